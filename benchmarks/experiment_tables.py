"""The tables and the figure of experiments, made from their lines (benchmarks/experiments.py).

The tables give the mean over training seeds and a 95 % interval, whose half-width is √(dialogues² +
seeds²): the mean half-width of each line's own interval (bootstrap over test dialogues), and
Student's t times the standard error of the seeds. One seed says nothing of the second part, so its
interval is marked with a *. The estimates of B and ece are biased upwards, and their intervals are
not (desc/metrics.py), so the tables show these intervals' ends."""

import math
import statistics

from desc import cli
from desc.calibration import WAYS
from desc.evaluation.figures import load_matplotlib
from desc.evaluation.frontier import ORACLE
from desc.evaluation.tables import JUDGE_COLUMNS, TEXT_COLUMNS, decimals

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
BIASED = ("B", "B expected", "ece")
COLOURS = ("#440154", "#d1495b", "#1f968b", "#c98a00", "#3b528b", "#777777", "#e08fb0", "#7a4b1e")


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


def ways_table(groups: dict[str, list[dict]]) -> str:
    """Q and B of each planner by the ways to calibrate it, expected at top_p 1, at the temperature
    of the evaluation and at 1: the mean over its lines. "" if no line has a frontier."""
    body = []
    for name, lines in groups.items():
        if any(line.get("frontier") is None for line in lines):
            continue
        for T in dict.fromkeys((lines[0]["evaluation"]["temperature"], 1.0)):
            row = [name, f"{T:g}"]
            for way in ("none", *WAYS, ORACLE):
                found = [
                    (point["Q"], point["B"])
                    for line in lines
                    for point in line["frontier"].get(way, ())
                    if point["T"] == T
                ]
                row.append("")
                if found:
                    q, b = map(statistics.mean, zip(*found))
                    row[-1] = f"{q:.1f}, {b:.3f}"
            if any(row[2:]):
                body.append(row)
    return cli.markdown([["system", "T", "none", *WAYS, ORACLE], *body]) if body else ""


def print_tables(evaluation: str, groups: dict[str, list[dict]]) -> None:
    """The tables of one way to evaluate."""
    print(f"## {evaluation}\n")
    kinds = (PLANNER_COLUMNS, TEXT_COLUMNS, JUDGE_COLUMNS)
    shown = [*(table(groups, columns) for columns in kinds), error_table(groups)]
    if by_way := ways_table(groups):
        shown += ["Q, B by way to calibrate, expected at top_p 1", by_way]
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
    with offsets by frequencies (dashed). Of the first way to evaluate, the first eight systems."""
    matplotlib = load_matplotlib()
    figure = matplotlib.figure.Figure(figsize=(8, 4.2), layout="constrained")
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
    title = "solid: as it is\ndashed: with offsets"
    figure.legend(loc="outside right upper", fontsize=8, title=title, title_fontsize=8)
    figure.savefig(path, dpi=130)
