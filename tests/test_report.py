"""pytest tests/test_report.py"""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from desc.esconv import Dialogue, Turn
from desc.evaluation.scores import frequency_row, summarise, won
from desc.evaluation.tables import tables
from desc.judging.judge import RUBRICS
from desc.strategies import Strategies

AB = Strategies(("a", "b"))
CONFIG = SimpleNamespace(temperature=1.0, top_p=1.0, seed=0)


def record(gold, predicted, logps=(), replies=(), human=None, **more):
    human = human or ["I see."] * len(gold)
    return {
        "dialogue": "0",
        "gold": list(gold),
        "predicted": predicted,
        "logps": list(logps),
        "human": human,
        "replies": list(replies),
        **more,
    }


def test_a_planners_row_by_hand():
    """Two dialogues of two turns, two seeds. Seed 1 is right in 3 of 4 turns, seed 2 in 1; accuracy
    is their mean, 50. At T = 1 sampling is right with the gold strategy's probability, on average
    (0.8 + 0.4 + 0.9 + 0.9) / 4; the likeliest is right in 3 turns."""
    p = [[[0.8, 0.2], [0.6, 0.4]], [[0.1, 0.9], [0.1, 0.9]]]
    records = [
        record("ab", ["aa", "bb"], np.log(p[0]).tolist()),
        record("bb", ["bb", "aa"], np.log(p[1]).tolist()),
    ]
    row = summarise({"x": records}, AB, CONFIG)["x"]
    assert row["turns"] == 4 and row["accuracy"] == 50 and row["by seed"]["accuracy"] == [75, 25]
    assert row["greedy"] == 75 and row["top-2"] == 100 and row["invalid"] == 0
    assert row["nll"] == pytest.approx(-np.log([0.8, 0.4, 0.9, 0.9]).mean())
    assert np.array(row["confusion"]) == pytest.approx(np.array([[0.5, 1.5], [0.5, 1.5]]))
    assert row["precision"] == pytest.approx({"a": 0.25, "b": 0.75}) and row[
        "recall"
    ] == pytest.approx({"a": 0.5, "b": 0.5})
    # a where gold is b 0.6 + 0.1 + 0.1 times, b where gold is a 0.2 times: p = (1.6, 0.4), which
    # differ from 1 by 0.6
    assert row["B expected"] == pytest.approx(0.6)
    assert row["ece"] == pytest.approx(100 * (abs(0.8 - 1) + abs(0.6 - 0) + abs(1.8 - 2)) / 4)


def test_what_could_not_be_parsed_is_left_out_and_counted():
    row = summarise({"x": [record("abab", [["a", None, None, "b"]])]}, AB, CONFIG)["x"]
    assert row["invalid"] == 50 and row["accuracy"] == 100 and "greedy" not in row
    nothing = summarise({"x": [record("ab", [[None, None]])]}, AB, CONFIG)["x"]
    assert nothing["invalid"] == 100 and nothing["accuracy"] == nothing["Q"] == nothing["B"] == 0


def test_differences_to_the_first_are_paired():
    """In each dialogue the second system is right once more, so the difference is 25 in every
    sample; each alone varies."""
    hits = [0, 1, 2, 3] * 5
    first = [record("aaaa", ["a" * n + "b" * (4 - n)]) for n in hits]
    second = [record("aaaa", ["a" * (n + 1) + "b" * (3 - n)]) for n in hits]
    rows = summarise({"one": first, "two": second}, AB, CONFIG)
    assert (
        rows["two"]["accuracy difference"] == pytest.approx((25, 25, 25))
        and "accuracy difference" not in rows["one"]
    )
    low, high = rows["two"]["accuracy interval"]
    assert rows["two"]["accuracy"] == 62.5 and low + 8 < 62.5 < high - 8


def test_replies_are_scored_where_there_are_some():
    """Two of three dialogues are answered: means are over their three turns."""
    human = ["I see you are sad.", "Why?"]
    answered = [
        record("ab", ["ab"], replies=human, human=human),
        record("a", ["a"], replies=["Hm."], human=["Oh no no."]),
    ]
    row = summarise({"x": [*answered, record("a", ["a"])]}, AB, CONFIG)["x"]
    assert row["replies"] == 3 and row["turns"] == 4
    # "hm ." and "oh no no ." share the full stop
    assert row["f1"] == pytest.approx((100 + 100 + 100 * 2 * 1 / (2 + 4)) / 3)
    assert row["length"] == pytest.approx((6 + 2 + 2) / 3)
    assert row["near-copies"] == row["self-repetition"] == 0


