"""How far the annotator and the judge agree with people.

- A review: judged answers as a CSV, in which people label what is wrong with them.
- Labelled turns, which the annotator labels, too.
- Ratings: rated replies as a CSV, in which people rate them, too."""

import csv
import io
import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from desc import DescError
from desc.cli import markdown
from desc.esconv import Dialogue, flatten
from desc.judging.judge import RUBRICS
from desc.judging.labels import annotate_labelled, hold_out, read_labels
from desc.judging.statistics import (
    Group,
    Statistic,
    bootstrap_statistic,
    kappa_of_confusion,
    kendall,
    pooled_statistic,
    spearman,
)
from desc.metrics import FEWEST_GROUPS, NO_INTERVAL, interval, resample
from desc.mining import LABELS, Annotator, Answer
from desc.storage.files import read_text, write_bytes
from desc.strategies import Strategies

REVIEW_COLUMNS = ("number", "context", "strategy", "reply", "label")
KEY_COLUMNS = ("number", "dialogue", "turn", "annotator", "confidence", "explanation")
REPLY_COLUMNS = ("system", "dialogue", "turn", "context", "reply")
FORMULA_STARTS = ("=", "+", "-", "@", "\t")
CONTEXT_LENGTH = 6  # utterances that people see before a reply
NUMBER = re.compile(r"\s*\d+([.,]\d+)?\s*")


# --- tables ---------------------------------------------------------------------------------------


def write_table(path: Path, lines: list[Sequence]) -> None:
    """A CSV in UTF-8 with a mark, by which spreadsheets know the encoding."""
    text = io.StringIO()
    writer = csv.writer(text)
    for line in lines:
        writer.writerow([disarm_formula(cell) for cell in line])
    write_bytes(path, text.getvalue().encode("utf-8-sig"))


def disarm_formula(cell):
    """The cell with a quotation mark before it if a spreadsheet would compute it as a formula."""
    return f"'{cell}" if str(cell).startswith(FORMULA_STARTS) else cell


