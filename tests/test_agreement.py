"""pytest tests/test_agreement.py"""

import csv
import io
import json
import random
from functools import partial
from math import nan
from types import SimpleNamespace

import numpy as np
import pytest

from desc import DescError
from desc.domain import ESCONV, UNREADABLE
from desc.esconv import Dialogue, Turn
from desc.judging import agreement
from desc.judging.agreement import agreement_report, correlate_ratings, measure_agreement
from desc.judging.forms import refuse_edited
from desc.judging.judge import RUBRICS
from desc.judging.labels import annotate_labelled, find_turns, hold_out, read_labels
from desc.judging.statistics import bootstrap_statistic, kappa_of_confusion, spearman
from desc.metrics import NO_INTERVAL
from desc.mining import Annotation, Answer

read_review = partial(agreement.read_review, labels=ESCONV.labels)
write_review = partial(agreement.write_review, speakers=ESCONV.speakers)
write_ratings = partial(agreement.write_ratings, speakers=ESCONV.speakers)
ROW = {
    "dialogue": "3",
    "turn": 1,
    "context": [{"speaker": "seeker", "text": "Hi"}],
    "strategy": "Others",
    "response": "Hm.",
    "label": "none",
}


def talk(name, *seeker_texts):
    """A dialogue in which a supporter's question follows each of the seeker's texts."""
    turns = []
    for text in seeker_texts:
        turns += [Turn("seeker", text), Turn("supporter", "So?", "Question")]
    return Dialogue(name, tuple(turns))


def write_records(path, records):
    """JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_csv(path):
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))


def write_csv(path, lines):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)


# --- κ --------------------------------------------------------------------------------------------


def test_kappa_by_hand():
    """20 + 15 of 50 agree: 0.7. Raters say yes to 25 and 30 turns. By chance 0.5 · 0.6 + 0.5 · 0.4
    = 0.5 agree, so κ = 0.2 / 0.5."""
    assert kappa_of_confusion(np.array([[20, 5], [10, 15]])) == pytest.approx(0.4)
    assert kappa_of_confusion(np.array([[9, 0], [0, 0]])) == 0
    assert kappa_of_confusion(np.zeros((2, 2))) == 0


def test_kappa_is_scikit_learns():
    cohen_kappa_score = pytest.importorskip("sklearn.metrics").cohen_kappa_score
    draw = random.Random(0)
    people = [draw.choice(ESCONV.labels) for _ in range(200)]
    annotator = [label if draw.random() < 0.4 else draw.choice(ESCONV.labels) for label in people]
    counts = np.zeros((6, 6))
    for a, b in zip(annotator, people):
        counts[ESCONV.labels.index(a), ESCONV.labels.index(b)] += 1
    expected = cohen_kappa_score(people, annotator)
    assert kappa_of_confusion(counts) == pytest.approx(expected)

    names = [str(i // 10) for i in range(200)]
    report = agreement_report(people, annotator, names, ESCONV.labels)
    assert f"200 turns of 20 dialogues: κ {expected:.3f}" in report
    of_none = cohen_kappa_score(
        [label == "none" for label in people], [label == "none" for label in annotator]
    )
    line = next(line for line in report.split("\n") if line.startswith("| none"))
    assert line.endswith(f"{of_none:.3f} |")


def test_an_unreadable_judgement_agrees_with_nothing():
    """A row of its own shows how many there are. Rows are the annotator's labels."""
    annotator = ["none", UNREADABLE, "none"]
    report = agreement_report(["none"] * 3, annotator, ["0", "0", "1"], ESCONV.labels)
    assert "the same label for 66.7 %" in report
    assert "| unreadable | 0 | 1 | 0 % |  | 0.000 |" in report
    assert report.endswith("| unreadable | 0 | 0 | 0 | 0 | 0 | 1 | 0 |")


# --- reviews --------------------------------------------------------------------------------------


SEEKERS = {"0": ("=1+1", 'a "quoted"\nline;\ttab', "ä"), "1": ("x", "3.0")}
# People's labels by number; the annotator's are all "none".
LABELLED = {str(number): label for number, label in enumerate(ESCONV.labels[:5], 1)}


def judged_answers(annotated="none", mark="-"):
    """Five judged answers of two dialogues, and one that is not judged."""
    dialogues = [talk(name, *texts) for name, texts in SEEKERS.items()]
    answers = [(dialogues[0], Answer(0, "Others", "unjudged"))]
    for dialogue in dialogues:
        for turn in range(len(dialogue)):
            judgement = Annotation(annotated, 0.5, "Fits.")
            answer = Answer(turn, "Others", f"{mark}{dialogue.id}{turn}", judgement)
            answers.append((dialogue, answer))
    return answers


