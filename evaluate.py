"""Evaluation: systems answer the same test turns on the human history, with the same seeds, and are
compared.

    python evaluate.py          what OUT holds, before and after DPO, on the sample's test dialogues
    python evaluate.py --systems sft=sp:out/sp/sft,rg:out/rg/sft oracle=sp:gold,rg:out/rg/sft \
        vanilla=vanilla:out/vanilla/dpo

A system is a planner (sp) and a generator (rg), which answers under the planner's strategy, a
planner alone, or one model for both (vanilla); each with the folder of its adapter, or "base";
sp:gold takes the human strategies. Strategies are drawn from the exact distribution over all names
(--decode scored), or written freely and parsed as the paper does (--decode free; what cannot be
parsed is dropped from B and Q, and its rate reported). Replies are written under what the first
seed draws.

Prints tables with 95 % intervals (bootstrap over dialogues; differences to the first system are
paired). Writes OUT/eval/results.json and answers.jsonl, a line a dialogue with what each system
answered and a judge was asked and said; killed and run again it goes on where it was. A judge's
ratings lie in ratings.csv, too, in which people can rate; --correlate ratings.csv then says how far
it follows them."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import transformers

from desc import __version__, cli
from desc.esconv import Dialogue, load_splits
from desc.evaluation import page
from desc.evaluation.figures import load_matplotlib
from desc.evaluation.scores import FREQUENCIES, frequency_row, summarise
from desc.evaluation.systems import answer, criticise, find_systems, load_systems
from desc.evaluation.tables import tables
from desc.judging import agreement
from desc.judging.annotator import make_annotator
from desc.judging.endpoint import Endpoint
from desc.judging.judge import make_judge
from desc.modeling import load
from desc.storage.adapters import adapter_digest
from desc.storage.files import read_lines, write_json
from desc.storage.journal import Journal, journal_settings, work_key
from desc.strategies import read_strategies
from desc.training import ranks


@dataclass
class EvalConfig(cli.SampleConfig, cli.AskConfig):
    systems: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME=MODULE:ADAPTER[,MODULE:ADAPTER] …; none: what OUT holds"},
    )
    seeds: int = cli.flag(
        1,
        "draws of every strategy, with --seed, --seed + 1, …; their mean scores are reported",
        at_least=1,
    )
    decode: Literal["scored", "free"] = cli.flag(
        "scored", "how a strategy is found: all names scored in one pass, or written and parsed"
    )
    reply_dialogues: int = cli.flag(
        0, "test dialogues that are answered in words, the first; 0 takes all, -1 none", at_least=-1
    )
    judge: Literal["none", "local", "endpoint"] = cli.flag(
        "none", "who rates replies and compares them: nobody, --model, --endpoint"
    )
    show: int = cli.flag(0, "turns to print with the answer of each system", at_least=0)
    report: str | None = cli.flag(
        None, "an HTML file to write: figures, and every answer; needs the extra `report`"
    )
    correlate: str | None = cli.flag(
        None, "ratings.csv with people's ratings, to hold against the judge's instead of evaluating"
    )


def show_turns(count: int, dialogues: list[Dialogue], answers: dict[str, list[dict]]) -> None:
    """`count` turns, from as many dialogues as there are, with what each system answered."""
    for number in range(count):
        which, turn = number % len(dialogues), 2 + number // len(dialogues)
        dialogue = dialogues[which]
        turn = min(turn, len(dialogue) - 1)
        print(
            f"\nseeker    {dialogue.turns[2 * turn].text}\nhuman    "
            f" [{dialogue.supporter(turn).strategy}] {dialogue.supporter(turn).text}"
        )
        for name, records in answers.items():
            reply = records[which]["replies"][turn] if records[which]["replies"] else ""
            print(f"{name:<9} [{records[which]['predicted'][0][turn]}] {reply}")


def main():
    config = cli.parse(EvalConfig)
    if config.correlate:
        return print(agreement.correlate(config.correlate, config.seed))
    device = ranks.join()
    folder, systems = Path(config.out) / "eval", find_systems(config)
    cli.choose_dtype(config, device, journal_settings(folder, "answers"))
    strategies = read_strategies(config.strategies)
    splits = load_splits(config.data, config.split_file, strategies, config.seed)
    test = splits["test"][: config.eval_dialogues or None]
    answered = (
        {d.id for d in test[: config.reply_dialogues or None]}
        if config.reply_dialogues >= 0
        else set()
    )
    if config.report:
        load_matplotlib()  # if it is missing, say so now
    ratings = folder / "ratings.csv"
    if config.judge != "none":
        agreement.refuse_labelled(ratings)

    model, tokenizer = load(config.model, config.torch_dtype, device)
    loaded = load_systems(model, systems)
    endpoint = Endpoint.of(config) if "endpoint" in (config.annotator, config.judge) else None
    annotator, judge = (
        make_annotator(config, model, tokenizer, endpoint),
        make_judge(config, model, tokenizer, endpoint),
    )
    settings = cli.answer_settings(
        config, "systems", "reply_dialogues", "show", "report", "correlate"
    )
    settings["adapters"] = {
        name: {module: adapter_digest(Path(f)) or f for module, f in modules.items()}
        for name, modules in systems.items()
    }
    settings["annotate"] = (
        adapter_digest(Path(config.out) / "annotate" / "sft") if config.annotator == "local" else ""
    )
    journal = Journal(folder, "answers", settings, ranks.rank(), ranks.wait_for_all)
    keys = [work_key(dialogue, strategies, dialogue.id in answered) for dialogue in test]
    mine = [(k, d) for k, d in zip(keys, test) if k not in journal.done][
        ranks.rank() :: ranks.world_size()
    ]
    bar = cli.progress(model, len(mine), "evaluate", "dialogues")
    for k, dialogue in mine:
        reply = dialogue.id in answered
        said = {
            name: answer(model, tokenizer, config, modules, dialogue, strategies, reply)
            for name, modules in loaded.items()
        }
        transcript = criticise(annotator, judge, dialogue, said)
        journal.append(
            {"key": k, "dialogue": dialogue.id, "systems": said, "judgements": transcript}
        )
        bar.update()
    bar.close()

    ranks.wait_for_all()
    if ranks.rank():
        return
    records = journal.finish(keys)
    answers = {name: [record["systems"][name] for record in records] for name in systems}
    if judge:
        agreement.write_ratings(ratings, test, answers)
    rows = {FREQUENCIES: frequency_row(splits["train"], test, strategies)} | summarise(
        answers, strategies, config
    )
    facts = {
        "desc": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "test dialogues": len(test),
    }
    facts |= {"test data": work_key(*keys), **asdict(config), **settings}
    write_json(folder / "results.json", {"facts": facts, "systems": rows})
    print(
        f"\n{len(test)} test dialogues; percent but for B, nll (nats), ratings (0 to 5) and length"
        f" (words)\n\n{tables(rows)}"
    )
    if config.report:
        logs = {
            f"{name} {m}": Path(f) / "metrics.jsonl"
            for name, modules in systems.items()
            for m, f in modules.items()
        }
        curves = {
            name: read_lines(path)
            for name, path in logs.items()
            if path.parent.name == "dpo" and path.exists()
        }
        results = {
            "facts": facts,
            "strategies": list(strategies),
            "systems": rows,
            "answers": answers,
            "curves": curves,
        }
        page.write_page(
            config.report, results | {"dialogues": [asdict(dialogue) for dialogue in test]}
        )
        print(f"\nthe report is {config.report}")
    show_turns(config.show, [d for d in test if d.id in answered] or test, answers)


if __name__ == "__main__":
    cli.run(main)
