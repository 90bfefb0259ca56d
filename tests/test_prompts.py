"""From (task, dialogue, turn) to messages and completion: the exact values, that the answer never
leaks, and how strategies are parsed.

    pytest tests/test_prompts.py -q
"""

from dataclasses import replace
from functools import partial

import pytest

from desc import prompts
from desc.domain import ESCONV, Strategies
from desc.esconv import Dialogue, Turn, flatten
from desc.prompts import TASKS, Layout, build_completion, build_examples, build_messages

IN_SYSTEM = Layout(strategy_at="system")

drop_oldest = partial(prompts.drop_oldest, speakers=ESCONV.speakers)
TINY = Dialogue(
    "7",
    (
        Turn("seeker", "I lost my job.\nIt was on Monday."),
        Turn("supporter", "Which job was it?", "Question"),
        Turn("seeker", "Cook."),
        Turn("supporter", "You sound worn out.", "Reflection of feelings"),
        Turn("seeker", " "),
        Turn("supporter", "I was let go once too.", "Self-disclosure"),
    ),
)


def roles(messages):
    return [message["role"] for message in messages]


def contents(messages):
    return [message["content"] for message in messages]


def test_planner_reads_one_flat_message_without_strategies():
    for turn, history in enumerate(
        [
            "seeker: I lost my job.\nIt was on Monday.\n",
            (
                "seeker: I lost my job.\nIt was on Monday.\nsupporter: Which job was it?\nseeker:"
                " Cook.\n"
            ),
            (
                "seeker: I lost my job.\nIt was on Monday.\nsupporter: Which job was it?\nseeker:"
                " Cook.\nsupporter: You sound worn out.\nseeker:  \n"
            ),
        ]
    ):
        messages = build_messages("sp", TINY, turn)
        assert roles(messages) == ["system", "user"]
        assert messages[1]["content"] == history
        assert ", ".join(ESCONV.strategies) in messages[0]["content"]


def test_generator_reads_a_chat_without_tags_and_its_strategy_in_the_system_message():
    messages = build_messages("rg", TINY, 2, "Information", layout=IN_SYSTEM)
    assert roles(messages) == ["system", "user", "assistant", "user", "assistant", "user"]
    texts = [
        "I lost my job.\nIt was on Monday.",
        "Which job was it?",
        "Cook.",
        "You sound worn out.",
        " ",
    ]
    assert contents(messages)[1:] == texts
    assert ", ".join(ESCONV.strategies) in messages[0]["content"]
    assert messages[0]["content"].endswith("Your current strategy is: Information")


def test_planner_reads_a_chat_as_vanilla_does():
    """With --history messages; it is instructed as it is with one text."""
    for turn in range(3):
        messages = build_messages("sp", TINY, turn, layout=Layout(history="messages"))
        assert messages[0] == build_messages("sp", TINY, turn)[0]
        assert messages[1:] == build_messages("vanilla", TINY, turn)[1:]
    assert messages[2]["content"] == "[Question] Which job was it?"


def test_vanilla_reads_a_chat_that_keeps_the_tags():
    messages = build_messages("vanilla", TINY, 2)
    assert roles(messages) == ["system", "user", "assistant", "user", "assistant", "user"]
    assert contents(messages)[1:] == [
        "I lost my job.\nIt was on Monday.",
        "[Question] Which job was it?",
        "Cook.",
        "[Reflection of feelings] You sound worn out.",
        " ",
    ]
    assert ", ".join(f"[{name}]" for name in ESCONV.strategies) in messages[0]["content"]


