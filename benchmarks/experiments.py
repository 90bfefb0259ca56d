"""Experiments as small records: one line for each system of an evaluation, with what made it, and
tables and a figure made from the lines.

    python benchmarks/experiments.py --record out/esconv/0/eval out/esconv/1/eval
    python benchmarks/experiments.py --plot docs/frontier.png

The lines lie in --file. Those of several machines add up, and one that is there already is not
added again. A system's lines differ by the seed of its training. The tables give the mean over
these seeds and a 95 % interval, whose half-width is √(dialogues² + seeds²): the mean half-width of
each line's own interval (bootstrap over test dialogues), and Student's t times the standard error
of the seeds. One seed says nothing of the second part, so its interval is marked with a *. The
estimates of B and ece are biased upwards, and their intervals are not (desc/metrics.py), so the
tables show these intervals' ends."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from contest import machine

from desc import DescError, cli
from desc.calibration import PLANNED
from desc.evaluation.figures import load_matplotlib
from desc.evaluation.systems import BASE, CALIBRATED, GOLD
from desc.evaluation.tables import JUDGE_COLUMNS, TEXT_COLUMNS, decimals
from desc.flags import flag, parse
from desc.storage.files import parse as parse_json
from desc.storage.files import read_lines, read_text, write_lines
from desc.storage.journal import read_metrics, work_key

PLANNER_COLUMNS = "accuracy greedy Q Q_W".split() + [
    "Q greedy",
    "B",
    "B expected",
    "nll",
    "nll gain",
    "ece",
]
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # 97.5 %, by seeds
STUDENT_OF_MORE = 2.31  # that of 9 seeds: for more than these it is a little too wide
LINE = {"system", "seed", "made", "adapters", "evaluation", "calibrate", "first", "scores"}
BIASED = ("B", "B expected", "ece")
COLOURS = ("#440154", "#d1495b", "#1f968b", "#c98a00", "#3b528b", "#777777", "#e08fb0")


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
    # Lines from before there were these flags have no entry.
    newer = {"objective": "dpo", "margin": 1.0, "sft_weight": 0.0, "exact": False}
    newer |= {"sft": "adapter"}  # the mining's
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


def interval_of_mean(values: list[float], limits: list) -> tuple[float, float] | None:
    """(centre, half-width) of the interval of a mean over seeds, as the module says; None if a line
    has none. The centre is that of the lines' own intervals."""
    if any(limit is None or None in limit for limit in limits):
        return None
    centre = statistics.mean((high + low) / 2 for low, high in limits)
    dialogues = statistics.mean((high - low) / 2 for low, high in limits)
    seeds = 0.0
    if len(values) > 1:
        t = STUDENT.get(len(values), STUDENT_OF_MORE)
        seeds = t * statistics.stdev(values) / math.sqrt(len(values))
    return centre, math.hypot(dialogues, seeds)


def cell(lines: list[dict], column: str, difference: bool = False) -> str:
    """A column's mean over the lines of a system; or of its differences to the first system."""
    rows = [line["scores"] for line in lines]
    if difference:
        found = [row.get(f"{column} difference") for row in rows]
        if None in found:
            return ""
        values, limits = [value for value, *_ in found], [limits for _, *limits in found]
    else:
        if any(column not in row for row in rows):
            return ""
        values = [row[column] for row in rows]
        limits = [row.get(f"{column} interval") for row in rows]
    found = interval_of_mean(values, limits)
    form = f"{'+' if difference else ''}.{decimals(column)}f"
    shown = f"{statistics.mean(values):{form}}"
    if found:
        centre, half = found
        if column in BIASED:
            low = centre - half if difference else max(centre - half, 0)
            shown += f" ({low:{form}} … {centre + half:{form}})"
        else:
            shown += f" ± {half:.{decimals(column)}f}"
        shown += "*" if len(values) == 1 else ""
    return shown.replace("-", "−")


def table(groups: dict[str, list[dict]], columns, difference: bool = False) -> str:
    """One line per system, without the columns that no system has; "" if there are none then."""
    rows = {
        name: {column: cell(lines, column, difference) for column in columns}
        for name, lines in groups.items()
    }
    shown = [column for column in columns if any(row[column] for row in rows.values())]
    body = [
        [name, str(len(groups[name])), *(row[column] for column in shown)]
        for name, row in rows.items()
        if any(row.values())
    ]
    return cli.markdown([["system", "seeds", *shown], *body]) if body else ""


def error_table(groups: dict[str, list[dict]]) -> str:
    """The annotator's errors in percent of what it annotated, the mean over each system's lines; ""
    if none was annotated."""
    shares = {}
    for name, lines in groups.items():
        counts = [line["scores"]["errors"] for line in lines if "errors" in line["scores"]]
        if counts:
            shares[name] = [{e: 100 * n / sum(c.values()) for e, n in c.items()} for c in counts]
    errors = sorted({error for each in shares.values() for share in each for error in share})
    body = [
        [name, *(f"{statistics.mean(s.get(error, 0) for s in each):.1f}" for error in errors)]
        for name, each in shares.items()
    ]
    return cli.markdown([["system", *errors], *body]) if body else ""


def print_tables(evaluation: str, groups: dict[str, list[dict]]) -> None:
    """The tables of one way to evaluate."""
    print(f"## {evaluation}\n")
    kinds = (PLANNER_COLUMNS, TEXT_COLUMNS, JUDGE_COLUMNS)
    shown = [*(table(groups, columns) for columns in kinds), error_table(groups)]
    for first in dict.fromkeys(line["first"] for lines in groups.values() for line in lines):
        compared = {}
        for name, lines in groups.items():
            if to_first := [line for line in lines if line["first"] == first]:
                compared[name] = to_first
        differences = [table(compared, columns, difference=True) for columns in kinds]
        if any(differences):
            shown += [f"Differences to {first}", *differences]
    print("\n\n".join(part for part in shown if part) + "\n")


def draw(groups: dict[str, list[dict]], path: str) -> None:
    """Q over B of each system at all temperatures, the mean over its seeds: as it is (solid), and
    with offsets by frequencies (dashed). Of the first way to evaluate, the first seven systems."""
    matplotlib = load_matplotlib()
    figure = matplotlib.figure.Figure(figsize=(7, 4.2), layout="constrained")
    plot = figure.add_subplot()
    drawn = {name: lines for name, lines in groups.items() if lines[0]["frontier"]}
    for (name, lines), colour in zip(drawn.items(), COLOURS):
        for way, style in (("none", "-o"), ("frequencies", "--s")):
            curves = [line["frontier"].get(way) for line in lines]
            if None in curves:
                continue
            xs, ys = (
                [statistics.mean(point[axis] for point in points) for points in zip(*curves)]
                for axis in "BQ"
            )
            label = name if way == "none" else None
            plot.plot(xs, ys, style, color=colour, label=label, markersize=3.5, linewidth=1.2)
    plot.set(xlabel="B, expected (0: as frequent as people)", ylabel="Q, expected (%)")
    plot.legend(fontsize=8, title="solid: as it is, dashed: with offsets", title_fontsize=8)
    figure.savefig(path, dpi=130)


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
