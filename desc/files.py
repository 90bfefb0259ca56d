"""Writing files so that none is ever seen half-written: to a temporary name, then renamed."""

import json
import os
from pathlib import Path

from desc import DescError


def write_bytes(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:  # a full disk, or a folder of that name: leave it as it was
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the new name too must outlive a power cut
    os.close(folder)


def write_json(path: Path, value) -> None:
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_lines(path: Path, records: list[dict]) -> None:
    """JSON lines."""
    write_bytes(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())


def append_line(path: Path, record: dict) -> None:
    """One more JSON line, whole on disk before this returns."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def mend(path: Path) -> None:
    """Drop a last line that a kill cut off."""
    if path.exists():
        whole = path.read_bytes().rpartition(b"\n")[0]
        write_bytes(path, whole + b"\n" if whole else b"")


def read_lines(path: Path) -> list[dict]:
    """JSON lines; DescError naming the line that is none."""
    try:
        text = path.read_text(encoding="utf-8").removesuffix("\n")
        lines = text.split("\n") if text else []  # not splitlines(): JSON may hold U+2028 and U+0085 as they are
    except (OSError, UnicodeDecodeError) as error:
        raise DescError(f"{path}: cannot be read ({error})") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DescError(f"{path}: line {number} is not JSON, or is cut off ({error.msg})") from None
    return records
