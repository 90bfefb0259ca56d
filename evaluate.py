"""Evaluation: each test turn answered on the human history, before and after DPO.

    python evaluate.py                             OUT/sp and OUT/rg, stages sft and dpo, on the sample's test dialogues
    python evaluate.py --system vanilla --data ESConv.json --split-file split.json

Decoupled: the planner draws a strategy, and the generator answers under it. Vanilla: one model does both. Strategies are drawn from the
exact distribution over all names (--decode scored), or written freely and parsed as the paper does (--decode free; what cannot be parsed
is dropped from B and Q, and its rate reported). Prints a table with 95 % intervals (bootstrap over dialogues) beside a planner that
ignores the context. Writes OUT/eval/SYSTEM.json and, for each stage, every answer to OUT/eval/SYSTEM.STAGE.jsonl.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from desc import DescError, cli, distributed
from desc.esconv import Dialogue, load_splits
from desc.files import write_json, write_lines
from desc.lora import adapter_off, load_adapter
from desc.metrics import bias_of_confusion, bootstrap, confusion, expected_confusion, negative_log_likelihood, scores_of_confusion, text_scores
from desc.modeling import load
from desc.sampling import plan_dialogue, write_dialogue
from desc.strategies import Strategies, read_strategies
from desc.training import take

COLUMNS = ("accuracy", "Q", "Q_W", "B", "nll", "invalid", "distinct-1", "bleu-1", "f1", "rouge-l", "length", "corpus distinct-1", "corpus bleu-4")


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
    names = {f"{module}-{other}" for module in ("sp", "rg", "vanilla") for other in ("sft", "dpo")}
    planner, generator = modules[0], modules[-1]
    logps, written = None, None
    with adapter_off(model, *names - {f"{planner}-{stage}"}):
        if config.decode == "scored":
            logps, planned = plan_dialogue(model, tokenizer, config, planner, dialogue, strategies)
        else:
            written = write_dialogue(model, tokenizer, config, planner, dialogue, [None] * len(dialogue), strategies)
            planned = [strategies.parse(text) if planner == "sp" else strategies.split_tag(text)[0] for text in written]
    if config.decode == "free" and planner == "vanilla":
        replies = [strategies.split_tag(text)[1] for text in written]
    elif reply:
        followed = [name or strategies.names[-1] for name in planned]  # the generator must be told something
        with adapter_off(model, *names - {f"{generator}-{stage}"}):
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


def summarise(records: list[dict], strategies: Strategies, seed: int) -> dict:
    """The scores of one system, in percent but for B, the likelihood and the length, with intervals for Q and B."""
    parsed = [[(g, p) for g, p in zip(r["gold"], r["predicted"]) if p] for r in records]
    counts = [confusion(*zip(*turns), strategies) if turns else np.zeros((len(strategies),) * 2) for turns in parsed]
    scores, turns = scores_of_confusion(sum(counts)), sum(len(r["gold"]) for r in records)
    row = {
        "turns": turns,
        "accuracy": 100 * scores.accuracy,
        "Q": 100 * scores.macro_f1,
        "Q_W": 100 * scores.weighted_f1,
        "B": bias_of_confusion(sum(counts)).bias,
        "Q interval": [100 * x for x in bootstrap(lambda w: scores_of_confusion(w).macro_f1, counts, seed=seed)],
        "B interval": list(bootstrap(lambda w: bias_of_confusion(w).bias, counts, seed=seed)),
        "preferences": dict(zip(strategies, bias_of_confusion(sum(counts)).preferences.tolist())),
        "invalid": 100 * (1 - sum(map(len, parsed)) / turns),
    }
    if all(r["logps"] for r in records):
        logps = np.concatenate([r["logps"] for r in records])
        row["nll"] = negative_log_likelihood(logps, [name for r in records for name in r["gold"]], strategies)
    answered = [r for r in records if r["replies"]]
    if answered:
        row |= text_scores([text for r in answered for text in r["human"]], [text for r in answered for text in r["replies"]])
        row["replies"] = sum(len(r["replies"]) for r in answered)
    return row


def frequency_row(train: list[Dialogue], test: list[Dialogue], strategies: Strategies) -> dict:
    """The expected scores of always drawing from the training strategies' frequencies: what knowing nothing of the context gives."""
    counts = Counter(turn.strategy for dialogue in train for turn in dialogue.turns[1::2])
    frequencies = np.array([counts[name] for name in strategies]) / counts.total()
    gold = [turn.strategy for dialogue in test for turn in dialogue.turns[1::2]]
    expected = expected_confusion(np.tile(frequencies, (len(gold), 1)), gold, strategies)
    scores = scores_of_confusion(expected)
    logps = np.log(np.maximum(np.tile(frequencies, (len(gold), 1)), 1e-12))
    row = {"turns": len(gold), "accuracy": 100 * scores.accuracy, "Q": 100 * scores.macro_f1, "Q_W": 100 * scores.weighted_f1}
    return row | {"B": bias_of_confusion(expected).bias, "nll": negative_log_likelihood(logps, gold, strategies)}


def table(rows: dict[str, dict]) -> str:
    """Markdown: a row a system, only the columns that some row has."""
    columns = [c for c in COLUMNS if any(c in row for row in rows.values())]

    def cell(row, column):
        text = f"{row[column]:.3f}" if column in ("B", "nll") else f"{row[column]:.1f}"
        low, high = row.get(f"{column} interval", (None, None))
        return text if low is None else text + (f" ({low:.2f}–{high:.2f})" if column == "B" else f" ({low:.1f}–{high:.1f})")

    lines = [["system", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(cell(row, c) if c in row else "" for c in columns)] for name, row in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
    modules = ("sp", "rg") if config.system == "decoupled" else ("vanilla",)
    answers, rows = {}, {"training frequencies": frequency_row(splits["train"], test, strategies)}
    for stage in load_stages(model, config, modules):
        bar = tqdm(test, desc=f"evaluate {config.system} {stage}", dynamic_ncols=True)
        answers[stage] = [answer(model, tokenizer, config, stage, modules, d, strategies, d.id in answered) for d in bar]
        rows[f"{config.system} {stage}"] = summarise(answers[stage], strategies, config.seed)
        write_lines(folder / f"{config.system}.{stage}.jsonl", answers[stage])
    write_json(folder / f"{config.system}.json", rows)
    cli.save_config(config, folder)
    print(f"\n{len(test)} test dialogues of {config.data}; percent but for B, nll (nats) and length (words)\n\n{table(rows)}")
    show_turns(config.show, test, answers)


if __name__ == "__main__":
    cli.run(main)
