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
    answer_dialogues,
    find_error,
    label,
    route,
)
from desc.pairs import Pair, Unpaired, add_mismatched, encode_unpaired, read_pairs, read_unpaired
from desc.prompts import Layout
from desc.sampling import LocalSampler
from desc.storage.files import write_lines
from mine_preferences import MineConfig

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

    def write(self, planned):
        return [[f"{turn} {strategy}" for turn, strategy in turns] for _, turns in planned]


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
    dialogues = [Dialogue("7", turns), Dialogue("8", turns)]
    answers, others = answer_dialogues(Unsure(), "sp", routing, dialogues, samples=2)
    assert answers == [Answer(0, None, "Let me think")] * 2 + [Answer(1, "Question", reply)] * 2
    assert others == answers
    assert find_error("sp", routing, GOLD, answers[0], ESCONV) == (
        None,
        "empty or unreadable answer",
    )


@pytest.mark.parametrize(
    "task, routing", [("vanilla", "released"), ("rg", "released"), ("rg", "paper"), ("sp", "paper")]
)
def test_dialogues_are_answered_at_once_as_one_at_a_time(task, routing, toy, sample):
    sampler = LocalSampler(*toy, MineConfig(task=task, max_new_tokens=6), ESCONV)
    at_once = answer_dialogues(sampler, task, routing, sample[:3], samples=2)
    assert at_once == [
        answer_dialogues(sampler, task, routing, [dialogue], samples=2)[0]
        for dialogue in sample[:3]
    ]
    assert [len(answers) for answers in at_once] == [2 * len(dialogue) for dialogue in sample[:3]]
    assert all(answer.strategy for answers in at_once for answer in answers)
    assert all(any(answer.reply for answer in answers) for answers in at_once)


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


def labelled(*arguments, **options):
    """What label() makes of the answers to DIALOGUE: id, strategy, error, completion, label."""
    answers = label(*arguments[:2], [(DIALOGUE, arguments[2])], ESCONV, **options)
    return [(a.id, a.strategy, a.error, a.completion, a.label) for a in answers]


def test_human_and_sound_answers_are_desirable_and_those_of_pairs_are_not():
    """The others are left out: one more with the same words, the human answer, what is not this
    module's fault, and what is empty."""
    answers = [
        Answer(0, "Others", "Hm.", judged("template response")),
        Answer(0, "Others", "Hm.\n", judged("template response")),
        Answer(0, "Question", "Why?", judged("none", 0.8)),
        Answer(0, "Question", "How  are you?", judged("lack of empathy")),
        Answer(1, "Others", "Hm.", judged("emotion misread")),
        Answer(1, None, "Let me think"),
        Answer(1, "Others", "So.", judged(UNREADABLE)),
    ]
    human = [
        ("rg/7/0/0", "Question", "", "How are you?", True),
        ("rg/7/1/0", "Reflection of feelings", "", "Oh no.", True),
    ]
    template = ("rg/7/0/1", "Others", "template response", "Hm.", False)
    sound = ("rg/7/0/2", "Question", "", "Why?", True)
    assert labelled("rg", "paper", answers) == [human[0], template, sound, human[1]]
    pairs = route("rg", "paper", [(DIALOGUE, answers)], ESCONV).pairs
    assert [pair.rejected for pair in pairs] == ["Hm."]
    # what is not sure makes no pair, and nothing desirable
    assert labelled("rg", "paper", answers, least_confidence=0.81) == human
    # each prompt names the strategy that its answer follows
    for place, message in (("system", 0), ("turn", -1)):
        layout = Layout(strategy_at=place)
        answers_of_rg = label("rg", "paper", [(DIALOGUE, answers)], ESCONV, layout=layout)
        for answer in answers_of_rg:
            assert f": {answer.strategy}" in answer.prompt[message]["content"][-40:]


def test_a_human_answer_that_is_not_sound_is_not_desirable():
    """Nor does it make a pair."""
    answers = [Answer(0, "Others", "Hm.", judged("lack of empathy"), judged("template response"))]
    assert labelled("rg", "released", answers) == []
    answers = [replace(answers[0], human=judged("none"))]
    assert [row[3:] for row in labelled("rg", "released", answers)] == [
        ("How are you?", True),
        ("Hm.", False),
    ]


def test_a_planners_answers_without_an_annotator():
    answers = [Answer(0, name, "") for name in ("Question", "Others", "Others", "Information")]
    assert [row[3:] for row in labelled("sp", "released", answers)] == [
        ("Question", True),
        ("Others", False),
        ("Information", False),
    ]


def test_an_answer_weighs_what_it_was_mined_with_and_the_human_answer_1():
    answers = [Answer(0, "Question", "", weight=0.7), Answer(0, "Others", "", weight=0.3)]
    unpaired = label("sp", "released", [(DIALOGUE, answers)], ESCONV)
    assert [(a.completion, a.weight) for a in unpaired] == [("Question", 1), ("Others", 0.3)]


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


# --- unpaired answers -----------------------------------------------------------------------------

ANSWER = Unpaired("rg/7/0/0", "rg", "7", 0, "Others", "", PROMPT, "Good.", True)


def test_unpaired_answers_are_trls_conversational_format_and_come_back(tmp_path):
    """But for the mismatched answers, which are found anew."""
    other = replace(
        ANSWER, id="b", prompt=talk("u Low"), completion="Bad.", label=False, weight=0.5
    )
    write_lines(tmp_path / "unpaired.jsonl", [ANSWER.record(), other.record()])
    first, second = map(json.loads, (tmp_path / "unpaired.jsonl").read_text().splitlines())
    assert first["prompt"] == PROMPT and first["label"] is True and second["label"] is False
    assert first["completion"] == [{"role": "assistant", "content": "Good."}]
    assert "weight" not in first and second["weight"] == 0.5
    assert "mismatched" not in first
    assert read_unpaired(tmp_path / "unpaired.jsonl", "rg") == [
        replace(ANSWER, mismatched="Bad."),
        replace(other, mismatched="Good."),
    ]


