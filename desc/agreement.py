"""What people say of turns, by labels or ratings: asked for, read back, learned from, and held
against an annotator or a judge."""

import csv
import io
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from desc import DescError
from desc.esconv import Dialogue, Turn
from desc.files import parse, read_records, read_text, write_bytes
from desc.judging import LABELS, RUBRICS, Annotator, Case, judging_messages
from desc.metrics import interval, kappa_of_confusion, kendall, resample, spearman
from desc.mining import Answer
from desc.prompts import Example
from desc.report import markdown
from desc.strategies import Strategies

KEY = ("number", "dialogue", "turn", "annotator", "confidence", "explanation")
FORMULA = ("=", "+", "-", "@", "\t")
SHOWN = 6  # utterances of context in a review


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


def write_review(path: Path, answers: list[tuple[Dialogue, Answer]], count: int, seed: int) -> None:
    """`count` random judged answers as a CSV for people to label, in their column "label" (UTF-8
    with a mark, for spreadsheets). What the annotator says of them would sway people, so it goes
    into a second file, the key."""
    judged = [one for one in answers if one[1].judged]
    rows, keys = [("number", "context", "strategy", "reply", "label")], [KEY]
    for number, (dialogue, answer) in enumerate(
        random.Random(seed).sample(judged, min(count, len(judged))), 1
    ):
        rows.append((number, context_of(dialogue, answer.turn), answer.strategy, answer.reply, ""))
        keys.append(
            (
                number,
                dialogue.id,
                answer.turn,
                answer.judged.error,
                answer.judged.confidence,
                answer.judged.explanation,
            )
        )
    write_table(path, rows)
    write_table(key_of(path), keys)


def context_of(dialogue: Dialogue, turn: int) -> str:
    return "\n".join(f"{now.speaker}: {now.text}" for now in dialogue.history(turn)[-SHOWN:])


