"""Evaluation: systems answer the same test turns on the human history, with the same seeds, and are compared.

    python evaluate.py                             what OUT holds, before and after DPO, on the sample's test dialogues
    python evaluate.py --systems sft=sp:out/sp/sft,rg:out/rg/sft oracle=sp:gold,rg:out/rg/sft vanilla=vanilla:out/vanilla/dpo

A system is a planner (sp) and a generator (rg), which answers under the planner's strategy, a planner alone, or one model for both
(vanilla); each with the folder of its adapter, or "base"; sp:gold takes the human strategies. Strategies are drawn from the exact
distribution over all names (--decode scored), or written freely and parsed as the paper does (--decode free; what cannot be parsed is
dropped from B and Q, and its rate reported). Replies are written under what the first seed draws.

Prints tables with 95 % intervals (bootstrap over dialogues; differences to the first system are paired). Writes OUT/eval/results.json, each
system's answers to OUT/eval/NAME.jsonl and, where a model judges, its transcript to judgements.jsonl and its ratings to ratings.csv, in
which people can rate, too; --correlate ratings.csv then says how far it follows them.
"""

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import transformers
from tqdm import tqdm

from desc import DescError, __version__, agreement, cli, distributed
from desc.endpoint import Endpoint
from desc.esconv import Dialogue, load_splits
from desc.files import read_lines, write_json, write_lines
from desc.judging import make_annotator, make_judge
from desc.lora import digest
from desc.modeling import load
from desc.report import frequency_row, summarise, tables
from desc.strategies import read_strategies
from desc.systems import answer, criticise, find_systems, load_systems
from desc.training import take


@dataclass
class EvalConfig(cli.SampleConfig, cli.AskConfig):
    systems: list[str] = field(default_factory=list, metadata={"help": "NAME=MODULE:ADAPTER[,MODULE:ADAPTER] …; none: what OUT holds"})
    seeds: int = cli.flag(1, "draws of every strategy, with --seed, --seed + 1, …; their mean scores are reported")
    decode: Literal["scored", "free"] = cli.flag("scored", "how a strategy is found: all names scored in one pass, or written and parsed")
    reply_dialogues: int = cli.flag(0, "test dialogues that are answered in words, the first; 0 takes all, -1 none")
    judge: Literal["none", "local", "endpoint"] = cli.flag("none", "who rates replies and compares them: nobody, --model, --endpoint")
    show: int = cli.flag(0, "turns to print with the answer of each system")
    report: str | None = cli.flag(None, "an HTML file to write: figures, and every answer; needs the extra `report`")
    correlate: str | None = cli.flag(None, "ratings.csv with people's ratings, to hold against the judge's instead of evaluating")


def show_turns(count: int, dialogues: list[Dialogue], answers: dict[str, list[dict]]) -> None:
    """`count` turns, from as many dialogues as there are, with what each system answered."""
    for number in range(count):
        which, turn = number % len(dialogues), 2 + number // len(dialogues)
        dialogue = dialogues[which]
        turn = min(turn, len(dialogue) - 1)
        print(f"\nseeker    {dialogue.turns[2 * turn].text}\nhuman     [{dialogue.supporter(turn).strategy}] {dialogue.supporter(turn).text}")
        for name, records in answers.items():
            reply = records[which]["replies"][turn] if records[which]["replies"] else ""
            print(f"{name:<9} [{records[which]['predicted'][0][turn]}] {reply}")


def main():
    config = cli.parse(EvalConfig)
    if config.correlate:
        return print(agreement.correlate(config.correlate, config.seed))
    device = distributed.setup()
    folder, systems = Path(config.out) / "eval", find_systems(config)
    strategies = read_strategies(config.strategies)
    splits = load_splits(config.data, config.split_file, strategies, config.seed)
    test = take(splits["test"], config.eval_dialogues)
    answered = {d.id for d in take(test, config.reply_dialogues)} if config.reply_dialogues >= 0 else set()

    model, tokenizer = load(config.model, config.torch_dtype, device)
    loaded = load_systems(model, systems)
    endpoint = Endpoint.of(config) if "endpoint" in (config.annotator, config.judge) else None
    annotator, judge = make_annotator(config, model, tokenizer, endpoint), make_judge(config, model, tokenizer, endpoint)
    done, transcript = [], []
    mine = test[distributed.rank() :: distributed.size()]
    for d in tqdm(mine, desc="evaluate", dynamic_ncols=True, disable=distributed.rank() > 0):
        said = {name: answer(model, tokenizer, config, modules, d, strategies, d.id in answered) for name, modules in loaded.items()}
        transcript.append(criticise(annotator, judge, d, said))
        done.append(said)
    parts = distributed.collect(list(zip(done, transcript)))
    if distributed.rank():
        return
    whole = [parts[i % len(parts)][i // len(parts)] for i in range(len(test))]
    answers = {name: [said[name] for said, _ in whole] for name in systems}
    rows = summarise(answers, strategies, config)
    facts = {"desc": __version__, "torch": torch.__version__, "transformers": transformers.__version__, **asdict(config)}
    facts |= {"data digest": hashlib.sha256(f"{test}{strategies}".encode()).hexdigest(), "dialogues": len(test)}
    facts["adapters"] = {name: {m: (f, digest(Path(f))) for m, f in modules.items()} for name, modules in systems.items()}
    write_json(folder / "results.json", {"facts": facts, "systems": rows})
    for name, records in answers.items():
        write_lines(folder / f"{name}.jsonl", records)
    if config.report:
        logs = {f"{name} {m}": Path(f) / "metrics.jsonl" for name, modules in systems.items() for m, f in modules.items()}
        results = {"facts": facts, "strategies": list(strategies), "systems": rows, "answers": answers, "dialogues": [asdict(d) for d in test]}
        results["errors"] = {name: row["errors"] for name, row in rows.items() if "errors" in row}
        results["curves"] = {name: read_lines(path) for name, path in logs.items() if path.parent.name == "dpo" and path.exists()}
        from desc import page

        page.write_page(Path(config.report), results)
    if judge:
        write_lines(folder / "judgements.jsonl", [line for _, lines in whole for line in lines])
        agreement.write_ratings(folder / "ratings.csv", test, answers)
    rows = {"training frequencies": frequency_row(splits["train"], test, strategies)} | rows
    print(f"\n{len(test)} test dialogues of {config.data}; percent but for B, nll (nats), ratings (0 to 5) and length (words)\n\n{tables(rows)}")
    show_turns(config.show, [d for d in test if d.id in answered] or test, answers)


if __name__ == "__main__":
    cli.run(main)
