"""Dialogues: reading ESConv (official JSON, Hub JSON lines) and the sample, checking every field,
and the splits."""

import random
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from desc import DescError
from desc.storage.files import read_records
from desc.strategies import ESCONV, Strategies

SPLITS = ("train", "valid", "test")
HUB = "thu-coai/esconv"
SPEAKERS = {"seeker": "seeker", "usr": "seeker", "supporter": "supporter", "sys": "supporter"}


@dataclass(frozen=True)
class Turn:
    speaker: str  # "seeker" or "supporter"
    text: str
    strategy: str | None = None  # the supporter's; None for the seeker


@dataclass(frozen=True)
class Dialogue:
    """Strictly alternating turns, seeker first, supporter last: supporter turn t is turns[2t + 1],
    after turns[: 2t + 1]."""

    id: str
    turns: tuple[Turn, ...]

    def __len__(self):
        """The number of supporter turns."""
        return len(self.turns) // 2

    def supporter(self, turn: int) -> Turn:
        return self.turns[2 * turn + 1]

    def supporter_turns(self) -> tuple[Turn, ...]:
        return self.turns[1::2]

    def history(self, turn: int) -> tuple[Turn, ...]:
        """What supporter turn `turn` answers; the seeker's words are its last."""
        return self.turns[: 2 * turn + 1]


def first(dialogues: list, count: int) -> list:
    """The first `count` of some dialogues or pairs; 0 takes all."""
    return dialogues[:count] if count else dialogues


