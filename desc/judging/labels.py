"""Turns that people labelled: read, held out, balanced for an annotator to learn from, and
annotated by one."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from desc import DescError
from desc.domain import Domain, Strategies
from desc.esconv import SPEAKERS, Dialogue, Turn
from desc.judging.annotator import build_annotator_messages
from desc.mining import Annotation, Annotator, Case
from desc.prompts import Example
from desc.storage.files import describe, parse, read_field, read_records, read_text


@dataclass(frozen=True)
class LabelledTurn:
    dialogue: str
    turn: int
    case: Case
    label: str  # one of the domain's

    def example(self, domain: Domain) -> Example:
        """The turn as an annotator is trained on it."""
        messages = build_annotator_messages(self.case, domain)
        return Example(self.dialogue, self.turn, messages, self.label)


def read_labels(
    path: str | Path, dialogues: list[Dialogue], domain: Domain, label_map: str | None = None
) -> list[LabelledTurn]:
    """The labelled turns of a file, which is of one of two kinds:

    - JSON lines {dialogue, turn, context: [{speaker, text}, …], strategy, response, label};
    - the error annotations published with DecoupledESC, whose turns are looked up in `dialogues`,
      the test split.

    `label_map` is a file as `read_label_map` reads it. Rows whose labels it does not know are left
    out, and rows that have none (null). Raises DescError, naming file and row, if a field of
    another row is missing or cannot be used, or if no row is left."""
    known_labels, strategies = read_label_map(label_map, domain.labels), domain.strategies
    records = read_records(path)
    if not all(isinstance(record, dict) for record in records):
        raise DescError(f"{path}: should hold JSON objects")
    is_published = bool(records) and "user_input" in records[0]
    if is_published:
        seeker_texts = []
        for i, record in enumerate(records):
            is_null = record.get("user_input") is None
            text = "" if is_null else read_field(record, "user_input", str, f"{path}: row {i + 1}")
            seeker_texts.append(text)
        places = find_turns(seeker_texts, dialogues, path)
    labelled = []
    for i, record in enumerate(records):
        where = f"{path}: row {i + 1}"
        if is_published:
            turn = read_published_row(record, known_labels, *places[i], strategies, where)
        else:
            turn = read_own_row(record, known_labels, strategies, where)
        if turn is not None:
            labelled.append(turn)
    if not labelled:
        raise DescError(f"{path}: holds no turn with a label that is known; give --label-map")
    return labelled


def read_label_map(path: str | None, labels: Sequence[str]) -> dict[str, str | None]:
    """{a file's label: one of `labels`, or None for rows to leave out}, from a JSON object.

    Without a path, it holds the labels published with DecoupledESC, as far as they mean one of
    `labels`, the domain's. These themselves are always known. Raises DescError if the file is no
    such object."""
    own = {label: label for label in labels}
    if path is None:
        shipped = parse(read_text(files("desc") / "data" / "labels.json"), "labels.json:")
        return {name: label for name, label in shipped.items() if label in labels} | own
    known_labels = parse(read_text(path), f"{path}:")
    if not isinstance(known_labels, dict):
        raise DescError(f"{path}: should hold JSON objects")
    for label in known_labels.values():
        if label is not None and label not in labels:
            raise DescError(
                f"{path}: {label!r} is no label; there are {', '.join(labels)}, and null to leave a"
                " row out"
            )
    return known_labels | own


def read_own_row(
    record: dict, known_labels: dict[str, str | None], strategies: Strategies, where: str
) -> LabelledTurn | None:
    """The labelled turn in a JSON line; None if it has no label, or one that is not known.

    Raises DescError that begins with `where` if a field is missing or cannot be used."""
    label = read_label(record, "label", known_labels, where)
    if label is None:
        return None
    dialogue, turn = record.get("dialogue"), record.get("turn")
    if type(dialogue) is not int:
        dialogue = read_field(record, "dialogue", str, where)
    if type(turn) is not int or turn < 0:
        raise DescError(f"{where}: field 'turn' should be an integer from 0, not {describe(turn)}")
    context = read_field(record, "context", list, where)
    if not context:
        raise DescError(f"{where}: field 'context' is empty")
    history = tuple(
        read_utterance(utterance, f"{where}, context, utterance {number}")
        for number, utterance in enumerate(context, 1)
    )
    reply = read_field(record, "response", str, where)
    case = read_case(record, history, reply, strategies, where)
    return LabelledTurn(str(dialogue), turn, case, label)


def read_utterance(record, where: str) -> Turn:
    """An utterance {speaker, text} of a row's context. Raises DescError that begins with `where` if
    it is none."""
    speaker, text = (
        read_field(record, "speaker", str, where),
        read_field(record, "text", str, where),
    )
    if speaker not in SPEAKERS:
        raise DescError(
            f"{where}: field 'speaker' is {speaker!r}; it should be one of {', '.join(SPEAKERS)}"
        )
    # One blank of the seeker's stands between two turns of a supporter's (desc.esconv.alternate).
    if not text.strip() and (SPEAKERS[speaker], text) != ("seeker", " "):
        raise DescError(f"{where}: field 'text' is empty")
    return Turn(SPEAKERS[speaker], text)


def read_label(
    record: dict, name: str, known_labels: dict[str, str | None], where: str
) -> str | None:
    """One of the domain's labels; None if the row's label is null or not known. Raises DescError
    that begins with `where` if it is missing or no text."""
    if name in record and record[name] is None:
        return None
    return known_labels.get(read_field(record, name, str, where))


def read_case(
    record: dict, history: tuple[Turn, ...], reply: str, strategies: Strategies, where: str
) -> Case:
    """The supporter turn that a row is about. Raises DescError that begins with `where` if the
    reply is blank, or the row's strategy unknown."""
    strategy = read_field(record, "strategy", str, where)
    if strategy not in strategies:
        raise DescError(
            f"{where}: field 'strategy' is {strategy!r}, no strategy of this"
            f" taxonomy{strategies.suggestion(strategy)}"
        )
    if not reply.strip():
        raise DescError(f"{where}: field 'response' is empty")
    return Case(history, strategy, reply)


def read_published_row(
    record: dict,
    known_labels: dict[str, str | None],
    dialogue: Dialogue,
    turn: int,
    strategies: Strategies,
    where: str,
) -> LabelledTurn | None:
    """The labelled turn in a row of the published annotations, which stands at supporter turn
    `turn` of `dialogue`; None if it has no label, or one that is not known.

    Raises DescError that begins with `where` if a field is missing or cannot be used."""
    label = read_label(record, "Error Type", known_labels, where)
    if label is None:
        return None
    _, reply = strategies.split_tag(read_field(record, "response", str, where))
    case = read_case(record, dialogue.history(turn), reply, strategies, where)
    return LabelledTurn(dialogue.id, turn, case, label)


def find_turns(
    seeker_texts: list[str], dialogues: list[Dialogue], path: str | Path
) -> list[tuple[Dialogue, int]]:
    """The (dialogue, supporter turn) that each of the seeker's texts comes directly before.

    The texts are in an order near that of the dialogues. Several turns may fit, for example after
    an empty text or "Hi". Then the nearest in that order is taken. No turn is taken twice. Raises
    DescError if no fitting turn is left, naming the row of the file `path`."""
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
                f"{path}: row {i + 1}: no test turn of --data is left before which the seeker says"
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
