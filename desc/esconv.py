"""Dialogues: reading ESConv (official JSON, Hub JSON lines) and the sample, checking every field,
and the splits."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from desc import DescError
from desc.domain import ESCONV, Strategies
from desc.storage.files import read_field, read_records

SPLITS = ("train", "valid", "test")
HUB = "thu-coai/esconv"
SPEAKERS = {"seeker": "seeker", "usr": "seeker", "supporter": "supporter", "sys": "supporter"}


@dataclass(frozen=True)
class Turn:
    speaker: str  # the role: "seeker", who is answered, or "supporter", who answers
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


def gold_strategies(dialogues: list[Dialogue]) -> list[str]:
    """People's strategy at every supporter turn, dialogue after dialogue."""
    return [turn.strategy for dialogue in dialogues for turn in dialogue.supporter_turns()]


def flatten(
    turns: Iterable[Turn], speakers: tuple[str, str], render: Callable[[str], str] = str
) -> str:
    """One line per utterance: its speaker's name, and its text as `render` writes it. `speakers`
    are a domain's names of who is answered and of who answers."""
    names = dict(zip(("seeker", "supporter"), speakers))
    return "".join(f"{names[turn.speaker]}: {render(turn.text)}\n" for turn in turns)


def alternate(utterances: list[Turn]) -> tuple[Turn, ...]:
    """Make the speakers alternate, as the paper's released preprocessing does.

    - Seeker utterances in a row are joined by a line break.
    - Supporter utterances each stay a turn, with a seeker turn of one blank between them.
    - "Hi" opens a dialogue that the supporter opens.
    - What the seeker says last is dropped."""
    turns: list[Turn] = []
    for utterance in utterances:
        last = turns[-1].speaker if turns else None
        if utterance.speaker == "seeker" == last:
            turns[-1] = Turn("seeker", turns[-1].text + "\n" + utterance.text)
            continue
        if utterance.speaker == "supporter" and last != "seeker":
            turns.append(Turn("seeker", " " if turns else "Hi"))
        turns.append(utterance)
    return tuple(turns[: len(turns) // 2 * 2])


def load_dialogues(path: str | Path, strategies: Strategies = ESCONV.strategies) -> list[Dialogue]:
    """Read a file of dialogues, in its order, with the ids "0", "1", ….

    The file is one of three things:

    - a JSON list in ESConv's official schema,
    - an object that holds such a list as "dialogues" (the sample),
    - JSON lines as on the Hub (speaker usr | sys, text, strategy).

    Raises DescError naming file, dialogue and field."""
    records = read_records(path)
    if len(records) == 1 and isinstance(records[0], dict) and "dialogues" in records[0]:
        records = read_field(records[0], "dialogues", list, str(path))
    if not records:
        raise DescError(f"{path}: holds no dialogue")
    dialogues = []
    for i, record in enumerate(records):
        where = f"{path}: dialogue {i}"
        utterances = [
            _utterance(utterance, f"{where}, utterance {k}", strategies)
            for k, utterance in enumerate(read_field(record, "dialog", list, where))
        ]
        turns = alternate(utterances)
        if not turns:
            raise DescError(f"{where}: field 'dialog' has no supporter utterance")
        dialogues.append(Dialogue(str(i), turns))
    return dialogues


def _utterance(record, where: str, strategies: Strategies) -> Turn:
    speaker = read_field(record, "speaker", str, where)
    if speaker not in SPEAKERS:
        raise DescError(
            f"{where}: field 'speaker' is {speaker!r}; it should be one of {', '.join(SPEAKERS)}"
        )
    from_hub = speaker in ("usr", "sys")
    text_field = "text" if from_hub else "content"
    text = read_field(record, text_field, str, where).strip()
    if not text:
        raise DescError(f"{where}: field {text_field!r} is empty")
    if SPEAKERS[speaker] == "seeker":
        return Turn("seeker", text)
    holder = record if from_hub else read_field(record, "annotation", dict, where)
    strategy = read_field(holder, "strategy", str, where)
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

    Raises DescError if the split file is malformed, leaves a split empty, names a dialogue twice,
    or names one that does not exist."""
    if split_file is None:
        indices = random_split(len(dialogues), seed)
    else:
        indices = read_split(split_file, len(dialogues))
    return {name: [dialogues[i] for i in indices[name]] for name in SPLITS}


def random_split(count: int, seed: int) -> dict[str, list[int]]:
    """The indices of a seeded 8:1:1 split of `count` dialogues."""
    if count < 3:
        raise DescError(
            f"{count} dialogues cannot be split in train, valid and test; give at least 3"
        )
    order = random.Random(seed).sample(range(count), count)
    tenth = max(1, round(count / 10))
    return {
        "train": sorted(order[2 * tenth :]),
        "valid": sorted(order[:tenth]),
        "test": sorted(order[tenth : 2 * tenth]),
    }


def read_split(path: str, count: int) -> dict[str, list[int]]:
    """The indices in a split file, checked against the number of dialogues."""
    records = read_records(path)
    indices = records[0] if records else None
    for name in SPLITS:
        if not read_field(indices, name, list, path):
            raise DescError(f"{path}: {name} is empty")
        for i in indices[name]:
            if type(i) is not int or not 0 <= i < count:
                raise DescError(f"{path}: {name}: {i!r} is no index into {count} dialogues")
    chosen = [i for name in SPLITS for i in indices[name]]
    if len(set(chosen)) < len(chosen):
        raise DescError(f"{path}: a dialogue stands in two places")
    return indices


def load_splits(
    data: str,
    split_file: str | None = None,
    strategies: Strategies = ESCONV.strategies,
    seed: int = 0,
) -> dict[str, list[Dialogue]]:
    """The three splits of "sample" (shipped with the package), "esconv" (fetched from the Hub, in
    its own splits), or a file."""
    if data == "esconv":
        if split_file:
            raise DescError(
                "a split file counts in ESConv.json's order, but the Hub's esconv has splits of its"
                " own: name the file ESConv.json itself as the data"
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
            f"esconv: {HUB} could not be fetched ({type(error).__name__}); download ESConv.json and"
            " name that file as the data"
        ) from None
    return [Dialogue(f"{name}/{d.id}", d.turns) for d in load_dialogues(path, strategies)]
