"""A model as annotator, which says what is psychologically wrong with a supporter's turn, and as
judge, which says how good it is: a local one, or one behind an endpoint.

The annotator is guided by definitions and worked examples (data/annotator.txt), as the paper's
expert-guided annotator is; the judge by four rubrics (data/judge.json). The words are our own."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from desc import cli
from desc.encoding import encode
from desc.endpoint import AsItIs, Endpoint
from desc.esconv import Dialogue, Turn
from desc.lora import adapter_only
from desc.prompts import Messages
from desc.sampling import score

MISMATCH = "strategy mismatch"
# what makes a pair for the generator
OF_REPLIES = ("lack of empathy", "early emotion shift", "template response")
LABELS = (MISMATCH, *OF_REPLIES, "emotion misread", "none")
UNREADABLE = "unreadable"  # what an endpoint wrote was no judgement
BY_LABEL = "Answer with the name of the error alone, or with none."
BY_JSON = (
    'Answer with one JSON object and nothing else: {"error": the name of the error or "none",'
    ' "explanation": one sentence, "confidence": from 0 to 1}'
)
FIELDS = {
    "error": {"type": "string", "enum": list(LABELS)},
    "explanation": {"type": "string"},
    "confidence": {"type": "number", "minimum": 0, "maximum": 1},
}
SCHEMA = {
    "type": "object",
    "properties": FIELDS,
    "required": list(FIELDS),
    "additionalProperties": False,
}
# Chat templates' own marks ("<|im_end|>", "</s>", "[INST]"): in JSON they may as well be written as
# escapes.
MARK = re.compile(r"<(?=[|｜/A-Za-z])|\[(?=/?[A-Z_]+\])")


@dataclass(frozen=True)
class Case:
    """A supporter turn to judge, after `history`, whose last turn is the seeker's."""

    history: tuple[Turn, ...]
    strategy: str
    reply: str


@dataclass(frozen=True)
class Judgement:
    error: str  # one of LABELS, or UNREADABLE
    confidence: float  # 0 … 1: the label's share of probability; an endpoint's own word for it
    explanation: str = ""


Annotator = Callable[[list[Case]], list[Judgement]]  # of one dialogue's cases


@cache
def guide(name: str) -> str:
    return (files("desc") / "data" / name).read_text(encoding="utf-8")


def quote(text: str) -> str:
    """As a JSON string: an utterance is data, so it cannot end its line, or a message, or begin
    another."""
    return MARK.sub(
        lambda mark: f"\\u{ord(mark.group()):04x}", json.dumps(text, ensure_ascii=False)
    )


def judging_messages(case: Case, answer: str = BY_LABEL) -> Messages:
    """What the annotator reads: one line an utterance, then the strategy and the reply to be
    judged."""
    lines = [("strategy", case.strategy), ("reply", case.reply)]
    return flat_messages(guide("annotator.txt") + answer, case.history, lines)


def flat_messages(system: str, history: Sequence[Turn], lines: list[tuple[str, str]]) -> Messages:
    said = [(turn.speaker, turn.text) for turn in history] + lines
    flat = "".join(f"{name}: {quote(text)}\n" for name, text in said)
    return [{"role": "system", "content": system}, {"role": "user", "content": flat}]


def choose(
    model, tokenizer, asked: list[Messages], options: Sequence[str], config, *adapters: str
) -> list[dict[str, float]]:
    """The share of probability of each option as the answer to each of `asked`, all in one tree;
    the model with `adapters` alone.

    `config` (a desc.cli.DataConfig) says how long a prompt and how large a tree may be."""
    items = [
        encode(tokenizer, f"case {i}", "", messages, list(options), config.max_length)
        for i, messages in enumerate(asked)
    ]
    with adapter_only(model, *adapters):
        shares = score(model, items, config.max_tokens).exp().tolist()
    return [dict(zip(options, row)) for row in shares]


def make_annotator(config, model, tokenizer, endpoint: Endpoint | None) -> Annotator | None:
    """As --annotator says (config: a desc.cli.AskConfig); the local one with the adapter
    OUT/annotate/sft, if there is one."""
    if config.annotator == "endpoint":
        return endpoint_annotator(endpoint)
    if config.annotator == "none":
        return None
    otherwise = "the base model judges; train_sft.py --task annotate makes a better annotator"
    cli.use_adapter(model, Path(config.out) / "annotate" / "sft", "annotate", otherwise)
    return local_annotator(model, tokenizer, config)


def local_annotator(model, tokenizer, config) -> Annotator:
    """Scores the labels by their log-probability: always a valid label, with its probability. Its
    adapter is called "annotate"."""

    def annotate(cases: list[Case]) -> list[Judgement]:
        shares = choose(
            model, tokenizer, [judging_messages(case) for case in cases], LABELS, config, "annotate"
        )
        return [
            Judgement(label, share)
            for label, share in (max(row.items(), key=lambda one: one[1]) for row in shares)
        ]

    return annotate


def in_schema(schema: dict) -> dict:
    """The protocol's response_format, for servers that can hold a model to a schema."""
    return AsItIs(
        type="json_schema", json_schema={"name": "answer", "schema": schema, "strict": True}
    )


def endpoint_annotator(endpoint: Endpoint) -> Annotator:
    """Asks for a judgement in JSON."""

    def annotate(cases: list[Case]) -> list[Judgement]:
        asked = [judging_messages(case, BY_JSON) for case in cases]
        texts = endpoint.ask_all(
            asked, "annotate", 0, temperature=0.0, max_tokens=200, response_format=in_schema(SCHEMA)
        )
        return [read_judgement(text) for text in texts]

    return annotate


def read_judgement(text: str) -> Judgement:
    """The judgement in what a model wrote: the first JSON object, whatever stands around it, or a
    bare label."""
    begin = text.find("{")
    try:
        answer = (
            json.JSONDecoder().raw_decode(text, begin)[0]
            if begin >= 0
            else {"error": text.strip(" .\"'\n")}
        )
        error = str(answer["error"]).strip().casefold()
        confidence = min(max(float(answer.get("confidence", 1.0)), 0.0), 1.0)
    except (ValueError, KeyError, TypeError):
        return Judgement(UNREADABLE, 0.0, text)
    if error not in LABELS or math.isnan(confidence):
        return Judgement(UNREADABLE, 0.0, text)
    return Judgement(error, confidence, str(answer.get("explanation", "")))


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