def write_table(path: Path, rows: list[Sequence]) -> None:
    text = io.StringIO()
    # A spreadsheet would compute a cell that begins like a formula.
    csv.writer(text).writerows(
        [f"'{cell}" if str(cell).startswith(FORMULA) else cell for cell in row] for row in rows
    )
    write_bytes(path, text.getvalue().encode("utf-8-sig"))


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV in UTF-8, with commas or, as some countries' spreadsheets save it,
    semicolons."""
    text = read_text(path)
    head = text.partition("\n")[0]
    try:
        return list(csv.DictReader(io.StringIO(text), delimiter=max(",;", key=head.count)))
    except csv.Error as error:
        raise DescError(f"{path}: cannot be read as CSV ({error})") from None


def spare(path: Path) -> None:
    """Raises DescError where the file holds what people wrote: a new one must not take its
    place."""
    rows = read_table(path) if path.exists() else []
    if any(
        cell
        for row in rows
        for column, cell in row.items()
        if column and (column == "label" or column.endswith(" human"))
    ):
        raise DescError(f"{path} holds people's labels: move it away first")


def key_of(path: Path) -> Path:
    return path.with_suffix(".key.csv")


def read_review(path: str | Path) -> tuple[list[str], list[str], list[str]]:
    """(people's labels, the annotator's, dialogues) of the rows of a review that have a label.

    Raises DescError naming the row where a label is none of LABELS, or which the key lacks."""
    keys, people, annotator, dialogues = (
        {key.get("number"): key for key in read_table(key_of(Path(path)))},
        [],
        [],
        [],
    )
    for row in read_table(Path(path)):
        number, label = row.get("number"), (row.get("label") or "").strip().casefold()
        if not label:
            continue
        if label not in LABELS or number not in keys:
            wrong = (
                f"is labelled {label!r}; labels are {', '.join(LABELS)}"
                if number in keys
                else f"is not in {key_of(Path(path))}"
            )
            raise DescError(f"{path}: number {number} {wrong}")
        (
            people.append(label),
            annotator.append(keys[number].get("annotator")),
            dialogues.append(keys[number].get("dialogue")),
        )
    if not people:
        raise DescError(f"{path}: no row has a label yet")
    return people, annotator, dialogues


def measure(
    config, dialogues: list[Dialogue], strategies: Strategies, annotator: Annotator | None
) -> str:
    """`compare` for the file config.agreement: a review as people labelled it, or labelled turns,
    of which the annotator judges those that are held out. Raises DescError where it would need an
    annotator."""
    if config.agreement.endswith(".csv"):
        return compare(*read_review(config.agreement), config.seed)
    if annotator is None:
        raise DescError(
            "--agreement with labelled turns needs an annotator: give --annotator local or endpoint"
        )
    held = hold_out(
        read_labels(config.agreement, dialogues, strategies, config.label_map), config.held_out
    )[1]
    if not held:
        raise DescError(
            f"--held-out {config.held_out} holds no dialogue of {config.agreement} out; give a"
            " larger share"
        )
    found = []
    for name, group in groupby(
        tqdm(held, desc="annotate", dynamic_ncols=True), key=lambda one: one.dialogue
    ):
        group = list(group)
        found += [
            (one.label, judged.error, name)
            for one, judged in zip(group, annotator([one.case for one in group]))
        ]
    return compare(*zip(*found), config.seed)


def compare(
    theirs: Sequence[str], ours: Sequence[str], dialogues: Sequence[str], seed: int = 0
) -> str:
    """How far an annotator (`ours`) agrees with labels (`theirs`), as text: κ with its 95 %
    interval (bootstrap over dialogues), a row a type, and the confusion matrix. A judgement that
    could not be read agrees with nothing."""
    names = [*LABELS, *sorted(set(ours) - set(LABELS))]
    counts = {dialogue: np.zeros((len(names), len(names))) for dialogue in dialogues}
    for label, found, dialogue in zip(theirs, ours, dialogues, strict=True):
        counts[dialogue][names.index(found), names.index(label)] += 1
    groups, whole = list(counts.values()), sum(counts.values())
    low, high = interval(kappa_of_confusion(resample(groups, seed=seed)))
    most = whole.sum(0).max() / whole.sum()
    head = (
        f"{len(theirs)} turns of {len(groups)} dialogues: κ {kappa_of_confusion(whole):.3f}"
        f" ({low:.3f}–{high:.3f}), the same label "
    )
    head += (
        f"for {100 * whole.trace() / whole.sum():.1f} %; always the commonest would be right for"
        f" {100 * most:.1f} % (κ 0)"
    )
    lines = [["type", "labelled", "annotated", "precision", "recall", "κ"]]
    for i, name in enumerate(names):
        hits, found, labelled = whole[i, i], whole[i].sum(), whole[:, i].sum()
        pair = np.array(
            [[hits, found - hits], [labelled - hits, whole.sum() - found - labelled + hits]]
        )
        shares = [f"{100 * hits / n:.0f} %" if n else "" for n in (found, labelled)]
        lines.append(
            [name, f"{labelled:.0f}", f"{found:.0f}", *shares, f"{kappa_of_confusion(pair):.3f}"]
        )
    matrix = [
        ["annotated \\ labelled", *names],
        *([name, *(f"{n:.0f}" for n in row)] for name, row in zip(names, whole)),
    ]
    return "\n\n".join([head, markdown(lines), markdown(matrix)])


def write_ratings(path: Path, dialogues: list[Dialogue], answers: dict[str, list[dict]]) -> None:
    """The rated replies of some systems as a CSV, with the judge's ratings and an empty column
    beside each for people's: before it is given to them, hide the judge's."""
    rows = [
        (
            "system",
            "dialogue",
            "turn",
            "context",
            "reply",
            *(f"{rubric} {who}" for rubric in RUBRICS for who in ("judge", "human")),
        )
    ]
    for name, records in answers.items():
        for dialogue, record in zip(dialogues, records, strict=True):
            for turn, (reply, rating) in enumerate(
                zip(record["replies"], record.get("ratings", []))
            ):
                cells = [cell for rubric in RUBRICS for cell in (rating[rubric], "")]
                rows.append((name, dialogue.id, turn, context_of(dialogue, turn), reply, *cells))
    write_table(path, rows)


def correlate(path: str | Path, seed: int = 0) -> str:
    """How far a judge's ratings follow people's in the rows of a CSV that have both, columns "X
    judge" and "X human" for any X, as a table: Spearman's ρ and Kendall's τ_b with 95 % intervals
    (bootstrap over dialogues). Raises DescError where no row has both."""
    rows, lines = read_table(Path(path)), [["rubric", "replies", "Spearman", "Kendall"]]
    for rubric in [
        column.removesuffix(" judge")
        for column in (rows[0] if rows else ())
        if column and column.endswith(" judge")
    ]:
        both: dict[str, list[tuple[float, float]]] = {}
        for number, row in enumerate(rows, 1):
            cells = [row[f"{rubric} judge"], row.get(f"{rubric} human")]
            if not all(cells):
                continue
            if not all(re.fullmatch(r"\s*\d+([.,]\d+)?\s*", cell) for cell in cells):
                raise DescError(
                    f"{path}: row {number}: {rubric} should be two numbers, not {cells[0]!r} and"
                    f" {cells[1]!r}"
                )
            both.setdefault(row.get("dialogue") or str(number), []).append(
                tuple(float(cell.replace(",", ".")) for cell in cells)
            )
        groups, cells = list(both.values()), []
        if not groups:
            continue
        draws = np.random.default_rng(seed).integers(len(groups), size=(300, len(groups)))
        for measure in (spearman, kendall):
            found = [measure(*zip(*(pair for i in drawn for pair in groups[i]))) for drawn in draws]
            low, high = (
                np.nanpercentile(found, [2.5, 97.5])
                if not np.isnan(found).all()
                else (np.nan, np.nan)
            )
            cells.append(
                f"{measure(*zip(*(pair for group in groups for pair in group))):.3f}"
                f" ({low:.3f}–{high:.3f})"
            )
        lines.append([rubric, str(sum(map(len, groups))), *cells])
    if len(lines) == 1:
        raise DescError(
            f"{path}: no row has both a judge's and a human rating, in columns like 'empathy judge'"
            " and 'empathy human'"
        )
    return markdown(lines)
