"""An annotator that says what is psychologically wrong with a supporter's turn: a local model, or one behind an endpoint.

It is guided by definitions and worked examples (data/annotator.txt), as the paper's expert-guided annotator is; the words are our own.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from desc import cli
from desc.encoding import encode
from desc.endpoint import Endpoint
from desc.esconv import Turn
from desc.lora import adapter_only, load_adapter
from desc.prompts import Messages
from desc.sampling import score

MISMATCH = "strategy mismatch"
OF_REPLIES = ("lack of empathy", "early emotion shift", "template response")  # what makes a pair for the generator
LABELS = (MISMATCH, *OF_REPLIES, "emotion misread", "none")
UNREADABLE = "unreadable"  # what an endpoint wrote was no judgement
BY_LABEL = "Answer with the name of the error alone, or with none."
BY_JSON = (
    'Answer with one JSON object and nothing else: {"error": the name of the error or "none", "explanation": one sentence, '
    '"confidence": from 0 to 1}'
)
SCHEMA = {
    "type": "object",
    "properties": {
        "error": {"type": "string", "enum": list(LABELS)},
        "explanation": {"type": "string"},
        "confidence": {"type": "number", "minimum": 0, "maximum": 1},
    },
    "required": ["error", "explanation", "confidence"],
    "additionalProperties": False,
}
# Chat templates' own marks ("<|im_end|>", "</s>", "[INST]"): in JSON they may as well be written as escapes.
MARK = re.compile(r"<(?=[|/A-Za-z])|\[(?=/?[A-Z_]+\])")


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
def guide() -> str:
    return (files("desc") / "data" / "annotator.txt").read_text(encoding="utf-8")


def quote(text: str) -> str:
    """As a JSON string: an utterance is data, so it cannot end its line, or a message, or begin another."""
    return MARK.sub(lambda mark: f"\\u{ord(mark.group()):04x}", json.dumps(text, ensure_ascii=False))


def judging_messages(case: Case, answer: str = BY_LABEL) -> Messages:
    """What the annotator reads: one line an utterance, then the strategy and the reply to be judged."""
    said = [(turn.speaker, turn.text) for turn in case.history] + [("strategy", case.strategy), ("reply", case.reply)]
    flat = "".join(f"{name}: {quote(text)}\n" for name, text in said)
    return [{"role": "system", "content": guide() + answer}, {"role": "user", "content": flat}]


def make_annotator(config, model, tokenizer, endpoint: Endpoint | None) -> Annotator | None:
    """As --annotator says (config: a desc.cli.AskConfig); the local one with the adapter OUT/annotate/sft, if there is one."""
    if config.annotator == "endpoint":
        return endpoint_annotator(endpoint)
    if config.annotator == "none":
        return None
    folder = Path(config.out) / "annotate" / "sft"
    if cli.find_adapter(folder, "the base model judges; train_sft.py --task annotate makes a better annotator"):
        load_adapter(model, folder, "annotate")
    return local_annotator(model, tokenizer, config.max_length, config.max_tokens)


def local_annotator(model, tokenizer, max_length: int, max_tokens: int) -> Annotator:
    """Scores the labels by their log-probability, all cases of a dialogue in one tree: always a valid label, with its probability.

    Of the model's adapters only "annotate" takes part, if there is one."""

    def annotate(cases: list[Case]) -> list[Judgement]:
        items = [encode(tokenizer, f"case {i}", "", judging_messages(case), LABELS, max_length) for i, case in enumerate(cases)]
        with adapter_only(model, "annotate"):
            best = score(model, items, max_tokens).exp().max(-1)
        return [Judgement(LABELS[label], share) for share, label in zip(best.values.tolist(), best.indices.tolist())]

    return annotate


def endpoint_annotator(endpoint: Endpoint) -> Annotator:
    """Asks for a judgement in JSON, with a schema where the server takes one."""
    schema = {"type": "json_schema", "json_schema": {"name": "judgement", "schema": SCHEMA, "strict": True}}

    def annotate(cases: list[Case]) -> list[Judgement]:
        asked = [judging_messages(case, BY_JSON) for case in cases]
        texts = endpoint.ask_all(asked, "annotate", 0, temperature=0.0, max_tokens=200, response_format=schema)
        return [read_judgement(text) for text in texts]

    return annotate


def read_judgement(text: str) -> Judgement:
    """The judgement in what a model wrote: the first JSON object, whatever stands around it, or a bare label."""
    found = re.search(r"\{.*\}", text, re.DOTALL)
    try:
        answer = json.loads(found.group()) if found else {"error": text.strip(" .\"'\n")}
        error = str(answer["error"]).strip().casefold()
        confidence = min(max(float(answer.get("confidence", 1.0)), 0.0), 1.0)
    except (ValueError, KeyError, TypeError):
        return Judgement(UNREADABLE, 0.0, text)
    if error not in LABELS:
        return Judgement(UNREADABLE, 0.0, text)
    return Judgement(error, confidence, str(answer.get("explanation", "")))