@pytest.fixture
def review(tmp_path):
    """The path of a review with five judged answers, from two dialogues."""
    write_review(tmp_path / "review.csv", judged_answers(), 10, seed=0)
    return tmp_path / "review.csv"


def label_review(path, *labels):
    """Write people's labels into a review, as a spreadsheet would."""
    write_csv(path, [line | {"label": label} for line, label in zip(read_csv(path), labels)])


def change_key(path, change):
    """Let `change` work on the list of rows in the key of `path`."""
    place = path.with_suffix(".key.json")
    key = json.loads(place.read_text(encoding="utf-8"))
    change(key["rows"])
    place.write_text(json.dumps(key), encoding="utf-8")


def test_a_review_shows_people_the_context_and_not_what_the_annotator_says(review):
    data = review.read_bytes()
    assert data.startswith(b"\xef\xbb\xbf") and b"none" not in data and b"Fits." not in data
    lines = read_csv(review)
    assert any('a "quoted"\nline' in line["context"] for line in lines)
    # The quotation mark keeps a spreadsheet from computing a formula.
    assert sorted(line["reply"] for line in lines) == ["'-00", "'-01", "'-02", "'-10", "'-11"]


def test_a_review_comes_back_as_people_labelled_it(review):
    with pytest.raises(DescError, match="no row has a label yet"):
        read_review(review)
    label_review(review, "none", " Template  response ", "", "none", " ")
    people, annotator, dialogues = read_review(review)
    assert people == ["none", "template response", "none"] and annotator == ["none"] * 3
    labelled = [line for line in read_csv(review) if line["number"] not in ("3", "5")]
    assert dialogues == [line["reply"][2] for line in labelled]


def as_csv(rows, encoding="utf-8", **options):
    """A table as bytes, as a program with other habits would save it."""
    text = io.StringIO()
    csv.writer(text, **options).writerows(rows)
    return text.getvalue().encode(encoding)


def name_columns(rows, *names):
    return as_csv([names, *rows[1:]])


# What programs and people do to a filled-in review, from which it is still read exactly. `rows` are
# lists of cells: the head, and the five rows with number, context, strategy, reply and label.
HARMLESS = {
    "as filled in": lambda rows: as_csv(rows),
    "with a mark": lambda rows: as_csv(rows, "utf-8-sig"),
    "other case": lambda rows: name_columns(
        rows, "NUMBER", "Context", "strategy", "Reply", "LABEL"
    ),
    "blanks around": lambda rows: name_columns(
        rows, "number ", "context", " strategy", "reply", "\tlabel "
    ),
    "other order": lambda rows: as_csv([row[::-1] for row in rows]),
    "semicolons": lambda rows: as_csv(rows, delimiter=";"),
    "tabs": lambda rows: as_csv(rows, delimiter="\t"),
    "Excel's preamble": lambda rows: b"\xef\xbb\xbfsep=;\r\n" + as_csv(rows, delimiter=";"),
    "preamble with a tab": lambda rows: b'"SEP=\t"\n' + as_csv(rows, delimiter="\t"),
    "Excel's Unicode text": lambda rows: as_csv(rows, "utf-16", delimiter="\t"),
    "UTF-16, big end first": lambda rows: b"\xfe\xff" + as_csv(rows, "utf-16-be"),
    "all quoted": lambda rows: as_csv(rows, quoting=csv.QUOTE_ALL),
    "LF": lambda rows: as_csv(rows, lineterminator="\n"),
    "CRLF in cells, too": lambda rows: as_csv(rows, lineterminator="\n").replace(b"\n", b"\r\n"),
    "blank rows": lambda rows: as_csv([[], [""] * 5, *rows[:3], [" "] * 5, *rows[3:], [], []]),
    "sorted by the reply": lambda rows: as_csv(
        [rows[0], *sorted(rows[1:], key=lambda row: row[3])]
    ),
    "upside down": lambda rows: as_csv([rows[0], *rows[:0:-1]]),
    "a column more": lambda rows: as_csv([[f"note {i}", *row] for i, row in enumerate(rows)]),
    "pandas' index": lambda rows: as_csv(
        [["" if i == 0 else i, *row] for i, row in enumerate(rows)]
    ),
    "a note in a row of its own": lambda rows: as_csv(
        [*([*row, ""] for row in rows), [""] * 5 + ["!"]]
    ),
    "empty cells at the end": lambda rows: as_csv([row + ["", ""] for row in rows]),
    "labels in capitals": lambda rows: as_csv(
        [rows[0], *([*r[:4], r[4].upper()] for r in rows[1:])]
    ),
    "blanks around labels": lambda rows: as_csv(
        [rows[0], *([*r[:4], f" {r[4]} "] for r in rows[1:])]
    ),
    "no marks before formulas": lambda rows: as_csv(
        [[cell.removeprefix("'") for cell in row] for row in rows]
    ),
    "decimal numbers": lambda rows: as_csv(
        [rows[0], *([f"{row[0]}.0", *row[1:]] for row in rows[1:])]
    ),
}


