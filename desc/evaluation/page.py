"""The report as one HTML file that opens offline: tables, charts and a browser of dialogues (its
template is data/page.html).

What comes from data enters the page in three ways only: as escaped HTML, as numbers, and as JSON
that its script shows as text."""

import json
import re
from html import escape
from importlib.resources import files
from pathlib import Path

import numpy as np

from desc.evaluation.figures import curves, phases
from desc.evaluation.tables import JUDGED, PLAN, TEXT, decimals
from desc.storage.files import write_bytes


def write_page(path: str | Path, results: dict) -> None:
    """Write the report of an evaluation; a section for which `results` holds nothing is left out.

    "facts" {name: value}: how it was made. "strategies": the K names. "systems" {name: row}:
    columns as desc.report.summarise names them, "COLUMN interval" [low, high], "COLUMN difference"
    [to the first system, low, high], "preferences" {strategy: p}, "confusion" (K, K)
    [predicted][gold], "errors" {error type or "none": replies}. "answers" {name: a record a
    dialogue}: "predicted" [seed][turn], the first seed's being those that the "replies" follow (or
    []), "logps" (T, K) in nats (or []). "dialogues" [{"id", "turns"}] in the order of the records.
    "curves" {run: records of its metrics.jsonl}. Raises DescError where matplotlib is missing."""
    parts = {
        make.__name__: make(results)
        for make in (scores, preferences, confusion, phases, curves, errors, data)
    }
    turns = sum(len(d["turns"]) // 2 for d in results["dialogues"])
    parts["lead"] = f"{turns:,} supporter turns of {len(results['dialogues'])} test dialogues"
    parts["systems"] = ", ".join(map(escape, results["answers"]))
    parts["facts"] = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in results["facts"].items()
    )
    page = (files("desc") / "data" / "page.html").read_text(encoding="utf-8")
    page = re.sub(
        r"(?s)<section.*?</section>\n",
        lambda s: s[0] if parts[re.search(r"<!--(\w+)-->", s[0])[1]] else "",
        page,
    )
    parts["contents"] = "".join(
        f'<a href="#{i}">{title}</a>'
        for i, title in re.findall(r'<section id="(\w+)">\s*<h2>(.*?)<', page)
    )
    write_bytes(Path(path), re.sub(r"<!--(\w+)-->", lambda m: parts[m[1]], page).encode())