def test_dialogues_without_replies_do_not_widen_the_interval_of_replies():
    answered = [record("a", ["a"], replies=["Oh no."], human=["Oh no."])] * 3
    row = summarise({"x": answered + [record("a", ["a"])] * 100}, AB, CONFIG)["x"]
    assert row["f1"] == 100 and row["f1 interval"] == (100, 100)


def test_what_a_judge_did_not_say_readably_is_no_score():
    rating, verdict = dict.fromkeys(RUBRICS), dict.fromkeys(RUBRICS, [None, "tie"])
    said = record(
        "a",
        ["a"],
        replies=["x"],
        ratings=[rating],
        verdicts=[verdict],
        judged=[{"error": "unreadable"}],
    )
    row = summarise({"x": [said]}, AB, CONFIG)["x"]
    assert not {"empathy", "empathy wins", "ties", "first shown", "faultless"} & row.keys()
    assert row["unreadable"] == pytest.approx(100 * (4 + 4 + 1) / (4 + 8 + 1)) and row[
        "errors"
    ] == {"unreadable": 1}


def test_ratings_wins_and_errors_by_hand():
    rating = dict.fromkeys(RUBRICS, 4.0)
    verdict = dict.fromkeys(RUBRICS, ["ours", "ours"])
    places = dict.fromkeys(RUBRICS, ["ours", "theirs"])  # twice the one shown first: a tie
    first = record(
        "ab",
        ["ab"],
        replies=["x", "y"],
        ratings=[rating, rating | {"empathy": None}],
        judged=[{"error": "none"}] * 2,
    )
    second = record(
        "ab",
        ["ab"],
        replies=["x", "y"],
        ratings=[rating | {"empathy": 1.0}] * 2,
        verdicts=[verdict, places],
    )
    rows = summarise(
        {
            "one": [first],
            "two": [second | {"judged": [{"error": "none"}, {"error": "template response"}]}],
        },
        AB,
        CONFIG,
    )
    assert (
        rows["one"]["empathy"] == 4
        and rows["two"]["empathy"] == 1
        and rows["two"]["empathy difference"] == (-3, -3, -3)
    )
    assert rows["two"]["empathy wins"] == 75 and "empathy wins" not in rows["one"]
    assert rows["two"]["first shown"] == 75  # 1 of 2 verdicts, and 2 of 2
    assert rows["two"]["faultless"] == 50 and rows["two"]["errors"] == {
        "none": 1,
        "template response": 1,
    }
    # two errors, eight ratings
    assert rows["two"]["ties"] == 50 and rows["one"]["unreadable"] == pytest.approx(100 / 10)
    json.dumps(rows)


@pytest.mark.parametrize(
    "verdicts, points",
    [
        (("ours", "ours"), 1),
        (("theirs", "theirs"), 0),
        (("ours", "theirs"), 0.5),
        (("ours", None), None),
    ],
)
def test_a_win_takes_both_orders(verdicts, points):
    assert won(list(verdicts)) == points


def test_tables_show_what_there_is():
    first = [record("abab", ["abba"]), record("ab", ["ab"])]
    said = tables(
        {"frequencies": {"accuracy": 50.0}} | summarise({"one": first, "two": first}, AB, CONFIG)
    )
    assert said.splitlines()[0] == "| system | accuracy | Q | Q_W | B | invalid |"
    assert (
        "| frequencies | 50.0 |  |  |  |  |" in said
        and "| accuracy | +0.0 (+0.0 … +0.0) |" in said
        and "f1" not in said
    )


def test_the_row_of_frequencies_by_hand():
    """Training strategies a, a, a, b: of gold a, b a draw is right with 3/4 and 1/4."""

    def talk(names):
        return Dialogue(
            "",
            tuple(
                turn
                for name in names
                for turn in (Turn("seeker", "Hi"), Turn("supporter", "Oh", name))
            ),
        )

    row = frequency_row([talk("aaa"), talk("b")], [talk("ab")], AB)
    assert (
        row["accuracy"] == pytest.approx(50)
        and row["nll"] == pytest.approx(-np.log([0.75, 0.25]).mean())
        and row["turns"] == 2
    )