def change_cell(rows, row, column, cell):
    rows = [list(line) for line in rows]
    rows[row][column] = cell
    return as_csv(rows)


# What cannot be told, or is not what was written; and what the refusal says after the file's name.
HARMFUL = {
    "label renamed": (
        lambda rows: name_columns(rows, "number", "context", "strategy", "reply", "my label"),
        "column 'label' is missing; its head should have it",
    ),
    "label human": (
        lambda rows: name_columns(rows, "number", "context", "strategy", "reply", "label human"),
        "column 'label' is missing; its head should have it",
    ),
    "two labels": (
        lambda rows: as_csv([[*row, cell] for row, cell in zip(rows, ["Label ", *"abcde"])]),
        "column 'label' stands twice; keep one of them",
    ),
    "no context": (
        lambda rows: as_csv([[row[0], *row[2:]] for row in rows]),
        "column 'context' is missing; its head should have it",
    ),
    "no head": (
        lambda rows: as_csv(rows[1:]),
        "column 'number' is missing; its head should have it",
    ),
    "nothing": (lambda rows: b"", "column 'number' is missing; its head should have it"),
    "bars": (
        lambda rows: as_csv(rows, delimiter="|"),
        "column 'number' is missing; its head should have it",
    ),
    "a row more": (
        lambda rows: as_csv([*rows, ["6", "seeker: Hi", "Others", "Hm.", "none"]]),
        "row 6: number 6 is not in {key}",
    ),
    "a row twice": (lambda rows: as_csv([*rows, rows[2]]), "row 6: number 2 stands twice"),
    "a number twice": (lambda rows: change_cell(rows, 2, 0, "1"), "row 2: number 1 stands twice"),
    "no number": (lambda rows: change_cell(rows, 2, 0, ""), "row 2: number  is not in {key}"),
    "a reply edited": (
        lambda rows: change_cell(rows, 3, 3, "I see."),
        "row 3: 'reply' is not as review.key.json has it for number 3: the cell was changed, or"
        " this is another file's key",
    ),
    "a strategy edited": (
        lambda rows: change_cell(rows, 3, 2, "Question"),
        "row 3: 'strategy' is not as review.key.json has it for number 3: the cell was changed, or"
        " this is another file's key",
    ),
    "one column sorted alone": (
        lambda rows: as_csv([[a[0], *b[1:]] for a, b in zip(rows, [rows[0], *rows[:0:-1]])]),
        "row 1: 'context' is not as review.key.json has it for number 1: the cell was changed, or"
        " this is another file's key",
    ),
    "a label in the next column": (
        lambda rows: as_csv([*rows[:2], [*rows[2][:4], "", "none"], *rows[3:]]),
        "row 2 has more cells than the head has columns",
    ),
    "a wrong label": (
        lambda rows: change_cell(rows, 2, 4, "Rude"),
        "row 2: number 2 is labelled 'rude'; labels are strategy mismatch, lack of empathy, early"
        " emotion shift, template response, emotion misread, none",
    ),
    "Latin 1": (
        lambda rows: as_csv(rows, "latin-1"),
        "is no CSV in UTF-8 (byte {byte}); save it as that",
    ),
    "a workbook": (lambda rows: b"PK\xff\x00", "is no CSV in UTF-8 (byte 2); save it as that"),
    "cut off": (
        lambda rows: as_csv(rows, quoting=csv.QUOTE_ALL)[:-9],
        "line {line} is no line of a CSV (unexpected end of data)",
    ),
}


def fill_in(path, labels=LABELLED):
    """The rows of a review with people's labels: lists of cells, in the order of the file."""
    head, *rows = csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""))
    return [head, *([*row[:4], labels.get(row[0], "")] for row in rows)]


def expect_no_replacement(path):
    """What people may have worked on is refused early and late, and stays with its key."""
    key = path.with_suffix(".key.json")
    before = path.read_bytes(), key.read_bytes()
    for write in (
        lambda: refuse_edited(path),
        lambda: write_review(path, judged_answers(), 10, seed=0),
        lambda: write_ratings(path, [], {}),
    ):
        with pytest.raises(DescError) as error:
            write()
        assert str(error.value) == (
            f"{path} would be replaced, but it may hold what people wrote, because {key.name} does"
            f" not prove that it is as it was written: move it and {key.name} away, or give"
            " another --out"
        )
    assert before == (path.read_bytes(), key.read_bytes())


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS.keys())
def test_a_review_that_is_saved_anew_is_never_replaced_and_read_back_exactly(review, change):
    rows = fill_in(review)
    review.write_bytes(change(rows))
    expect_no_replacement(review)
    people, annotator, dialogues = read_review(review)
    assert people == list(LABELLED.values()) and annotator == ["none"] * 5
    assert dialogues == [row[3].lstrip("'-")[0] for row in rows[1:]]


