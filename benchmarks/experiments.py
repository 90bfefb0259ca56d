"""Experiments as small records: one line for each system of an evaluation, with what made it, and
tables and a figure made from the lines (benchmarks/experiment_tables.py).

    python benchmarks/experiments.py --record out/esconv/0/eval out/esconv/1/eval
    python benchmarks/experiments.py --plot docs/frontier.png

The lines lie in --file. Those of several machines add up, and one that is there already is not
added again. A system's lines differ by the seed of its training."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from contest import machine
from experiment_tables import draw, print_tables

from desc import DescError, cli
from desc.calibration import PLANNED
from desc.evaluation.systems import BASE, CALIBRATED, GOLD
from desc.flags import flag, parse
from desc.storage.files import parse as parse_json
from desc.storage.files import read_lines, read_text, write_lines
from desc.storage.journal import read_metrics, work_key

LINE = {"system", "seed", "made", "adapters", "evaluation", "calibrate", "first", "scores"}


@dataclass
class Config:
    record: list[str] = flag([], "folders of evaluations (OUT/eval) whose systems become lines")
    file: str = flag("docs/experiments.jsonl", "the lines")
    plot: str | None = flag(
        None, "a file for the figure of the frontiers; needs the extra `report`"
    )


def read_record(path: Path) -> dict:
    return parse_json(read_text(path), f"{path}:")


def without_places(flags: dict) -> dict:
    """The flags that were given or have a value. Where things lay says nothing to others, so files
    keep their names alone, and OUT and what training started from are left out."""
    kept = {name: value for name, value in flags.items() if value not in (None, [])}
    for name in ("out", "pairs", "sft" if "beta" in flags else ""):
        kept.pop(name, None)
    for name in ("model", "data", "split_file", "domain", "chat_template", "labels", "label_map"):
        if name in kept:
            kept[name] = Path(kept[name]).name
    return kept


def made_with(folder: Path) -> dict:
    """What made an adapter: its flags, the steps and seconds of its training and, after DPO, the
    same of its pairs and of its SFT adapter."""
    flags = cli.read_config(folder)
    made = {"flags": without_places(flags)}
    run = folder.parent if folder.name in ("best", "last") else folder
    metrics = [record for record in read_metrics(run / "metrics.jsonl") if "loss" in record]
    made["steps"] = metrics[-1]["step"]
    made["seconds"] = round(metrics[-1]["time"] - metrics[0]["time"])
    made["nodes"] = round(sum(record["nodes"] for record in metrics))
    if "beta" in flags:
        home = Path(flags["out"]) / flags["task"]
        pairs = Path(flags["pairs"]) if flags["pairs"] else home
        made["mining"] = {"flags": without_places(cli.read_config(pairs))}
        if (pairs / "mining.json").exists():  # else they were not mined
            made["mining"]["pairs"] = read_record(pairs / "mining.json")["pairs"]
        sft = Path(flags["sft"]) if flags["sft"] else home / "sft"
        made["sft"] = made_with(sft) if sft.exists() else BASE
    return made


def make_lines(folder: Path) -> list[dict]:
    """The lines of an evaluation's systems; the frequencies' is the first. Raises DescError if a
    file is missing, or if the evaluation was made by an older version."""
    results = read_record(folder / "results.json")
    facts, lines = results["facts"], []
    if "folders" not in facts:
        raise DescError(f"{folder}: is an older version's; run evaluate.py again, which is quick")
    asked = {"seed", "temperature", "top_p", "seeds", "dtype", "test dialogues", "test data"}
    evaluation = {name: facts[name] for name in sorted(asked | {"decode", "max_new_tokens"})}
    for name in ("annotator", "judge"):
        if facts[name] != "none":
            evaluation[name] = facts[name]
    computed_in = SimpleNamespace(dtype=facts["dtype"])
    for name, row in results["systems"].items():
        adapters = facts["folders"].get(name, {})
        made = {
            task: made_with(Path(path))
            for task, path in adapters.items()
            if path not in (BASE, GOLD)
        }
        seeds = [part["flags"]["seed"] for part in made.values()]
        line = {"system": name, "seed": seeds[0] if seeds else 0, "made": made}
        line |= {"adapters": facts["adapters"].get(name, {}), "evaluation": evaluation}
        line |= {"calibrate": facts["calibrate"], "first": next(iter(facts["folders"]))}
        line |= {"machine": machine(computed_in), "scores": row}
        line |= {"frontier": results["frontiers"].get(name)}
        if name.endswith(CALIBRATED):
            planned = next(iter(adapters.values()))
            line["fitted on"] = len(read_lines(Path(planned) / PLANNED)) - 1  # turns
        lines.append(line)
    return lines


def way_of_calibration(line: dict) -> str:
    """How a line's system is calibrated, and on how many turns; "" if it is not."""
    is_calibrated = line["system"].endswith(CALIBRATED)
    return f"{line['calibrate']} {line['fitted on']}" if is_calibrated else ""


