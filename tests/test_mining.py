"""pytest tests/test_mining.py"""

import json
from collections import Counter
from dataclasses import asdict, replace

import pytest

from desc import DescError
from desc.domain import ESCONV
from desc.esconv import Dialogue, Turn
from desc.mining import (
    UNREADABLE,
    Annotation,
    Answer,
    Case,
    Routed,
    account,
    annotate,
    answer_dialogue,
    find_error,
    route,
)
from desc.pairs import Pair, read_pairs
from desc.storage.files import write_lines

GOLD = Turn("supporter", "How are you?", "Question")
PROMPT = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
PAIR = Pair("sp/7/0", "sp", "7", 0, "Question", "strategy mismatch", PROMPT, "Question", "Others")


def judged(error, confidence=0.8):
    return Annotation(error, confidence)


@pytest.mark.parametrize(
    "task, strategy, reply, error",
    [
        ("sp", "Question", "", "the human answer"),
        ("sp", "Others", "", "strategy mismatch"),
        ("sp", None, "", "empty or unreadable answer"),
        ("rg", "Question", "Fine.", "unjudged"),
        ("rg", "Question", "How  are\nyou?", "the human answer"),
        ("rg", "Question", "", "empty or unreadable answer"),
        ("vanilla", "Others", "How are you?", "strategy mismatch"),
        ("vanilla", "Question", "Fine.", "unjudged"),
        ("vanilla", "Question", "How are you?", "the human answer"),
    ],
)
def test_which_answers_make_a_pair_without_an_annotator(task, strategy, reply, error):
    assert error in find_error(task, "released", GOLD, Answer(0, strategy, reply), ESCONV)


class Unsure:
    """A sampler whose planner names no strategy at every other turn."""

    domain = ESCONV

    def plan(self, dialogue, turns):
        return ["Question." if turn % 2 else "Let me think" for turn in turns]

    def write(self, dialogue, planned):
        return [f"{turn} {strategy}" for turn, strategy in planned]


@pytest.mark.parametrize("task", ["sp", "rg", "vanilla"])
def test_an_answer_that_nobody_judged_makes_no_pair(task):
    # The reply is empty, as if the generator had ended at once.
    (answer,) = annotate(
        None, "paper", Dialogue("7", (Turn("seeker", "Hi"), GOLD)), [Answer(0, "Others", "")]
    )
    assert find_error(task, "paper", GOLD, answer, ESCONV) == (None, "empty or unreadable answer")


@pytest.mark.parametrize("routing, reply", [("paper", "1 Question"), ("released", "")])
def test_what_names_no_strategy_is_kept_and_makes_no_pair(routing, reply):
    turns = (Turn("seeker", "Hi"), GOLD) * 2
    answers = answer_dialogue(Unsure(), "sp", routing, Dialogue("7", turns), samples=2)
    assert answers == [Answer(0, None, "Let me think")] * 2 + [Answer(1, "Question", reply)] * 2
    assert find_error("sp", routing, GOLD, answers[0], ESCONV) == (
        None,
        "empty or unreadable answer",
    )


NOT_MINE = "not this module's fault"
# The annotator's error, and what find_error() makes of it: for sp, rg and vanilla under "paper",
# and for rg under "all-to-rg" and "released".
TABLE = [
    (
        "strategy mismatch",
        "strategy mismatch",
        NOT_MINE,
        "strategy mismatch",
        "strategy mismatch",
        NOT_MINE,
    ),
    (
        "lack of empathy",
        NOT_MINE,
        "lack of empathy",
        "lack of empathy",
        "lack of empathy",
        "lack of empathy",
    ),
    (
        "early emotion shift",
        NOT_MINE,
        "early emotion shift",
        "early emotion shift",
        "early emotion shift",
        "early emotion shift",
    ),
    (
        "template response",
        NOT_MINE,
        "template response",
        "template response",
        "template response",
        "template response",
    ),
    ("emotion misread", NOT_MINE, NOT_MINE, NOT_MINE, NOT_MINE, NOT_MINE),
    ("none", *["nothing wrong"] * 5),
    (UNREADABLE, *["unreadable judgement"] * 5),
]