@pytest.mark.parametrize("change, problem", HARMFUL.values(), ids=HARMFUL.keys())
def test_a_review_that_cannot_be_told_is_never_replaced_and_refused_by_name(
    review, change, problem
):
    data = change(fill_in(review))
    review.write_bytes(data)
    expect_no_replacement(review)
    with pytest.raises(DescError) as error:
        read_review(review)
    problem = problem.format(
        key=review.with_suffix(".key.json"), byte=data.find(b"\xe4"), line=data.count(b"\n") + 1
    )
    assert str(error.value) == f"{review}: {problem}"


@pytest.mark.parametrize("labels", [{"2": "none"}, {"5": "none", "1": "emotion misread"}])
def test_a_review_half_filled_in_or_with_rows_deleted_gives_the_labels_it_has(review, labels):
    rows = fill_in(review, labels)
    expected = [labels[number] for number in sorted(labels)]
    review.write_bytes(as_csv(rows))
    expect_no_replacement(review)
    assert read_review(review)[0] == expected
    review.write_bytes(as_csv([row for row in rows if row[4]]))  # the head has a last cell, too
    expect_no_replacement(review)
    assert read_review(review)[0] == expected


def test_a_review_that_is_as_it_was_written_is_replaced(review):
    """Also by another one, and by another one when a kill came between the key and the review."""
    refuse_edited(review.with_name("absent.csv"))
    first = review.read_bytes()
    key = review.with_suffix(".key.json")
    key_of_first = key.read_bytes()
    write_review(review, judged_answers(), 10, seed=0)
    assert (first, key_of_first) == (review.read_bytes(), key.read_bytes())
    write_review(review, judged_answers(), 3, seed=0)
    second = review.read_bytes()
    assert len(read_csv(review)) == 3
    review.write_bytes(first)  # the key is the second's already
    refuse_edited(review)
    write_review(review, judged_answers(), 3, seed=0)
    assert review.read_bytes() == second
    write_review(review, judged_answers(), 3, seed=0)
    review.unlink()  # as if a first run was killed after the key
    write_review(review, judged_answers(), 3, seed=0)
    assert review.read_bytes() == second
    assert {path.name for path in review.parent.iterdir()} == {review.name, key.name}


@pytest.mark.parametrize("data", [None, b"", b"{", b"[]", b'{"rows": []}', b'{"rows": [1]}'])
def test_without_a_key_that_proves_it_nothing_is_replaced(review, data):
    """Such as a review of an older version, whose key was a CSV."""
    key = review.with_suffix(".key.json")
    key.unlink()
    if data is not None:
        key.write_bytes(data)
    before = review.read_bytes()
    with pytest.raises(DescError, match="may hold what people wrote.*away, or give another --out"):
        write_review(review, judged_answers(), 10, seed=0)
    assert review.read_bytes() == before and key.exists() == (data is not None)
    with pytest.raises(DescError, match="review.key.json|not in"):
        read_review(review)


def test_the_key_of_a_review_that_was_moved_away_is_kept(review, tmp_path):
    review.write_bytes(as_csv(fill_in(review)))
    moved = tmp_path / "moved.csv"
    review.rename(moved)
    write_review(review, judged_answers(mark="+"), 10, seed=0)
    (kept,) = tmp_path.glob("review.*.key.json")
    assert len(kept.name) == len("review.12345678.key.json")
    with pytest.raises(DescError, match="moved.csv can only be read with its key, moved.key.json"):
        read_review(moved)
    kept.rename(tmp_path / "moved.key.json")
    assert read_review(moved)[0] == list(LABELLED.values())


def test_a_review_is_held_against_its_own_key_alone(review, tmp_path):
    """Both reviews have the numbers 1 to 5; without a look at the texts κ would be of chance."""
    other = tmp_path / "other" / "review.csv"
    write_review(other, judged_answers(mark="+"), 10, seed=1)
    review.write_bytes(as_csv(fill_in(other)))
    with pytest.raises(
        DescError, match="row 1: '.*' is not as review.key.json has it for number 1"
    ):
        read_review(review)