def alternate(utterances: list[Turn]) -> tuple[Turn, ...]:
    """Make the speakers alternate as the paper's released preprocessing does.

    Seeker utterances in a row are joined by a line break. Supporter utterances each stay a turn of
    their own, with a seeker turn of one blank between them. "Hi" opens a dialogue that the
    supporter opens. What the seeker says last is dropped."""
    turns: list[Turn] = []
    for now in utterances:
        last = turns[-1].speaker if turns else None
        if now.speaker == "seeker" == last:
            turns[-1] = Turn("seeker", turns[-1].text + "\n" + now.text)
            continue
        if now.speaker == "supporter" and last != "seeker":
            turns.append(Turn("seeker", " " if turns else "Hi"))
        turns.append(now)
    return tuple(turns[: len(turns) // 2 * 2])


def load_dialogues(path: str | Path, strategies: Strategies = ESCONV) -> list[Dialogue]:
    """Read a file of dialogues, in its order, ids "0", "1", ….

    The file is a JSON list in ESConv's official schema, an object that holds such a list as
    "dialogues" (the sample), or JSON lines as on the Hub (speaker usr | sys, text, strategy).
    Raises DescError naming file, dialogue and field."""
    records = read_records(path)
    if len(records) == 1 and isinstance(records[0], dict) and "dialogues" in records[0]:
        records = _field(records[0], "dialogues", list, str(path))
    if not records:
        raise DescError(f"{path}: holds no dialogue")
    dialogues = []
    for i, record in enumerate(records):
        where = f"{path}: dialogue {i}"
        said = _field(record, "dialog", list, where)
        turns = alternate(
            [_utterance(one, f"{where}, utterance {k}", strategies) for k, one in enumerate(said)]
        )
        if not turns:
            raise DescError(f"{where}: field 'dialog' has no supporter utterance")
        dialogues.append(Dialogue(str(i), turns))
    return dialogues


def _kind(value) -> str:
    return {dict: "an object", list: "a list", str: "a string", type(None): "null"}.get(
        type(value), f"{value!r}"
    )


def _field(record, name: str, kind: type, where: str):
    """record[name], checked; a readable DescError otherwise."""
    if not isinstance(record, dict):
        raise DescError(f"{where}: should be an object, not {_kind(record)}")
    if name not in record:
        raise DescError(
            f"{where}: field {name!r} is missing (it has {', '.join(map(repr, record)) or 'none'})"
        )
    if not isinstance(record[name], kind):
        raise DescError(
            f"{where}: field {name!r} should be {_kind(kind())}, not {_kind(record[name])}"
        )
    if kind is str and any("\ud800" <= c <= "\udfff" for c in record[name]):
        raise DescError(
            f"{where}: field {name!r} holds half a surrogate pair, which is no Unicode text"
        )
    return record[name]


def _utterance(record, where: str, strategies: Strategies) -> Turn:
    said = _field(record, "speaker", str, where)
    if said not in SPEAKERS:
        raise DescError(
            f"{where}: field 'speaker' is {said!r}; it should be one of {', '.join(SPEAKERS)}"
        )
    hub = said in ("usr", "sys")
    text = _field(record, "text" if hub else "content", str, where).strip()
    if not text:
        raise DescError(f"{where}: field {'text' if hub else 'content'!r} is empty")
    if SPEAKERS[said] == "seeker":
        return Turn("seeker", text)
    strategy = _field(
        record if hub else _field(record, "annotation", dict, where), "strategy", str, where
    )
    if strategy not in strategies:
        raise DescError(
            f"{where}: field 'strategy' is {strategy!r}, no strategy of this"
            f" taxonomy{strategies.suggestion(strategy)}"
        )
    return Turn("supporter", text, strategy)


def split(
    dialogues: list[Dialogue], split_file: str | None = None, seed: int = 0
) -> dict[str, list[Dialogue]]:
    """{"train", "valid", "test"}: as `split_file` says ({"train": [index, …], …}), otherwise a
    seeded 8:1:1.

    Raises DescError where the split file is malformed, leaves a split empty, names a dialogue twice
    or one that is not there."""
    if split_file is None:
        if len(dialogues) < 3:
            raise DescError(
                f"{len(dialogues)} dialogues cannot be split in train, valid and test; give at"
                " least 3"
            )
        order = random.Random(seed).sample(range(len(dialogues)), len(dialogues))
        tenth = max(1, round(len(dialogues) / 10))
        parts = {
            "train": sorted(order[2 * tenth :]),
            "valid": sorted(order[:tenth]),
            "test": sorted(order[tenth : 2 * tenth]),
        }
    else:
        (parts,) = read_records(split_file)[:1] or [None]
        for name in SPLITS:
            if not _field(parts, name, list, split_file):
                raise DescError(f"{split_file}: {name} is empty")
            for i in parts[name]:
                if type(i) is not int or not 0 <= i < len(dialogues):
                    raise DescError(
                        f"{split_file}: {name}: {i!r} is no index into {len(dialogues)} dialogues"
                    )
        chosen = [i for name in SPLITS for i in parts[name]]
        if len(set(chosen)) < len(chosen):
            raise DescError(f"{split_file}: a dialogue stands in two places")
    return {name: [dialogues[i] for i in parts[name]] for name in SPLITS}


def load_splits(
    data: str, split_file: str | None = None, strategies: Strategies = ESCONV, seed: int = 0
) -> dict[str, list[Dialogue]]:
    """The three splits of "sample" (shipped with the package), "esconv" (fetched from the Hub, in
    its own splits), or a file."""
    if data == "esconv":
        if split_file:
            raise DescError(
                "--split-file counts in ESConv.json's order; --data esconv has splits of its own:"
                " give --data PATH/ESConv.json"
            )
        return {name: _hub_split(name, strategies) for name in SPLITS}
    path = files("desc") / "data" / "sample.json" if data == "sample" else Path(data)
    return split(load_dialogues(path, strategies), split_file, seed)


def _hub_split(name: str, strategies: Strategies) -> list[Dialogue]:
    from huggingface_hub import HfApi, hf_hub_download

    try:
        names = HfApi().list_repo_files(HUB, repo_type="dataset")
        (name_there,) = [file for file in names if file.startswith(f"{name}.")]
        path = hf_hub_download(HUB, name_there, repo_type="dataset")
    except Exception as error:  # the Hub's errors have no common base that says "offline"
        raise DescError(
            f"--data esconv: {HUB} could not be fetched ({type(error).__name__}); download"
            " ESConv.json and give --data PATH/ESConv.json"
        ) from None
    return [Dialogue(f"{name}/{d.id}", d.turns) for d in load_dialogues(path, strategies)]