@pytest.mark.parametrize("judgement, sp, rg, vanilla, all_to_rg, released", TABLE)
def test_the_annotators_error_routes_an_answer(judgement, sp, rg, vanilla, all_to_rg, released):
    answer = Answer(0, "Others", "Fine.", judged(judgement))
    cases = [("sp", "paper", sp), ("rg", "paper", rg), ("vanilla", "paper", vanilla)]
    cases += [("rg", "all-to-rg", all_to_rg), ("rg", "released", released)]
    for task, routing, expected in cases:
        error, reason = find_error(task, routing, GOLD, answer, ESCONV)
        assert (error or reason).startswith(expected)
        assert bool(error) is (expected == judgement)
    # This case asks no annotator.
    assert find_error("sp", "released", GOLD, answer, ESCONV) == ("strategy mismatch", "")
    if released == judgement:
        kept, dropped = (judgement, ""), (None, "no sound human answer")
        after_template = replace(answer, human=judged("template response"))
        assert find_error("rg", "released", GOLD, after_template, ESCONV) == dropped
        assert (
            find_error("rg", "released", GOLD, replace(answer, human=judged("none")), ESCONV)
            == kept
        )
        unsure = find_error("rg", "released", GOLD, answer, ESCONV, least_confidence=0.81)
        assert unsure == (None, "unsure judgement")
        assert find_error("rg", "released", GOLD, answer, ESCONV, least_confidence=0.8) == kept


DIALOGUE = Dialogue(
    "7",
    (
        Turn("seeker", "Hi"),
        GOLD,
        Turn("seeker", "Low."),
        Turn("supporter", "Oh no.", "Reflection of feelings"),
    ),
)


def test_route_drops_repeated_pairs_and_accounts_for_every_answer():
    answers = [
        Answer(0, "Others", "Hm.", judged("template response")),
        Answer(0, "Others", "Hm  .", judged("template response")),
    ]
    answers += [
        Answer(0, "Others", "Hm.\n", judged("template response")),
        Answer(0, "Question", "Why?", judged("none")),
    ]
    answers += [Answer(1, "Others", "Hm.", judged("lack of empathy"))]
    routed = route("rg", "paper", [(DIALOGUE, answers)], ESCONV)
    pairs, dropped = routed.pairs, routed.dropped
    assert [(p.id, p.error, p.rejected) for p in pairs] == [
        ("rg/7/0", "template response", "Hm."),
        ("rg/7/0/1", "template response", "Hm  ."),
        ("rg/7/1", "lack of empathy", "Hm."),
    ]
    assert dropped == {"repeated": 1, "nothing wrong": 1}
    assert [p.chosen for p in pairs] == ["How are you?", "How are you?", "Oh no."]
    # The prompt names the human's strategy, which the chosen reply follows.
    assert "Reflection of feelings" in pairs[2].prompt[0]["content"].rpartition("is: ")[2]
    counts = account("rg", routed, ESCONV)
    assert counts["answers"] == len(pairs) + sum(dropped.values()) == 5
    assert counts["judged"] == {"template response": 3, "none": 1, "lack of empathy": 1}
    assert counts["chosen strategies"]["Question"] == 2
    assert counts["rejected strategies"]["Others"] == 3
    assert counts["warnings"] == []
    # The warnings are: one strategy is always chosen, one is always rejected, and no pair is a
    # template response.
    equal_answers = [replace(answers[0], judged=judged("lack of empathy"))] * 20
    uniform = Routed(equal_answers, pairs[2:] * 20, ["Others"] * 20, Counter())
    assert len(account("rg", uniform, ESCONV)["warnings"]) == 3


def test_answers_come_back_from_their_records():
    for answer in (Answer(0, "Others", "Hm.", judged("none"), judged("none")), Answer(1, None, "")):
        assert Answer.read(json.loads(json.dumps(asdict(answer)))) == answer


def test_the_annotator_sees_each_answer_once_and_the_human_one_where_released():
    judged_cases = []

    def annotator(cases):
        judged_cases.extend(cases)
        return [
            judged("none" if case.reply in ("How are you?", "Oh no.") else "lack of empathy")
            for case in cases
        ]

    answers = [
        Answer(0, "Others", "Hm."),
        Answer(0, "Others", "Hm."),
        Answer(1, None, ""),
        Answer(1, "Question", "So?"),
    ]
    annotated = annotate(annotator, "paper", DIALOGUE, answers)
    assert judged_cases == [
        Case(DIALOGUE.turns[:1], "Others", "Hm."),
        Case(DIALOGUE.turns[:3], "Question", "So?"),
    ]
    assert [a.judged and a.judged.error for a in annotated] == [
        "lack of empathy",
        "lack of empathy",
        None,
        "lack of empathy",
    ]
    assert all(a.human is None for a in annotated)
    # There is nothing to judge, so no annotator is needed.
    assert annotate(None, "paper", DIALOGUE, [Answer(1, None, "")]) == [Answer(1, None, "")]
    annotated = annotate(annotator, "released", DIALOGUE, answers)
    assert len(judged_cases) == 2 + 4
    assert annotated[3].human.error == "none"
    assert annotated[3].judged.error == "lack of empathy"


