"""Messages -> token ids.

Prompt and completion are tokenised apart, so no token can straddle their boundary (trl#2054)."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from desc import DescError
from desc.prompts import Example, Messages, drop_oldest
from desc.templates import control_tokens, defuse, form_of, render


class TokenSequence(NamedTuple):
    """One prompt with one completion. The loss counts every token of the completion, its
    end-of-turn token too."""

    prompt: list[int]
    completion: list[int]


@dataclass
class Item:
    """What a loss needs together: an example's sequence (SFT), the chosen and the rejected one of a
    pair (DPO), or an answer and one to another prompt (KTO)."""

    id: str
    dialogue: str
    sequences: list[TokenSequence]
    turns_cut: int = 0  # exchanges dropped from the start to fit
    weight: float = 1.0  # what it counts for in a loss
    desirable: bool = True  # for KTO: whether the answer is


def encode_prompt(tokenizer, messages: Messages) -> list[int]:
    """The chat template's text up to where the assistant begins to write, as token ids.

    Raises DescError if the template cannot render these messages."""
    plain = [{**message, "content": defuse(tokenizer, message["content"])} for message in messages]
    return tokenize(tokenizer, render(tokenizer, plain))


@lru_cache  # all pairs of a turn, which follow each other, have the same prompt
def tokenize(tokenizer, text: str) -> list[int]:
    """`text` as token ids, in a list that is shared, so it must not be changed."""
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_completion(tokenizer, text: str, end: bool) -> list[int]:
    """What the assistant writes, as token ids, with the end-of-turn token if `end`."""
    form = form_of(tokenizer)
    if not (text or end):
        return []
    text = form.lead + defuse(tokenizer, text.strip() if form.strips else text)
    if not end:
        return encode_after(tokenizer, form.opening, text)
    return encode_after(tokenizer, form.opening, text + form.trail) + [form.end]


@lru_cache  # a planner's answers are few
def encode_after(tokenizer, opening: str, text: str) -> list[int]:
    """`text` as token ids, as it follows `opening`, with no token of both. The list is shared, so
    it must not be changed.

    Tokenizers like Llama 2's put a blank before a text that follows nothing."""
    before, both = tokenizer([opening, opening + text], add_special_tokens=False).input_ids
    if both[: len(before)] == before:
        return both[len(before) :]
    return tokenize(tokenizer, text)


def decode(tokenizer, ids: list[int]) -> str:
    """What a model wrote, without control tokens, without blanks around it, and without the half
    of a character in which it may have been cut off."""
    control = control_tokens(tokenizer)
    written = [token for token in ids if token not in control]
    for cut in (0, 1, 2, 3, 0):  # the tokens of a half character; if it is none, all are kept
        # the clean-up would turn "do n't" into "don't"
        kept = written[: len(written) - cut]
        text = tokenizer.decode(kept, clean_up_tokenization_spaces=False).strip()
        if not text.endswith("\ufffd"):  # what bytes that are no character are decoded as
            break
    return text


def encode(
    tokenizer,
    name: str,
    dialogue: str,
    messages: Messages,
    completions: list[str],
    max_length: int,
    speakers: tuple[str, str],
    end: bool = True,
) -> Item:
    """Tokenise one prompt with each of its completions, dropping the oldest exchanges until all fit
    in `max_length` tokens.

    `speakers` are the domain's, by which a flattened history is cut. `end=False` leaves the
    end-of-turn token out, because the completion goes on (the tag of "[strategy] reply"). Raises
    DescError, with `name` before it, if the system message, the latest turn and the completion
    alone are too long, or if the chat template cannot render the messages."""
    tails = [encode_completion(tokenizer, text, end) for text in completions]
    longest, kept, cut = max(map(len, tails)), messages, 0
    try:
        while len(prompt := encode_prompt(tokenizer, kept)) + longest > max_length:
            kept, cut = drop_oldest(kept, speakers), cut + 1
            if kept is None:
                raise DescError(
                    f"the latest turn alone has more than {max_length} tokens; raise max_length"
                )
    except DescError as error:
        raise DescError(f"{name}: {error}") from None
    return Item(name, dialogue, [TokenSequence(prompt, tail) for tail in tails], cut)


def encode_example(tokenizer, example: Example, max_length: int, speakers: tuple[str, str]) -> Item:
    """One supporter turn with the human answer, for SFT. `speakers` as in encode."""
    return encode(
        tokenizer,
        f"{example.dialogue}/{example.turn}",
        example.dialogue,
        example.messages,
        [example.completion],
        max_length,
        speakers,
    )


def mark_loss(tokenizer, sequence: TokenSequence) -> str:
    """The sequence as text, with the part that carries loss between » and «."""
    prompt, whole = (
        tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        for ids in (sequence.prompt, sequence.prompt + sequence.completion)
    )
    return f"{prompt}»{whole[len(prompt) :]}«"
