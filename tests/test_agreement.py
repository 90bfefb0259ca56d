"""pytest tests/test_agreement.py"""

import csv
import io
import json
import random
from math import nan

import numpy as np
import pytest

from desc import DescError
from desc.esconv import Dialogue, Turn
from desc.judging.agreement import (
    agreement_report,
    correlate_ratings,
    read_review,
    refuse_labelled,
    write_ratings,
    write_review,
)
from desc.judging.judge import RUBRICS
from desc.judging.labels import annotate_labelled, find_turns, hold_out, read_labels
from desc.judging.statistics import bootstrap_statistic, kappa_of_confusion, spearman
from desc.metrics import NO_INTERVAL
from desc.mining import LABELS, Annotation, Answer
from desc.strategies import ESCONV

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
    people = [draw.choice(LABELS) for _ in range(200)]
    annotator = [label if draw.random() < 0.4 else draw.choice(LABELS) for label in people]
    counts = np.zeros((6, 6))
    for a, b in zip(annotator, people):
        counts[LABELS.index(a), LABELS.index(b)] += 1
    expected = cohen_kappa_score(people, annotator)
    assert kappa_of_confusion(counts) == pytest.approx(expected)

    report = agreement_report(people, annotator, [str(i // 10) for i in range(200)])
    assert f"200 turns of 20 dialogues: κ {expected:.3f}" in report
    of_none = cohen_kappa_score(
        [label == "none" for label in people], [label == "none" for label in annotator]
    )
    line = next(line for line in report.split("\n") if line.startswith("| none"))
    assert line.endswith(f"{of_none:.3f} |")


def test_an_unreadable_judgement_agrees_with_nothing():
    """A row of its own shows how many there are. Rows are the annotator's labels."""
    report = agreement_report(["none"] * 3, ["none", "unreadable", "none"], ["0", "0", "1"])
    assert "the same label for 66.7 %" in report
    assert "| unreadable | 0 | 1 | 0 % |  | 0.000 |" in report
    assert report.endswith("| unreadable | 0 | 0 | 0 | 0 | 0 | 1 | 0 |")


# --- reviews --------------------------------------------------------------------------------------


@pytest.fixture
def review(tmp_path):
    """The path of a review with four judged answers, from two dialogues."""
    dialogues = [talk("0", "=1+1", 'a "quoted"\nline', "ä"), talk("1", "x")]
    answers = [(dialogues[0], Answer(0, "Others", "unjudged"))]
    for dialogue in dialogues:
        for turn in range(len(dialogue)):
            judgement = Annotation("none", 0.5, "Fits.")
            answer = Answer(turn, "Others", f"-{dialogue.id}{turn}", judgement)
            answers.append((dialogue, answer))
    write_review(tmp_path / "review.csv", answers, 10, seed=0)
    return tmp_path / "review.csv"


def label_review(path, *labels):
    """Write people's labels into a review, as a spreadsheet would."""
    write_csv(path, [line | {"label": label} for line, label in zip(read_csv(path), labels)])


def test_a_review_shows_people_the_context_and_not_what_the_annotator_says(review):
    data = review.read_bytes()
    assert data.startswith(b"\xef\xbb\xbf") and b"none" not in data and b"Fits." not in data
    lines = read_csv(review)
    assert any('a "quoted"\nline' in line["context"] for line in lines)
    # The quotation mark keeps a spreadsheet from computing a formula.
    assert sorted(line["reply"] for line in lines) == ["'-00", "'-01", "'-02", "'-10"]


def test_a_review_comes_back_as_people_labelled_it(review):
    with pytest.raises(DescError, match="no row has a label yet"):
        read_review(review)
    label_review(review, "none", " Template response ", "", "none")
    people, annotator, dialogues = read_review(review)
    assert people == ["none", "template response", "none"] and annotator == ["none"] * 3
    labelled = [line for line in read_csv(review) if line["number"] != "3"]
    assert dialogues == [line["reply"][2] for line in labelled]


def test_a_review_with_a_wrong_label_or_number_is_refused(review):
    label_review(review, "none", "rude", "", "")
    with pytest.raises(DescError, match="number 2 is labelled 'rude'"):
        read_review(review)
    lines = read_csv(review)
    lines[0]["number"] = "77"
    write_csv(review, lines)
    with pytest.raises(DescError, match="number 77 is not in .*review.key.csv"):
        read_review(review)


def test_a_review_saved_with_semicolons_is_read(tmp_path):
    text = 'number;context;label\n1;"seeker: a, b";none\n'
    (tmp_path / "r.csv").write_text(text, encoding="utf-8")
    (tmp_path / "r.key.csv").write_text("number,dialogue,turn,annotator\n1,7,0,none\n")
    assert read_review(tmp_path / "r.csv") == (["none"], ["none"], ["7"])


@pytest.mark.parametrize(
    "head, line",
    [
        ("number,label", "1,"),
        ("empathy judge,empathy human", "1,"),
        ("empathy judge;empathy human", "1;"),
    ],
)
def test_what_people_wrote_is_not_overwritten(tmp_path, head, line):
    refuse_labelled(tmp_path / "absent.csv")
    path = tmp_path / "r.csv"
    path.write_text(f"{head}\n{line}\n")
    refuse_labelled(path)
    path.write_text(f"{head}\n{line}2\n")
    with pytest.raises(DescError, match="move it away first"):
        refuse_labelled(path)


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
    assert first.example().completion == "none"

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
    report = agreement_report(people, annotator, names)
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
