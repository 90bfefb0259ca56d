"""A model as annotator, which says what is psychologically wrong with a supporter's turn: a local
one, or one behind an endpoint.

It is guided by definitions and worked examples (data/annotator.txt), as the paper's expert-guided
annotator is; the words are our own."""

import json
import math
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from desc import cli
from desc.encoding import encode
from desc.esconv import Turn
from desc.judging.endpoint import AsItIs, Endpoint
from desc.lora import adapter_only
from desc.mining import LABELS, UNREADABLE, Annotator, Case, Judgement
from desc.prompts import Messages
from desc.sampling import score

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
