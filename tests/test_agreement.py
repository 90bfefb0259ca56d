"""pytest tests/test_agreement.py"""

import csv
import io
import json
import random

import numpy as np
import pytest

from desc import DescError
from desc.esconv import Dialogue, Turn
from desc.judging.agreement import (
    compare,
    correlate,
    read_review,
    refuse_labelled,
    write_ratings,
    write_review,
)
from desc.judging.judge import RUBRICS
from desc.judging.labels import find_turns, hold_out, read_labels
from desc.judging.statistics import kappa_of_confusion
from desc.mining import LABELS, Answer, Judgement
from desc.strategies import ESCONV


def talk(name, *said):
    """A dialogue in which the seeker says these, each followed by a supporter's question."""
    return Dialogue(
        name,
        tuple(
            turn
            for text in said
            for turn in (Turn("seeker", text), Turn("supporter", "So?", "Question"))
        ),
    )


def test_kappa_by_hand():
    """20 + 15 of 50 agree: 0.7. Raters say yes for 25 and 30: by chance 0.5 · 0.6 + 0.5 · 0.4 =
    0.5; κ = 0.2 / 0.5."""
    assert kappa_of_confusion(np.array([[20, 5], [10, 15]])) == pytest.approx(0.4)
    assert (
        kappa_of_confusion(np.array([[9, 0], [0, 0]])) == 0
        and kappa_of_confusion(np.zeros((2, 2))) == 0
    )


def test_kappa_is_scikit_learns():
    draw = random.Random(0)
    theirs = [draw.choice(LABELS) for _ in range(200)]
    ours = [label if draw.random() < 0.4 else draw.choice(LABELS) for label in theirs]
    counts = np.zeros((6, 6))
    for a, b in zip(ours, theirs):
        counts[LABELS.index(a), LABELS.index(b)] += 1
    cohen_kappa_score = pytest.importorskip("sklearn.metrics").cohen_kappa_score
    expected = cohen_kappa_score(theirs, ours)
    assert kappa_of_confusion(counts) == pytest.approx(expected)
    text = compare(theirs, ours, [str(i // 10) for i in range(200)])
    assert f"200 turns of 20 dialogues: κ {expected:.3f}" in text
    one = cohen_kappa_score(
        [label == "none" for label in theirs], [label == "none" for label in ours]
    )
    assert next(line for line in text.split("\n") if line.startswith("| none")).endswith(
        f"{one:.3f} |"
    )


def test_a_review_comes_back_as_people_labelled_it(tmp_path):
    """They see what was said and not what the annotator thinks of it; a spreadsheet finds no
    formula."""
    dialogues, review = (
        [talk("0", "=1+1", 'a "quoted"\nline', "ä"), talk("1", "x")],
        tmp_path / "review.csv",
    )
    answers = [
        (d, Answer(t, "Others", f"-{d.id}{t}", Judgement("none", 0.5, "Fits.")))
        for d in dialogues
        for t in range(len(d))
    ]
    write_review(review, [*answers, (dialogues[0], Answer(0, "Others", "unjudged"))], 10, seed=0)
    data = review.read_bytes()
    assert data.startswith(b"\xef\xbb\xbf") and b"none" not in data and b"Fits." not in data
    rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))))
    assert sorted(row["reply"] for row in rows) == ["'-00", "'-01", "'-02", "'-10"]
    assert any('a "quoted"\nline' in row["context"] for row in rows)
    with pytest.raises(DescError, match="no row has a label yet"):
        read_review(review)

    def label(*labels):
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0].keys())
        (
            writer.writeheader(),
            writer.writerows([row | {"label": label} for row, label in zip(rows, labels)]),
        )
        review.write_text(text.getvalue(), encoding="utf-8")

    label("none", " Template response ", "", "none")
    people, annotator, names = read_review(review)
    assert people == ["none", "template response", "none"] and annotator == ["none"] * 3
    assert names == [row["reply"][2] for row in rows if row["number"] != "3"]
    label("none", "rude", "", "")
    with pytest.raises(DescError, match="number 2 is labelled 'rude'"):
        read_review(review)
    rows[0]["number"] = "77"
    label("none", "", "", "")
    with pytest.raises(DescError, match="number 77 is not in .*review.key.csv"):
        read_review(review)


def test_turns_are_found_by_what_was_said_last_and_by_place():
    dialogues = [talk("0", "Hi", " ", "a", " "), talk("1", "Hi", "b", " ")]
    found = find_turns(["hi", "a", "", "", "HI", " ", "b"], dialogues)
    assert [(d.id, t) for d, t in found] == [
        ("0", 0),
        ("0", 2),
        ("0", 1),
        ("0", 3),
        ("1", 0),
        ("1", 2),
        ("1", 1),
    ]
    with pytest.raises(DescError, match="row 2: no test turn"):
        find_turns(["b", "b"], dialogues)


