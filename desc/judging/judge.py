"""A model as judge, which says how good a reply is: a local one, or one behind an endpoint.

Four rubrics (data/judge.json); the words are our own."""

import json
import re
from collections.abc import Callable, Sequence

from desc.esconv import Dialogue
from desc.judging.annotator import choose, flat_messages, guide, in_schema
from desc.judging.endpoint import Endpoint
from desc.prompts import Messages

# each option's share, {} if unreadable; the text
Judge = Callable[[list[Messages], Sequence[str]], list[tuple[dict[str, float], str]]]
RUBRICS = ("fluency", "professionalism", "empathy", "helpfulness")
DIGITS, SIDES = ("0", "1", "2", "3", "4", "5"), ("A", "B", "tie")


def make_judge(config, model, tokenizer, endpoint: Endpoint | None) -> Judge | None:
    """As --judge says. The local one is the base model."""

    def local(asked: list[Messages], options: Sequence[str]):
        return [
            (row, max(row, key=row.get)) for row in choose(model, tokenizer, asked, options, config)
        ]

    def remote(asked: list[Messages], options: Sequence[str]):
        schema = in_schema({"type": "string", "enum": list(options)})
        texts = endpoint.ask_all(
            asked, "judge", 0, temperature=0.0, max_tokens=16, response_format=schema
        )
        # The option alone, or little around it ("**4**", "Score: 4/5", "tie."): in a longer text a
        # digit or an "A" may mean anything.
        found = [
            re.fullmatch(r"\W*(?:(?:answer|score|rating)\W+)?(\w+)(?:/5)?\W*", text, re.IGNORECASE)
            for text in texts
        ]
        known = {option.casefold(): option for option in options}
        read = [known.get(match.group(1).casefold()) if match else None for match in found]
        return [({option: 1.0} if option else {}, text) for option, text in zip(read, texts)]

    return {"none": None, "local": local, "endpoint": remote}[config.judge]


def rubric_messages(
    rubric: str, dialogue: Dialogue, turn: int, replies: dict[str, str]
) -> Messages:
    """What the judge reads: one reply, to be rated from 0 to 5, or two, A and B, of which the
    better is to be named."""
    texts = json.loads(guide("judge.json"))
    wanted = f"{texts[rubric]['scale']} Answer with one digit from 0 to 5 and nothing else."
    if len(replies) > 1:
        wanted = (
            "Which of A and B is better in this respect? Answer with A, B or tie and nothing else."
        )
    lines = [("human supporter's reply", dialogue.supporter(turn).text), *replies.items()]
    return flat_messages(
        " ".join([texts["guide"], texts[rubric]["asks"], wanted]), dialogue.history(turn), lines
    )


def rate(
    judge: Judge, dialogue: Dialogue, replies: list[str]
) -> tuple[list[dict[str, float | None]], list[dict]]:
    """Each reply's rating by rubric, 0 … 5 (of a local judge the mean over its digits' shares),
    None where unreadable; a transcript."""
    ratings, transcript = [{} for _ in replies], []
    for rubric in RUBRICS:
        asked = [
            rubric_messages(rubric, dialogue, turn, {"reply": reply})
            for turn, reply in enumerate(replies)
        ]
        for turn, (shares, said) in enumerate(judge(asked, DIGITS)):
            ratings[turn][rubric] = (
                sum(int(digit) * share for digit, share in shares.items()) if shares else None
            )
            transcript.append(
                {"turn": turn, "rubric": rubric, "asked": asked[turn][-1]["content"], "said": said}
            )
    return ratings, transcript


def contest(
    judge: Judge, dialogue: Dialogue, ours: list[str], theirs: list[str]
) -> tuple[list[dict[str, list]], list[dict]]:
    """Which of two systems' replies is better, by rubric: [with ours shown first, with theirs shown
    first] of "ours", "theirs", "tie" or None, for judges favour a place; a transcript."""
    verdicts, transcript = [{rubric: [] for rubric in RUBRICS} for _ in ours], []
    for rubric in RUBRICS:
        for names in (("ours", "theirs"), ("theirs", "ours")):
            shown = zip(ours, theirs) if names[0] == "ours" else zip(theirs, ours)
            asked = [
                rubric_messages(rubric, dialogue, turn, dict(zip(SIDES, pair)))
                for turn, pair in enumerate(shown)
            ]
            meaning = dict(zip(SIDES, (*names, "tie")))
            for turn, (shares, said) in enumerate(judge(asked, SIDES)):
                verdicts[turn][rubric].append(
                    meaning[max(shares, key=shares.get)] if shares else None
                )
                transcript.append(
                    {
                        "turn": turn,
                        "rubric": rubric,
                        "A": names[0],
                        "asked": asked[turn][-1]["content"],
                        "said": said,
                    }
                )
    return verdicts, transcript