def test_examples_are_every_turn_with_the_human_answer():
    completions = {
        "sp": ["Question", "Reflection of feelings", "Self-disclosure"],
        "rg": ["Which job was it?", "You sound worn out.", "I was let go once too."],
        "vanilla": [
            "[Question] Which job was it?",
            "[Reflection of feelings] You sound worn out.",
            "[Self-disclosure] I was let go once too.",
        ],
    }
    for task in TASKS:
        examples = build_examples(task, [TINY, replace(TINY, id="8")])
        assert [(e.dialogue, e.turn) for e in examples] == [
            ("7", 0),
            ("7", 1),
            ("7", 2),
            ("8", 0),
            ("8", 1),
            ("8", 2),
        ]
        assert [e.completion for e in examples] == 2 * completions[task]
        assert [e.messages for e in examples[:3]] == [
            build_messages(task, TINY, t, TINY.supporter(t).strategy) for t in range(3)
        ]


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_and_what_follows_never_reach_the_messages(task, sample):
    """The messages for turn t do not depend on turn t and what follows. They do depend on what
    comes before."""
    dialogue = sample[0]
    for turn in range(len(dialogue)):
        gold = build_messages(task, dialogue, turn, "Others")
        other = tuple(
            replace(original, text="SECRET", strategy=original.strategy and "Information")
            for original in dialogue.turns
        )
        context = 2 * turn + 1
        assert (
            build_messages(
                task,
                replace(dialogue, turns=dialogue.turns[:context] + other[context:]),
                turn,
                "Others",
            )
            == gold
        )
        assert (
            build_messages(
                task,
                replace(dialogue, turns=other[:context] + dialogue.turns[context:]),
                turn,
                "Others",
            )
            != gold
        )
        assert dialogue.supporter(turn).text not in " ".join(contents(gold))


def test_another_taxonomy_is_what_the_system_message_names():
    own = replace(ESCONV, strategies=Strategies(("Open question", "Affirm")))
    for task in TASKS:
        system = build_messages(task, TINY, 0, "Affirm", own)[0]["content"]
        assert "Open question" in system and "Affirm" in system and "Self-disclosure" not in system


@pytest.mark.parametrize("task", TASKS)
def test_drop_oldest_leaves_what_a_dialogue_without_its_first_exchanges_would_give(task):
    messages = build_messages(task, TINY, 2, "Others")
    for cut in (1, 2):
        messages = drop_oldest(messages)
        assert messages == build_messages(
            task, replace(TINY, turns=TINY.turns[2 * cut :]), 2 - cut, "Others"
        )
    assert drop_oldest(messages) is None


@pytest.mark.parametrize("task", TASKS)
def test_drop_oldest_never_cuts_into_a_turn(task):
    """A seeker may quote a chat. So a line in an utterance that begins with "seeker: " is no new
    turn."""
    quoting = Turn("seeker", "He wrote\nseeker: me\nsupporter: him")
    assert (
        drop_oldest(build_messages(task, Dialogue("0", (quoting, TINY.turns[1])), 0, "Others"))
        is None
    )
    messages = drop_oldest(
        build_messages(task, Dialogue("0", (quoting, *TINY.turns[1:])), 1, "Others")
    )
    assert messages == build_messages(task, Dialogue("0", TINY.turns[2:]), 0, "Others")


@pytest.mark.parametrize(
    "text, guarded",
    [
        ("He wrote\nseeker: me\nsupporter: him", "He wrote\nseeker : me\nsupporter : him"),
        ("a\n\n  Supporter:b", "a\n\n  Supporter :b"),
        ("a\r\nSEEKER: b\rsupporter: c", "a\r\nSEEKER : b\rsupporter : c"),
        (
            "a\u2028supporter: b\x85seeker: c\vseeker: d",
            "a\u2028supporter : b\x85seeker : c\vseeker : d",
        ),
        ('supporter: it reads "seeker: supporter: …"', None),  # on the line of its own turn
        ("my supporter: you\nMy supporter: you\nsupporters: all\nsupporter said: x\n", None),
    ],
)
def test_no_line_of_an_utterance_begins_like_a_turn_of_the_flattened_history(text, guarded):
    """A blank is put before the colon. All else stays as it is."""
    turns = (Turn("seeker", text), Turn("supporter", text, "Others"), *TINY.turns)
    flat = build_messages("sp", Dialogue("0", turns), 1)[1]["content"]
    text = guarded or text
    assert flat == f"seeker: {text}\nsupporter: {text}\nseeker: {TINY.turns[0].text}\n"


def test_ordinary_dialogues_are_flattened_as_they_are(sample):
    for dialogue in sample:
        flat = build_messages("sp", dialogue, len(dialogue) - 1)[1]["content"]
        assert flat == flatten(dialogue.history(len(dialogue) - 1), ESCONV.speakers)


def chat(roles):
    """Messages with these roles (s, u, a), whose contents are their places: "0", "1", …"""
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[role], "content": str(i)} for i, role in enumerate(roles)]