def test_labels_of_both_kinds(tmp_path):
    ours = {
        "dialogue": "3",
        "turn": 1,
        "context": [{"speaker": "seeker", "text": "Hi"}],
        "strategy": "Others",
        "response": "Hm.",
    }
    (tmp_path / "a.jsonl").write_text(
        "".join(
            json.dumps(ours | {"label": label}) + "\n"
            for label in ("none", "odd", "lack of empathy")
        )
    )
    labelled = read_labels(tmp_path / "a.jsonl", [], ESCONV)
    assert [(one.dialogue, one.turn, one.label) for one in labelled] == [
        ("3", 1, "none"),
        ("3", 1, "lack of empathy"),
    ]
    assert (
        labelled[0].case.history == (Turn("seeker", "Hi"),)
        and labelled[0].example().completion == "none"
    )
    (tmp_path / "map.json").write_text('{"odd": "template response"}')
    assert [
        one.label
        for one in read_labels(tmp_path / "a.jsonl", [], ESCONV, str(tmp_path / "map.json"))
    ][1] == "template response"
    rows = [
        {
            "user_input": "b",
            "strategy": "Question",
            "response": "[Question] Why?",
            "Error Type": "Premature Emotional Transition",
        },
        {"user_input": "", "strategy": "Others", "response": "[Others] Hm.", "Error Type": "N/A"},
        {
            "user_input": "a",
            "strategy": "Others",
            "response": "[Others] Hm.",
            "Error Type": "Other",
        },
    ]
    (tmp_path / "b.json").write_text(json.dumps(rows))
    labelled = read_labels(tmp_path / "b.json", [talk("9", "a", "b", " ")], ESCONV)
    assert [(one.turn, one.case.reply, one.label) for one in labelled] == [
        (1, "Why?", "early emotion shift"),
        (2, "Hm.", "none"),
    ]
    assert labelled[0].case.history == talk("9", "a", "b").turns[:3]
    for text, says in (
        ('{"label": "none"}', "row 1 is no labelled turn"),
        ("[1]", "should hold JSON objects"),
        ("[{", "cannot be read"),
    ):
        (tmp_path / "c.jsonl").write_text(text + "\n")
        with pytest.raises(DescError, match=says):
            read_labels(tmp_path / "c.jsonl", [], ESCONV)
    (tmp_path / "map.json").write_text("[]")
    with pytest.raises(DescError, match="map.json: should hold JSON objects"):
        read_labels(tmp_path / "a.jsonl", [], ESCONV, str(tmp_path / "map.json"))


def test_no_dialogue_is_on_both_sides_of_a_hold_out(tmp_path):
    record = {"turn": 0, "context": [], "strategy": "Others", "response": "Hm.", "label": "none"}
    names = [str(i) for i in range(10) for _ in range(2)] + ["9", "0"]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(record | {"dialogue": name}) + "\n" for name in names)
    )
    rest, held = hold_out(read_labels(tmp_path / "a.jsonl", [], ESCONV), 0.2)
    assert [one.dialogue for one in held] == ["8", "8", "9", "9", "9"] and len(rest) == 17
    assert not {one.dialogue for one in rest} & {one.dialogue for one in held}


# --- ratings --------------------------------------------------------------------------------------
# ------------------------------


def test_ratings_come_back_with_peoples_and_are_correlated(tmp_path):
    """The judge gives 0 … 5 and people the same order, with one pair the other way round: of 15
    pairs 14 agree, so τ = (14 − 1) / 15; ρ = 1 − 6 Σd² / n(n² − 1) = 1 − 6 · 2 / 210."""
    dialogues = [talk(str(i), "Hi") for i in range(6)]
    records = [
        {"replies": [f"-{i}"], "ratings": [dict.fromkeys(RUBRICS, float(i))]} for i in range(6)
    ]
    write_ratings(tmp_path / "r.csv", dialogues, {"sft": records})
    rows = list(csv.DictReader((tmp_path / "r.csv").read_text(encoding="utf-8-sig").splitlines()))
    assert rows[1]["reply"] == "'-1" and rows[1]["context"] == "seeker: Hi"
    for row, value in zip(rows, (0, 1, 3, 2, 4, 5)):
        row["empathy human"] = value
    with open(tmp_path / "r.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader(), writer.writerows(rows)
    said = correlate(tmp_path / "r.csv")
    assert "| empathy | 6 | 0.943 (" in said and "| 0.867 (" in said and "fluency" not in said


@pytest.mark.parametrize(
    "text, says",
    [
        ("a judge,a human\n1,\n", "no row has both"),
        ("a judge,a human\n1,good\n", "row 1: a should be two numbers"),
        ("", "no row"),
    ],
)
def test_ratings_that_cannot_be_correlated_are_told(tmp_path, text, says):
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(DescError, match=says):
        correlate(tmp_path / "r.csv")


def test_what_people_wrote_is_not_overwritten(tmp_path):
    refuse_labelled(tmp_path / "none.csv")
    for head in ("number,label", "empathy judge,empathy human", "empathy judge;empathy human"):
        (tmp_path / "r.csv").write_text(
            f"{head}\n1,\n".replace("1,", "1;" if ";" in head else "1,")
        )
        refuse_labelled(tmp_path / "r.csv")
        (tmp_path / "r.csv").write_text((tmp_path / "r.csv").read_text().rstrip() + "2\n")
        with pytest.raises(DescError, match="move it away first"):
            refuse_labelled(tmp_path / "r.csv")


def test_a_review_saved_with_semicolons_is_read(tmp_path):
    (tmp_path / "r.csv").write_text(
        'number;context;label\n1;"seeker: a, b";none\n', encoding="utf-8"
    )
    (tmp_path / "r.key.csv").write_text("number,dialogue,turn,annotator\n1,7,0,none\n")
    assert read_review(tmp_path / "r.csv") == (["none"], ["none"], ["7"])
