"""What a model behind an endpoint wrote, without its thoughts, or why it cannot be read."""

import json
import re
from collections import Counter
from dataclasses import dataclass

# Why an answer cannot be read.
CUT_OFF = "cut off"
OTHER_FORM = "no answer of the asked form"
EMPTY = "empty"
ODD = "odd content"

# What opens or closes a model's thoughts: of most models, of Mistral's, and of Kimi's.
THOUGHT_MARK = re.compile(
    r"</?(?:think|thinking|thought|reasoning)>|\[/?THINK\]|◁/?think▷", re.IGNORECASE
)
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no file in UTF-8 can hold


@dataclass(frozen=True)
class Completion:
    """What a model wrote."""

    text: str  # without the model's thoughts; as JSON if the content is no text
    is_odd: bool = False  # whether the content is no text, or one that no file in UTF-8 can hold
    is_cut_off: bool = False  # whether max_tokens were spent
    has_thoughts: bool = False
    problem: str | None = None  # why it cannot be read, None if it can


def read_completion(body: bytes) -> Completion:
    """The answer in the body of a chat completion.

    Content that is no text is odd, and kept as JSON. "reasoning_content", or "reasoning" as newer
    servers call it, holds thoughts alone. Raises LookupError, TypeError, ValueError or
    AttributeError if the body is no chat completion."""
    try:
        # Numbers of thousands of digits are no error as floats.
        answer = json.loads(body.decode("utf-8-sig", "replace"), parse_int=float)
        choice = answer["choices"][0]
        message = choice["message"]
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            return Completion(json.dumps(content), is_odd=True)
    except RecursionError:
        return Completion("", is_odd=True)
    written = SURROGATE.sub("\ufffd", content or "").strip()
    text = strip_thoughts(written)
    return Completion(
        text,
        is_odd=bool(SURROGATE.search(content or "")),
        is_cut_off=choice.get("finish_reason") == "length",
        has_thoughts=text != written
        or bool(message.get("reasoning_content") or message.get("reasoning")),
    )


def strip_thoughts(text: str) -> str:
    """The text without a model's thoughts.

    They may lack the closing mark, if they were cut off, or the opening one, if the chat template
    writes it."""
    kept: list[str] = []
    begin, thinks = 0, False
    for mark in THOUGHT_MARK.finditer(text):
        if "/" in mark.group():
            if not thinks:
                kept.clear()
            thinks = False
        else:
            if not thinks:
                kept.append(text[begin : mark.start()])
            thinks = True
        begin = mark.end()
    if not thinks:
        kept.append(text[begin:])
    return "".join(kept).strip()


def format_unread(task: str, counts: Counter) -> str:
    """The unread answers of a task as "rg 3 of 40 (7.5 %: 2 cut off, 1 empty)", from numbers of
    answers by (task, problem)."""
    problems = Counter({problem: n for (name, problem), n in counts.items() if name == task})
    total = problems.total()
    unread = total - problems.pop(None, 0)
    if not unread:
        return f"{task} 0 of {total}"
    commonest_first = sorted(problems.items(), key=lambda item: (-item[1], item[0]))
    causes = ", ".join(f"{n} {problem}" for problem, n in commonest_first)
    return f"{task} {unread} of {total} ({100 * unread / total:.1f} %: {causes})"
