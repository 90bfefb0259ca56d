"""Scores of systems, and counts of mined answers, as tables in Markdown."""

from collections.abc import Iterable

from desc.cli import markdown
from desc.judging.judge import RUBRICS
from desc.metrics import NO_INTERVAL

PLANNER_COLUMNS = (
    "accuracy",
    "greedy",
    "top-2",
    "top-3",
    "Q",
    "Q_W",
    "Q greedy",
    "B",
    "B greedy",
    "B expected",
    "nll",
    "nll gain",
    "ece",
    "invalid",
)
TEXT_COLUMNS = (
    "distinct-1",
    "bleu-1",
    "f1",
    "rouge-l",
    "length",
    "self-repetition",
    "near-copies",
    "corpus distinct-1",
    "corpus bleu-4",
)
WINS = tuple(f"{rubric} wins" for rubric in RUBRICS)
JUDGE_COLUMNS = ("faultless", *RUBRICS, *WINS, "ties", "first shown", "unreadable")
# What the paper reports, and what is judged: in Markdown these alone show their intervals.
INTERVAL_COLUMNS = ("Q", "B", "faultless", *RUBRICS, *WINS)


def decimals(column: str) -> int:
    """How many decimals a column is shown with."""
    if column.startswith(("B", "nll")):
        return 3
    return 2 if column in RUBRICS else 1


def select_columns(
    rows: dict[str, dict], columns: Iterable[str]
) -> tuple[list[str], dict[str, dict]]:
    """Those of `columns` that some row has, and the rows that have any of them."""
    shown = [column for column in columns if any(column in row for row in rows.values())]
    filled = {name: row for name, row in rows.items() if any(column in row for column in shown)}
    return shown, filled


def tables(rows: dict[str, dict]) -> str:
    """Up to four tables in Markdown of {system: its row}, as desc.evaluation.scores.summarise makes
    them: of planners, of replies, of what was judged, and of differences to the first system. A
    table without any values is left out. A line below a table says why intervals are missing."""
    parts = []
    for columns in (PLANNER_COLUMNS, TEXT_COLUMNS, JUDGE_COLUMNS):
        parts.append(score_table(rows, columns))
    parts.append(difference_table(rows))
    return "\n\n".join(part for part in parts if part)


def score_table(rows: dict[str, dict], columns: tuple[str, ...]) -> str:
    """One line per system; "" if no system has any of `columns`."""
    shown, filled = select_columns(rows, columns)
    if not filled:
        return ""
    lines = [["system", *shown]]
    for name, row in filled.items():
        lines.append([name, *(markdown_cell(row, column) for column in shown)])
    with_interval = [column for column in shown if column in INTERVAL_COLUMNS]
    return markdown(lines) + missing_intervals(filled, with_interval)


def missing_intervals(rows: dict[str, dict], columns: Iterable[str]) -> str:
    """The line that says why intervals are missing; "" if none is. The row of training frequencies
    never has one, and no key for it."""
    for row in rows.values():
        for column in columns:
            limits, difference = (
                row.get(f"{column} interval", ()),
                row.get(f"{column} difference", ()),
            )
            if limits is None or None in difference:
                return f"\n\n{NO_INTERVAL}"
    return ""


def markdown_cell(row: dict, column: str) -> str:
    """A score, with its interval if the column is one of INTERVAL_COLUMNS."""
    if column not in row:
        return ""
    digits = decimals(column)
    text = f"{row[column]:.{digits}f}"
    limits = row.get(f"{column} interval")
    if column not in INTERVAL_COLUMNS or limits is None:
        return text
    low, high = limits
    digits = min(digits, 2)
    return f"{text} ({low:.{digits}f}–{high:.{digits}f})"


def difference_table(rows: dict[str, dict]) -> str:
    """One line per column with the differences of later systems to the first, and their intervals;
    "" if there is no later system."""
    later = {name: row for name, row in rows.items() if "accuracy difference" in row}
    lines = [["difference to the first", *later]]
    for column in (*PLANNER_COLUMNS, *TEXT_COLUMNS, *JUDGE_COLUMNS):
        if any(f"{column} difference" in row for row in later.values()):
            lines.append([column, *(difference_cell(row, column) for row in later.values())])
    if not later:
        return ""
    return markdown(lines) + missing_intervals(
        later, (*PLANNER_COLUMNS, *TEXT_COLUMNS, *JUDGE_COLUMNS)
    )


def difference_cell(row: dict, column: str) -> str:
    if f"{column} difference" not in row:
        return ""
    digits = decimals(column)
    difference, low, high = row[f"{column} difference"]
    if low is None:
        return f"{difference:+.{digits}f}"
    return f"{difference:+.{digits}f} ({low:+.{digits}f} … {high:+.{digits}f})"


def mining_table(counts: dict) -> str:
    """What desc.mining.account counted, as text."""
    lines = [f"{counts['answers']} answers, {counts['pairs']} pairs"]
    if counts["weight of pairs"] != counts["pairs"]:
        lines[0] += f" that weigh {counts['weight of pairs']} together; all counts are by weight"
    for name in ("judged", "kept", "dropped"):
        if counts[name]:
            lines.append(f"{name}: {list_shares(counts[name], counts['answers'])}")
    strategies = [["strategy", "chosen", "rejected"]]
    for name, chosen in counts["chosen strategies"].items():
        strategies.append([name, str(chosen), str(counts["rejected strategies"][name])])
    warnings = [f"caution: {text}" for text in counts["warnings"]]
    return "\n".join([*lines, "", markdown(strategies), *warnings])


def list_shares(counts: dict[str, int], total: int) -> str:
    """ "NAME COUNT (PERCENT %), …", the commonest first."""
    commonest = sorted(counts.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{name} {n} ({100 * n / max(total, 1):.1f} %)" for name, n in commonest)