@pytest.mark.parametrize(
    "roles, left",
    [
        ("suaua", "0 3 4"),
        ("suau", "0 3"),
        ("uau", "2"),
        ("uauau", "2 3 4"),
        ("ssuauau", "0 1 4 5 6"),
        ("sauau", "0 2 3 4"),  # the assistant's greeting goes alone
        ("aau", "2"),
        ("suuaauu", "0 5 6"),  # several messages in a row are one turn
        ("suasu", "0 3 4"),
        ("suas", None),
        ("su", None),
        ("suu", None),
        ("uuu", None),
        ("u", None),
        ("s", None),
        ("", None),
    ],
)
def test_drop_oldest_keeps_system_messages_and_the_latest_turn_of_any_messages(roles, left):
    messages = drop_oldest(chat(roles))
    assert (messages and " ".join(contents(messages))) == left


@pytest.mark.parametrize(
    "flat, left",
    [
        ("seeker: a\nsupporter: b\nseeker: c\n", "seeker: c\n"),
        ("seeker: a\nseeker: b\nsupporter: c\nseeker: d\nseeker: e\n", "seeker: d\nseeker: e\n"),
        ("seeker: a\nseeker: b\n", None),  # both are the latest turn
        ("I read\nsupporter: a\nseeker: b\nWhat do you think?\n", None),  # no flattened history
        ("seeker: a\nsupporter: b\nseeker: c", None),
    ],
)
@pytest.mark.parametrize("system", ["", "s", "ss"])
def test_drop_oldest_of_a_flattened_history(flat, left, system):
    messages = drop_oldest([*chat(system), {"role": "user", "content": flat}])
    assert messages == (left and [*chat(system), {"role": "user", "content": left}])


@pytest.mark.parametrize(
    "text, strategy",
    [(name, name) for name in ESCONV.strategies]
    + [
        ("[Question]", "Question"),
        (" question.\n", "Question"),
        ('"Reflection  of\nFeelings"', "Reflection of feelings"),
        ("**Question**", None),
        ("Self disclosure", None),
        ("Question, Information", None),
        ("Quest", None),
        ("", None),
    ],
)
def test_parse(text, strategy):
    assert ESCONV.strategies.parse(text) == strategy


@pytest.mark.parametrize(
    "text, strategy, reply",
    [
        ("[Question] Why?", "Question", "Why?"),
        ("\n [providing suggestions]Rest. ", "Providing Suggestions", "Rest."),
        ("[Question]", "Question", ""),
        ("[Question] [Others] Why?", "Question", "[Others] Why?"),
        ("Why? [Question]", None, "Why? [Question]"),
        ("[Hypnosis] Sleep.", None, "[Hypnosis] Sleep."),
        ("[Question Why?", None, "[Question Why?"),
        ("Question Why?", None, "Question Why?"),
        ("", None, ""),
    ],
)
def test_split_tag(text, strategy, reply):
    assert ESCONV.strategies.split_tag(text) == (strategy, reply)


def test_what_vanilla_writes_is_read_back():
    for name in ESCONV.strategies:
        assert ESCONV.strategies.split_tag(
            build_completion("vanilla", name, "I see [so far].")
        ) == (name, "I see [so far].")
        assert ESCONV.strategies.parse(build_completion("sp", name, "")) == name


def test_the_strategy_stands_in_the_last_message():
    """Then all strategies of a turn share everything before it. The other tasks know no such
    place."""
    at_turn = [build_messages("rg", TINY, 2, strategy) for strategy in ("Question", "Others")]
    in_system = build_messages("rg", TINY, 2, "Question", layout=IN_SYSTEM)
    assert at_turn[0][:-1] == at_turn[1][:-1]
    assert at_turn[0][-1]["content"] == (
        in_system[-1]["content"] + "\n\n(Strategy of your reply: Question)"
    )
    assert at_turn[0][1:-1] == in_system[1:-1]
    assert "current strategy" not in at_turn[0][0]["content"]
    assert "Providing Suggestions" in at_turn[0][0]["content"]
    for task in ("sp", "vanilla"):
        in_system = build_messages(task, TINY, 1, layout=IN_SYSTEM)
        assert build_messages(task, TINY, 1) == in_system
