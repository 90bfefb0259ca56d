"""Evaluation: each test turn answered on the human history, before and after DPO.

    python evaluate.py                             OUT/sp and OUT/rg, stages sft and dpo, on the sample's test dialogues
    python evaluate.py --system vanilla --data ESConv.json --split-file split.json

Decoupled: the planner draws a strategy, and the generator answers under it. Vanilla: one model does both. Strategies are drawn from the
exact distribution over all names (--decode scored), or written freely and parsed as the paper does (--decode free; what cannot be parsed
is dropped from B and Q, and its rate reported). Prints a table with 95 % intervals (bootstrap over dialogues) beside a planner that
ignores the context. Writes OUT/eval/SYSTEM.json and, for each stage, every answer to OUT/eval/SYSTEM.STAGE.jsonl.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from desc import DescError, cli, distributed
from desc.esconv import Dialogue, load_splits
from desc.files import write_json, write_lines
from desc.lora import adapter_only, load_adapter
from desc.modeling import load
from desc.report import frequency_row, summarise, table
from desc.sampling import plan_dialogue, write_dialogue
from desc.strategies import Strategies, read_strategies
from desc.training import take


@dataclass
class EvalConfig(cli.SampleConfig):
    system: Literal["decoupled", "vanilla"] = cli.flag("decoupled", "a planner and a generator, or one model for both")
    stages: list[str] = field(default_factory=lambda: ["sft", "dpo"], metadata={"help": "which of base, sft and dpo to compare"})
    decode: Literal["scored", "free"] = cli.flag("scored", "how a strategy is found: all names scored in one pass, or written and parsed")
    reply_dialogues: int = cli.flag(0, "test dialogues that are answered in words, the first; 0 takes all, -1 none")
    show: int = cli.flag(0, "turns to print with the answer of each stage")


def load_stages(model, config: EvalConfig, modules: tuple[str, ...]) -> list[str]:
    """Attach the adapters of all stages as "module-stage"; returns the stages for which every module has one."""
    stages = []
    for stage in config.stages:
        if stage not in ("base", "sft", "dpo"):
            raise DescError(f"--stages {stage}: is none of base, sft, dpo")
        folders = {module: Path(config.out) / module / stage for module in modules if stage != "base"}
        if all(cli.find_adapter(folder, f"stage {stage} is left out") for folder in folders.values()):
            stages.append(stage)
            for module, folder in folders.items():
                load_adapter(model, folder, f"{module}-{stage}")
    if not stages:
        raise DescError(f"no stage to evaluate in {config.out}: run train_sft.py and train_dpo.py first, or give --stages base")
    return stages


def answer(model, tokenizer, config: EvalConfig, stage: str, modules, dialogue: Dialogue, strategies: Strategies, reply: bool) -> dict:
    """What one system says at every turn of a dialogue; a strategy is None where a freely written one could not be parsed."""
    planner, generator = modules[0], modules[-1]
    logps, written = None, None
    with adapter_only(model, f"{planner}-{stage}"):
        if config.decode == "scored":
            logps, planned = plan_dialogue(model, tokenizer, config, planner, dialogue, strategies)
        else:
            unplanned = [(turn, None) for turn in range(len(dialogue))]
            written = write_dialogue(model, tokenizer, config, planner, dialogue, unplanned, strategies)
            planned = [strategies.parse(text) if planner == "sp" else strategies.split_tag(text)[0] for text in written]
    if config.decode == "free" and planner == "vanilla":
        replies = [strategies.split_tag(text)[1] for text in written]
    elif reply:
        followed = [(turn, name or strategies.names[-1]) for turn, name in enumerate(planned)]  # the generator must be told something
        with adapter_only(model, f"{generator}-{stage}"):
            replies = write_dialogue(model, tokenizer, config, generator, dialogue, followed, strategies)
    else:
        replies = []
    return {
        "dialogue": dialogue.id,
        "gold": [turn.strategy for turn in dialogue.turns[1::2]],
        "predicted": planned,
        "logps": logps.tolist() if logps is not None else [],
        "human": [turn.text for turn in dialogue.turns[1::2]],
        "replies": replies,
    }


def show_turns(count: int, dialogues: list[Dialogue], answers: dict[str, list[dict]]) -> None:
    """`count` turns, from as many dialogues as there are, with what each stage answered."""
    for number in range(count):
        which, turn = number % len(dialogues), 2 + number // len(dialogues)
        dialogue = dialogues[which]
        turn = min(turn, len(dialogue) - 1)
        print(f"\nseeker    {dialogue.turns[2 * turn].text}\nhuman     [{dialogue.supporter(turn).strategy}] {dialogue.supporter(turn).text}")
        for stage, records in answers.items():
            reply = records[which]["replies"][turn] if records[which]["replies"] else ""
            print(f"{stage:<9} [{records[which]['predicted'][turn]}] {reply}")


def main():
    config = cli.parse(EvalConfig)
    device = distributed.setup()
    folder = Path(config.out) / "eval"
    strategies = read_strategies(config.strategies)
    splits = load_splits(config.data, config.split_file, strategies, config.seed)
    test = take(splits["test"], config.eval_dialogues)
    answered = {d.id for d in take(test, config.reply_dialogues)} if config.reply_dialogues >= 0 else set()

    model, tokenizer = load(config.model, config.torch_dtype, device)
    modules = ("vanilla",) if config.system == "vanilla" else ("sp", "rg") if answered else ("sp",)
    answers, rows = {}, {"training frequencies": frequency_row(splits["train"], test, strategies)}
    for stage in load_stages(model, config, modules):
        mine = test[distributed.rank() :: distributed.size()]
        bar = tqdm(mine, desc=f"evaluate {config.system} {stage}", dynamic_ncols=True, disable=distributed.rank() > 0)
        records = [answer(model, tokenizer, config, stage, modules, d, strategies, d.id in answered) for d in bar]
        parts = distributed.collect(records)
        answers[stage] = [parts[i % len(parts)][i // len(parts)] for i in range(len(test))]
        if distributed.rank():
            continue
        rows[f"{config.system} {stage}"] = summarise(answers[stage], strategies, config.seed)
        write_lines(folder / f"{config.system}.{stage}.jsonl", answers[stage])
    if distributed.rank():
        return
    write_json(folder / f"{config.system}.json", rows)
    cli.save_config(config, folder)
    print(f"\n{len(test)} test dialogues of {config.data}; percent but for B, nll (nats) and length (words)\n\n{table(rows)}")
    show_turns(config.show, test[: len(answered)] or test, answers)


if __name__ == "__main__":
    cli.run(main)
