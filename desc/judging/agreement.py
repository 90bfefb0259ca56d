"""How far the annotator and the judge agree with people.

- A review: judged answers as a CSV, in which people label what is wrong with them.
- Labelled turns, which the annotator labels, too.
- Ratings: rated replies as a CSV, in which people rate them, too.

A review and ratings are written with a key beside them, X.key.json for X.csv. It holds the digest
of the file, so that nothing is replaced on which people have worked. And it holds what each row
showed, so that what people wrote is only taken for the rows that they saw."""

import csv
import hashlib
import io
import json
import random
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np

from desc import DescError
from desc.cli import markdown
from desc.esconv import Dialogue, flatten
from desc.judging.judge import RUBRICS
from desc.judging.labels import annotate_labelled, hold_out, read_labels
from desc.judging.statistics import (
    Group,
    Statistic,
    bootstrap_statistic,
    kappa_of_confusion,
    kendall,
    pooled_statistic,
    spearman,
)
from desc.metrics import FEWEST_GROUPS, NO_INTERVAL, interval, resample
from desc.mining import LABELS, UNREADABLE, Annotator, Answer
from desc.storage.files import parse, read_text, write_bytes
from desc.strategies import Strategies

REVIEW_COLUMNS = ("number", "context", "strategy", "reply", "label")
RATING_COLUMNS = (
    *("system", "dialogue", "turn", "context", "reply"),
    *(f"{rubric} {rater}" for rubric in RUBRICS for rater in ("judge", "human")),
)
FOR_PEOPLE = ("label", *(f"{rubric} human" for rubric in RUBRICS))  # columns that people fill in
# Columns that tell the rows apart.
REVIEW_INDEX = ("number",)
RATING_INDEX = ("system", "dialogue", "turn")
TABLE_SUFFIXES = (".csv", ".tsv", ".xlsx", ".ods")
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
SEPARATORS = (",", ";", "\t")
# Excel's "sep=;" before the head
SEPARATOR_LINE = re.compile(r'\s*"?sep=[^\r\n]?"?[,; \t]*[\r\n]+', re.IGNORECASE)
WHOLE_NUMBER = re.compile(r"(\d+)[.,]0+")
CONTEXT_LENGTH = 6  # utterances that people see before a reply
NUMBER = re.compile(r"\s*\d{1,15}([.,]\d{1,25})?(e[+-]?\d{1,2})?\s*", re.IGNORECASE)


# --- tables ---------------------------------------------------------------------------------------


def key_path(path: Path) -> Path:
    """The key of a review or of ratings, which is written beside it."""
    return path.with_suffix(".key.json")


def write_table(path: Path, columns: Sequence[str], rows: list[dict]) -> None:
    """`columns` of some rows as a CSV, with empty cells FOR_PEOPLE; its key holds all of the rows.

    The CSV is in UTF-8 with a mark, by which spreadsheets know the encoding. The key is written
    first. If the program is killed between them, the key still knows the file before, so that the
    next run may replace it. A key without its table may be the key of one that was moved away, so
    it is kept under another name. Raises DescError as refuse_edited does."""
    refuse_edited(path)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    for row in rows:
        writer.writerow([disarm_formula(row.get(column, "")) for column in columns])
    data = text.getvalue().encode("utf-8-sig")

    key = {"sha256": digest(data), "replaces": None, "rows": rows}
    before = digest(path.read_bytes()) if path.exists() else None
    if before != key["sha256"]:
        key["replaces"] = before
    key_data = (json.dumps(key, indent=2, ensure_ascii=False) + "\n").encode()
    keep_key_of_moved(path, key_data)
    write_bytes(key_path(path), key_data)
    write_bytes(path, data)


def keep_key_of_moved(path: Path, new_key: bytes) -> None:
    """Rename another key than the new one to X.DIGEST.key.json if its table, X.csv, is gone."""
    key = key_path(path)
    if path.exists() or not key.exists():
        return
    data = key.read_bytes()
    if data != new_key:
        key.replace(key_path(path.with_name(f"{path.stem}.{digest(data)[:8]}.csv")))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def disarm_formula(cell):
    """The cell with a quotation mark before it if a spreadsheet would compute it as a formula."""
    return f"'{cell}" if str(cell).startswith(FORMULA_STARTS) else cell


