"""How a chat template renders a conversation, and what of that is a prompt, an answer, and the end
of a turn. It is the model's own, or one in a file.

A model is trained on PROMPT + ANSWER + END OF TURN. This must be the template's own rendering of
the whole conversation, and PROMPT must be what a server gives the model to continue. `form_of`
tries a template out on small conversations, and refuses one for which this cannot be had."""

import re
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path

from jinja2 import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from desc import DescError
from desc.prompts import Messages
from desc.storage.files import read_text
from desc.storage.journal import work_key

# What a template may write that steers a model even if it is no token: "[INST]", "</think>".
WRITTEN_MARK = r"<[^<>\s]+>|\[/?[A-Z_]+\]"
# The words of the conversations on which a template is tried out.
SYSTEM, QUESTION, ANSWER, REPLY = "descsystem", "descquestion", "descanswer", "descreply"


@dataclass(frozen=True)
class Form:
    """How a template renders an answer:

    generation prompt + header + lead + ANSWER + trail + end of turn"""

    folds_system: bool  # it knows no system message, so that text opens the first user message
    header: str  # of an answer, if the template has no generation prompt; part of our prompt
    opening: str  # all that our prompt has after the latest message, the header too
    lead: str  # blanks that the model writes before its answer
    trail: str  # blanks that it writes after its answer
    strips: bool  # blanks around what the answer itself says are dropped
    end: int  # the token that ends an answer


def read_template(path: str | Path) -> str:
    """The chat template in a Jinja file. Whether it can be matched is form_of's business.

    Raises DescError if the file cannot be read, is empty, or is no valid Jinja."""
    template = read_text(path)
    if not template.strip():
        raise DescError(f"{path}: is empty; it should hold a chat template in Jinja")
    try:
        render_jinja_template([], chat_template=template)  # no conversation: it is only compiled
    except TemplateSyntaxError as error:
        raise DescError(f"{path}: line {error.lineno}: no valid Jinja ({error.message})") from None
    except Exception as error:  # Jinja compiles to Python, which has limits of its own
        reason = str(error).partition("\n")[0]
        raise DescError(f"{path}: no valid Jinja ({reason})") from None
    return template


def digest_template(template: str) -> str:
    """Tells a template from others, in 16 hexadecimal digits."""
    return work_key(template)


def pin_date(tokenizer, day: str) -> None:
    """From now on this tokenizer's template takes `day` (ISO 8601, "2026-11-25") for today.

    Otherwise the prompts of a template that tells the date would change at midnight."""
    tokenizer.pinned_date = day


@lru_cache
def without_clock(template: str, day: str) -> str:
    """The template with its clock, strftime_now(format), stopped at the beginning of `day`."""
    if "strftime_now" not in template:
        return template
    today = date.fromisoformat(day)
    # strftime's directives; "{%-if" is none. "%%" comes last.
    directives = sorted(set(re.findall(r"(?<!\{)%[-_^#]?[A-Za-z%]", template)), reverse=True)
    said = "".join(f" | replace({each!r}, {today.strftime(each)!r})" for each in directives)
    # the line break is dropped, as after any block, so that the template still begins a line
    return f"{{% macro strftime_now(format) %}}{{{{ format{said} }}}}{{% endmacro %}}\n{template}"


def template_of(tokenizer) -> str:
    """The source of the chat template that is used, its clock stopped if a date was pinned.

    Raises DescError if the model has none."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise DescError(
            "has no chat template; use an instruct model, or give one as chat_template"
        ) from None
    day = getattr(tokenizer, "pinned_date", None)
    return without_clock(template, day) if day else template


def fold_system(messages: Messages) -> Messages:
    """The messages with what the system messages at their beginning say at the beginning of the
    first user message."""
    first = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not first or not users:
        return messages
    parts = [message["content"] for message in messages[:first]]
    parts.append(messages[users[0]]["content"])
    folded = {"role": "user", "content": "\n\n".join(parts)}
    return messages[first : users[0]] + [folded] + messages[users[0] + 1 :]


def render_as_is(tokenizer, messages: Messages, generate: bool) -> str:
    """The messages as text; if `generate`, up to where the assistant begins to write.

    Thinking is switched off if the template knows the switch (enable_thinking, as in Qwen3).
    Raises DescError if the template refuses the messages, or is broken."""
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=template_of(tokenizer),
            tokenize=False,
            add_generation_prompt=generate,
            enable_thinking=False,
        )
    except DescError:
        raise
    except TemplateError as error:
        reason = str(error)
    except Exception as error:  # a template may fail as any program may
        reason = f"{type(error).__name__}: {error}"
    reason = reason.strip().partition("\n")[0]
    raise DescError(
        f"the chat template cannot render these messages ({reason}); use another model or"
        " template, or other messages"
    )


def render(tokenizer, messages: Messages) -> str:
    """The prompt: the messages as text, up to where an answer begins.

    Raises DescError if the template refuses the messages, or leaves out what one of them says."""
    form = form_of(tokenizer)
    shown = fold_system(messages) if form.folds_system else messages
    text = render_as_is(tokenizer, shown, generate=True) + form.header
    for message in messages:
        if message["content"].strip() not in text:
            raise DescError(
                f"the chat template leaves out, or changes, what the {message['role']}"
                f" says ({message['content'].strip()[:60]!r}); use another model or template"
            )
    return text


def form_of(tokenizer) -> Form:
    """How this tokenizer's template renders an answer.

    Raises DescError if the template leaves out messages, if it ends an answer with no token of its
    own, or if its generation prompt does not begin its rendering of the whole conversation (as with
    models that must think first)."""
    return _form_of(tokenizer, template_of(tokenizer))


@lru_cache
def _form_of(tokenizer, template: str) -> Form:
    """form_of; `template` tells apart what the same tokenizer may have been given since."""
    conversations = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]]
    conversations.append(
        [
            *conversations[0],
            {"role": "assistant", "content": ANSWER},
            {"role": "user", "content": "descfollowup"},
        ]
    )
    folds = not knows_system(tokenizer, conversations[0])
    forms = [try_out(tokenizer, messages, folds) for messages in conversations]
    if forms[0] != forms[1]:
        raise DescError(
            "the chat template renders a first answer in another way than a later one; use"
            " another model or template"
        )
    return forms[0]


def knows_system(tokenizer, messages: Messages) -> bool:
    """Whether the template renders a system message, also in a conversation that was answered.
    Mistral 7B's (0.3) has it only in a prompt."""
    try:
        return SYSTEM in answer(tokenizer, messages, REPLY)
    except DescError:  # it refuses the role, or it is broken, and then try_out says so
        return False


