"""Small charts for the report, as inline SVG made by matplotlib (the extra `report`)."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO

import numpy as np

from desc import DescError
from desc.evaluation.frontier import ORACLE

PHASES = 6
# Each system has a mark in the page and a shape in charts: a grey print loses the colours.
MARKS, SHAPES = "●■▲◆▼★", "os^Dv*"
# {a chart of a DPO run: its keys in metrics.jsonl}
CURVES = {
    "loss": ["loss"],
    "reward margin": ["rewards/margins"],
    "reward accuracy": ["rewards/accuracies"],
    "log-probability: ● chosen, ■ rejected": ["logps/chosen", "logps/rejected"],
    "nll of the human strategy": ["nll"],
    "Q (0 to 1)": ["Q"],
    "B": ["B"],
}
# {a way to calibrate a planner: what the page calls it}
CALIBRATED = {
    "none": "as it is",
    "frequencies": "offsets by frequencies",
    "likelihood": "by likelihood",
    "prior": "prior correction",
    ORACLE: "offsets by the test turns’ own frequencies",
}
# What a policy equal to the reference has. Its loss is that of step 0, by the objective.
REFERENCE = {"reward margin": 0, "reward accuracy": 0.5}
STYLE = {
    "svg.hashsalt": "desc",
    "svg.fonttype": "none",
    "font.size": 8,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}
INK = "#000000"  # becomes the colour of the page's text


@dataclass(frozen=True)
class Line:
    """One line of a chart, drawn in matplotlib's `style`."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: dict


def load_matplotlib():
    """The module matplotlib. Raises DescError if it is missing."""
    try:
        import matplotlib.figure
    except ImportError:
        raise DescError("the report needs matplotlib: pip install 'desc[report]'") from None
    return matplotlib


def page_colour(number: int) -> str:
    """A colour that `adopt_page_style` turns into the page's colour `number`, 0 … 5."""
    return f"#5e000{number}"


def chart(title: str, lines: list[Line], reference: float | None = None, **axes) -> str:
    """An HTML figure of some lines, with a dashed line at `reference`.

    It suits light, dark and print, because its text takes the page's font and its colours become
    the page's. Raises DescError if matplotlib is missing."""
    svg = adopt_page_style(draw_svg(lines, reference, axes))
    ranges = "; ".join(f"{line.name} from {line.y[0]:.3g} to {line.y[-1]:.3g}" for line in lines)
    label = escape(f"{title}: {ranges}")
    caption = f"<figcaption>{escape(title)}</figcaption>"
    rest = svg.removeprefix("<svg")
    return f'<figure>{caption}<svg role="img" aria-label="{label}"{rest}</figure>'


def draw_svg(lines: list[Line], reference: float | None, axes: dict) -> str:
    """The SVG file that matplotlib makes of some lines."""
    matplotlib = load_matplotlib()
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(2.9, 1.75), layout="constrained")
        plot = figure.add_subplot()
        for line in lines:
            plot.plot(line.x, line.y, **line.style)
        if reference is not None:
            plot.axhline(reference, color=INK, linewidth=0.6, linestyle=(0, (4, 3)))
        plot.set(**axes)
        file = StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return file.getvalue()


def adopt_page_style(svg: str) -> str:
    """The <svg> element of matplotlib's file, without ids and fonts, in the page's colours."""
    unwanted = r' id="[^"]*_\d+"| font-family: [^;]*;|<style.*?</style>'
    svg = re.sub(unwanted, "", svg, flags=re.DOTALL)
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r"#5e000(\d)", r"var(--s\1)", svg)


def phase_shares(
    dialogues: list[list[str | None]], strategies: list[str], phases: int = PHASES
) -> np.ndarray:
    """(phases, K): of the turns in each phase, the share of each strategy, 0 … 1; NaN in a phase
    without a turn.

    `dialogues` holds the strategies of each dialogue's turns. Each dialogue has `phases` equal
    parts. A strategy of None does not count."""
    counts = np.zeros((phases, len(strategies)))
    for names in dialogues:
        for turn, name in enumerate(names):
            if name is not None:
                phase = int((turn + 0.5) * phases / len(names))
                counts[phase, strategies.index(name)] += 1
    total = counts.sum(1, keepdims=True)
    return np.where(total > 0, counts / np.maximum(total, 1), np.nan)


@dataclass(frozen=True)
class Timing:
    """When in a conversation a system, or people, use each strategy; and the style of its lines."""

    name: str
    shares: np.ndarray  # (PHASES, K), 0 … 1
    style: dict


