r"""Evaluation: systems answer the same test turns on the human history, with the same seeds, and
are compared.

    python evaluate.py          what OUT holds, before and after DPO, on the sample's test dialogues
    python evaluate.py --systems sft=sp:out/sp/sft,rg:out/rg/sft oracle=sp:gold,rg:out/rg/sft \
        vanilla=vanilla:out/vanilla/dpo

A system is a planner (sp) and a generator (rg), which answers under the planner's strategy; or a
planner alone; or one model for both (vanilla). Each is given with the folder of its adapter, or
with "base" for none; sp:gold takes the human strategies. Each adapter is asked as it was trained.
--history and --strategy-at are for "base" alone, and for adapters that others made.

With --decode scored strategies are drawn from the exact distribution over all names. With --decode
free they are written and parsed, as the paper does: what cannot be parsed is left out of accuracy,
B and Q, and its rate is reported. Replies follow the strategies that the first seed draws.

Prints tables with 95 % intervals (bootstrap over dialogues; differences to the first system are
paired). Writes OUT/eval/results.json and answers.jsonl. The latter has one line per dialogue: what
each system answered, and what a judge was asked and said. Killed and run again, it goes on where it
was. A judge's ratings are also written to ratings.csv, in which people can rate; --correlate
ratings.csv then says how far the judge follows them."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers

from desc import DescError, __version__, cli
from desc.calibration import planned_digest
from desc.esconv import Dialogue, first, load_splits
from desc.evaluation.figures import load_matplotlib
from desc.evaluation.frontier import frontiers
from desc.evaluation.page import write_page
from desc.evaluation.scores import FREQUENCIES, frequency_row, summarise
from desc.evaluation.systems import (
    System,
    annotate_and_judge,
    answer_dialogues_as,
    find_systems,
    load_systems,
)
from desc.evaluation.tables import tables
from desc.flags import MANY, AskConfig, SampleConfig, answer_settings, flag, parse
from desc.judging import agreement
from desc.judging.annotator import make_annotator
from desc.judging.endpoint import Endpoint
from desc.judging.forms import refuse_edited
from desc.judging.judge import make_judge
from desc.sampling import group_dialogues
from desc.storage.adapters import adapter_digest
from desc.storage.base import base_digest
from desc.storage.files import write_json
from desc.storage.journal import Journal, journal_settings, read_metrics, work_key
from desc.training import ranks


@dataclass
class EvalConfig(SampleConfig, AskConfig):
    systems: list[str] = flag([], "NAME=MODULE:ADAPTER[,MODULE:ADAPTER] …; none: what OUT holds")
    seeds: int = flag(
        1,
        "draws of every strategy, with --seed, --seed + 1, …; their mean scores are reported",
        at_least=1,
        at_most=1000,
    )
    decode: Literal["scored", "free"] = flag(
        "scored", "how a strategy is found: all names scored in one pass, or written and parsed"
    )
    reply_dialogues: int = flag(
        0,
        "test dialogues that are answered in words, the first; 0 means all, -1 none",
        at_least=-1,
        at_most=MANY,
    )
    judge: Literal["none", "local", "endpoint"] = flag(
        "none", "who rates replies and compares them: nobody, --model, --endpoint"
    )
    judge_tokens: int = flag(
        512,
        "the most that a judge behind the endpoint may write, thoughts included; an answer that was"
        " cut off gets four times as much room, once",
        at_least=8,
        at_most=65_536,
    )
    show: int = flag(0, "turns to print with the answer of each system", at_least=0, at_most=1000)
    report: str | None = flag(
        None, "an HTML file to write: figures, and every answer; needs the extra `report`"
    )
    correlate: str | None = flag(
        None, "ratings.csv with people's ratings, to hold against the judge's instead of evaluating"
    )

    @property
    def folder(self) -> Path:
        return Path(self.out) / "eval"

    @property
    def ratings_file(self) -> Path:
        return self.folder / "ratings.csv"


def refuse_early(config: EvalConfig) -> None:
    """Raises DescError if flags do not go together, or if the run would fail at its end: matplotlib
    is missing, or ratings.csv may hold what people wrote."""
    if config.calibrate != "none" and config.decode == "free":
        raise DescError("--calibrate needs --decode scored: what is written freely has no offsets")
    if config.reply_dialogues < 0 and (config.annotator, config.judge) != ("none", "none"):
        raise DescError("--annotator and --judge read replies: --reply-dialogues -1 leaves none")
    if config.report:
        load_matplotlib()
    if config.judge != "none":
        refuse_edited(config.ratings_file)


def find_replied(config: EvalConfig, test: list[Dialogue]) -> list[Dialogue]:
    """The test dialogues that are answered in words, as --reply-dialogues says."""
    if config.reply_dialogues < 0:
        return []
    return first(test, config.reply_dialogues)


def journal_settings_of(config: EvalConfig, systems: list[System]) -> dict:
    """What the answers depend on; answers that were made with anything else are not reused."""
    modules = {task for system in systems for task in system.adapters()}
    modules |= {"annotate"} if config.annotator != "none" else set()
    modules |= {"judge"} if config.judge != "none" else set()
    irrelevant = ("systems", "reply_dialogues", "show", "report", "correlate")
    settings = answer_settings(config, sorted(modules), *irrelevant)
    settings["adapters"] = {system.name: system.digests() for system in systems}
    settings["annotate"] = ""
    if config.annotator == "local":
        settings["annotate"] = adapter_digest(Path(config.out) / "annotate" / "sft")
    if config.calibrate != "none":
        calibrated = [system for system in systems if system.calibrated]
        settings["fitted on"] = {s.name: planned_digest(s.planner_adapter) for s in calibrated}
    if config.judge != "none":  # which compares all others with it
        settings["first"] = systems[0].name
    return settings | {"base": base_digest(config.model)}


def read_curves(systems: list[System]) -> dict[str, list[dict]]:
    """{"SYSTEM TASK": the records of metrics.jsonl} of the adapters that train_dpo.py made."""
    curves = {}
    for system in systems:
        for task, adapter in system.adapters().items():
            log = Path(adapter) / "metrics.jsonl"
            if Path(adapter).name == "dpo" and log.exists():
                curves[f"{system.name} {task}"] = read_metrics(log)
    return curves


def show_turns(
    count: int, dialogues: list[Dialogue], answers: dict[str, list[dict]], seeker: str
) -> None:
    """Print `count` turns with what each system answered: the third turn of every dialogue, then
    the fourth of every dialogue, ….

    `answers` is {system: its records}, in the order of `dialogues`; `seeker` is what the domain
    calls who is answered."""
    for number in range(count):
        earlier_rounds, index = divmod(number, len(dialogues))
        dialogue = dialogues[index]
        turn = min(2 + earlier_rounds, len(dialogue) - 1)
        human = dialogue.supporter(turn)
        print(f"\n{seeker:<9} {dialogue.history(turn)[-1].text}")
        print(f"human     [{human.strategy}] {human.text}")
        for name, records in answers.items():
            record = records[index]
            strategy = record["predicted"][0][turn]
            reply = record["replies"][turn] if record["replies"] else ""
            print(f"{name:<9} [{strategy}] {reply}")


def main():
    config = parse(EvalConfig)
    if config.correlate:
        print(agreement.correlate_ratings(config.correlate, config.seed))
        return
    uses_endpoint = "endpoint" in (config.annotator, config.judge)
    endpoint = Endpoint.of(config) if uses_endpoint else None
    device = ranks.join_ranks()
    systems = find_systems(config)
    wanted = journal_settings_of(config, systems)
    cli.resolve_auto(config, device, journal_settings(config.folder, "answers", wanted))
    domain = config.read_domain()
    strategies = domain.strategies
    splits = load_splits(config.data, config.split_file, strategies, config.seed)
    test = first(splits["test"], config.eval_dialogues)
    replied = find_replied(config, test)
    refuse_early(config)

    # Load the model, the annotator and the judge.
    model, tokenizer = cli.load_model(config, device)
    loaded = load_systems(config, model, tokenizer, systems, strategies)
    annotator = make_annotator(config, model, tokenizer, endpoint)
    judge = make_judge(config, model, tokenizer, endpoint)

    # Answer the dialogues that have no line in the journal yet, some at once.
    settings = journal_settings_of(config, systems)
    cli.claim_folders(config.folder)
    if endpoint:
        endpoint.keep_answers(config.folder)
    journal = Journal(
        config.folder, "answers", settings, ranks.rank(), ranks.world_size(), ranks.wait_for_all
    )
    replied_ids = {dialogue.id for dialogue in replied}
    keys = [work_key(dialogue, strategies, dialogue.id in replied_ids) for dialogue in test]
    groups = group_dialogues(dict(zip(keys, test)), tokenizer, config.max_tokens)
    work = journal.left_for_me(groups)
    left = sum(key not in journal.done for group in work for key in group)
    bar = cli.progress(model, left, "evaluate", "dialogues")
    for group in work:
        dialogues = list(group.values())
        answered = {}  # by system
        for system in systems:
            answered[system.name] = answer_dialogues_as(
                system, loaded, config, dialogues, domain, replied_ids
            )
        for i, (key, dialogue) in enumerate(group.items()):
            if key in journal.done:  # a kill cut the group in two
                continue
            records = {name: answers[i] for name, answers in answered.items()}
            transcript = annotate_and_judge(annotator, judge, dialogue, records)
            journal.append(
                {"key": key, "dialogue": dialogue.id, "systems": records, "judgements": transcript}
            )
            bar.update()
    bar.close()
    ranks.wait_for_all()
    if endpoint:
        endpoint.print_unread()
    if ranks.rank() > 0:
        return

    # Summarise: the first rank alone.
    lines = journal.finish(keys)
    if endpoint:
        endpoint.kept.discard()
    answers = {}
    for system in systems:
        answers[system.name] = [line["systems"][system.name] for line in lines]
    rows = {FREQUENCIES: frequency_row(splits["train"], test, strategies)}
    rows |= summarise(answers, strategies, config)
    for row in rows.values():  # what the context tells a planner
        if "nll" in row:
            row["nll gain"] = rows[FREQUENCIES]["nll"] - row["nll"]
    facts = {
        "desc": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "test dialogues": len(test),
        "test data": work_key(*(work_key(dialogue, strategies, False) for dialogue in test)),
        "folders": {system.name: system.adapters() for system in systems},
        "layouts": {system.name: loaded.layouts_of(system) for system in systems},
        "domain file": config.domain,
        "chat template file": config.chat_template,
    }
    facts |= asdict(config) | settings

    # Write and print.
    curves = frontiers(systems, answers, strategies)
    print(
        f"\n{len(test)} test dialogues; percent but for B, nll (nats), ratings (0 to 5) and length"
        f" (words)\n\n{tables(rows)}"
    )
    if config.report:
        results = {
            "facts": facts,
            "strategies": list(strategies),
            "speakers": list(domain.speakers),
            "systems": rows,
            "answers": answers,
            "curves": read_curves(systems),
            "frontiers": curves,
            "dialogues": [asdict(dialogue) for dialogue in test],
        }
        write_page(config.report, results)
        print(f"\nthe report is {config.report}")
    summary = {"facts": facts, "systems": rows, "frontiers": curves}
    write_json(config.folder / "results.json", summary)
    show_turns(config.show, replied or test, answers, domain.speakers[0])
    if judge:  # last, because it may be refused if people have worked on the file meanwhile
        agreement.write_ratings(config.ratings_file, test, answers, domain.speakers)


if __name__ == "__main__":
    cli.run(main)