def test_a_cell_longer_than_any_of_a_csv_is_refused(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("empathy judge,empathy human," + "x" * 200_000 + "\n1,2,3\n")
    with pytest.raises(DescError, match=r"own.csv: line \d is no line of a CSV \(field larger"):
        correlate_ratings(path)


def test_a_key_that_lacks_an_empty_cell_is_read_as_if_it_had_it(tmp_path):
    path = tmp_path / "ratings.csv"
    rated = dict.fromkeys(RUBRICS, 3) | {"helpfulness": None}
    records = {"sft": [{"replies": ["a"], "ratings": [rated]}]}
    write_ratings(path, [talk("0", "x")], records)
    path.write_bytes(path.read_bytes().replace(b",3,,3,,3,,", b",3,1,3,2,3,4,"))
    before = correlate_ratings(path)
    change_key(path, lambda rows: [row.pop("helpfulness judge") for row in rows])
    assert correlate_ratings(path) == before


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda rows: [row.pop("dialogue") for row in rows], "row 1 has no 'dialogue'"),
        (lambda rows: rows[1].update(dialogue=" "), "row 2 has no 'dialogue'"),
        (lambda rows: rows[1].update(annotator=None), "row 2 has no 'annotator'"),
        (lambda rows: rows[1].update(annotator="odd"), "number 2 is annotated 'odd', no label"),
        (lambda rows: rows.append(rows[1]), "number 2 stands twice"),
    ],
)
def test_a_key_that_cannot_be_used_is_refused(review, change, problem):
    review.write_bytes(as_csv(fill_in(review)))
    change_key(review, change)
    with pytest.raises(DescError) as error:
        read_review(review)
    assert str(error.value).startswith(f"{review.with_suffix('.key.json')}: {problem}")


@pytest.mark.parametrize("name", ["Anna.CSV", "Anna.tsv", "Anna.txt", "Anna"])
def test_a_review_under_another_name_is_known_by_its_key(review, name):
    anna = review.with_name(name)
    anna.write_bytes(as_csv(fill_in(review), delimiter="\t"))
    review.with_suffix(".key.json").rename(review.with_name("Anna.key.json"))
    config = SimpleNamespace(agreement=str(anna), seed=0)
    assert "5 turns of 2 dialogues" in measure_agreement(config, [], ESCONV, None)


# --- labelled turns -------------------------------------------------------------------------------


def test_turns_are_found_by_the_seekers_last_words_and_by_place():
    dialogues = [talk("0", "Hi", " ", "a", " "), talk("1", "Hi", "b", " ")]
    matches = find_turns(["hi", "a", "", "", "HI", " ", "b"], dialogues, "f.json")
    first = [("0", 0), ("0", 2), ("0", 1), ("0", 3)]
    second = [("1", 0), ("1", 2), ("1", 1)]
    assert [(dialogue.id, turn) for dialogue, turn in matches] == first + second
    with pytest.raises(DescError, match="^f.json: row 2: no test turn"):
        find_turns(["b", "b"], dialogues, "f.json")


def test_labels_in_json_lines(tmp_path):
    labels = ("none", "odd", "lack of empathy")
    path = write_records(tmp_path / "a.jsonl", [ROW | {"label": label} for label in labels])
    first, second = read_labels(path, [], ESCONV)
    assert (first.dialogue, first.turn, first.label) == ("3", 1, "none")
    assert (second.dialogue, second.turn, second.label) == ("3", 1, "lack of empathy")
    assert first.case.history == (Turn("seeker", "Hi"),)
    assert first.example(ESCONV).completion == "none"

    (tmp_path / "map.json").write_text('{"odd": "template response"}')
    labelled = read_labels(path, [], ESCONV, str(tmp_path / "map.json"))
    assert [turn.label for turn in labelled] == ["none", "template response", "lack of empathy"]


def test_labels_as_published_with_decoupledesc(tmp_path):
    """The last row's label is not known, so it is left out."""
    columns = ("user_input", "strategy", "response", "Error Type")
    cells = [
        ("b", "Question", "[Question] Why?", "Premature Emotional Transition"),
        ("", "Others", "[Others] Hm.", "N/A"),
        ("a", "Others", "[Others] Hm.", "Other"),
    ]
    (tmp_path / "b.json").write_text(json.dumps([dict(zip(columns, row)) for row in cells]))
    first, second = read_labels(tmp_path / "b.json", [talk("9", "a", "b", " ")], ESCONV)
    assert (first.turn, first.case.reply, first.label) == (1, "Why?", "early emotion shift")
    assert (second.turn, second.case.reply, second.label) == (2, "Hm.", "none")
    assert first.case.history == talk("9", "a", "b").turns[:3]


