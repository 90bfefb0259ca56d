"""A model as annotator: it names what is psychologically wrong with a supporter's turn.

The model is local, or behind an endpoint. The domain's definitions and worked examples guide it,
like the paper's expert-guided annotator. The words of ESConv's (data/esconv.json) are our own."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from desc import cli
from desc.domain import NO_ERROR, UNREADABLE, Domain
from desc.encoding import encode
from desc.esconv import Turn, flatten
from desc.flags import AskConfig, DataConfig
from desc.judging.completions import SURROGATE
from desc.judging.endpoint import MARK, Endpoint, json_schema_format
from desc.lora import adapter_only
from desc.mining import Annotation, Annotator, Case
from desc.prompts import Messages
from desc.sampling import score

# What the annotator is called: its adapter, the adapter's folder, and {task} of --endpoint-model.
MODULE = "annotate"
BY_LABEL = "Answer with the name of the error alone, or with none."
BY_JSON = (
    'Answer with one JSON object and nothing else: {"error": the name of the error or "none",'
    ' "explanation": one sentence, "confidence": from 0 to 1}'
)


def annotation_schema(domain: Domain) -> dict:
    """The JSON schema of an annotation."""
    properties = {
        "error": {"type": "string", "enum": list(domain.labels)},
        "explanation": {"type": "string"},
        "confidence": {"type": "number", "minimum": 0, "maximum": 1},
    }
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def quote(text: str) -> str:
    """`text` as a JSON string in one line.

    An utterance is data: it can neither end its line, nor end a message, nor begin one. So chat
    templates' marks are escaped, too."""
    return MARK.sub(escape_mark, json.dumps(text, ensure_ascii=False))


def escape_mark(mark: re.Match) -> str:
    """JSON's escape for the one character that MARK matches."""
    return f"\\u{ord(mark.group()):04x}"


def build_quoted_messages(
    system: str,
    history: Sequence[Turn],
    lines: Sequence[tuple[str, str]],
    speakers: tuple[str, str],
) -> Messages:
    """A system message, and a user message with one line 'name: "text"' per utterance.

    The utterances of `history` come first, then `lines`, pairs of a name and a text."""
    quoted = flatten(history, speakers, quote)
    quoted += "".join(f"{name}: {quote(text)}\n" for name, text in lines)
    return [{"role": "system", "content": system}, {"role": "user", "content": quoted}]


def build_annotator_messages(case: Case, domain: Domain, answer_form: str = BY_LABEL) -> Messages:
    """What the annotator reads: the conversation, then the strategy and the reply to annotate.

    `answer_form` is the sentence that says how to answer: BY_LABEL or BY_JSON."""
    lines = [("strategy", case.strategy), ("reply", case.reply)]
    definitions = [f"{name}: {error.definition}" for name, error in domain.errors.items()]
    definitions.append(f"{NO_ERROR}: the turn is sound.")
    guide = domain.annotator.replace("{errors}", "\n".join(definitions))
    system = f"{guide}\n\n{answer_form}"
    return build_quoted_messages(system, case.history, lines, domain.speakers)


def score_options(
    model,
    tokenizer,
    conversations: Sequence[Messages],
    options: Sequence[str],
    config: DataConfig,
    domain: Domain,
    *adapters: str,
) -> list[dict[str, float]]:
    """{option: its share of probability} as the answer to each conversation; shares sum to 1.

    The model is used with `adapters` alone. All conversations are read as one tree, of which
    `config` limits the size (max_tokens); it limits a prompt's length, too (max_length). Raises
    DescError if a conversation is too long."""
    items = []
    for i, messages in enumerate(conversations):
        name, room = f"case {i}", config.max_length
        item = encode(tokenizer, name, "", messages, list(options), room, domain.speakers)
        items.append(item)
    with adapter_only(model, *adapters):
        logps = score(model, items, config.max_tokens)
    return [dict(zip(options, shares)) for shares in logps.exp().tolist()]


@dataclass(frozen=True)
class LocalAnnotator:
    """Names the likeliest label of each case, with its share of probability as the confidence.

    So the label is always one of the domain's. If the model has an adapter called MODULE, it is
    used."""

    model: torch.nn.Module
    tokenizer: object
    config: DataConfig
    domain: Domain

    def __call__(self, cases: list[Case]) -> list[Annotation]:
        domain = self.domain
        conversations = [build_annotator_messages(case, domain) for case in cases]
        scored = score_options(
            self.model, self.tokenizer, conversations, domain.labels, self.config, domain, MODULE
        )
        annotations = []
        for shares in scored:
            label = max(shares, key=shares.get)
            annotations.append(Annotation(label, shares[label]))
        return annotations


@dataclass(frozen=True)
class EndpointAnnotator:
    """Asks a model behind an endpoint for an annotation in JSON on each case.

    An answer that cannot be read is UNREADABLE, with what was written as its explanation."""

    endpoint: Endpoint
    domain: Domain
    max_tokens: int = AskConfig.annotator_tokens

    def __call__(self, cases: list[Case]) -> list[Annotation]:
        conversations = [build_annotator_messages(case, self.domain, BY_JSON) for case in cases]
        completions = self.endpoint.ask_all(
            conversations,
            MODULE,
            seed=0,
            readable=lambda text: self.read(text).error != UNREADABLE,
            temperature=0.0,
            max_tokens=self.max_tokens,
            response_format=json_schema_format(annotation_schema(self.domain)),
        )
        return [
            Annotation(UNREADABLE, 0.0, said.text) if said.problem else self.read(said.text)
            for said in completions
        ]

    def read(self, text: str) -> Annotation:
        """The annotation in what the model wrote."""
        return read_annotation(text, self.domain.labels)


def make_annotator(
    config: AskConfig, model, tokenizer, endpoint: Endpoint | None
) -> Annotator | None:
    """The annotator that --annotator names; None for "none".

    The local one gets the adapter OUT/annotate/sft attached, if there is one."""
    if config.annotator == "endpoint":
        return EndpointAnnotator(endpoint, config.read_domain(), config.annotator_tokens)
    if config.annotator == "local":
        otherwise = "the base model judges; train_sft.py --task annotate makes a better annotator"
        cli.use_adapter(config, model, Path(config.out) / MODULE / "sft", MODULE, otherwise)
        return LocalAnnotator(model, tokenizer, config, config.read_domain())
    return None


def read_annotation(text: str, labels: Sequence[str]) -> Annotation:
    """The annotation in what a model wrote: the first JSON object in it, or one of the `labels`
    alone.

    If there is neither, or if a field makes no sense, its error is UNREADABLE, and its explanation
    is the whole text."""
    unreadable = Annotation(UNREADABLE, 0.0, text)
    try:
        answer = read_answer(text)
        error = answer["error"].strip().casefold()
        confidence = float(answer.get("confidence", 1.0))
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return unreadable
    explanation = answer.get("explanation") or ""
    is_text = isinstance(explanation, str) and not SURROGATE.search(explanation)
    if error not in labels or not math.isfinite(confidence) or not is_text:
        return unreadable
    return Annotation(error, min(max(confidence, 0.0), 1.0), explanation)


def read_answer(text: str) -> dict:
    """The first JSON object in a text, whatever stands around it; without one, the text as a label.

    Raises ValueError if what begins like an object is not one."""
    begin = text.find("{")
    if begin < 0:
        return {"error": text.strip(" .\"'\n")}
    answer, _ = json.JSONDecoder().raw_decode(text, begin)
    return answer