def try_out(tokenizer, messages: Messages, folds_system: bool) -> Form:
    """The form in which the template renders an answer to `messages`.

    Raises DescError as form_of does."""
    shown = fold_system(messages) if folds_system else messages
    prompt = render_as_is(tokenizer, shown, generate=True)
    left_out = [m["role"] for m in messages if m["content"] not in prompt]
    if left_out:
        raise DescError(
            f"the chat template leaves out what the {left_out[0]} says; use another model or"
            " template"
        )
    whole = answer(tokenizer, shown, REPLY)
    before, found, after = whole.rpartition(REPLY)
    if not found:
        raise DescError(
            "the chat template leaves out what the assistant says; use another model or template"
        )
    spaced = f"\n {REPLY} \n"
    strips = answer(tokenizer, shown, spaced) != before + spaced + after
    header, lead = "", before.removeprefix(prompt)
    opening, rendered = (text.rpartition(messages[-1]["content"])[2] for text in (prompt, before))
    if not before.startswith(prompt):
        raise DescError(
            "the chat template asks for an answer in another way than it renders one"
            f" ({opening[-40:]!r} against {rendered[-40:]!r}), as models do that must think first;"
            " use an instruct model, or another template"
        )
    if lead.strip():
        if prompt != render_as_is(tokenizer, shown, generate=False):
            raise DescError(
                f"the chat template puts {lead.strip()!r} before an answer, which the model"
                " would have to write; use another model or template"
            )
        header, lead = lead, ""
    end, trail = split_ending(tokenizer, after)
    return Form(folds_system, header, opening + header, lead, trail, strips, end)


def answer(tokenizer, messages: Messages, text: str) -> str:
    """The whole conversation as text, if the assistant answers `text`."""
    answered = [*messages, {"role": "assistant", "content": text}]
    return render_as_is(tokenizer, answered, generate=False)


def split_ending(tokenizer, after: str) -> tuple[int, str]:
    """(the token that ends an answer, the blanks before it) of what a template renders after an
    answer. It may be another token than the eos token, as with Gemma.

    Raises DescError if there is no such token, or if more than blanks stand before it."""
    ids = tokenizer(after, add_special_tokens=False).input_ids
    control = control_tokens(tokenizer)
    ends = [token for token in ids if token in control]
    if not ends:
        raise DescError(
            "the chat template ends an assistant's message with no special token; use a"
            " model or a template that does"
        )
    trail = after.partition(control[ends[0]])[0]
    if trail.strip():
        raise DescError(
            f"the chat template puts {trail.strip()!r} after an answer, which the model"
            " would have to write; use another model or template"
        )
    return ends[0], trail


def end_of_turn(tokenizer) -> int:
    """The token with which the chat template ends an assistant's message.

    Raises DescError as form_of does."""
    return form_of(tokenizer).end


def control_tokens(tokenizer) -> dict[int, str]:
    """{id: text} of the tokens that steer the model instead of saying something.

    They are looked up once, so a tokenizer is given its tokens before."""
    return _control_tokens(tokenizer, template_of(tokenizer))


@lru_cache
def _control_tokens(tokenizer, template: str) -> dict[int, str]:
    """control_tokens; `template` as for _form_of.

    A token steers if it begins or ends a text (eos_token), if it looks like a mark ("<|user|>", or
    "[TOOL_CALLS]" if it is special), or if the template writes it and it begins and ends as no word
    does ("[gMASK]"). Words that people add ("Others", "[Question]") do not."""
    control = {}
    for token, added in tokenizer.added_tokens_decoder.items():
        text = str(added)
        mark = text.strip()
        steers = (
            text in (tokenizer.bos_token, tokenizer.eos_token)
            or re.fullmatch(r"<.+>", mark)
            or (added.special and re.fullmatch(r"\[/?[A-Z_]+\]", mark))
            or (mark in template and re.fullmatch(r"[^\w\s].*\w.*[^\w\s]", mark))
        )
        if steers:
            control[token] = text
    return control


def defuse(tokenizer, text: str) -> str:
    """The text with every mark in it broken by a blank: the control tokens, and what else the
    template writes as a mark. Utterances are data: "<|im_end|>" typed by a seeker must not end a
    turn."""
    marks = _marks(tokenizer, template_of(tokenizer))
    while marks.search(text):
        text = marks.sub(lambda mark: mark[0][0] + " " + mark[0][1:], text)
    return text


@lru_cache
def _marks(tokenizer, template: str) -> re.Pattern:
    """What defuse breaks, the longest first. Blanks around a mark are no part of it."""
    control = _control_tokens(tokenizer, template).values()
    marks = {mark.strip() for mark in control} | set(re.findall(WRITTEN_MARK, template))
    longest_first = sorted((mark for mark in marks if len(mark) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
