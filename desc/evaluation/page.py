"""The report as one HTML file that opens offline: tables, charts and a browser of dialogues. Its
template is data/page.html.

What comes from data enters the page in three ways only: as escaped HTML, as numbers, and as JSON
that the page's script shows as text."""

import json
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

import numpy as np

from desc.evaluation.figures import curves_html, frontiers_html, human_strategies, phases_html
from desc.evaluation.tables import (
    JUDGE_COLUMNS,
    PLANNER_COLUMNS,
    TEXT_COLUMNS,
    decimals,
    missing_intervals,
    select_columns,
)
from desc.storage.files import write_bytes


def write_page(path: str | Path, results: dict) -> None:
    """Write the report of an evaluation. A section is left out if `results` holds nothing for it.

    `results` holds
      "facts"       {name: value}: how the evaluation was made
      "strategies"  the K names
      "speakers"    what the domain calls who is answered, and who answers
      "systems"     {system: row}, as desc.evaluation.scores.summarise makes them
      "answers"     {system: one record per dialogue}, as
                    desc.evaluation.systems.answer_dialogues_as makes them
      "dialogues"   [{"id", "turns"}], in the order of the records
      "curves"      {DPO run: the records of its metrics.jsonl}
      "frontiers"   {system: …}, as desc.evaluation.frontier.frontiers makes them

    Raises DescError if matplotlib is missing."""
    parts = {
        "seeker": escape(results["speakers"][0]),
        "supporter": escape(results["speakers"][1]),
        "lead": lead_html(results),
        "systems": ", ".join(escape(name) for name in results["answers"]),
        "scores": scores_html(results),
        "preferences": preferences_html(results),
        "confusion": confusion_html(results),
        "phases": phases_html(results),
        "curves": curves_html(results),
        "frontiers": frontiers_html(results),
        "errors": errors_html(results),
        "data": dialogues_json(results),
        "facts": facts_html(results),
    }
    template = (files("desc") / "data" / "page.html").read_text(encoding="utf-8")
    template = drop_empty_sections(template, parts)
    parts["contents"] = contents_html(template)
    # All placeholders are filled in one pass, so that none in the data is taken for one.
    page = re.sub(r"<!--(\w+)-->", lambda placeholder: parts[placeholder[1]], template)
    write_bytes(Path(path), page.encode())


def drop_empty_sections(template: str, parts: dict[str, str]) -> str:
    """The template without the sections whose first placeholder has nothing to show."""

    def keep(section: re.Match) -> str:
        placeholder = re.search(r"<!--(\w+)-->", section[0])[1]
        return section[0] if parts[placeholder] else ""

    return re.sub(r"(?s)<section.*?</section>\n", keep, template)


def contents_html(template: str) -> str:
    """Links to the sections of the template."""
    sections = re.findall(r'<section id="(\w+)">\s*<h2>(.*?)<', template)
    return "".join(f'<a href="#{name}">{title}</a>' for name, title in sections)