def read_table(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV in UTF-8, each as {column: cell}.

    Cells are separated by commas, or by semicolons, as some countries' spreadsheets do. Raises
    DescError if the file cannot be read."""
    text = read_text(path)
    head, _, _ = text.partition("\n")
    delimiter = ";" if head.count(";") > head.count(",") else ","
    try:
        return list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
    except csv.Error as error:
        raise DescError(f"{path}: cannot be read as CSV ({error})") from None


def refuse_labelled(path: Path) -> None:
    """Raises DescError if the file holds what people wrote, because a new one would replace it."""
    lines = read_table(path) if path.exists() else []
    for line in lines:
        for column, cell in line.items():
            # cells beyond the last column have no name
            is_for_people = column and (column == "label" or column.endswith(" human"))
            if is_for_people and cell:
                raise DescError(f"{path} holds people's labels: move it away first")


def format_context(dialogue: Dialogue, turn: int) -> str:
    """The last utterances before supporter turn `turn`, each on a line of its own."""
    return flatten(dialogue.history(turn)[-CONTEXT_LENGTH:]).removesuffix("\n")


# --- reviews --------------------------------------------------------------------------------------


def write_review(path: Path, answers: list[tuple[Dialogue, Answer]], count: int, seed: int) -> None:
    """`count` random judged answers as a CSV for people to label, in the column "label".

    What the annotator says of them would sway people. So it goes into a second file, the key."""
    judged = [(dialogue, answer) for dialogue, answer in answers if answer.judged]
    drawn = random.Random(seed).sample(judged, min(count, len(judged)))
    review: list[Sequence] = [REVIEW_COLUMNS]
    key: list[Sequence] = [KEY_COLUMNS]
    for number, (dialogue, answer) in enumerate(drawn, 1):
        context = format_context(dialogue, answer.turn)
        review.append((number, context, answer.strategy, answer.reply, ""))
        annotation = (answer.judged.error, answer.judged.confidence, answer.judged.explanation)
        key.append((number, dialogue.id, answer.turn, *annotation))
    write_table(path, review)
    write_table(key_path(path), key)


def key_path(path: Path) -> Path:
    """The file with the annotator's annotations on the answers of a review."""
    return path.with_suffix(".key.csv")


def read_review(path: str | Path) -> tuple[list[str], list[str], list[str]]:
    """(people's labels, the annotator's, dialogues): one of each per labelled answer of a review.

    Raises DescError if a label is none of LABELS or the key lacks an answer, naming its number, or
    if nothing is labelled."""
    path = Path(path)
    key = {line.get("number"): line for line in read_table(key_path(path))}
    people, annotator, dialogues = [], [], []
    for line in read_table(path):
        number = line.get("number")
        label = (line.get("label") or "").strip().casefold()
        if not label:
            continue
        if number not in key:
            raise DescError(f"{path}: number {number} is not in {key_path(path)}")
        if label not in LABELS:
            raise DescError(
                f"{path}: number {number} is labelled {label!r}; labels are {', '.join(LABELS)}"
            )
        people.append(label)
        annotator.append(key[number].get("annotator"))
        dialogues.append(key[number].get("dialogue"))
    if not people:
        raise DescError(f"{path}: no row has a label yet")
    return people, annotator, dialogues


# --- labels ---------------------------------------------------------------------------------------


def measure_agreement(
    config, dialogues: list[Dialogue], strategies: Strategies, annotator: Annotator | None
) -> str:
    """`agreement_report` on the file config.agreement (`config` is mine_preferences.py's).

    A CSV is a review, which holds the annotator's labels already. Any other file holds labelled
    turns, of which the annotator labels those that are held out (config.held_out); published ones
    are looked up in `dialogues`. Raises DescError if an annotator is needed and missing, or if
    nothing is held out."""
    if config.agreement.endswith(".csv"):
        return agreement_report(*read_review(config.agreement), config.seed)
    if annotator is None:
        raise DescError(
            "--agreement with labelled turns needs an annotator: give --annotator local or endpoint"
        )
    labelled = read_labels(config.agreement, dialogues, strategies, config.label_map)
    _, held = hold_out(labelled, config.held_out)
    if not held:
        raise DescError(
            f"--held-out {config.held_out} holds no dialogue of {config.agreement} out; give a"
            " larger share"
        )
    annotations = annotate_labelled(annotator, held)
    return agreement_report(
        [turn.label for turn in held],
        [annotation.error for annotation in annotations],
        [turn.dialogue for turn in held],
        config.seed,
    )


def agreement_report(
    people: Sequence[str], annotator: Sequence[str], dialogues: Sequence[str], seed: int = 0
) -> str:
    """How far an annotator agrees with people, as text, from the labels of each and the turns'
    dialogues.

    It shows κ with its 95 % interval (bootstrap over dialogues; none below FEWEST_GROUPS), a table
    with one line per label, and the confusion matrix. An unreadable annotation agrees with
    nothing."""
    names = [*LABELS, *sorted(set(annotator) - set(LABELS))]
    counts = {dialogue: np.zeros((len(names), len(names))) for dialogue in dialogues}
    for label, annotated, dialogue in zip(people, annotator, dialogues, strict=True):
        counts[dialogue][names.index(annotated), names.index(label)] += 1
    groups = list(counts.values())
    total = sum(groups)  # (K, K): rows are the annotator's labels, columns people's

    limits = interval(kappa_of_confusion(resample(groups, seed=seed)), len(groups))
    same = 100 * total.trace() / total.sum()
    commonest = total.sum(0).max() / total.sum()
    summary = (
        f"{len(people)} turns of {len(groups)} dialogues:"
        f" κ {kappa_of_confusion(total):.3f}{format_interval(limits)},"
        f" the same label for {same:.1f} %;"
        f" always the commonest would be right for {100 * commonest:.1f} % (κ 0)"
    )
    if limits is None:
        summary += f"\n\n{NO_INTERVAL}"
    by_label = [["type", "labelled", "annotated", "precision", "recall", "κ"]]
    matrix = [["annotated \\ labelled", *names]]
    for i, name in enumerate(names):
        by_label.append([name, *score_label(total, i)])
        matrix.append([name, *(f"{count:.0f}" for count in total[i])])
    return "\n\n".join([summary, markdown(by_label), markdown(matrix)])


def score_label(total: np.ndarray, i: int) -> list[str]:
    """How often people and the annotator gave label i, precision, recall, and κ of this label
    against all others, from a confusion matrix (K, K)."""
    hits = total[i, i]
    annotated = total[i].sum()
    labelled = total[:, i].sum()
    neither = total.sum() - annotated - labelled + hits
    against_others = np.array([[hits, annotated - hits], [labelled - hits, neither]])
    return [
        f"{labelled:.0f}",
        f"{annotated:.0f}",
        format_share(hits, annotated),
        format_share(hits, labelled),
        f"{kappa_of_confusion(against_others):.3f}",
    ]


def format_interval(limits: tuple[float, float] | None) -> str:
    """ " (0.812–1.000)"; "" if there is no interval."""
    if limits is None:
        return ""
    low, high = limits
    return f" ({low:.3f}–{high:.3f})"


def format_share(part: float, whole: float) -> str:
    """The share in percent; "" if there is no whole."""
    return f"{100 * part / whole:.0f} %" if whole else ""


# --- ratings --------------------------------------------------------------------------------------


def write_ratings(path: Path, dialogues: list[Dialogue], answers: dict[str, list[dict]]) -> None:
    """The rated replies of some systems as a CSV, with an empty column for people's rating beside
    each of the judge's.

    `answers` are each system's records, one per dialogue. Hide the judge's columns before people
    rate."""
    rating_columns = [f"{rubric} {rater}" for rubric in RUBRICS for rater in ("judge", "human")]
    table: list[Sequence] = [(*REPLY_COLUMNS, *rating_columns)]
    for system, records in answers.items():
        for dialogue, record in zip(dialogues, records, strict=True):
            rated = zip(record["replies"], record.get("ratings", []))
            for turn, (reply, ratings) in enumerate(rated):
                context = format_context(dialogue, turn)
                cells = [cell for rubric in RUBRICS for cell in (ratings[rubric], "")]
                table.append((system, dialogue.id, turn, context, reply, *cells))
    write_table(path, table)


def correlate_ratings(path: str | Path, seed: int = 0) -> str:
    """How far a judge's ratings follow people's, as a table with one line per rubric.

    The CSV has the columns "X judge" and "X human" for any rubric X; lines that have both ratings
    count. The table shows Spearman's ρ and Kendall's τ_b with 95 % intervals (bootstrap over
    dialogues; none below FEWEST_GROUPS). Raises DescError if a rating is no number, or if no line
    has both."""
    lines = read_table(Path(path))
    table = [["rubric", "replies", "Spearman", "Kendall"]]
    note = ""
    for column in lines[0] if lines else ():
        if not column or not column.endswith(" judge"):
            continue
        rubric = column.removesuffix(" judge")
        groups = pair_ratings(path, lines, rubric)
        if groups:
            replies = sum(len(group) for group in groups)
            rho = format_correlation(spearman, groups, seed)
            tau = format_correlation(kendall, groups, seed)
            table.append([rubric, str(replies), rho, tau])
            if len(groups) < FEWEST_GROUPS:
                note = f"\n\n{NO_INTERVAL}"
    if len(table) == 1:
        raise DescError(
            f"{path}: no row has both a judge's and a human rating, in columns like 'empathy judge'"
            " and 'empathy human'"
        )
    return markdown(table) + note


def pair_ratings(path: str | Path, lines: list[dict[str, str]], rubric: str) -> list[Group]:
    """The pairs (judge's rating, human rating) of each dialogue that has any.

    A line that names no dialogue counts as a dialogue of its own. Raises DescError if a rating is
    no number."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for number, line in enumerate(lines, 1):
        judge = line[f"{rubric} judge"]
        human = line.get(f"{rubric} human")
        if not judge or not human:
            continue
        if not NUMBER.fullmatch(judge) or not NUMBER.fullmatch(human):
            raise DescError(
                f"{path}: row {number}: {rubric} should be two numbers, not {judge!r} and {human!r}"
            )
        dialogue = line.get("dialogue") or str(number)
        pairs.setdefault(dialogue, []).append((read_number(judge), read_number(human)))
    return list(pairs.values())


def read_number(cell: str) -> float:
    """A number with a decimal point or, as some countries' spreadsheets write it, a comma."""
    return float(cell.replace(",", "."))


def format_correlation(statistic: Statistic, groups: list[Group], seed: int) -> str:
    """A correlation with its 95 % interval, "0.943 (0.812–1.000)"; without one below FEWEST_GROUPS
    dialogues."""
    limits = interval(bootstrap_statistic(statistic, groups, seed=seed), len(groups))
    return f"{pooled_statistic(statistic, groups):.3f}{format_interval(limits)}"