@pytest.mark.parametrize(
    "text, problem",
    [
        ('{"label": "none"}', "row 1: field 'dialogue' is missing"),
        ("[1]", "should hold JSON objects"),
        ("[{", "cannot be read"),
        (json.dumps(ROW | {"label": "odd"}), "holds no turn with a label that is known"),
    ],
)
def test_a_file_without_labelled_turns_is_refused(tmp_path, text, problem):
    (tmp_path / "c.jsonl").write_text(text + "\n")
    with pytest.raises(DescError, match=problem):
        read_labels(tmp_path / "c.jsonl", [], ESCONV)


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"response": None}, "field 'response' should be a string, not null"),
        ({"response": nan}, "field 'response' should be a string, not nan"),
        ({"response": 3}, "field 'response' should be a string, not 3"),
        ({"response": ["Hm."]}, "field 'response' should be a string, not a list"),
        ({"response": " \n"}, "field 'response' is empty"),
        ({"response": "\udc00"}, "field 'response' holds half a surrogate pair"),
        ({"strategy": "Questions"}, "'Questions', no strategy of this taxonomy (did you mean 'Qu"),
        ({"strategy": None}, "field 'strategy' should be a string, not null"),
        ({"context": "Hi"}, "field 'context' should be a list, not a string"),
        ({"context": []}, "field 'context' is empty"),
        ({"context": ["Hi"]}, "context, utterance 1: should be an object, not a string"),
        (
            {"context": [{"speaker": "seeker", "text": "Hi"}, {"speaker": "bot", "text": "Hi"}]},
            "context, utterance 2: field 'speaker' is 'bot'; it should be one of seeker,",
        ),
        ({"context": [{"speaker": "seeker", "text": None}]}, "'text' should be a string, not null"),
        ({"context": [{"speaker": "seeker", "text": ""}]}, "field 'text' is empty"),
        ({"turn": "1"}, "field 'turn' should be an integer from 0, not a string"),
        ({"turn": 1.5}, "field 'turn' should be an integer from 0, not 1.5"),
        ({"turn": True}, "field 'turn' should be an integer from 0, not True"),
        ({"turn": -1}, "field 'turn' should be an integer from 0, not -1"),
        ({"dialogue": None}, "field 'dialogue' should be a string, not null"),
        ({"label": ["none"]}, "field 'label' should be a string, not a list"),
    ],
)
def test_a_row_with_a_field_that_cannot_be_used_is_refused(tmp_path, change, problem):
    path = write_records(tmp_path / "a.jsonl", [ROW, ROW | change])
    with pytest.raises(DescError) as error:
        read_labels(path, [], ESCONV)
    assert str(error.value).startswith(f"{path}: row 2") and problem in str(error.value)


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"response": None}, "field 'response' should be a string, not null"),
        ({"response": "[Others] "}, "field 'response' is empty"),
        ({"strategy": "Hypnosis"}, "field 'strategy' is 'Hypnosis', no strategy of this taxonomy"),
        ({"user_input": 3}, "field 'user_input' should be a string, not 3"),
        ({"user_input": "c"}, "no test turn of --data is left before which the seeker says 'c'"),
        ({"Error Type": nan}, "field 'Error Type' should be a string, not nan"),
    ],
)
def test_a_published_row_with_a_field_that_cannot_be_used_is_refused(tmp_path, change, problem):
    row = {"user_input": "a", "strategy": "Others", "response": "[Others] Hm.", "Error Type": "N/A"}
    path = write_records(tmp_path / "a.jsonl", [row, row | {"user_input": "b"} | change])
    with pytest.raises(DescError) as error:
        read_labels(path, [talk("9", "a", "b")], ESCONV)
    assert str(error.value).startswith(f"{path}: row 2: ") and problem in str(error.value)


def test_rows_without_a_label_are_left_out_whatever_else_they_hold(tmp_path):
    bare = {"label": None, "response": None}
    path = write_records(tmp_path / "a.jsonl", [bare, ROW, ROW | {"label": "odd", "turn": None}])
    assert len(read_labels(path, [], ESCONV)) == 1


@pytest.mark.parametrize(
    "text, problem",
    [("[]", "map.json: should hold JSON objects"), ('{"odd": "rude"}', "'rude' is no label")],
)
def test_a_label_map_that_cannot_be_used_is_refused(tmp_path, text, problem):
    path = write_records(tmp_path / "a.jsonl", [ROW])
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(DescError, match=problem):
        read_labels(path, [], ESCONV, str(tmp_path / "map.json"))


def test_no_dialogue_is_on_both_sides_of_a_hold_out(tmp_path):
    names = [str(i) for i in range(10) for _ in range(2)] + ["9", "0"]
    path = write_records(tmp_path / "a.jsonl", [ROW | {"dialogue": name} for name in names])
    rest, held = hold_out(read_labels(path, [], ESCONV), 0.2)
    assert [turn.dialogue for turn in held] == ["8", "8", "9", "9", "9"] and len(rest) == 17
    assert not {turn.dialogue for turn in rest} & {turn.dialogue for turn in held}