def test_pairs_are_trls_conversational_format_and_come_back(tmp_path):
    # str.splitlines would end a line at these characters.
    other = Pair(**vars(PAIR) | {"id": "sp/7/1", "rejected": "low\u2028tired\u0085"})
    write_lines(tmp_path / "pairs.jsonl", [PAIR.record(), other.record()])
    record = json.loads((tmp_path / "pairs.jsonl").read_text().split("\n")[0])
    assert record["prompt"] == PROMPT
    assert record["chosen"] == [{"role": "assistant", "content": "Question"}]
    assert record["rejected"] == [{"role": "assistant", "content": "Others"}]
    assert read_pairs(tmp_path / "pairs.jsonl", "sp") == [PAIR, other]


def talk(*texts):
    """Messages "ROLE text", where ROLE is s, u or a."""
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[text[0]], "content": text[2:]} for text in texts]


CHOSEN, REJECTED = talk("a Good."), talk("a Bad.")
WHOLE = talk("s S", "u Hi", "a Hello", "u Low")


@pytest.mark.parametrize(
    "columns, prompt",
    [
        # TRL's conversational formats: with a prompt, and with the conversation in the answers.
        ({"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED}, PROMPT),
        ({"chosen": WHOLE + CHOSEN, "rejected": WHOLE + REJECTED}, WHOLE),
        # Both: the prompt is all that they share, its beginning, or its end (UltraFeedback).
        ({"prompt": WHOLE, "chosen": WHOLE + CHOSEN, "rejected": WHOLE + REJECTED}, WHOLE),
        ({"prompt": WHOLE[:2], "chosen": WHOLE + CHOSEN, "rejected": WHOLE + REJECTED}, WHOLE),
        ({"prompt": "Low", "chosen": WHOLE + CHOSEN, "rejected": WHOLE + REJECTED}, WHOLE),
        # A string is one message.
        ({"prompt": "Hi", "chosen": "Good.", "rejected": "Bad."}, talk("u Hi")),
        # Other columns and fields are ignored, and null is as good as absent.
        (
            {
                "prompt": [PROMPT[0], PROMPT[1] | {"name": "Ann"}],
                "chosen": CHOSEN,
                "rejected": REJECTED,
                "score": 0.5,
                "error": None,
            },
            PROMPT,
        ),
        # One blank of the user's stands between two turns of a supporter's.
        (
            {"prompt": talk("a Hi", "u  "), "chosen": CHOSEN, "rejected": REJECTED},
            talk("a Hi", "u  "),
        ),
    ],
)
def test_pairs_that_people_bring_are_read(tmp_path, columns, prompt):
    write_lines(tmp_path / "pairs.jsonl", [PAIR.record(), columns])
    _, pair = read_pairs(tmp_path / "pairs.jsonl", "sp")
    expected = Pair("line 2", "sp", "line 2", 0, "", "", prompt, "Good.", "Bad.")
    assert pair == expected


def test_equal_answers_are_read_because_only_encoding_shows_which_are_equal(tmp_path):
    write_lines(tmp_path / "pairs.jsonl", [{"chosen": WHOLE + CHOSEN, "rejected": WHOLE + CHOSEN}])
    (pair,) = read_pairs(tmp_path / "pairs.jsonl", "sp")
    assert (pair.prompt, pair.chosen, pair.rejected) == (WHOLE, "Good.", "Good.")


def test_a_line_keeps_its_own_facts_and_its_true_number(tmp_path):
    """Blank lines count, as in an editor."""
    bare = {"prompt": "Hi", "chosen": "Good.", "rejected": "Bad."}
    records = [bare | {"id": 17, "dialogue": 4, "turn": 2, "task": "sp"}, bare, bare]
    text = "\n\n".join(map(json.dumps, records))
    (tmp_path / "pairs.jsonl").write_text(text)
    pairs = read_pairs(tmp_path / "pairs.jsonl", "sp")
    assert [(p.id, p.dialogue, p.turn) for p in pairs] == [
        ("17", "4", 2),
        ("line 3", "line 3", 0),
        ("line 5", "line 5", 0),
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"chosen": []},
            "should differ in one message, the last; after what they share they have 0",
        ),
        ({"chosen": CHOSEN * 2}, "after what they share they have 2 and 1"),
        ({"chosen": WHOLE + CHOSEN}, "after what they share they have 5 and 1"),
        ({"chosen": WHOLE + CHOSEN, "rejected": WHOLE + CHOSEN + REJECTED}, "they have 1 and 2"),
        (
            {"chosen": WHOLE[2:] + CHOSEN, "rejected": WHOLE[2:] + REJECTED},
            "the messages that chosen and rejected share do not begin or end with the prompt",
        ),
        (
            {"chosen": talk("u Good.")},
            "chosen should end with the assistant's message, not the user's",
        ),
        ({"rejected": talk("s Bad.")}, "rejected should end with the assistant's message"),
        ({"prompt": talk("u Hi", "a Hello")}, "the prompt ends with the assistant's message"),
        ({"prompt": talk("s S")}, "the prompt has no message of the user's"),
        ({"prompt": None}, "the prompt has no message of the user's"),
        ({"prompt": []}, "the prompt has no message of the user's"),
        ({"prompt": talk("u Hi", "u ")}, "prompt, message 2: field 'content' is empty"),
        ({"prompt": ""}, "prompt, message 1: field 'content' is empty"),
        ({"prompt": 3}, "field 'prompt' should be a list, not 3"),
        ({"prompt": ["Hi"]}, "prompt, message 1: should be an object, not a string"),
        ({"chosen": None}, "field 'chosen' should be a list, not null"),
        ({"chosen": " \n"}, "chosen, message 1: field 'content' is empty"),
        ({"chosen": [{"content": "Good."}]}, "chosen, message 1: field 'role' is missing"),
        ({"chosen": [{"role": "gpt", "content": "G"}]}, "field 'role' is 'gpt'; it should be one"),
        ({"chosen": [{"role": "assistant"}]}, "field 'content' is missing"),
        ({"chosen": [CHOSEN[0] | {"content": None}]}, "'content' should be a string, not null"),
        ({"chosen": [CHOSEN[0] | {"content": 7}]}, "'content' should be a string, not 7"),
        ({"chosen": [CHOSEN[0] | {"content": float("nan")}]}, "should be a string, not nan"),
        (
            {"rejected": [REJECTED[0] | {"content": [{"type": "text", "text": "Bad."}]}]},
            "rejected, message 1: field 'content' should be a string, not a list",
        ),
        ({"rejected": "\ud83d"}, "field 'content' holds half a surrogate pair"),
        ({"task": "rg"}, "is of task 'rg', not 'sp'"),
        ({"id": ["7"]}, "field 'id' should be a string, not a list"),
        ({"turn": "2"}, "field 'turn' should be an integer, not a string"),
    ],
)
def test_a_line_that_is_no_pair_is_refused_with_its_number(tmp_path, change, message):
    record = {"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED} | change
    lines = [json.dumps(PAIR.record()), json.dumps(record)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    with pytest.raises(DescError) as error:
        read_pairs(tmp_path / "pairs.jsonl", "sp")
    assert str(error.value).startswith(f"{tmp_path}/pairs.jsonl: line 2")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "holds no pair"),
        (['{"id": "sp/7/0"'], "line 1 is not JSON"),
        (['{"id": "sp/7/0"}'], "line 1: field 'chosen' is missing"),
        (["[]"], "line 1: should be an object, not a list"),
        ([json.dumps(PAIR.record())] * 2, "line 2 has the id 'sp/7/0' of a line before"),
    ],
)
def test_a_file_of_no_pairs_ends_in_one_clear_line(tmp_path, lines, message):
    (tmp_path / "pairs.jsonl").write_text("".join(line + "\n" for line in lines))
    with pytest.raises(DescError, match=message) as error:
        read_pairs(tmp_path / "pairs.jsonl", "sp")
    assert "\n" not in str(error.value)
