"""Rows of numbers as tables in Markdown."""

from desc.cli import markdown
from desc.judging.judge import RUBRICS

PLAN = (
    "accuracy",
    "greedy",
    "top-2",
    "top-3",
    "Q",
    "Q_W",
    "B",
    "B greedy",
    "B expected",
    "nll",
    "ece",
    "invalid",
)
TEXT = (
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
JUDGED = (
    "faultless",
    *RUBRICS,
    *(f"{rubric} wins" for rubric in RUBRICS),
    "ties",
    "first shown",
    "unreadable",
)


def decimals(column: str) -> int:
    return 3 if column[0] == "B" or column == "nll" else 2 if column in RUBRICS else 1


def tables(rows: dict[str, dict]) -> str:
    """Markdown: a row a system, of the planner, of replies and of the judge, only the columns that
    some row has; then the differences to the first system, with their intervals."""
    parts = []
    for columns in (PLAN, TEXT, JUDGED):
        shown = [c for c in columns if any(c in row for row in rows.values())]
        lines = [
            [name, *(cell(row, c) for c in shown)]
            for name, row in rows.items()
            if any(c in row for c in shown)
        ]
        parts += [markdown([["system", *shown], *lines])] if lines else []
    later = {name: row for name, row in rows.items() if "accuracy difference" in row}
    lines = []
    for column in (*PLAN, *TEXT, *JUDGED):
        found = [row.get(f"{column} difference") for row in later.values()]
        if any(found):
            digits = decimals(column)
            lines.append(
                [
                    column,
                    *(
                        f"{d[0]:+.{digits}f} ({d[1]:+.{digits}f} … {d[2]:+.{digits}f})" if d else ""
                        for d in found
                    ),
                ]
            )
    return "\n\n".join(
        parts + ([markdown([["difference to the first", *later], *lines])] if lines else [])
    )


def cell(row: dict, column: str) -> str:
    """With the interval of what the paper reports, and of what is judged."""
    if column not in row:
        return ""
    digits = decimals(column)
    text = f"{row[column]:.{digits}f}"
    if column not in ("Q", "B", *JUDGED[:-3]) or f"{column} interval" not in row:
        return text
    low, high = row[f"{column} interval"]
    return f"{text} ({low:.{min(digits, 2)}f}–{high:.{min(digits, 2)}f})"


def mining_table(found: dict) -> str:
    """What desc.mining.account says, as text."""
    answers = max(found["answers"], 1)

    def counted(counts: dict) -> str:
        return (
            ", ".join(
                f"{name} {n} ({100 * n / answers:.1f} %)"
                for name, n in sorted(counts.items(), key=lambda c: -c[1])
            )
            or "none"
        )

    lines = [f"{found['answers']} answers, {found['pairs']} pairs"]
    lines += [
        f"{name}: {counted(found[name])}" for name in ("judged", "kept", "dropped") if found[name]
    ]
    rows = [["strategy", "chosen", "rejected"]]
    rows += [
        [name, str(n), str(found["rejected strategies"][name])]
        for name, n in found["chosen strategies"].items()
    ]
    return "\n".join(
        [*lines, "", markdown(rows), *(f"warning: {text}" for text in found["warnings"])]
    )
