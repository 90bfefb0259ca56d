"""Turns that people labelled: read, held out, balanced for an annotator to learn from, and
annotated by one."""

import math
from collections import Counter
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from desc import DescError
from desc.esconv import Dialogue, Turn
from desc.judging.annotator import build_annotator_messages
from desc.mining import LABELS, Annotation, Annotator, Case
from desc.prompts import Example
from desc.storage.files import parse, read_records, read_text
from desc.strategies import Strategies


@dataclass(frozen=True)
class LabelledTurn:
    dialogue: str
    turn: int
    case: Case
    label: str  # one of LABELS

    def example(self) -> Example:
        """The turn as an annotator is trained on it."""
        messages = build_annotator_messages(self.case)
        return Example(self.dialogue, self.turn, messages, self.label)


def read_labels(
    path: str | Path,
    dialogues: list[Dialogue],
    strategies: Strategies,
    label_map: str | None = None,
) -> list[LabelledTurn]:
    """The labelled turns of a file, which is of one of two kinds:

    - JSON lines {dialogue, turn, context: [{speaker, text}, …], strategy, response, label};
    - the error annotations published with DecoupledESC, whose turns are looked up in `dialogues`,
      the test split.

    `label_map` is a file as `read_label_map` reads it. Rows whose labels it does not know are left
    out. Raises DescError if a field is missing, naming the row, or if no row is left."""
    known_labels = read_label_map(label_map)
    records = read_records(path)
    if not all(isinstance(record, dict) for record in records):
        raise DescError(f"{path}: should hold JSON objects")
    is_published = bool(records) and "user_input" in records[0]
    if is_published:
        seeker_texts = [record.get("user_input") or "" for record in records]
        places = find_turns(seeker_texts, dialogues)
    labelled = []
    for i, record in enumerate(records):
        try:
            if is_published:
                turn = read_published_row(record, known_labels, *places[i], strategies)
            else:
                turn = read_own_row(record, known_labels)
        except (KeyError, TypeError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise DescError(f"{path}: row {i + 1} is no labelled turn ({problem})") from None
        if turn is not None:
            labelled.append(turn)
    if not labelled:
        raise DescError(f"{path}: holds no turn with a label that is known; give --label-map")
    return labelled


def read_label_map(path: str | None) -> dict[str, str | None]:
    """{a file's label: one of LABELS, or None for rows to leave out}, from a JSON object.

    Without a path, it holds the labels published with DecoupledESC. LABELS themselves are always
    known. Raises DescError if the file is no such object."""
    path = path or files("desc") / "data" / "labels.json"
    known_labels = parse(read_text(path), f"{path}:")
    if not isinstance(known_labels, dict):
        raise DescError(f"{path}: should hold JSON objects")
    for label in known_labels.values():
        if label is not None and label not in LABELS:
            raise DescError(
                f"{path}: {label!r} is no label; there are {', '.join(LABELS)}, and null to leave a"
                " row out"
            )
    return known_labels | {label: label for label in LABELS}


def read_own_row(record: dict, known_labels: dict[str, str | None]) -> LabelledTurn | None:
    """The labelled turn in a JSON line; None if its label is not known.

    Raises KeyError or TypeError if a field is missing or of a wrong kind."""
    label = known_labels.get(record["label"])
    dialogue = str(record["dialogue"])
    turn = record["turn"]
    reply = record["response"]
    history = tuple(
        Turn(utterance["speaker"], utterance["text"]) for utterance in record["context"]
    )
    if label is None:
        return None
    return LabelledTurn(dialogue, turn, Case(history, record["strategy"], reply), label)


def read_published_row(
    record: dict,
    known_labels: dict[str, str | None],
    dialogue: Dialogue,
    turn: int,
    strategies: Strategies,
) -> LabelledTurn | None:
    """The labelled turn in a row of the published annotations, which stands at supporter turn
    `turn` of `dialogue`; None if its label is not known.

    Raises KeyError or TypeError if a field is missing or of a wrong kind."""
    label = known_labels.get(record["Error Type"])
    _, reply = strategies.split_tag(record["response"])
    if label is None:
        return None
    case = Case(dialogue.history(turn), record["strategy"], reply)
    return LabelledTurn(dialogue.id, turn, case, label)


def find_turns(seeker_texts: list[str], dialogues: list[Dialogue]) -> list[tuple[Dialogue, int]]:
    """The (dialogue, supporter turn) that each of the seeker's texts comes directly before.

    The texts are in an order near that of the dialogues. Several turns may fit, for example after
    an empty text or "Hi". Then the nearest in that order is taken. No turn is taken twice. Raises
    DescError if no fitting turn is left."""
    turns = [(dialogue, turn) for dialogue in dialogues for turn in range(len(dialogue))]
    places: dict[str, list[int]] = {}  # indices into `turns` that are not taken yet, by text
    for place, (dialogue, turn) in enumerate(turns):
        seeker_turn = dialogue.history(turn)[-1]
        places.setdefault(normalise(seeker_turn.text), []).append(place)
    matches = []
    for i, text in enumerate(seeker_texts):
        fitting = places.get(normalise(text))
        if not fitting:
            raise DescError(
                f"row {i + 1}: no test turn of --data is left before which the seeker says"
                f" {text[:60]!r}"
            )
        nearest = min(fitting, key=lambda place: abs(place - i))
        fitting.remove(nearest)
        matches.append(turns[nearest])
    return matches


def normalise(text: str) -> str:
    """The text without case, and with single blanks between its words."""
    return " ".join(text.casefold().split())


def hold_out(
    labelled: list[LabelledTurn], share: float
) -> tuple[list[LabelledTurn], list[LabelledTurn]]:
    """(the rest, the turns of the last `share` of the dialogues).

    Dialogues are in the order in which the file first names them. So no dialogue is on both sides.
    The turns held out are sorted by dialogue."""
    order = list(dict.fromkeys(turn.dialogue for turn in labelled))
    held_dialogues = order[len(order) - round(share * len(order)) :]
    rest = [turn for turn in labelled if turn.dialogue not in held_dialogues]
    held = [turn for turn in labelled if turn.dialogue in held_dialogues]
    held.sort(key=lambda turn: order.index(turn.dialogue))
    return rest, held


def balance(labelled: list[LabelledTurn]) -> list[LabelledTurn]:
    """Each turn √(count of the commonest label / count of its own label) times, rounded.

    Otherwise it would never pay to name a rare label. A repeated turn costs little, because a tree
    reads it once."""
    counts = Counter(turn.label for turn in labelled)
    balanced = []
    for turn in labelled:
        times = math.sqrt(max(counts.values()) / counts[turn.label])
        balanced += [turn] * round(times)
    return balanced


def annotate_labelled(annotator: Annotator, labelled: list[LabelledTurn]) -> list[Annotation]:
    """The annotation of each labelled turn. A dialogue's turns are annotated together, so they
    should follow one another."""
    annotations = []
    progress = tqdm(labelled, desc="annotate", dynamic_ncols=True)
    for _, turns in groupby(progress, key=lambda turn: turn.dialogue):
        annotations += annotator([turn.case for turn in turns])
    return annotations
