"""Small charts for the report, as inline SVG made by matplotlib (the extra `report`)."""

import math
import re
from html import escape
from io import StringIO

import numpy as np

from desc import DescError

PHASES = 6
# of a system, in the page and in charts: colours alone would not survive a grey print
MARKS, SHAPES = "●■▲◆▼★", "os^Dv*"
# keys in metrics.jsonl
CURVES = {
    "loss": ["loss"],
    "reward margin": ["rewards/margins"],
    "reward accuracy": ["rewards/accuracies"],
}
CURVES |= {"log-probability: ● chosen, ■ rejected": ["logps/chosen", "logps/rejected"]}
CURVES |= {"nll of the human strategy": ["nll"], "Q (0 to 1)": ["Q"], "B": ["B"]}
# what a policy equal to the reference has
REFERENCE = {"loss": math.log(2), "reward margin": 0, "reward accuracy": 0.5}
STYLE = {
    "svg.hashsalt": "desc",
    "svg.fonttype": "none",
    "font.size": 8,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
}
STYLE |= {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


def load_matplotlib():
    """matplotlib; DescError where it is missing."""
    try:
        import matplotlib.figure
    except ImportError:
        raise DescError("the report needs matplotlib: pip install 'desc[report]'") from None
    return matplotlib


def chart(title: str, lines: list[tuple], reference: float | None = None, **axes) -> str:
    """A figure of lines (name, x, y, style) with a dashed line at `reference`. Its text takes the
    page's font, black the page's ink and #5e000N the page's colour N, so that it suits light, dark
    and print."""
    matplotlib = load_matplotlib()
    with matplotlib.rc_context(STYLE):
        figure, buffer = (
            matplotlib.figure.Figure(figsize=(2.9, 1.75), layout="constrained"),
            StringIO(),
        )
        plot = figure.add_subplot()
        for _, x, y, style in lines:
            plot.plot(x, y, **style)
        if reference is not None:
            plot.axhline(reference, color="#000000", linewidth=0.6, linestyle=(0, (4, 3)))
        plot.set(**axes)
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    svg = re.sub(
        r' id="[^"]*_\d+"| font-family: [^;]*;|<style.*?</style>', "", buffer.getvalue(), flags=re.S
    )
    svg = re.sub(
        r"#5e000(\d)", r"var(--s\1)", svg[svg.index("<svg") :].replace("#000000", "currentColor")
    )
    told = escape(
        f"{title}: "
        + "; ".join(f"{name} from {y[0]:.3g} to {y[-1]:.3g}" for name, _, y, _ in lines)
    )
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg role="img"'
        f' aria-label="{told}"{svg[4:]}</figure>'
    )


def phase_shares(
    dialogues: list[list[str | None]], strategies: list[str], phases: int = PHASES
) -> np.ndarray:
    """(phases, K): of the turns in each phase of their dialogue, the share of each strategy; NaN in
    a phase without a turn.

    `dialogues` holds the strategies of their turns, a phase is an equal part of a dialogue, and a
    None does not count."""
    counts = np.zeros((phases, len(strategies)))
    for names in dialogues:
        for t, name in enumerate(names):
            if name is not None:
                counts[int((t + 0.5) * phases / len(names)), strategies.index(name)] += 1
    total = counts.sum(1, keepdims=True)
    return np.where(total > 0, counts / np.maximum(total, 1), np.nan)


def phases(results: dict) -> str:
    """A chart a strategy: its share over the phases of a conversation, people's and each
    system's."""
    strategies, human = (
        results["strategies"],
        [[turn["strategy"] for turn in d["turns"][1::2]] for d in results["dialogues"]],
    )
    drawn = [
        (
            "human",
            phase_shares(human, strategies),
            {"color": "#000000", "linewidth": 2.4, "alpha": 0.75},
        )
    ]
    legend = "<span><b>━</b> human</span>"
    for i, (name, records) in enumerate(results["answers"].items()):
        shares = phase_shares(
            [names for record in records for names in record["predicted"]], strategies
        )
        drawn.append((name, shares, {"color": f"#5e000{i % 6}", "marker": SHAPES[i % 6]}))
        legend += f'<span><b class="s{i % 6}">{MARKS[i % 6]}</b> {escape(name)}</span>'
    x = range(1, PHASES + 1)
    axes = {
        "xticks": x,
        "ylabel": "% of turns",
        "ylim": (0, 105 * np.nanmax([shares for _, shares, _ in drawn])),
    }
    charts = (
        chart(s, [(name, x, 100 * y[:, k], style) for name, y, style in drawn], **axes)
        for k, s in enumerate(strategies)
    )
    return f'<p class="legend">{legend}</p><div class="charts">{"".join(charts)}</div>'


def curves(results: dict) -> str:
    """The charts of each DPO run for which its metrics have points."""
    html = ""
    for run, records in results["curves"].items():
        html += f'<h3>{escape(run)}</h3><div class="charts">'
        for title, keys in CURVES.items():
            lines = []
            for i, key in enumerate(keys):
                for name, style in (
                    (key, {"linewidth": 0.7, "alpha": 0.45}),
                    (f"valid/{key}", {"marker": SHAPES[i]}),
                ):
                    # While policy and reference are equal no pair is ordered either way: that is no
                    # accuracy of 0.
                    found = [
                        r
                        for r in records
                        if name in r
                        and ("accuracies" not in key or r[name.replace("accuracies", "margins")])
                    ]
                    x, y = [r["step"] for r in found], [r[name] for r in found]
                    lines += [(name, x, y, {"color": f"#5e000{i}"} | style)] if found else []
            html += chart(title, lines, REFERENCE.get(title), xlabel="step") if lines else ""
        html += "</div>"
    return html