def identity(line: dict) -> str:
    """What makes two lines the same experiment."""
    parts = [line[name] for name in ("system", "seed", "adapters", "evaluation")]
    return work_key(*parts, way_of_calibration(line))


def recipe(made) -> object:
    """What was done to make an adapter, without what differs from seed to seed and day to day."""
    if not isinstance(made, dict):
        return made
    passing = {"seed", "date", "seconds", "nodes", "steps", "pairs", "desc", "torch", "save_every"}
    passing |= {"eval_dialogues", "eval_every"}  # a calibration's turns are counted by themselves
    if made.get("task") != "rg":
        passing.add("strategy_at")  # which is for rg alone
    if made.get("task") != "sp" and made.get("routing") not in ("paper", "all-to-rg"):
        passing.add("history")  # which is for sp alone, and these routings ask it, too
    # Lines from before there were these flags have no entry.
    newer = {"objective": "dpo", "margin": 1.0, "sft_weight": 0.0, "exact": False}
    newer |= {"history": "text", "sft": "adapter"}  # the latter is the mining's
    kept = {name: value for name, value in made.items() if name not in passing}
    for name, default in newer.items():
        if kept.get(name) == default:
            del kept[name]
    return {name: recipe(value) for name, value in kept.items()}


def group_lines(lines: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """{how it was evaluated: {system: its lines}}, in the order in which they come first. Lines
    of a system differ by the seed of its training: of several evaluations the first counts. One of
    another recipe is another system, "NAME (2)"."""
    tables: dict[str, dict[str, list[dict]]] = {}
    names: dict[tuple, str] = {}  # of each system by evaluation, name and recipe
    for line in lines:
        facts = {name: value for name, value in line["evaluation"].items() if name != "seed"}
        evaluation = ", ".join(f"{name} {value}" for name, value in facts.items())
        groups, system = tables.setdefault(evaluation, {}), line["system"]
        key = (evaluation, system, str(recipe(line["made"])) + way_of_calibration(line))
        if key not in names:
            others = sum(known[:2] == key[:2] for known in names)
            names[key] = f"{system} ({others + 1})" if others else system
        group = groups.setdefault(names[key], [])
        if all(line["seed"] != other["seed"] for other in group):
            group.append(line)
    return tables


def main():
    config = parse(Config)
    path = Path(config.file)
    lines = []
    for where, line in (read_lines(path) if path.exists() else {}).items():
        if not isinstance(line, dict) or not LINE <= line.keys():
            raise DescError(f"{where}: is no line of an experiment")
        lines.append(line)
    known = {identity(line) for line in lines}
    for folder in config.record:
        new = [line for line in make_lines(Path(folder)) if identity(line) not in known]
        known |= {identity(line) for line in new}
        lines += new
        print(f"{folder}: {len(new)} new lines")
    if config.record:
        write_lines(path, lines)
    if not lines:
        raise DescError(f"{path}: holds no line; give --record OUT/eval of an evaluation")
    tables = group_lines(lines)
    for evaluation, groups in tables.items():
        print_tables(evaluation, groups)
    if config.plot:
        draw(next(iter(tables.values())), config.plot)


if __name__ == "__main__":
    cli.run(main)
