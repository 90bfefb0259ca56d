"""Messages -> token ids.

Prompt and completion are tokenised apart, so no token can straddle their boundary (trl#2054)."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from jinja2 import TemplateError

from desc import DescError
from desc.prompts import Example, Messages, drop_oldest


class TokenSequence(NamedTuple):
    """One prompt with one completion. The loss counts every token of the completion, its
    end-of-turn token too."""

    prompt: list[int]
    completion: list[int]


@dataclass
class Item:
    """What a loss needs together: an example's sequence (SFT), or the chosen and the rejected one
    of a pair (DPO)."""

    id: str
    dialogue: str
    sequences: list[TokenSequence]
    turns_cut: int = 0  # exchanges dropped from the start to fit


@lru_cache
def end_of_turn(tokenizer) -> int:
    """The token with which this model's chat template ends an assistant's message. It may be
    another than the eos token, as with Gemma.

    Raises DescError if the template ends a message with no special token."""
    mark = "desc"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": mark}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    after_mark = text[text.rindex(mark) + len(mark) :]
    tail = tokenizer(after_mark, add_special_tokens=False).input_ids
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ends = [token for token in tail if token in special]
    if not ends:
        raise DescError(
            "this model's chat template ends an assistant's message with no special token; use an"
            " instruct model"
        )
    return ends[0]


@lru_cache
def _special_texts(tokenizer) -> tuple[str, ...]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    return tuple({*tokenizer.all_special_tokens, *added})


def _plain(tokenizer, text: str) -> str:
    """The text with every special token in it broken by a blank. Utterances are data: "<|im_end|>"
    typed by a seeker must not end a turn."""
    for special in _special_texts(tokenizer):
        if len(special) > 1 and not special.isspace():
            text = text.replace(special, special[0] + " " + special[1:])
    return text


def encode_prompt(tokenizer, messages: Messages) -> list[int]:
    """The chat template's text up to where the assistant begins to write, as token ids."""
    plain = [{**message, "content": _plain(tokenizer, message["content"])} for message in messages]
    try:
        text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError) as error:
        raise DescError(
            f"the model's chat template cannot render these messages ({error}); use an instruct"
            " model"
        ) from None
    return tokenizer(text, add_special_tokens=False).input_ids


def encode(
    tokenizer,
    name: str,
    dialogue: str,
    messages: Messages,
    completions: list[str],
    max_length: int,
    end: bool = True,
) -> Item:
    """Tokenise one prompt with each of its completions, dropping the oldest exchanges until all fit
    in `max_length` tokens.

    `end=False` leaves the end-of-turn token out, because the completion goes on (the tag of
    "[strategy] reply"). Raises DescError if the system message, the latest turn and the completion
    alone are too long."""
    ending = [end_of_turn(tokenizer)] if end else []
    tails = [
        tokenizer(_plain(tokenizer, text), add_special_tokens=False).input_ids + ending
        for text in completions
    ]
    longest, kept, cut = max(map(len, tails)), messages, 0
    while len(prompt := encode_prompt(tokenizer, kept)) + longest > max_length:
        kept, cut = drop_oldest(kept), cut + 1
        if kept is None:
            raise DescError(
                f"{name}: the latest turn alone has more than {max_length} tokens; raise max_length"
            )
    return Item(name, dialogue, [TokenSequence(prompt, tail) for tail in tails], cut)


def encode_example(tokenizer, example: Example, max_length: int) -> Item:
    """One supporter turn with the human answer, for SFT."""
    name = f"{example.dialogue}/{example.turn}"
    return encode(
        tokenizer, name, example.dialogue, example.messages, [example.completion], max_length
    )


def mark_loss(tokenizer, sequence: TokenSequence) -> str:
    """The sequence as text, with the part that carries loss between » and «."""
    return f"{tokenizer.decode(sequence.prompt)}»{tokenizer.decode(sequence.completion)}«"