def lead_html(results: dict) -> str:
    dialogues = results["dialogues"]
    turns = sum(len(dialogue["turns"]) // 2 for dialogue in dialogues)
    return f"{turns:,} {escape(results['speakers'][1])} turns of {len(dialogues)} test dialogues"


def facts_html(results: dict) -> str:
    html = ""
    for name, value in results["facts"].items():
        html += f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
    return html


def table_html(caption: str, head: list[str], rows: dict[str, list[str]]) -> str:
    """An HTML table in a box that scrolls by itself. `rows` is {label: cells}; the cells are <td>
    elements already."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = ""
    for label, cells in rows.items():
        body += f'<tr><th scope="row">{escape(label)}</th>{"".join(cells)}</tr>'
    table = f"<caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead>"
    table += f"<tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{table}</table></div>'


def scores_html(results: dict) -> str:
    """Tables of the planners' columns, of the replies' and of the judge's; all other numbers stand
    in a table that is folded away."""
    rows = results["systems"]
    html = score_table_html("Strategies", rows, PLANNER_COLUMNS)
    html += score_table_html("Replies", rows, TEXT_COLUMNS)
    html += score_table_html("Judged", rows, JUDGE_COLUMNS)
    others = score_table_html("Other numbers", rows, other_columns(rows))
    if others:
        html += f"<details><summary>Other numbers</summary>{others}</details>"
    return html


def score_table_html(caption: str, rows: dict[str, dict], columns: Sequence[str]) -> str:
    """One line per system; "" if no system has any of `columns`."""
    shown, filled = select_columns(rows, columns)
    if not filled:
        return ""
    lines = {name: [html_cell(row, column) for column in shown] for name, row in filled.items()}
    note = missing_intervals(filled, shown).strip()
    if note:
        note = f'<p class="how">{escape(note)}</p>'
    return table_html(caption, ["system", *shown], lines) + note


def other_columns(rows: dict[str, dict]) -> list[str]:
    """The columns of numbers that no other table shows."""
    known = (*PLANNER_COLUMNS, *TEXT_COLUMNS, *JUDGE_COLUMNS)
    columns = []
    for row in rows.values():
        for column, value in row.items():
            is_new = column not in known and column not in columns
            if is_new and isinstance(value, (int, float)):
                columns.append(column)
    return columns


def html_cell(row: dict, column: str) -> str:
    """A score with its interval and its difference to the first system; an empty cell if the row
    has no such column."""
    digits = 0 if isinstance(row.get(column), int) else decimals(column)
    text = ""
    if column in row:
        text += f"{row[column]:,.{digits}f}"
    if row.get(f"{column} interval") is not None:
        low, high = row[f"{column} interval"]
        text += f"<small>{low:.{digits}f} – {high:.{digits}f}</small>"
    if f"{column} difference" in row:
        difference, low, high = row[f"{column} difference"]
        text += f"<small>Δ {difference:+.{digits}f}"
        if low is not None:
            text += f" ({low:+.{digits}f} … {high:+.{digits}f})"
        text += "</small>"
    return f"<td>{text.replace('-', '−')}</td>"


def bar_cell(value: float, html: str, origin: float = 0) -> str:
    """A cell with a bar from `origin` to `value`, both as shares of the cell's width, and `html`
    beside it."""
    low, high = sorted((value, origin))
    style = f"--from:{low:.3f};--to:{high:.3f};--origin:{origin:.3f}"
    return f'<td class="bar" style="{style}"><i></i>{html}</td>'


def rows_with(results: dict, key: str) -> dict[str, dict]:
    """{system: its row[key]} of the systems that have one."""
    return {name: row[key] for name, row in results["systems"].items() if key in row}


def preferences_html(results: dict) -> str:
    """A bar from 1.0, the ideal, to each system's preference for each strategy."""
    preferences = rows_with(results, "preferences")
    if not preferences:
        return ""
    highest = max(p for by_strategy in preferences.values() for p in by_strategy.values())
    width = max(2, highest)
    rows = {}
    for strategy in results["strategies"]:
        values = [by_strategy[strategy] for by_strategy in preferences.values()]
        rows[strategy] = [bar_cell(p / width, f"{p:.2f}", 1 / width) for p in values]
    head = ["strategy", *preferences]
    return table_html("Preference p; the line is the ideal, 1.0", head, rows)


def errors_html(results: dict) -> str:
    """Each system's shares of the annotator's errors."""
    errors = rows_with(results, "errors")
    if not errors:
        return ""
    rows = {}
    for counts in errors.values():
        for error in counts:
            rows[error] = [error_cell(error, each) for each in errors.values()]
    head = ["error", *errors]
    return table_html("Share of the judged replies, and their number", head, rows)


def error_cell(error: str, counts: dict[str, int]) -> str:
    number = counts.get(error, 0)
    share = number / max(sum(counts.values()), 1)
    return bar_cell(share, f"{100 * share:.0f} %<small>{number:,}</small>")


def confusion_html(results: dict) -> str:
    """A table per system, in percent. Its columns give what the system chose if people chose that
    strategy, what it chose over all turns, and what people chose."""
    strategies = results["strategies"]
    numbers = [str(i + 1) for i in range(len(strategies))]
    head = ["chosen ↓ human →", *numbers, "all", "human"]
    html = ""
    for name, counts in rows_with(results, "confusion").items():
        counts = np.array(counts)
        counts = np.column_stack([counts, counts.sum(1), counts.sum(0)])
        shares = counts / np.maximum(counts.sum(0), 1e-12)
        rows = {}
        for i, strategy in enumerate(strategies):
            cells = [shade_cell(share, same=i == j) for j, share in enumerate(shares[i])]
            rows[f"{i + 1} {strategy}"] = cells
        html += table_html(name, head, rows)
    return html


def shade_cell(share: float, same: bool) -> str:
    """A share, 0 … 1, in percent; it is outlined if system and people chose the `same`."""
    shade = "shade same" if same else "shade"
    return f'<td class="{shade}" style="--v:{share:.3f}">{100 * share:.0f}</td>'


def dialogues_json(results: dict) -> str:
    """What the browser of dialogues shows. It is JSON without a "<", so that it cannot end its
    element. A strategy is its index, or -1 for None."""
    index = {name: i for i, name in enumerate(results["strategies"])} | {None: -1}
    dialogues = []
    for number, dialogue in enumerate(results["dialogues"]):
        records = [records[number] for records in results["answers"].values()]
        turns = dialogue["turns"]
        dialogues.append(
            {
                "id": dialogue["id"],
                "texts": [turn["text"] for turn in turns],
                "gold": [index[name] for name in human_strategies(dialogue)],
                "systems": [answers_of(record, index) for record in records],
            }
        )
    shown = {
        "strategies": results["strategies"],
        "speakers": results["speakers"],
        "systems": list(results["answers"]),
        "dialogues": dialogues,
    }
    return json.dumps(shown, separators=(",", ":")).replace("<", "\\u003c")


def answers_of(record: dict, index: dict[str | None, int]) -> dict:
    """What the browser shows of one system's record of a dialogue."""
    drawn = [[index[name] for name in names] for names in record["predicted"]]
    probabilities = np.exp(record["logps"]).round(3).tolist()
    return {"said": drawn, "p": probabilities, "replies": record["replies"]}
