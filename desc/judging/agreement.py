"""What people say of turns, by labels or ratings: asked for, read back, learned from, and held
against an annotator or a judge."""

import csv
import io
import random
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from desc import DescError
from desc.cli import markdown
from desc.esconv import Dialogue
from desc.judging.judge import RUBRICS
from desc.judging.labels import hold_out, read_labels
from desc.judging.statistics import kappa_of_confusion, kendall, spearman
from desc.metrics import interval, resample
from desc.mining import LABELS, Annotator, Answer
from desc.storage.files import read_text, write_bytes
from desc.strategies import Strategies

KEY = ("number", "dialogue", "turn", "annotator", "confidence", "explanation")
FORMULA = ("=", "+", "-", "@", "\t")
SHOWN = 6  # utterances of context in a review


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


def refuse_labelled(path: Path) -> None:
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