def test_labelled_turns_are_annotated_a_dialogue_at_a_time(tmp_path):
    rows = [ROW | {"dialogue": name, "response": name} for name in ("0", "0", "1")]
    labelled = read_labels(write_records(tmp_path / "a.jsonl", rows), [], ESCONV)
    asked = []

    def annotator(cases):
        asked.append([case.reply for case in cases])
        return [Annotation("none", 0.5, case.reply) for case in cases]

    judgements = annotate_labelled(annotator, labelled)
    assert [judgement.explanation for judgement in judgements] == ["0", "0", "1"]
    assert asked == [["0", "0"], ["1"]]


# --- ratings --------------------------------------------------------------------------------------


@pytest.fixture
def ratings(tmp_path):
    """The path of the ratings of six replies, each of its own dialogue, which a judge gives i + 1/7
    points; the first one's fluency is unreadable."""
    dialogues, records = [], []
    for i in range(6):
        dialogues.append(talk(str(i), "Hi"))
        points = dict.fromkeys(RUBRICS, i + 1 / 7) | ({} if i else {"fluency": None})
        records.append({"replies": [f"-{i}"], "ratings": [points]})
    write_ratings(tmp_path / "ratings.csv", dialogues, {"sft": records})
    return tmp_path / "ratings.csv"


def rate(lines):
    """People's empathy in the order of the judge's, but for one pair, and their fluency."""
    for line, rating in zip(lines, (0, 1, 3, 2, 4, 5)):
        line["empathy human"] = line["fluency human"] = rating
    return lines


RATINGS_HARMLESS = {
    "as filled in": lambda lines: lines,
    "sorted by people's": lambda lines: sorted(lines, key=lambda line: line["empathy human"]),
    "columns in another order and case": lambda lines: [
        {f" {column.upper()}": line[column] for column in sorted(line)} for line in lines
    ],
    "judge's rounded, decimal commas": lambda lines: [
        line | {"empathy judge": line["empathy judge"][:4].replace(".", ",")} for line in lines
    ],
    "a column more": lambda lines: [line | {"note": "so"} for line in lines],
}


@pytest.mark.parametrize("change", RATINGS_HARMLESS.values(), ids=RATINGS_HARMLESS.keys())
def test_ratings_that_are_saved_anew_are_never_replaced_and_read_back_exactly(ratings, change):
    """τ = (14 − 1) / 15 and ρ = 1 − 6 · 2 / 210, as below; intervals, too, do not go by the rows'
    order. Of fluency five replies count, of which one pair of ten is in the other order."""
    lines = rate(read_csv(ratings))
    write_csv(ratings, lines)
    as_filled_in = correlate_ratings(ratings)
    assert "| empathy | 6 | 0.943 (" in as_filled_in and "| 0.867 (" in as_filled_in
    assert "| fluency | 5 | 0.900 (" in as_filled_in and "| 0.800 (" in as_filled_in
    write_csv(ratings, change(lines))
    expect_no_replacement(ratings)
    assert correlate_ratings(ratings) == as_filled_in


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda lines: lines[2].update({"empathy judge": "5"}), "row 3: 'empathy judge' is not as"),
        (lambda lines: lines[2].update(reply="Hm."), "row 3: 'reply' is not as ratings.key.json"),
        (
            lambda lines: lines[2].update(dialogue="9"),
            "row 3: system sft, dialogue 9, turn 0 is no",
        ),
        (
            lambda lines: lines.append(lines[2]),
            "row 7: system sft, dialogue 2, turn 0 stands twice",
        ),
        (
            lambda lines: [line.pop("empathy human") for line in lines],
            "column 'empathy human' is m",
        ),
        (lambda lines: [line.pop("reply") for line in lines], "column 'reply' is missing"),
        (lambda lines: lines[2].update({"empathy human": "9" * 400}), "row 3: empathy should be"),
        (lambda lines: lines[2].update({"empathy human": "good"}), "row 3: empathy should be two"),
    ],
)
def test_ratings_that_cannot_be_told_are_never_replaced_and_refused(ratings, change, problem):
    lines = rate(read_csv(ratings))
    change(lines)
    write_csv(ratings, lines)
    expect_no_replacement(ratings)
    with pytest.raises(DescError) as error:
        correlate_ratings(ratings)
    assert str(error.value).startswith(f"{ratings}: {problem}")