def refuse_edited(path: Path) -> None:
    """Raises DescError if the file is there and not byte for byte what write_table wrote, because
    people may have worked on it."""
    if not path.exists():
        return
    try:
        key = read_key(path)
        known = key.get("sha256"), key.get("replaces")
        is_ours = digest(path.read_bytes()) in known
    except (DescError, OSError):
        is_ours = False
    if not is_ours:
        key = key_path(path)
        both = f"it and {key.name}" if key.exists() else "it"
        raise DescError(
            f"{path} would be replaced, but it may hold what people wrote, because {key.name} does"
            f" not prove that it is as it was written: move {both} away, or give another --out"
        )


def read_key(path: Path) -> dict:
    """The key of a table. Raises DescError if it is missing or is no key."""
    place = key_path(path)
    if not place.exists():
        raise DescError(
            f"{path} can only be read with its key, {place.name}, beside it, which is missing; if"
            " it is lost, move the file away, and the command that wrote it writes both again"
        )
    key = parse(read_text(place), f"{place}:")
    rows = key.get("rows") if isinstance(key, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DescError(f"{place}: is no key, which is an object with a list of rows")
    return key


def read_table(path: Path, needed: Sequence[str]) -> tuple[list[str], dict[int, dict[str, str]]]:
    """(columns, {row number: {column: cell}}) of a CSV as any spreadsheet saves it.

    It may be in UTF-8 or UTF-16, with commas, semicolons or tabs between cells, and with Excel's
    line "sep=;" before the head. Columns are told by their names in lower case, without blanks
    around. Blank rows are left out; numbers start at 1 below the head. Raises DescError if the file
    cannot be read, lacks a column that is needed, has one twice, or has a row with too many
    cells."""
    text = read_csv_text(path)
    preamble = SEPARATOR_LINE.match(text)
    if preamble:
        text = text[preamble.end() :]
    head = re.split(r"[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0]
    separator = max(SEPARATORS, key=lambda mark: len(next(csv.reader([head], delimiter=mark), ())))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        lines = list(reader)
    except csv.Error as error:
        raise DescError(f"{path}: line {reader.line_num} is no line of a CSV ({error})") from None
    while lines and not any(cell.strip() for cell in lines[0]):
        lines.pop(0)

    columns = [" ".join(name.split()).casefold() for name in lines[0]] if lines else []
    for column in needed:
        if column not in columns:
            raise DescError(f"{path}: column {column!r} is missing; its head should have it")
    for column in columns:
        if column and columns.count(column) > 1:
            raise DescError(f"{path}: column {column!r} stands twice; keep one of them")
    rows = {}
    for number, cells in enumerate(lines[1:], 1):
        if any(cell.strip() for cell in cells[len(columns) :]):
            raise DescError(f"{path}: row {number} has more cells than the head has columns")
        cells += [""] * (len(columns) - len(cells))
        if any(cell.strip() for cell in cells):
            rows[number] = dict(zip(columns, cells))
    return columns, rows


def read_csv_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a mark. Raises DescError if it is neither."""
    try:
        data = path.read_bytes()
        is_utf_16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        return data.decode("utf-16" if is_utf_16 else "utf-8-sig")
    except OSError as error:
        raise DescError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DescError(
            f"{path}: is no CSV in UTF-8 (byte {error.start}); save it as that"
        ) from None


def read_filled(
    path: Path, columns: Sequence[str], index: Sequence[str], hidden: Sequence[str] = ()
) -> list[tuple[int, dict[str, str]]]:
    """(row number, row) of each row of a table that people filled in, in the order of its key.

    A row is as in the key, plus the columns FOR_PEOPLE as people wrote them. Raises DescError,
    naming the row, if the key has no row of that `index`, if an index stands twice, or if any other
    of the `columns` is not as in the key; and if a row of the key has no index or lacks one of the
    `hidden` columns."""
    place = key_path(path)
    key = {}
    for number, row in enumerate(read_key(path)["rows"], 1):
        kept = {column: "" if cell is None else str(cell) for column, cell in row.items()}
        for column in (*index, *hidden):
            if not kept.get(column, "").strip():
                raise DescError(f"{place}: row {number} has no {column!r}, so it cannot be used")
        name = name_row(kept, index)
        if name in key:
            raise DescError(f"{place}: {name} stands twice")
        key[name] = kept

    filled = {}
    _, rows = read_table(path, columns)
    for number, row in rows.items():
        name = name_row(row, index)
        where = f"{path}: row {number}"
        if name not in key:
            raise DescError(f"{where}: {name} is not in {place}")
        if name in filled:
            raise DescError(f"{where}: {name} stands twice")
        for column in columns:
            if column not in FOR_PEOPLE and not is_same(row[column], key[name].get(column, "")):
                raise DescError(
                    f"{where}: {column!r} is not as {place.name} has it for {name}: the cell was"
                    " changed, or this is another file's key"
                )
        written = {column: row[column] for column in columns if column in FOR_PEOPLE}
        filled[name] = number, key[name] | written
    return [filled[name] for name in key if name in filled]


def name_row(row: dict[str, str], index: Sequence[str]) -> str:
    """What tells a row from others: "number 3", or "system sft, dialogue 0, turn 1"."""
    return ", ".join(f"{column} {normalise_cell(row[column])}" for column in index)


def normalise_cell(cell: str) -> str:
    """A cell without what spreadsheets change: white space, the mark before a formula, "3.0" for
    3."""
    cell = cell.strip()
    if cell.startswith("'") and cell[1:].startswith(FORMULA_STARTS):
        cell = cell[1:]
    cell = " ".join(cell.split())
    whole = WHOLE_NUMBER.fullmatch(cell)
    return whole[1] if whole else cell


def is_same(cell: str, kept: str) -> bool:
    """Whether a cell is as it was written; a number may be rounded, as spreadsheets show it."""
    if NUMBER.fullmatch(cell) and NUMBER.fullmatch(kept):
        last_place = Decimal(cell.strip().replace(",", ".")).as_tuple().exponent
        return abs(read_number(cell) - read_number(kept)) <= 0.5001 * 10.0 ** min(last_place, 0)
    return normalise_cell(cell) == normalise_cell(kept)


def format_context(dialogue: Dialogue, turn: int) -> str:
    """The last utterances before supporter turn `turn`, each on a line of its own."""
    return flatten(dialogue.history(turn)[-CONTEXT_LENGTH:]).removesuffix("\n")


# --- reviews --------------------------------------------------------------------------------------


def write_review(path: Path, answers: list[tuple[Dialogue, Answer]], count: int, seed: int) -> None:
    """`count` random judged answers as a CSV for people to label, in the column "label".

    What the annotator says of them would sway people. So it is in the key alone. Raises DescError
    as refuse_edited does."""
    judged = [(dialogue, answer) for dialogue, answer in answers if answer.judged]
    drawn = random.Random(seed).sample(judged, min(count, len(judged)))
    rows = []
    for number, (dialogue, answer) in enumerate(drawn, 1):
        row = {"number": number, "context": format_context(dialogue, answer.turn)}
        row |= {"strategy": answer.strategy, "reply": answer.reply}
        row |= {"dialogue": dialogue.id, "turn": answer.turn, "annotator": answer.judged.error}
        row |= {"confidence": answer.judged.confidence, "explanation": answer.judged.explanation}
        rows.append(row)
    write_table(path, REVIEW_COLUMNS, rows)


def read_review(path: str | Path) -> tuple[list[str], list[str], list[str]]:
    """(people's labels, the annotator's, dialogues): one of each per labelled answer of a review.

    Raises DescError as read_filled does, if a label is none of LABELS, naming its number, or if
    nothing is labelled."""
    path = Path(path)
    people, annotator, dialogues = [], [], []
    hidden = ("dialogue", "turn", "annotator")
    for row_number, row in read_filled(path, REVIEW_COLUMNS, REVIEW_INDEX, hidden):
        label = normalise_cell(row["label"]).casefold()
        if not label:
            continue
        number = row["number"]
        if label not in LABELS:
            raise DescError(
                f"{path}: row {row_number}: number {number} is labelled {label!r}; labels are"
                f" {', '.join(LABELS)}"
            )
        if row["annotator"] not in (*LABELS, UNREADABLE):
            raise DescError(
                f"{key_path(path)}: number {number} is annotated {row['annotator']!r}, no label"
            )
        people.append(label)
        annotator.append(row["annotator"])
        dialogues.append(row["dialogue"])
    if not people:
        raise DescError(f"{path}: no row has a label yet")
    return people, annotator, dialogues


# --- labels ---------------------------------------------------------------------------------------


def measure_agreement(
    config, dialogues: list[Dialogue], strategies: Strategies, annotator: Annotator | None
) -> str:
    """`agreement_report` on the file config.agreement (`config` is mine_preferences.py's).

    A table, or any file with a key, is a review; the key holds the annotator's labels already. Any
    other file holds labelled turns, of which the annotator labels those that are held out
    (config.held_out); published ones are looked up in `dialogues`. Raises DescError if an annotator
    is needed and missing, or if nothing is held out."""
    path = Path(config.agreement)
    if path.suffix.casefold() in TABLE_SUFFIXES or key_path(path).exists():
        return agreement_report(*read_review(config.agreement), config.seed)
    if annotator is None:
        raise DescError(
            "--agreement with labelled turns needs an annotator: give --annotator local or endpoint"
        )
    labelled = read_labels(config.agreement, dialogues, strategies, config.label_map)
    _, held = hold_out(labelled, config.held_out)
    if not held:
        raise DescError(
            f"--held-out {config.held_out} holds no dialogue of {config.agreement} out; give a"
            " larger share"
        )
    annotations = annotate_labelled(annotator, held)
    return agreement_report(
        [turn.label for turn in held],
        [annotation.error for annotation in annotations],
        [turn.dialogue for turn in held],
        config.seed,
    )


def agreement_report(
    people: Sequence[str], annotator: Sequence[str], dialogues: Sequence[str], seed: int = 0
) -> str:
    """How far an annotator agrees with people, as text, from the labels of each and the turns'
    dialogues.

    It shows κ with its 95 % interval (bootstrap over dialogues; none below FEWEST_GROUPS), a table
    with one line per label, and the confusion matrix. An unreadable annotation agrees with
    nothing."""
    names = [*LABELS, *sorted(set(annotator) - set(LABELS))]
    counts = {dialogue: np.zeros((len(names), len(names))) for dialogue in dialogues}
    for label, annotated, dialogue in zip(people, annotator, dialogues, strict=True):
        counts[dialogue][names.index(annotated), names.index(label)] += 1
    groups = list(counts.values())
    total = sum(groups)  # (K, K): rows are the annotator's labels, columns people's

    limits = interval(kappa_of_confusion(resample(groups, seed=seed)), len(groups))
    same = 100 * total.trace() / total.sum()
    commonest = total.sum(0).max() / total.sum()
    summary = (
        f"{len(people)} turns of {len(groups)} dialogues:"
        f" κ {kappa_of_confusion(total):.3f}{format_interval(limits)},"
        f" the same label for {same:.1f} %;"
        f" always the commonest would be right for {100 * commonest:.1f} % (κ 0)"
    )
    if limits is None:
        summary += f"\n\n{NO_INTERVAL}"
    by_label = [["type", "labelled", "annotated", "precision", "recall", "κ"]]
    matrix = [["annotated \\ labelled", *names]]
    for i, name in enumerate(names):
        by_label.append([name, *score_label(total, i)])
        matrix.append([name, *(f"{count:.0f}" for count in total[i])])
    return "\n\n".join([summary, markdown(by_label), markdown(matrix)])


def score_label(total: np.ndarray, i: int) -> list[str]:
    """How often people and the annotator gave label i, precision, recall, and κ of this label
    against all others, from a confusion matrix (K, K)."""
    hits = total[i, i]
    annotated = total[i].sum()
    labelled = total[:, i].sum()
    neither = total.sum() - annotated - labelled + hits
    against_others = np.array([[hits, annotated - hits], [labelled - hits, neither]])
    return [
        f"{labelled:.0f}",
        f"{annotated:.0f}",
        format_share(hits, annotated),
        format_share(hits, labelled),
        f"{kappa_of_confusion(against_others):.3f}",
    ]


def format_interval(limits: tuple[float, float] | None) -> str:
    """ " (0.812–1.000)"; "" if there is no interval."""
    if limits is None:
        return ""
    low, high = limits
    return f" ({low:.3f}–{high:.3f})"


def format_share(part: float, whole: float) -> str:
    """The share in percent; "" if there is no whole."""
    return f"{100 * part / whole:.0f} %" if whole else ""


# --- ratings --------------------------------------------------------------------------------------


def write_ratings(path: Path, dialogues: list[Dialogue], answers: dict[str, list[dict]]) -> None:
    """The rated replies of some systems as a CSV, with an empty column for people's rating beside
    each of the judge's.

    `answers` are each system's records, one per dialogue. Hide the judge's columns before people
    rate. Raises DescError as refuse_edited does."""
    rows = []
    for system, records in answers.items():
        for dialogue, record in zip(dialogues, records, strict=True):
            rated = zip(record["replies"], record.get("ratings", []))
            for turn, (reply, ratings) in enumerate(rated):
                row = {"system": system, "dialogue": dialogue.id, "turn": turn}
                row |= {"context": format_context(dialogue, turn), "reply": reply}
                row |= {f"{rubric} judge": ratings[rubric] for rubric in RUBRICS}
                rows.append(row)
    write_table(path, RATING_COLUMNS, rows)


def correlate_ratings(path: str | Path, seed: int = 0) -> str:
    """How far a judge's ratings follow people's, as a table with one line per rubric.

    The table has the columns "X judge" and "X human" for any rubric X; rows that have both ratings
    count. The report shows Spearman's ρ and Kendall's τ_b with 95 % intervals (bootstrap over
    dialogues; none below FEWEST_GROUPS). Raises DescError as read_ratings does, if a rating is no
    number, or if no row has both."""
    path = Path(path)
    rubrics, rows = read_ratings(path)
    table = [["rubric", "replies", "Spearman", "Kendall"]]
    note = ""
    for rubric in rubrics:
        groups = pair_ratings(path, rows, rubric)
        if groups:
            replies = sum(len(group) for group in groups)
            rho = format_correlation(spearman, groups, seed)
            tau = format_correlation(kendall, groups, seed)
            table.append([rubric, str(replies), rho, tau])
            if len(groups) < FEWEST_GROUPS:
                note = f"\n\n{NO_INTERVAL}"
    if len(table) == 1:
        raise DescError(
            f"{path}: no row has both a judge's and a human rating, in columns like 'empathy judge'"
            " and 'empathy human'"
        )
    return markdown(table) + note


def read_ratings(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """(rubrics, [(row number, row)]) of rated replies.

    Ratings with a key beside them are held against it. A table of one's own has no key, and may
    have any rubrics. Raises DescError as read_filled does; in a table of one's own if a rubric
    lacks the judge's or people's column, or if a reply stands twice."""
    if key_path(path).exists():
        return list(RUBRICS), read_filled(path, RATING_COLUMNS, RATING_INDEX)
    columns, rows = read_table(path, ())
    rubrics = []
    for column in columns:
        rubric, _, rater = column.rpartition(" ")
        if rubric and rater in ("judge", "human"):
            other = f"{rubric} human" if rater == "judge" else f"{rubric} judge"
            if other not in columns:
                raise DescError(f"{path}: column {other!r} is missing beside {column!r}")
            if rubric not in rubrics:
                rubrics.append(rubric)
    if set(RATING_INDEX) <= set(columns):
        names = set()
        for number, row in rows.items():
            name = name_row(row, RATING_INDEX)
            if name in names:
                raise DescError(f"{path}: row {number}: {name} stands twice")
            names.add(name)
    return rubrics, list(rows.items())


def pair_ratings(path: Path, rows: list[tuple[int, dict[str, str]]], rubric: str) -> list[Group]:
    """The pairs (judge's rating, human rating) of each dialogue that has any.

    A row that names no dialogue counts as a dialogue of its own. Raises DescError if a rating is
    no number."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for number, row in rows:
        judge = row[f"{rubric} judge"]
        human = row[f"{rubric} human"]
        if not judge.strip() or not human.strip():
            continue
        if not NUMBER.fullmatch(judge) or not NUMBER.fullmatch(human):
            raise DescError(
                f"{path}: row {number}: {rubric} should be two numbers, not {judge!r} and {human!r}"
            )
        dialogue = normalise_cell(row.get("dialogue", "")) or f"row {number}"
        pairs.setdefault(dialogue, []).append((read_number(judge), read_number(human)))
    return list(pairs.values())


def read_number(cell: str) -> float:
    """A number with a decimal point or, as some countries' spreadsheets write it, a comma."""
    return float(cell.replace(",", "."))


def format_correlation(statistic: Statistic, groups: list[Group], seed: int) -> str:
    """A correlation with its 95 % interval, "0.943 (0.812–1.000)"; without one below FEWEST_GROUPS
    dialogues."""
    limits = interval(bootstrap_statistic(statistic, groups, seed=seed), len(groups))
    return f"{pooled_statistic(statistic, groups):.3f}{format_interval(limits)}"
