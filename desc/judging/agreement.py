"""How far the annotator and the judge agree with people.

- A review: judged answers as a CSV, in which people label what is wrong with them.
- Labelled turns, which the annotator labels, too.
- Ratings: rated replies as a CSV, in which people rate them, too.

Both are written and read by desc/judging/forms.py, which never replaces what people wrote."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from desc import DescError
from desc.cli import markdown
from desc.domain import UNREADABLE, Domain
from desc.esconv import Dialogue, flatten
from desc.judging.forms import (
    NUMBER,
    key_path,
    name_row,
    normalise_cell,
    read_filled,
    read_number,
    read_table,
    write_table,
)
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
from desc.mining import Annotator, Answer

REVIEW_COLUMNS = ("number", "context", "strategy", "reply", "label")
RATING_COLUMNS = (
    *("system", "dialogue", "turn", "context", "reply"),
    *(f"{rubric} {rater}" for rubric in RUBRICS for rater in ("judge", "human")),
)
# Columns that tell the rows apart.
REVIEW_INDEX = ("number",)
RATING_INDEX = ("system", "dialogue", "turn")
TABLE_SUFFIXES = (".csv", ".tsv", ".xlsx", ".ods")
CONTEXT_LENGTH = 6  # utterances that people see before a reply


def format_context(dialogue: Dialogue, turn: int, speakers: tuple[str, str]) -> str:
    """The last utterances before supporter turn `turn`, each on a line of its own."""
    shown = dialogue.history(turn)[-CONTEXT_LENGTH:]
    return flatten(shown, speakers).removesuffix("\n")


# --- reviews --------------------------------------------------------------------------------------


def write_review(
    path: Path,
    answers: list[tuple[Dialogue, Answer]],
    count: int,
    seed: int,
    speakers: tuple[str, str],
) -> None:
    """`count` random judged answers as a CSV for people to label, in the column "label".

    What the annotator says of them would sway people. So it is in the key alone. Raises DescError
    as refuse_edited does."""
    judged = [(dialogue, answer) for dialogue, answer in answers if answer.judged]
    drawn = random.Random(seed).sample(judged, min(count, len(judged)))
    rows = []
    for number, (dialogue, answer) in enumerate(drawn, 1):
        context = format_context(dialogue, answer.turn, speakers)
        row = {"number": number, "context": context}
        row |= {"strategy": answer.strategy, "reply": answer.reply}
        row |= {"dialogue": dialogue.id, "turn": answer.turn, "annotator": answer.judged.error}
        row |= {"confidence": answer.judged.confidence, "explanation": answer.judged.explanation}
        rows.append(row)
    write_table(path, REVIEW_COLUMNS, rows)


def read_review(path: str | Path, labels: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """(people's labels, the annotator's, dialogues): one of each per labelled answer of a review.

    Raises DescError as read_filled does, if a label is none of the domain's `labels`, naming its
    number, or if nothing is labelled."""
    path = Path(path)
    people, annotator, dialogues = [], [], []
    hidden = ("dialogue", "turn", "annotator")
    for row_number, row in read_filled(path, REVIEW_COLUMNS, REVIEW_INDEX, hidden):
        label = normalise_cell(row["label"]).casefold()
        if not label:
            continue
        number = row["number"]
        if label not in labels:
            raise DescError(
                f"{path}: row {row_number}: number {number} is labelled {label!r}; labels are"
                f" {', '.join(labels)}"
            )
        if row["annotator"] not in (*labels, UNREADABLE):
            raise DescError(
                f"{key_path(path)}: number {number} is annotated {row['annotator']!r}, no label"
            )
        people.append(label)
        annotator.append(row["annotator"])
        dialogues.append(row["dialogue"])
    if not people:
        raise DescError(f"{path}: no row has a label yet")
    return people, annotator, dialogues


# --- labels ---------------------------------------------------------------------------------------


def measure_agreement(
    config, dialogues: list[Dialogue], domain: Domain, annotator: Annotator | None
) -> str:
    """`agreement_report` on the file config.agreement (`config` is mine_preferences.py's).

    A table, or any file with a key, is a review; the key holds the annotator's labels already. Any
    other file holds labelled turns, of which the annotator labels those that are held out
    (config.held_out); published ones are looked up in `dialogues`. Raises DescError if an annotator
    is needed and missing, or if nothing is held out."""
    path = Path(config.agreement)
    if path.suffix.casefold() in TABLE_SUFFIXES or key_path(path).exists():
        labelled_by = read_review(config.agreement, domain.labels)
        return agreement_report(*labelled_by, domain.labels, config.seed)
    if annotator is None:
        raise DescError(
            "--agreement with labelled turns needs an annotator: give --annotator local or endpoint"
        )
    labelled = read_labels(config.agreement, dialogues, domain, config.label_map)
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
        domain.labels,
        config.seed,
    )


def agreement_report(
    people: Sequence[str],
    annotator: Sequence[str],
    dialogues: Sequence[str],
    labels: Sequence[str],
    seed: int = 0,
) -> str:
    """How far an annotator agrees with people, as text, from the labels of each and the turns'
    dialogues. `labels` are the domain's.

    It shows κ with its 95 % interval (bootstrap over dialogues; none below FEWEST_GROUPS), a table
    with one line per label, and the confusion matrix. An unreadable annotation agrees with
    nothing."""
    names = [*labels, *sorted(set(annotator) - set(labels))]
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


def write_ratings(
    path: Path, dialogues: list[Dialogue], answers: dict[str, list[dict]], speakers: tuple[str, str]
) -> None:
    """The rated replies of some systems as a CSV, with an empty column for people's rating beside
    each of the judge's.

    `answers` are each system's records, one per dialogue. Hide the judge's columns before people
    rate. Raises DescError as refuse_edited does."""
    rows = []
    for system, records in answers.items():
        for dialogue, record in zip(dialogues, records, strict=True):
            rated = zip(record["replies"], record.get("ratings", []))
            for turn, (reply, ratings) in enumerate(rated):
                row = {"system": system, "dialogue": dialogue.id, "turn": turn}
                row |= {"context": format_context(dialogue, turn, speakers), "reply": reply}
                row |= {f"{rubric} judge": ratings[rubric] for rubric in RUBRICS}
                rows.append(row)
    write_table(path, RATING_COLUMNS, rows)


def correlate_ratings(path: str | Path, seed: int = 0) -> str:
    """How far a judge's ratings follow people's, as a table with one line per rubric.

    The table has the columns "X judge" and "X human" for any rubric X; rows that have both ratings
    count. The report shows Spearman's ρ and Kendall's τ_b with 95 % intervals (bootstrap over
    dialogues; none below FEWEST_GROUPS). Raises DescError as read_ratings does, if a rating is no
    number, or if no row has both."""
    path = Path(path)
    rubrics, rows = read_ratings(path)
    table = [["rubric", "replies", "Spearman", "Kendall"]]
    note = ""
    for rubric in rubrics:
        groups = pair_ratings(path, rows, rubric)
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


def read_ratings(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """(rubrics, [(row number, row)]) of rated replies.

    Ratings with a key beside them are held against it. A table of one's own has no key, and may
    have any rubrics. Raises DescError as read_filled does; in a table of one's own if a rubric
    lacks the judge's or people's column, or if a reply stands twice."""
    if key_path(path).exists():
        return list(RUBRICS), read_filled(path, RATING_COLUMNS, RATING_INDEX)
    columns, rows = read_table(path, ())
    rubrics = []
    for column in columns:
        rubric, _, rater = column.rpartition(" ")
        if rubric and rater in ("judge", "human"):
            other = f"{rubric} human" if rater == "judge" else f"{rubric} judge"
            if other not in columns:
                raise DescError(f"{path}: column {other!r} is missing beside {column!r}")
            if rubric not in rubrics:
                rubrics.append(rubric)
    if set(RATING_INDEX) <= set(columns):
        names = set()
        for number, row in rows.items():
            name = name_row(row, RATING_INDEX)
            if name in names:
                raise DescError(f"{path}: row {number}: {name} stands twice")
            names.add(name)
    return rubrics, list(rows.items())


def pair_ratings(path: Path, rows: list[tuple[int, dict[str, str]]], rubric: str) -> list[Group]:
    """The pairs (judge's rating, human rating) of each dialogue that has any.

    A row that names no dialogue counts as a dialogue of its own. Raises DescError if a rating is
    no number."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for number, row in rows:
        judge = row[f"{rubric} judge"]
        human = row[f"{rubric} human"]
        if not judge.strip() or not human.strip():
            continue
        if not NUMBER.fullmatch(judge) or not NUMBER.fullmatch(human):
            raise DescError(
                f"{path}: row {number}: {rubric} should be two numbers, not {judge!r} and {human!r}"
            )
        dialogue = normalise_cell(row.get("dialogue", "")) or f"row {number}"
        pairs.setdefault(dialogue, []).append((read_number(judge), read_number(human)))
    return list(pairs.values())


def format_correlation(statistic: Statistic, groups: list[Group], seed: int) -> str:
    """A correlation with its 95 % interval, "0.943 (0.812–1.000)"; without one below FEWEST_GROUPS
    dialogues."""
    limits = interval(bootstrap_statistic(statistic, groups, seed=seed), len(groups))
    return f"{pooled_statistic(statistic, groups):.3f}{format_interval(limits)}"