def test_ratings_of_ones_own_need_no_key_and_no_reply_twice(tmp_path):
    """Each rubric has both columns, and any separator and case will do."""
    path = tmp_path / "own.csv"
    path.write_text("sep=;\nTact Judge;TACT human\n1,5;2\n2;3\n \n3;4,5\n")
    assert "| tact | 3 | 1.000 | 1.000 |" in correlate_ratings(path)
    path.write_text("tact judge,tact Anna\n1,2\n")
    with pytest.raises(DescError, match="column 'tact human' is missing beside 'tact judge'"):
        correlate_ratings(path)
    path.write_text("system,dialogue,turn,a judge,a human\ns,0,1,2,3\ns,0,1.0,2,4\n")
    with pytest.raises(DescError, match="row 2: system s, dialogue 0, turn 1 stands twice"):
        correlate_ratings(path)


def test_ratings_come_back_with_peoples_and_are_correlated(tmp_path):
    """The judge gives 0 … 5, and people the same order, but for one pair. Of 15 pairs 14 agree, so
    τ = (14 − 1) / 15. And ρ = 1 − 6 Σd² / n(n² − 1) = 1 − 6 · 2 / 210."""
    path = tmp_path / "r.csv"
    dialogues, records = [], []
    for i in range(6):
        dialogues.append(talk(str(i), "Hi"))
        ratings = dict.fromkeys(RUBRICS, float(i))
        records.append({"replies": [f"-{i}"], "ratings": [ratings]})
    write_ratings(path, dialogues, {"sft": records})
    lines = read_csv(path)
    assert lines[1]["reply"] == "'-1" and lines[1]["context"] == "seeker: Hi"
    for line, rating in zip(lines, (0, 1, 3, 2, 4, 5)):
        line["empathy human"] = rating
    write_csv(path, lines)
    table = correlate_ratings(path)
    assert "| empathy | 6 | 0.943 (" in table and "| 0.867 (" in table
    assert "fluency" not in table


@pytest.mark.parametrize(
    "text, problem",
    [
        ("a judge,a human\n1,\n", "no row has both"),
        ("a judge,a human\n1,good\n", "row 1: a should be two numbers"),
        ("", "no row"),
    ],
)
def test_ratings_that_cannot_be_correlated_are_refused(tmp_path, text, problem):
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(DescError, match=problem):
        correlate_ratings(tmp_path / "r.csv")


def test_the_bootstrap_of_a_statistic_draws_dialogues_whole():
    """Each value is the statistic of as many groups, drawn anew, all of whose pairs count."""
    groups = [[(1.0, 2.0), (2.0, 1.0)], [(3.0, 3.0)], [(4.0, 5.0), (5.0, 4.0), (6.0, 6.0)]]
    values = bootstrap_statistic(spearman, groups, samples=50, seed=3)
    draw = np.random.default_rng(3)
    for value, times in zip(values, draw.multinomial(3, [1 / 3] * 3, size=50), strict=True):
        judge, people = zip(*sum((groups[i] * times[i] for i in range(3)), []))
        np.testing.assert_equal(value, spearman(judge, people))  # nan, if only group 1 is drawn


# --- intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialogues", [4, 5])
def test_agreement_has_an_interval_from_five_dialogues_on(dialogues):
    """In each dialogue two turns agree and one does not."""
    people = ["none", "template response", "none"] * dialogues
    annotator = ["none", "template response", "template response"] * dialogues
    names = [str(i // 3) for i in range(3 * dialogues)]
    report = agreement_report(people, annotator, names, ESCONV.labels)
    assert (f"{dialogues} dialogues: κ 0.400, the same" in report) == (dialogues == 4)
    assert (f"{dialogues} dialogues: κ 0.400 (0.400–0.400), the same" in report) == (dialogues == 5)
    assert (NO_INTERVAL in report) == (dialogues == 4)


@pytest.mark.parametrize("dialogues", [4, 5])
def test_correlations_have_an_interval_from_five_dialogues_on(tmp_path, dialogues):
    lines = [f"{i},{rating},{rating}" for i in range(dialogues) for rating in (1, 4)]
    path = tmp_path / "r.csv"
    path.write_text("\n".join(["dialogue,a judge,a human", *lines]))
    report = correlate_ratings(path)
    interval = " (1.000–1.000)" if dialogues == 5 else ""
    assert f"| a | {2 * dialogues} | 1.000{interval} | 1.000{interval} |" in report
    assert (NO_INTERVAL in report) == (dialogues == 4)


def test_a_correlation_with_a_constant_has_no_interval(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("\n".join(["a judge,a human", *["3,1", "3,2"] * 4]))
    report = correlate_ratings(path)
    assert "| a | 8 | nan | nan |" in report and NO_INTERVAL not in report
