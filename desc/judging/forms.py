"""Tables (CSV) that people fill in, each with a key beside it: X.key.json for X.csv.

The key holds the digest of the table, so that nothing is replaced on which people have worked. And
it holds what each row showed, so that what people wrote is only taken for the rows that they
saw."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

from desc import DescError
from desc.judging.judge import RUBRICS
from desc.storage.files import parse, read_text, write_bytes

FOR_PEOPLE = ("label", *(f"{rubric} human" for rubric in RUBRICS))  # columns that people fill in
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
SEPARATORS = (",", ";", "\t")
# Excel's "sep=;" before the head
SEPARATOR_LINE = re.compile(r'\s*"?sep=[^\r\n]?"?[,; \t]*[\r\n]+', re.IGNORECASE)
WHOLE_NUMBER = re.compile(r"(\d+)[.,]0+")
NUMBER = re.compile(r"\s*\d{1,15}([.,]\d{1,25})?(e[+-]?\d{1,2})?\s*", re.IGNORECASE)


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
    separator = max(SEPARATORS, key=lambda mark: count_cells(head, mark))
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


def count_cells(head: str, separator: str) -> int:
    """The number of cells in a line of a CSV; 0 if it is none."""
    try:
        return len(next(csv.reader([head], delimiter=separator), ()))
    except csv.Error:
        return 0


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
        kept = dict.fromkeys(columns, "")
        kept |= {column: "" if cell is None else str(cell) for column, cell in row.items()}
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
        if not any(row[column].strip() for column in columns):
            continue  # only columns of people's own are filled, such as a note's
        name = name_row(row, index)
        where = f"{path}: row {number}"
        if name not in key:
            raise DescError(f"{where}: {name} is not in {place}")
        if name in filled:
            raise DescError(f"{where}: {name} stands twice")
        for column in columns:
            if column not in FOR_PEOPLE and not is_same(row[column], key[name][column]):
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


def read_number(cell: str) -> float:
    """A number with a decimal point or, as some countries' spreadsheets write it, a comma."""
    return float(cell.replace(",", "."))
