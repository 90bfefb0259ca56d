"""What a long run has done so far, dialogue by dialogue: killed and started again, it goes on from
there, on any number of ranks."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from desc import distributed
from desc.checkpoint import refuse_differing
from desc.files import append_line, mend, read_lines, write_lines


def key(*parts) -> str:
    """Of a piece of work: what its record is found by."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def journal_settings(folder: Path, name: str) -> dict:
    """The settings of the run that is under way in FOLDER/NAME.RANK.jsonl; {} if there is none."""
    for part in sorted(folder.glob(f"{name}.*.jsonl")):
        with open(part, encoding="utf-8") as file, suppress(ValueError):
            return json.loads(file.readline())  # a ValueError if a kill cut this line off
    return {}


class Journal:
    """FOLDER/NAME.jsonl, which a run that ended leaves, and beside it a NAME.RANK.jsonl for each
    rank of a run under way. The first line of each are the settings, then a record a piece of work,
    whole on disk once `append` returns."""

    def __init__(self, folder: Path, name: str, settings: dict):
        """Every rank must call this. Raises DescError where a run under way was begun with other
        settings, naming them."""
        self.whole, self.mine = (
            folder / f"{name}.jsonl",
            folder / f"{name}.{distributed.rank()}.jsonl",
        )
        self.settings = settings
        for part in self.parts() if not distributed.rank() else ():
            mend(part)
        distributed.barrier()
        self.done = self.read()
        if self.whole.exists() and not self.done:
            print(f"{self.whole} was made with other settings; it is replaced at the end")
        distributed.barrier()  # every rank has read all of them before any grows

    def parts(self) -> list[Path]:
        return sorted(self.whole.parent.glob(f"{self.whole.stem}.*.jsonl"))

    def read(self) -> dict[str, dict]:
        """The records by key."""
        before, *records = (read_lines(self.whole) if self.whole.exists() else []) or [
            self.settings
        ]
        records = records if before == self.settings else []
        for part in self.parts():
            before, *more = read_lines(part) or [self.settings]
            refuse_differing(part, before, self.settings)
            records += more
        return {record["key"]: record for record in records}

    def append(self, record: dict) -> None:
        if not self.mine.exists() or not self.mine.stat().st_size:
            write_lines(self.mine, [self.settings])
        append_line(self.mine, record)

    def finish(self, keys: list[str]) -> list[dict]:
        """All ranks' records in the order of `keys`, and nothing half done any more. Only the first
        rank may call this, after all."""
        done = self.read()
        records = {key: done[key] for key in keys}
        write_lines(self.whole, [self.settings, *(records | done).values()])
        for part in self.parts():
            part.unlink()
        return list(records.values())
