"""Writing files so that none is ever seen half-written: to a temporary name, then renamed."""

import json
import os
import secrets
import socket
import sys
from collections.abc import Iterable
from pathlib import Path

from desc import DescError

if os.name == "posix":
    import fcntl

TEMPORARY = ".desc-tmp"  # how the names of half-written files end
held_locks = []  # open files, so that they stay locked until this process ends


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all, and make its folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # such as a full disk, or a folder of that name: all stays as it was
        temporary.unlink(missing_ok=True)
        error.filename = str(path)  # which a failed write does not name
        raise
    if os.name == "posix":  # Windows opens no folder
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name must outlive a power cut, too
        os.close(folder)


def claim_folder(folder: Path) -> None:
    """Make this process the only writer of FOLDER until it ends, however it ends.

    The lock is on a file beside the folder, .NAME.lock. A file system without locks, and Windows,
    are left without. What a killed writer left half-written is deleted. Raises DescError if another
    process writes there, naming it."""
    if os.name != "posix":
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = open(
        folder.parent / f".{folder.name}.lock", "a+", encoding="utf-8", errors="backslashreplace"
    )
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "just begun"
        lock.close()
        raise DescError(
            f"{folder}: another run writes there ({holder}); wait for its end, or give another"
            " --out"
        ) from None
    except OSError:  # this file system has no locks
        lock.close()
        return
    held_locks.append(lock)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}: {' '.join(sys.argv)[:200]}\n")
    lock.flush()
    for half_written in folder.glob(f"*{TEMPORARY}"):
        half_written.unlink()


def encode_text(text: str) -> bytes:
    """The text in UTF-8. A path may hold bytes that are not UTF-8, which Python reads as halves of
    surrogate pairs; these are escaped, as JSON can."""
    return text.encode("utf-8", "backslashreplace")


def write_json(path: Path, value) -> None:
    write_bytes(path, encode_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n"))


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """One JSON line per record."""
    lines = [encode_text(json.dumps(record, ensure_ascii=False) + "\n") for record in records]
    write_bytes(path, b"".join(lines))


def append_line(path: Path, record: dict) -> None:
    """Append one JSON line, which is whole on disk before this returns."""
    line = encode_text(json.dumps(record, ensure_ascii=False) + "\n")
    try:
        with open(path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)
        raise


def drop_torn_line(path: Path) -> None:
    """Drop a last line that a kill cut off."""
    if path.exists():
        whole = path.read_bytes().rpartition(b"\n")[0]
        write_bytes(path, whole + b"\n" if whole else b"")


def read_text(path: str | Path) -> str:
    """A text in UTF-8, with or without a mark. Raises DescError if it cannot be read as that."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DescError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DescError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def parse(text: str, where: str):
    """The value of a JSON text. Raises DescError if it is none, naming `where` it stands."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets, too
        raise DescError(
            f"{where} is not JSON, or is cut off, and cannot be read ({error})"
        ) from None


def read_lines(path: str | Path) -> dict[str, object]:
    """{"PATH: line 1": its value} of JSON lines; blank lines are left out. Raises DescError naming
    the line that is no JSON."""
    return parse_lines(read_text(path), path)


def parse_lines(text: str, path: str | Path) -> dict[str, object]:
    """read_lines of a text that was read from `path`."""
    # not splitlines(): JSON may hold U+2028 and U+0085 as they are
    lines = {f"{path}: line {number}": line for number, line in enumerate(text.split("\n"), 1)}
    return {where: parse(line, where) for where, line in lines.items() if line.strip()}


def read_records(path: str | Path) -> list:
    """The elements of a JSON list, one JSON object, or JSON lines. Raises DescError if the file is
    none of these."""
    text = read_text(path)
    first = text.strip().partition("\n")[0].rstrip()
    if first.startswith("{") and first.endswith("}"):
        return list(parse_lines(text, path).values())  # read once, because it may be a pipe
    whole = parse(text, f"{path}:")
    if not isinstance(whole, (list, dict)):
        raise DescError(f"{path}: should hold a list or an object, not {text.strip()[:60]}")
    return whole if isinstance(whole, list) else [whole]


KINDS = {dict: "an object", list: "a list", str: "a string", type(None): "null"}


def describe(value) -> str:
    """What an error message calls a JSON value: "a list", or a number as it is."""
    return KINDS.get(type(value), repr(value))


def read_field(record, name: str, kind: type, where: str):
    """record[name], checked. Raises DescError if it is missing, or of another kind."""
    if not isinstance(record, dict):
        raise DescError(f"{where}: should be an object, not {describe(record)}")
    if name not in record:
        names = ", ".join(map(repr, record)) or "none"
        raise DescError(f"{where}: field {name!r} is missing (it has {names})")
    value = record[name]
    if not isinstance(value, kind):
        raise DescError(f"{where}: field {name!r} should be {KINDS[kind]}, not {describe(value)}")
    if kind is str and any("\ud800" <= character <= "\udfff" for character in value):
        raise DescError(
            f"{where}: field {name!r} holds half a surrogate pair, which is no Unicode text"
        )
    return value