def phases_html(results: dict) -> str:
    """One chart per strategy: its share over the phases of a conversation, people's and each
    system's. `results` as in desc.evaluation.page.write_page."""
    timings = [human_timing(results)]
    legend = "<span><b>━</b> human</span>"
    for number, name in enumerate(results["answers"]):
        timings.append(system_timing(results, name, number % 6))
        mark = f'<b class="s{number % 6}">{MARKS[number % 6]}</b>'
        legend += f"<span>{mark} {escape(name)}</span>"
    highest = np.nanmax([timing.shares for timing in timings])
    charts = ""
    for index, strategy in enumerate(results["strategies"]):
        charts += timing_chart(strategy, index, timings, 105 * highest)
    return f'<p class="legend">{legend}</p><div class="charts">{charts}</div>'


def human_strategies(dialogue: dict) -> list[str]:
    """The strategies of the supporter turns, of a Dialogue as a dictionary."""
    return [turn["strategy"] for turn in dialogue["turns"] if turn["strategy"]]


def human_timing(results: dict) -> Timing:
    dialogues = [human_strategies(dialogue) for dialogue in results["dialogues"]]
    shares = phase_shares(dialogues, results["strategies"])
    return Timing("human", shares, {"color": INK, "linewidth": 2.4, "alpha": 0.75})


def system_timing(results: dict, name: str, colour: int) -> Timing:
    """A system's timing over all its seeds; `colour` 0 … 5 is its colour and its shape."""
    drawn = []
    for record in results["answers"][name]:
        drawn += record["predicted"]
    shares = phase_shares(drawn, results["strategies"])
    return Timing(name, shares, {"color": page_colour(colour), "marker": SHAPES[colour]})


def timing_chart(strategy: str, index: int, timings: list[Timing], top: float) -> str:
    """The chart of one strategy, which is number `index`; its axis ends at `top` percent."""
    phases = range(1, PHASES + 1)
    lines = []
    for timing in timings:
        lines.append(Line(timing.name, phases, 100 * timing.shares[:, index], timing.style))
    return chart(strategy, lines, xticks=phases, ylabel="% of turns", ylim=(0, top))


def frontiers_html(results: dict) -> str:
    """One chart per system: B and Q at each temperature, as the planner is and calibrated. "" if no
    planner was scored."""
    frontiers = results["frontiers"]
    if not frontiers:
        return ""
    legend = ""
    for number, text in enumerate(CALIBRATED.values()):
        legend += f'<span><b class="s{number}">{MARKS[number]}</b> {text}</span>'
    points = [point for ways in frontiers.values() for line in ways.values() for point in line]
    same_axes = {"xlim": around(point["B"] for point in points)}
    same_axes["ylim"] = around(point["Q"] for point in points)
    charts = ""
    for name, ways in frontiers.items():
        lines = []
        for number, way in enumerate(CALIBRATED):
            if way not in ways:
                continue
            style = {"color": page_colour(number), "marker": SHAPES[number]}
            xs, ys = ([point[axis] for point in ways[way]] for axis in "BQ")
            lines.append(Line(CALIBRATED[way], xs, ys, style))
        charts += chart(name, lines, xlabel="B", ylabel="Q", **same_axes)
    return f'<p class="legend">{legend}</p><div class="charts">{charts}</div>'


def around(values: Iterable[float]) -> tuple[float, float]:
    """An axis on which all values are seen."""
    values = list(values)
    margin = 0.05 * (max(values) - min(values)) or 1
    return min(values) - margin, max(values) + margin


def curves_html(results: dict) -> str:
    """The charts of each DPO run, those of CURVES that its metrics have points for. `results` as in
    desc.evaluation.page.write_page."""
    html = ""
    for run, records in results["curves"].items():
        charts = "".join(curve_chart(title, keys, records) for title, keys in CURVES.items())
        html += f'<h3>{escape(run)}</h3><div class="charts">{charts}</div>'
    return html


def curve_chart(title: str, keys: list[str], records: list[dict]) -> str:
    """The chart of some keys of metrics.jsonl: thin lines of training batches, marked lines of
    validation. "" if no record has any of the keys."""
    lines = []
    for number, key in enumerate(keys):
        colour = {"color": page_colour(number)}
        thin = {"linewidth": 0.7, "alpha": 0.45}
        marked = {"marker": SHAPES[number]}
        lines.append(curve(key, records, colour | thin))
        lines.append(curve(f"valid/{key}", records, colour | marked))
    lines = [line for line in lines if line.x]
    begun = [record["valid/loss"] for record in records if "valid/loss" in record][:1]
    reference = begun[0] if title == "loss" and begun else REFERENCE.get(title)
    return chart(title, lines, reference, xlabel="step") if lines else ""


def curve(key: str, records: list[dict], style: dict) -> Line:
    """The line of one key of metrics.jsonl over the steps."""
    points = [record for record in records if key in record and is_defined(key, record)]
    steps = [record["step"] for record in points]
    return Line(key, steps, [record[key] for record in points], style)


def is_defined(key: str, record: dict) -> bool:
    """False for the accuracy of a policy that equals its reference: it orders no pair, so its
    accuracy of 0 means nothing. All its margins are 0."""
    return "accuracies" not in key or record[key.replace("accuracies", "margins")] != 0
