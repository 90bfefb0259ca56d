"""Turns that people labelled: read, held out, and balanced for an annotator to learn from."""

import math
from collections import Counter
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from desc import DescError
from desc.esconv import Dialogue, Turn
from desc.judging.annotator import judging_messages
from desc.mining import LABELS, Case
from desc.prompts import Example
from desc.storage.files import parse, read_records, read_text
from desc.strategies import Strategies


@dataclass(frozen=True)
class Labelled:
    dialogue: str
    turn: int
    case: Case
    label: str  # one of LABELS

    def example(self) -> Example:
        """For SFT of an annotator."""
        return Example(self.dialogue, self.turn, judging_messages(self.case), self.label)


def read_labels(
    path: str | Path,
    dialogues: list[Dialogue],
    strategies: Strategies,
    label_map: str | None = None,
) -> list[Labelled]:
    """Labelled turns from JSON lines {dialogue, turn, context: [{speaker, text}, …], strategy,
    response, label}, or from the error annotations published with DecoupledESC, whose turns are
    looked up in `dialogues`, the test split.

    `label_map` is a JSON object from the file's labels to ours; None knows ours and the published
    ones. Rows with other labels are left out. Raises DescError naming the row where a field is
    missing."""
    label_map = label_map or files("desc") / "data" / "labels.json"
    known = parse(read_text(label_map), f"{label_map}:")
    records = read_records(path)
    if not isinstance(known, dict) or not all(isinstance(record, dict) for record in records):
        raise DescError(
            f"{path if isinstance(known, dict) else label_map}: should hold JSON objects"
        )
    if odd := [label for label in known.values() if label not in (*LABELS, None)]:
        raise DescError(
            f"{label_map}: {odd[0]!r} is no label; there are {', '.join(LABELS)}, and null to leave"
            " a row out"
        )
    known |= {label: label for label in LABELS}
    published = bool(records) and "user_input" in records[0]
    turns = (
        find_turns([record.get("user_input") or "" for record in records], dialogues)
        if published
        else [None] * len(records)
    )
    labelled = []
    for number, (record, turn) in enumerate(zip(records, turns), 1):
        try:
            label = known.get(record["Error Type" if published else "label"])
            if turn:
                name, k, history = turn[0].id, turn[1], turn[0].history(turn[1])
                reply = strategies.split_tag(record["response"])[1]
            else:
                name, k, reply = str(record["dialogue"]), record["turn"], record["response"]
                history = tuple(Turn(said["speaker"], said["text"]) for said in record["context"])
            if label:
                labelled.append(Labelled(name, k, Case(history, record["strategy"], reply), label))
        except (KeyError, TypeError) as error:
            raise DescError(
                f"{path}: row {number} is no labelled turn ({type(error).__name__}: {error})"
            ) from None
    if not labelled:
        raise DescError(f"{path}: holds no turn with a label that is known; give --label-map")
    return labelled


def find_turns(said: list[str], dialogues: list[Dialogue]) -> list[tuple[Dialogue, int]]:
    """The supporter turns before which the seeker said these, each turn once, in an order near that
    of the dialogues.

    Where several turns fit (an empty utterance, "Hi"), the nearest in that order is taken. Raises
    DescError where none is left."""
    places: dict[str, list[int]] = {}
    turns = [(dialogue, turn) for dialogue in dialogues for turn in range(len(dialogue))]
    for place, (dialogue, turn) in enumerate(turns):
        places.setdefault(" ".join(dialogue.turns[2 * turn].text.casefold().split()), []).append(
            place
        )
    found = []
    for number, text in enumerate(said):
        fitting = places.get(" ".join(text.casefold().split()))
        if not fitting:
            raise DescError(
                f"row {number + 1}: no test turn of --data is left before which the seeker says"
                f" {text[:60]!r}"
            )
        nearest = min(fitting, key=lambda place: abs(place - number))
        fitting.remove(nearest)
        found.append(turns[nearest])
    return found


def hold_out(labelled: list[Labelled], share: float) -> tuple[list[Labelled], list[Labelled]]:
    """(the rest, those of the last `share` of dialogues), dialogues in the order of the file: no
    dialogue is on both sides."""
    order = list(dict.fromkeys(one.dialogue for one in labelled))
    last = set(order[len(order) - round(share * len(order)) :])
    rest, held = (
        [one for one in labelled if (one.dialogue in last) is side] for side in (False, True)
    )
    return rest, sorted(held, key=lambda one: order.index(one.dialogue))


def balance(labelled: list[Labelled]) -> list[Labelled]:
    """Each turn √(count of the commonest label / count of its own) times, rounded: else a rare
    label is never worth naming. A tree reads a repeated turn once."""
    counts = Counter(one.label for one in labelled)
    most = max(counts.values(), default=0)
    return [one for one in labelled for _ in range(round(math.sqrt(most / counts[one.label])))]
