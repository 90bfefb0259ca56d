"""pytest tests/test_report.py

How records of what systems answered become rows of scores and tables, worked by hand."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from desc import DescError
from desc.domain import ESCONV, Strategies
from desc.esconv import Dialogue, Turn
from desc.evaluation.counts import count_predictions, score_predictions, score_verdicts
from desc.evaluation.scores import bootstrap_scores, frequency_row, summarise
from desc.evaluation.systems import System, answer_dialogues_as, find_systems, load_systems
from desc.evaluation.tables import tables
from desc.judging.judge import RUBRICS
from desc.metrics import NO_INTERVAL
from evaluate import EvalConfig

AB = Strategies(("a", "b"))
CONFIG = SimpleNamespace(temperature=1.0, top_p=1.0, seed=0)


def make_record(gold, predicted, logps=(), replies=(), human=None, **judgements):
    """What a system answered in one dialogue; its strategies are named by one letter."""
    return {
        "dialogue": "0",
        "gold": list(gold),
        "predicted": predicted,
        "logps": list(logps),
        "human": human or ["I see."] * len(gold),
        "replies": list(replies),
        **judgements,
    }


def summarise_one(*records) -> dict:
    """The row of a single system."""
    return summarise({"x": list(records)}, AB, CONFIG)["x"]


# Systems


def test_a_calibrated_planner_is_a_system_of_its_own():
    """After the same one as it is. People, and a planner without an adapter, are not calibrated."""
    flags = ["both=sp:P,rg:R", "base=sp:base", "people=sp:gold"]
    found = find_systems(SimpleNamespace(systems=flags, out="out", calibrate="prior"))
    assert [system.name for system in found] == ["both", "both calibrated", "base", "people"]
    assert found[1] == replace(found[0], name="both calibrated", calibrated=True)


def test_systems_are_read_from_the_flag():
    flags = ["both=rg:R,sp:P", "alone=sp:gold", "one=vanilla:base"]
    both, alone, entry = find_systems(SimpleNamespace(systems=flags, out="out", calibrate="none"))
    assert both == System("both", "sp", "P", "rg", "R")
    assert alone == System("alone", "sp", "gold") and alone.plans_as_human
    assert entry == System("one", "vanilla", "base", "vanilla", "base")
    assert list(both.adapters().items()) == [("sp", "P"), ("rg", "R")]  # sp is always the first
    assert entry.digests() == {"vanilla": "base"} and not entry.plans_as_human


@pytest.mark.parametrize("decode", ["scored", "free"])
def test_dialogues_are_answered_at_once_as_one_at_a_time(toy, sample, decode):
    """The second is not answered in words."""
    flags = ["both=sp:base,rg:base", "one=vanilla:base", "alone=sp:base"]
    config = EvalConfig(systems=flags, max_new_tokens=6, decode=decode, seeds=2)
    systems, dialogues = find_systems(config), sample[:3]
    replied = {dialogues[0].id, dialogues[2].id}

    def answer(some):
        loaded = load_systems(config, *toy, systems, ESCONV.strategies)
        return [
            answer_dialogues_as(system, loaded, config, some, ESCONV, replied) for system in systems
        ]

    one_at_a_time = [answer([dialogue]) for dialogue in dialogues]
    for at_once, *alone in zip(answer(dialogues), *one_at_a_time):
        for record, (other,) in zip(at_once, alone, strict=True):
            for logps, others in zip(record.pop("logps"), other.pop("logps"), strict=True):
                assert logps == pytest.approx(others, abs=1e-4)
            assert record == other
    both, one, alone = answer(dialogues)
    assert [bool(record["replies"]) for record in both] == [True, False, True]
    assert [bool(record["replies"]) for record in one] == [True, False, True]
    assert not any(record["replies"] for record in alone)


@pytest.mark.parametrize(
    "flag", ["sp:P", "a=", "a=sp:", "=sp:P", "a=rg:R", "a=sp:P,sp:Q", "a=sp:P,vanilla:V", "a=sp:P,"]
)
def test_a_malformed_system_is_an_error(flag):
    with pytest.raises(DescError, match="should be NAME=sp:ADAPTER,rg:ADAPTER"):
        find_systems(SimpleNamespace(systems=[flag], out="out"))


# Planners


def test_a_planners_row_by_hand():
    """Two dialogues of two turns, two seeds. Seed 1 is right in 3 of 4 turns, seed 2 in 1; accuracy
    is their mean, 50. At T = 1 a draw is right with the gold strategy's probability, on average
    (0.8 + 0.4 + 0.9 + 0.9) / 4. The likeliest is right in 3 turns."""
    first = [[0.8, 0.2], [0.6, 0.4]]
    second = [[0.1, 0.9], [0.1, 0.9]]
    row = summarise_one(
        make_record("ab", ["aa", "bb"], np.log(first).tolist()),
        make_record("bb", ["bb", "aa"], np.log(second).tolist()),
    )
    assert row["turns"] == 4 and row["accuracy"] == 50
    assert row["by seed"]["accuracy"] == [75, 25]
    assert row["greedy"] == 75 and row["top-2"] == 100 and row["invalid"] == 0
    assert row["nll"] == pytest.approx(-np.log([0.8, 0.4, 0.9, 0.9]).mean())
    np.testing.assert_allclose(row["confusion"], [[0.5, 1.5], [0.5, 1.5]])
    assert row["precision"] == pytest.approx({"a": 0.25, "b": 0.75})
    assert row["recall"] == pytest.approx({"a": 0.5, "b": 0.5})
    # a if gold is b 0.6 + 0.1 + 0.1 times, b if gold is a 0.2 times: p = (1.6, 0.4), which differ
    # from 1 by 0.6
    assert row["B expected"] == pytest.approx(0.6)
    assert row["ece"] == pytest.approx(100 * (abs(0.8 - 1) + abs(0.6 - 0) + abs(1.8 - 2)) / 4)


def test_what_could_not_be_parsed_is_left_out_and_counted():
    row = summarise_one(make_record("abab", [["a", None, None, "b"]]))
    assert row["invalid"] == 50 and row["accuracy"] == 100 and "greedy" not in row
    nothing = summarise_one(make_record("ab", [[None, None]]))
    assert nothing["invalid"] == 100
    assert nothing["accuracy"] == nothing["Q"] == nothing["B"] == 0


def test_differences_to_the_first_are_paired():
    """In each dialogue the second system is right once more, so the difference is 25 in every
    resample, although each system alone varies."""
    hits = [0, 1, 2, 3] * 5
    first = [make_record("aaaa", ["a" * n + "b" * (4 - n)]) for n in hits]
    second = [make_record("aaaa", ["a" * (n + 1) + "b" * (3 - n)]) for n in hits]
    rows = summarise({"one": first, "two": second}, AB, CONFIG)
    assert rows["two"]["accuracy difference"] == pytest.approx((25, 25, 25))
    assert "accuracy difference" not in rows["one"]
    low, high = rows["two"]["accuracy interval"]
    assert rows["two"]["accuracy"] == 62.5 and low + 8 < 62.5 < high - 8


def test_the_row_of_frequencies_by_hand():
    """The training strategies are a, a, a, b. If gold is a, b, a draw is right with 3/4 and 1/4."""

    def make_dialogue(names):
        turns = []
        for name in names:
            turns += [Turn("seeker", "Hi"), Turn("supporter", "Oh", name)]
        return Dialogue("", tuple(turns))

    row = frequency_row([make_dialogue("aaa"), make_dialogue("b")], [make_dialogue("ab")], AB)
    assert row["turns"] == 2 and row["accuracy"] == pytest.approx(50)
    assert row["nll"] == pytest.approx(-np.log([0.75, 0.25]).mean())


# Replies


def test_dialogues_that_are_not_answered_do_not_count_for_replies():
    """Two of three dialogues are answered: means are over their three turns."""
    human = ["I see you are sad.", "Why?"]
    row = summarise_one(
        make_record("ab", ["ab"], replies=human, human=human),
        make_record("a", ["a"], replies=["Hm."], human=["Oh no no."]),
        make_record("a", ["a"]),
    )
    assert row["replies"] == 3 and row["turns"] == 4
    # "hm ." and "oh no no ." share the full stop
    assert row["f1"] == pytest.approx((100 + 100 + 100 * 2 * 1 / (2 + 4)) / 3)
    assert row["length"] == pytest.approx((6 + 2 + 2) / 3)
    assert row["near-copies"] == row["self-repetition"] == 0


def test_dialogues_without_replies_do_not_widen_the_interval_of_replies():
    answered = make_record("a", ["a"], replies=["Oh no."], human=["Oh no."])
    row = summarise_one(*[answered] * 5, *[make_record("a", ["a"])] * 100)
    assert row["f1"] == 100 and row["f1 interval"] == (100, 100)


def test_intervals_are_of_the_dialogues_that_have_a_value():
    """Of 20 dialogues 5 have a readable rating, 3. Other resamples than these have no mean, and no
    mean of 0. With 4 such dialogues there is no interval."""
    rated, unread = [dict.fromkeys(RUBRICS, 3.0)], [dict.fromkeys(RUBRICS)]

    def rate(readable):
        ratings = [rated] * readable + [unread] * (20 - readable)
        return summarise_one(*(make_record("a", ["a"], replies=["x"], ratings=r) for r in ratings))

    assert rate(5)["empathy"] == 3 and rate(5)["empathy interval"] == (3, 3)
    assert rate(4)["empathy"] == 3 and rate(4)["empathy interval"] is None
    assert rate(4)["unreadable interval"] is not None


def test_a_difference_to_a_score_of_too_few_dialogues_has_no_interval():
    """The first system has 4 readable ratings, the second 6. One note is for the first's score, and
    one for the difference."""
    rated, unread = [dict.fromkeys(RUBRICS, 3.0)], [dict.fromkeys(RUBRICS)]
    systems = {}
    for name, readable in (("one", 4), ("two", 6)):
        ratings = [rated] * readable + [unread] * (6 - readable)
        systems[name] = [make_record("a", ["a"], replies=["x"], ratings=r) for r in ratings]
    rows = summarise(systems, AB, CONFIG)
    assert rows["two"]["empathy interval"] == (3, 3)
    assert rows["two"]["empathy difference"] == (0, None, None)
    assert tables(rows).count(NO_INTERVAL) == 2
    assert tables({"two": rows["two"]}).count(NO_INTERVAL) == 2


# Judgements


def test_an_unreadable_judgement_is_no_score():
    record = make_record(
        "a",
        ["a"],
        replies=["x"],
        judged=[{"error": "unreadable"}],
        ratings=[dict.fromkeys(RUBRICS)],
        verdicts=[dict.fromkeys(RUBRICS, [None, "tie"])],
    )
    row = summarise_one(record)
    assert not {"empathy", "empathy wins", "ties", "first shown", "faultless"} & row.keys()
    # 4 verdicts, 4 ratings and the annotator's judgement, of 8, 4 and 1
    assert row["unreadable"] == pytest.approx(100 * (4 + 4 + 1) / (8 + 4 + 1))
    assert row["errors"] == {"unreadable": 1}


def test_ratings_wins_and_errors_by_hand():
    good = dict.fromkeys(RUBRICS, 4.0)
    win = dict.fromkeys(RUBRICS, ["ours", "ours"])
    tie = dict.fromkeys(RUBRICS, ["ours", "theirs"])  # twice the reply that is shown first
    first = make_record(
        "ab",
        ["ab"],
        replies=["x", "y"],
        judged=[{"error": "none"}] * 2,
        ratings=[good, good | {"empathy": None}],
    )
    second = make_record(
        "ab",
        ["ab"],
        replies=["x", "y"],
        judged=[{"error": "none"}, {"error": "template response"}],
        ratings=[good | {"empathy": 1.0}] * 2,
        verdicts=[win, tie],
    )
    rows = summarise({"one": [first], "two": [second]}, AB, CONFIG)
    entry, two = rows["one"], rows["two"]
    assert entry["empathy"] == 4 and two["empathy"] == 1
    assert two["empathy difference"] == (-3, None, None)  # of one dialogue
    assert two["empathy wins"] == 75 and "empathy wins" not in entry
    assert two["first shown"] == 75  # 1 of the first 2 verdicts, and 2 of the next 2
    assert two["ties"] == 50
    assert two["faultless"] == 50 and two["errors"] == {"none": 1, "template response": 1}
    assert entry["unreadable"] == pytest.approx(100 / 10)  # of two judgements and eight ratings
    json.dumps(rows)


@pytest.mark.parametrize(
    "verdicts, points",
    [
        (["ours", "ours"], 1),
        (["theirs", "theirs"], 0),
        (["ours", "theirs"], 0.5),
        (["ours", "tie"], 0.5),
        (["ours", None], None),
    ],
)
def test_a_reply_wins_if_it_does_in_both_orders(verdicts, points):
    assert score_verdicts(verdicts) == points


# Tables


def test_tables_show_only_columns_and_rows_with_values():
    records = [make_record("abab", ["abba"]), make_record("ab", ["ab"])]
    rows = summarise({"one": records, "two": records}, AB, CONFIG)
    text = tables({"frequencies": {"accuracy": 50.0}} | rows)
    assert text.splitlines()[0] == "| system | accuracy | Q | Q_W | B | invalid |"
    assert "| frequencies | 50.0 |  |  |  |  |" in text
    assert "| accuracy | +0.0 |" in text
    assert "f1" not in text


@pytest.mark.parametrize("dialogues", [4, 5])
def test_tables_show_intervals_from_five_dialogues_on(dialogues):
    """Q of a planner that is always right is 100. The note is below both tables."""
    records = [make_record("ab", ["ab"])] * dialogues
    rows = summarise({"one": records, "two": records}, AB, CONFIG)
    frequencies = {"frequencies": {"accuracy": 50.0, "Q": 40.0}}
    text = tables(frequencies | json.loads(json.dumps(rows)))
    few = dialogues == 4
    assert (rows["one"]["Q interval"] is None) == few
    assert ("| one | 100.0 | 100.0 | 100.0 | 0.000 | 0.0 |" in text) == few
    assert ("| one | 100.0 | 100.0 (100.0–100.0) | 100.0 | 0.000 (0.00–0.00) |" in text) != few
    assert ("| Q | +0.0 |" in text) == few
    assert ("| Q | +0.0 (+0.0 … +0.0) |" in text) != few
    assert text.count(NO_INTERVAL) == (2 if few else 0)


def test_the_interval_of_b_is_basic_and_never_below_zero():
    """Both seeds and all 12 dialogues differ, so resamples of B vary. B is biased upwards, so its
    interval is twice the estimate minus the percentiles; for Q it is the percentiles."""
    draw = np.random.default_rng(0)
    records = []
    for _ in range(12):
        names = ["".join(draw.choice(list("ab"), 8, p=[0.7, 0.3])) for _ in range(3)]
        records.append(make_record(names[0], names[1:]))
    counts = [count_predictions(record, AB, CONFIG) for record in records]
    estimates = bootstrap_scores(counts, score_predictions, CONFIG.seed)
    row = summarise_one(*records)
    low, high = np.percentile(estimates["B"].resampled, [2.5, 97.5])
    assert 2 * row["B"] - high < 0
    assert row["B interval"] == pytest.approx((0, 2 * row["B"] - low))
    assert row["Q interval"] == pytest.approx(np.percentile(estimates["Q"].resampled, [2.5, 97.5]))