def test_strings_stand_for_messages_of_unpaired_answers(tmp_path):
    records = [{"prompt": "Hi", "completion": "A", "label": True, "turn": None}]
    records += [{"prompt": "Low", "completion": talk("a B"), "label": False, "score": 3}]
    write_lines(tmp_path / "unpaired.jsonl", records)
    first, second = read_unpaired(tmp_path / "unpaired.jsonl", "rg")
    assert first == Unpaired("line 1", "rg", "line 1", 0, "", "", talk("u Hi"), "A", True, 1, "B")
    assert (second.completion, second.label, second.mismatched) == ("B", False, "A")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"label": None}, "field 'label' should be true or false, not null"),
        ({"label": 1}, "field 'label' should be true or false, not 1"),
        ({"label": "true"}, "field 'label' should be true or false, not a string"),
        ({"completion": []}, "completion should hold one message, the answer, not 0"),
        ({"completion": talk("u Hi", "a A")}, "completion should hold one message"),
        ({"completion": talk("u A")}, "completion should end with the assistant's message"),
        ({"completion": None}, "field 'completion' should be a list, not null"),
        ({"completion": " "}, "completion, message 1: field 'content' is empty"),
        ({"prompt": None}, "field 'prompt' should be a list, not null"),
        ({"prompt": []}, "the prompt has no message of the user's"),
        ({"prompt": talk("u Hi", "a Hm")}, "the prompt ends with the assistant's message"),
        ({"task": "sp"}, "is of task 'sp', not 'rg'"),
        ({"weight": 0}, "field 'weight' should be a positive, finite number, not 0"),
        ({"id": "rg/7/0/0"}, "has the id 'rg/7/0/0' of a line before"),
    ],
)
def test_a_line_that_is_no_answer_is_refused_with_its_number(tmp_path, change, message):
    record = {"prompt": "Low", "completion": "Bad.", "label": False} | change
    write_lines(tmp_path / "unpaired.jsonl", [ANSWER.record(), record])
    with pytest.raises(DescError) as error:
        read_unpaired(tmp_path / "unpaired.jsonl", "rg")
    assert str(error.value).startswith(f"{tmp_path}/unpaired.jsonl: line 2")
    assert message in str(error.value)


def answer(dialogue, prompt, completion):
    name = f"{dialogue}/{prompt}/{completion}"
    return replace(
        ANSWER, id=name, dialogue=dialogue, prompt=talk(f"u {prompt}"), completion=completion
    )


def mismatched(*answers):
    return [found.mismatched for found in add_mismatched([answer(*each) for each in answers])]


def test_answers_meet_those_at_the_same_place_of_the_dialogues_next_turn():
    """So a human answer, the first of its turn, meets a human one; all are as frequent as they
    were. Dialogues may be mixed."""
    turns = [("7", "a", "A1"), ("7", "a", "A2"), ("8", "x", "X1"), ("7", "b", "B1")]
    turns += [("7", "b", "B2"), ("8", "y", "Y1"), ("7", "c", "C1"), ("7", "c", "C2")]
    assert mismatched(*turns) == ["B1", "B2", "Y1", "C1", "C2", "X1", "A1", "A2"]


def test_answers_never_meet_one_in_the_same_words_or_to_the_same_prompt():
    turns = [("7", "a", "Question"), ("7", "a", "Others"), ("7", "b", "Question")]
    turns += [("7", "b", "Information")]
    assert mismatched(*turns) == ["Information", "Information", "Others", "Others"]
    # if the dialogue has none, another's
    assert mismatched(("7", "a", "A"), ("8", "a", "B"), ("9", "c", "C")) == ["C", "C", "A"]


def test_without_answers_to_other_prompts_kto_is_refused(tmp_path):
    for answers in (
        [answer("7", "a", "A")],
        [answer("7", "a", "A"), answer("7", "a", "B")],
        [answer("7", "a", "A"), answer("8", "b", "A")],
    ):
        write_lines(tmp_path / "unpaired.jsonl", [each.record() for each in answers])
        with pytest.raises(DescError) as error:
            read_unpaired(tmp_path / "unpaired.jsonl", "rg")
        told = "KTO needs answers to other prompts, but none differs from that of 7/a/A"
        assert str(error.value) == f"{tmp_path}/unpaired.jsonl: {told}"


def test_both_answers_of_an_item_fit_behind_one_prompt(toy):
    """The mismatched answer is the longer one, so an exchange is dropped for it."""
    prompt, texts = (
        talk("s S", "u Hi", "a Hello", "u Low"),
        {"completion": "a", "mismatched": "a b c"},
    )
    answer = replace(ANSWER, prompt=prompt, label=False, weight=0.25, **texts)
    whole = encode_unpaired(toy[1], answer, 2048, ESCONV.speakers)
    assert whole.turns_cut == 0 and not whole.desirable and whole.weight == 0.25
    longest = max(len(prompt) + len(completion) for prompt, completion in whole.sequences)
    item = encode_unpaired(toy[1], answer, longest - 1, ESCONV.speakers)
    own, other = item.sequences
    assert item.turns_cut == 1 and own.prompt == other.prompt
    shorter = replace(answer, mismatched="b")
    assert encode_unpaired(toy[1], shorter, longest - 1, ESCONV.speakers).turns_cut == 0
