"""What a long run has done so far, by dialogue: killed and started again, it goes on from there, on
any number of ranks."""

import hashlib
import json
import re
import sys
from contextlib import suppress
from pathlib import Path

from desc import DescError
from desc.storage.checkpoint import differing, refuse_differing
from desc.storage.files import append_line, drop_torn_line, encode_text, read_lines, write_lines


def work_key(*parts) -> str:
    """A stable hash that identifies one unit of work, so that its record is found again."""
    return hashlib.sha256(encode_text("\n".join(map(str, parts)))).hexdigest()[:16]


def journal_settings(folder: Path, name: str, wanted: dict) -> dict:
    """The settings of the run under way in FOLDER/NAME.RANK.jsonl, else those of the finished one
    in FOLDER/NAME.jsonl if they are `wanted` but for dtype and date; {} if there is neither."""
    for part in part_files(folder, name):
        return first_line(part)
    finished = first_line(folder / f"{name}.jsonl")
    any_machine_and_day = {"dtype": None, "date": None}
    same = finished | any_machine_and_day == wanted | any_machine_and_day
    return finished if same else {}


def part_files(folder: Path, name: str) -> list[Path]:
    """The files FOLDER/NAME.RANK.jsonl. Others that begin alike, such as a copy that people made,
    are not ours."""
    paths = sorted(folder.glob(f"{name}.*.jsonl"))
    return [path for path in paths if re.fullmatch(r"0|[1-9]\d{0,3}", path.name.split(".")[-2])]


def first_line(path: Path) -> dict:
    """The first JSON line of a file; {} if it is no object, as if a kill cut it off."""
    with suppress(OSError, ValueError, RecursionError), open(path, encoding="utf-8") as file:
        settings = json.loads(file.readline())
        return settings if isinstance(settings, dict) else {}
    return {}


def seal(record: dict) -> dict:
    """The record with a digest of itself, by which one that was damaged is told."""
    return record | {"digest": work_key(json.dumps(record))}


def unseal(record, where: str) -> dict:
    """The record in a line at `where`. Raises DescError if it was damaged.

    Lines of older versions have no digest, so of them only the key is checked."""
    if isinstance(record, dict) and isinstance(record.get("key"), str):
        whole = {name: value for name, value in record.items() if name != "digest"}
        if "digest" not in record or record == seal(whole):
            return whole
    raise DescError(f"{where} is damaged: delete it, and what it held is asked for again")


def read_metrics(path: Path) -> list[dict]:
    """The records of a training run's metrics.jsonl: finite numbers, of which "step" is an integer.

    Raises DescError naming the line that is no such record."""
    lines = read_lines(path)
    for where, record in lines.items():
        is_record = isinstance(record, dict) and type(record.get("step")) is int
        if not is_record or not all(map(is_finite, record.values())):
            raise DescError(f"{where} is no record of a step: delete this line")
    return list(lines.values())


def is_finite(value) -> bool:
    """Whether a JSON value is a number that a float can hold."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


class Journal:
    """FOLDER/NAME.jsonl, which a finished run leaves, and beside it NAME.RANK.jsonl for each rank
    of a run under way.

    The first line of each file holds the settings. After it comes one record for each unit of work,
    whole on disk once `append` returns, and sealed by a digest. `rank` is this process's number
    among `world_size`, and `wait_for_all` returns once every rank has called it."""

    def __init__(
        self,
        folder: Path,
        name: str,
        settings: dict,
        rank: int = 0,
        world_size: int = 1,
        wait_for_all=lambda: None,
    ):
        """Every rank must call this. Raises DescError if a run under way was begun with other
        settings, naming them."""
        self.whole, self.mine = folder / f"{name}.jsonl", folder / f"{name}.{rank}.jsonl"
        self.settings, self.rank, self.world_size = settings, rank, world_size
        if rank == 0:
            for part in self.parts():
                drop_torn_line(part)
        wait_for_all()
        self.done = self.read()
        if self.whole.exists() and not self.done:
            print(f"{self.whole} was made with other settings; it is replaced at the end")
        wait_for_all()  # every rank has read all files before any of them grows

    def parts(self) -> list[Path]:
        return part_files(self.whole.parent, self.whole.stem)

    def read(self) -> dict[str, dict]:
        """The records by key: of the finished run if it had the same settings, and of the one under
        way. Raises DescError naming the line that was damaged."""
        sealed = []  # (where, record)
        if self.whole.exists():
            lines = list(read_lines(self.whole).items())
            made = lines[0][1] if lines else None
            if isinstance(made, dict) and not differing(made, self.settings):
                sealed += lines[1:]
        for part in self.parts():
            lines = list(read_lines(part).items())
            if lines:
                refuse_differing(part, lines[0][1], self.settings)
                sealed += lines[1:]
        records = [unseal(record, where) for where, record in sealed]
        return {record["key"]: record for record in records}

    def left_for_me(self, groups: list[dict]) -> list[dict]:
        """Of groups of units, by key, those that are not all done; of these this rank's share.

        A group stays whole, so that its units are answered as they would be without a kill, if
        groups are the same; otherwise up to rounding."""
        left = [group for group in groups if not group.keys() <= self.done.keys()]
        return left[self.rank :: self.world_size]

    def append(self, record: dict) -> None:
        if not self.mine.exists() or not self.mine.stat().st_size:
            write_lines(self.mine, [self.settings])
        append_line(self.mine, seal(record))

    def finish(self, keys: list[str]) -> list[dict]:
        """All ranks' records in the order of `keys`. Nothing half done stays. Only the first rank
        may call this, after all have done their work."""
        done = self.read()
        records = {key: done[key] for key in keys}
        write_lines(self.whole, [self.settings, *map(seal, (records | done).values())])
        self.discard()
        return list(records.values())

    def discard(self) -> None:
        """Delete what is half done. Only the first rank may call this."""
        for part in self.parts():
            part.unlink()
