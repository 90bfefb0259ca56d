"""A model as judge: it rates replies, and says which of two is better.

The model is local, or behind an endpoint. It judges by four rubrics. The domain says what each one
asks; the words of ESConv's (data/esconv.json) are our own."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from desc.domain import RUBRICS, Domain
from desc.esconv import Dialogue
from desc.flags import DataConfig
from desc.judging.annotator import build_quoted_messages, score_options
from desc.judging.endpoint import Endpoint, json_schema_format
from desc.prompts import Messages

DIGITS = ("0", "1", "2", "3", "4", "5")
SIDES = ("A", "B", "tie")
# The option alone, or with little around it ("**4**", "Score: 4/5", "tie."). In a longer text a
# digit or an "A" may mean anything.
ANSWER = re.compile(r"\W*(?:(?:answer|score|rating)\W+)?(\w+)(?:/5)?\W*", re.IGNORECASE)


@dataclass(frozen=True)
class Opinion:
    """A judge's answer to one conversation."""

    shares: dict[str, float]  # {option: its share of probability}; {} if the answer is unreadable
    text: str  # the answer in words

    def preferred(self) -> str | None:
        """The option with the largest share; None if the answer is unreadable."""
        return max(self.shares, key=self.shares.get) if self.shares else None


@dataclass(frozen=True)
class LocalJudge:
    """Scores the options by their log-probability under the base model, without any adapter."""

    model: torch.nn.Module
    tokenizer: object
    config: DataConfig
    domain: Domain

    def __call__(self, conversations: list[Messages], options: Sequence[str]) -> list[Opinion]:
        scored = score_options(
            self.model, self.tokenizer, conversations, options, self.config, self.domain
        )
        return [Opinion(shares, max(shares, key=shares.get)) for shares in scored]


@dataclass(frozen=True)
class EndpointJudge:
    """Asks a model behind an endpoint to write one of the options."""

    endpoint: Endpoint
    domain: Domain
    max_tokens: int

    def __call__(self, conversations: list[Messages], options: Sequence[str]) -> list[Opinion]:
        completions = self.endpoint.ask_all(
            conversations,
            "judge",
            seed=0,
            readable=lambda text: bool(read_opinion(text, options).shares),
            temperature=0.0,
            max_tokens=self.max_tokens,
            response_format=json_schema_format({"type": "string", "enum": list(options)}),
        )
        return [
            Opinion({}, said.text) if said.problem else read_opinion(said.text, options)
            for said in completions
        ]


# Called with conversations and the options to answer with, a judge gives an opinion on each
# conversation. Its domain says what it is asked.
Judge = LocalJudge | EndpointJudge


def make_judge(config, model, tokenizer, endpoint: Endpoint | None) -> Judge | None:
    """The judge that --judge names (`config` is evaluate.py's); None for "none"."""
    if config.judge == "endpoint":
        return EndpointJudge(endpoint, config.read_domain(), config.judge_tokens)
    if config.judge == "local":
        return LocalJudge(model, tokenizer, config, config.read_domain())
    return None


def read_opinion(text: str, options: Sequence[str]) -> Opinion:
    """What a model wrote, with all probability on the option that it names, in any case."""
    match = ANSWER.fullmatch(text)
    for option in options:
        if match and match.group(1).casefold() == option.casefold():
            return Opinion({option: 1.0}, text)
    return Opinion({}, text)


def build_judge_messages(
    rubric: str, dialogue: Dialogue, turn: int, replies: dict[str, str], domain: Domain
) -> Messages:
    """What the judge reads: the history, the human supporter's reply, and `replies` by their names.

    One reply is to be rated from 0 to 5. Of two, called A and B, the better is to be named."""
    texts = domain.judge
    if len(replies) == 1:
        scale = texts[rubric]["scale"]
        answer_form = f"{scale} Answer with one digit from 0 to 5 and nothing else."
    else:
        answer_form = (
            "Which of A and B is better in this respect? Answer with A, B or tie and nothing else."
        )
    system = " ".join([texts["guide"], texts[rubric]["asks"], answer_form])
    human = f"human {domain.speakers[1]}'s reply"
    lines = [(human, dialogue.supporter(turn).text), *replies.items()]
    return build_quoted_messages(system, dialogue.history(turn), lines, domain.speakers)


def rate(
    judge: Judge, dialogue: Dialogue, replies: list[str]
) -> tuple[list[dict[str, float | None]], list[dict]]:
    """(each reply's {rubric: rating}, a transcript); `replies` are one system's, one per turn.

    A rating is from 0 to 5, and None if the answer is unreadable. A local judge's is the mean over
    the digits' shares. The transcript's records say what the judge was asked and what it
    answered."""
    ratings: list[dict[str, float | None]] = [{} for _ in replies]
    transcript = []
    for rubric in RUBRICS:
        conversations = [
            build_judge_messages(rubric, dialogue, turn, {"reply": reply}, judge.domain)
            for turn, reply in enumerate(replies)
        ]
        for turn, opinion in enumerate(judge(conversations, DIGITS)):
            ratings[turn][rubric] = mean_rating(opinion)
            question = {"turn": turn, "rubric": rubric}
            transcript.append(transcribe(question, conversations[turn], opinion))
    return ratings, transcript


def mean_rating(opinion: Opinion) -> float | None:
    """The mean over the digits' shares; None if the answer is unreadable."""
    if not opinion.shares:
        return None
    return sum(int(digit) * share for digit, share in opinion.shares.items())


def contest(
    judge: Judge, dialogue: Dialogue, replies: list[str], first_replies: list[str]
) -> tuple[list[dict[str, list]], list[dict]]:
    """(each turn's {rubric: two verdicts}, a transcript) on a system's replies and the first's.

    A verdict is "ours" if the system's reply is better, "theirs" if the first system's is, "tie",
    or None if the answer is unreadable. Judges favour a place, so each pair is shown twice: "ours"
    comes first for the first verdict, and "theirs" for the second."""
    replies_of = {"ours": replies, "theirs": first_replies}
    verdicts: list[dict[str, list]] = [{rubric: [] for rubric in RUBRICS} for _ in replies]
    transcript = []
    for rubric in RUBRICS:
        for a, b in (("ours", "theirs"), ("theirs", "ours")):
            meaning = {"A": a, "B": b, "tie": "tie"}
            conversations = [
                build_judge_messages(rubric, dialogue, turn, {"A": of_a, "B": of_b}, judge.domain)
                for turn, (of_a, of_b) in enumerate(zip(replies_of[a], replies_of[b]))
            ]
            for turn, opinion in enumerate(judge(conversations, SIDES)):
                side = opinion.preferred()
                verdicts[turn][rubric].append(meaning[side] if side else None)
                question = {"turn": turn, "rubric": rubric, "A": a}
                transcript.append(transcribe(question, conversations[turn], opinion))
    return verdicts, transcript


def transcribe(question: dict, conversation: Messages, opinion: Opinion) -> dict:
    """One record of a transcript: which question, what the judge read, and what it answered."""
    return {**question, "asked": conversation[-1]["content"], "said": opinion.text}