def grid(caption: str, head: list[str], rows: dict[str, list[str]]) -> str:
    """An HTML table in a box that scrolls by itself, of a row a label; the cells are HTML
    already."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{escape(label)}</th>{"".join(cells)}</tr>'
        for label, cells in rows.items()
    )
    table = (
        f"<caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    )
    return f'<div class="scroll"><table>{table}</table></div>'


def scores(results: dict) -> str:
    """Tables of the planners' columns, the replies' and the judge's, and folded away one of all
    other numbers."""
    rows, tables = results["systems"], []
    known = (*PLAN, *TEXT, *JUDGED)
    rest = {
        c: None
        for row in rows.values()
        for c, value in row.items()
        if isinstance(value, (int, float)) and c not in known
    }
    for caption, columns in (
        ("Strategies", PLAN),
        ("Replies", TEXT),
        ("Judged", JUDGED),
        ("Other numbers", rest),
    ):
        columns = [c for c in columns if any(c in row for row in rows.values())]
        found = {
            name: [cell(row, c) for c in columns]
            for name, row in rows.items()
            if any(c in row for c in columns)
        }
        tables.append(grid(caption, ["system", *columns], found) if found else "")
    return "".join(
        tables[:3]
    ) + f"<details><summary>Other numbers</summary>{tables[3]}</details>" * bool(rest)


def cell(row: dict, column: str) -> str:
    digits = 0 if isinstance(row.get(column), int) else decimals(column)
    text = f"{row[column]:,.{digits}f}" if column in row else ""
    if f"{column} interval" in row:
        text += "<small>{:.{d}f} – {:.{d}f}</small>".format(*row[f"{column} interval"], d=digits)
    if f"{column} difference" in row:
        text += "<small>Δ {:+.{d}f} ({:+.{d}f} … {:+.{d}f})</small>".format(
            *row[f"{column} difference"], d=digits
        )
    return f"<td>{text.replace('-', '−')}</td>"


def bar(value: float, text: str, origin: float = 0) -> str:
    """A cell with a bar from `origin` to `value`, both as a share of its width."""
    low, high = sorted((value, origin))
    return (
        '<td class="bar"'
        f' style="--from:{low:.3f};--to:{high:.3f};--origin:{origin:.3f}"><i></i>{text}</td>'
    )


def preferences(results: dict) -> str:
    found = {
        name: row["preferences"] for name, row in results["systems"].items() if "preferences" in row
    }
    top = max([2, *(p for of in found.values() for p in of.values())])
    rows = {
        s: [bar(of[s] / top, f"{of[s]:.2f}", 1 / top) for of in found.values()]
        for s in results["strategies"]
    }
    return (
        grid("Preference p; the line is the ideal, 1.0", ["strategy", *found], rows)
        if found
        else ""
    )


def errors(results: dict) -> str:
    found, rows = (
        {name: row["errors"] for name, row in results["systems"].items() if "errors" in row},
        {},
    )
    for error in dict.fromkeys(e for counts in found.values() for e in counts):
        cells = [
            (counts.get(error, 0), counts.get(error, 0) / max(sum(counts.values()), 1))
            for counts in found.values()
        ]
        rows[error] = [bar(share, f"{100 * share:.0f} %<small>{n:,}</small>") for n, share in cells]
    return (
        grid("Share of the judged replies, and their number", ["error", *found], rows)
        if found
        else ""
    )


def confusion(results: dict) -> str:
    """Of each system: what it chose where people chose a column's strategy and over all turns,
    beside what people chose, in percent."""
    html, strategies = "", results["strategies"]
    for name, counts in (
        (name, np.array(row["confusion"]))
        for name, row in results["systems"].items()
        if "confusion" in row
    ):
        counts, rows = np.c_[counts, counts.sum(1), counts.sum(0)], {}
        for i, shares in enumerate(counts / np.maximum(counts.sum(0), 1e-12)):
            cells = [
                f'<td class="shade{" same" * (i == j)}" style="--v:{x:.3f}">{100 * x:.0f}</td>'
                for j, x in enumerate(shares)
            ]
            rows[f"{i + 1} {strategies[i]}"] = cells
        html += grid(
            name,
            ["chosen ↓ human →", *map(str, range(1, len(strategies) + 1)), "all", "human"],
            rows,
        )
    return html


def data(results: dict) -> str:
    """What the browser of dialogues shows, as JSON without a "<", so that it cannot end its
    element; -1 is no strategy."""
    index, dialogues = {name: i for i, name in enumerate(results["strategies"])} | {None: -1}, []
    for n, dialogue in enumerate(results["dialogues"]):
        systems = []
        for record in (records[n] for records in results["answers"].values()):
            said = [[index[name] for name in names] for names in record["predicted"]]
            systems.append(
                {
                    "said": said,
                    "p": np.exp(record["logps"]).round(3).tolist(),
                    "replies": record["replies"],
                }
            )
        gold = [index[turn["strategy"]] for turn in dialogue["turns"][1::2]]
        dialogues.append(
            {
                "id": dialogue["id"],
                "texts": [turn["text"] for turn in dialogue["turns"]],
                "gold": gold,
                "systems": systems,
            }
        )
    found = {
        "strategies": results["strategies"],
        "systems": list(results["answers"]),
        "dialogues": dialogues,
    }
    return json.dumps(found, separators=(",", ":")).replace("<", "\\u003c")
