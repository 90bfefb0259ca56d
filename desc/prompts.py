"""(task, dialogue, turn) -> the messages a module reads and the completion it should write.

p(strategy, reply | context) = p_SP(strategy | context) · p_RG(reply | context, strategy): `sp` and
`rg` are the two factors, `vanilla` is one model for both. The contents of the system messages
follow the paper's release; the words are our own."""

import re
from dataclasses import dataclass
from functools import cache, partial

from desc.domain import ESCONV, Domain
from desc.esconv import Dialogue, flatten

TASKS = ("sp", "rg", "vanilla")
# Where rg is told its strategy: in the last message, so that all of them share what comes before,
# or in the system message, as in the paper's release.
STRATEGY_PLACES = ("turn", "system")
# How sp reads what was said: as one text, as in the paper's release, or as the chat's own messages,
# each answer after its strategy, as vanilla reads it.
HISTORIES = ("text", "messages")
Messages = list[dict[str, str]]  # [{"role": "system" | "user" | "assistant", "content": …}, …]

RESPONDER = (
    "{responder} You are given a reference strategy, and your reply follows it. The strategies are:"
    " {names}. Your current strategy is: {strategy}"
)
RESPONDER_AT_TURN = (
    "{responder} Each time you are given a strategy, and your reply follows it. The strategies are:"
    " {names}."
)
AT_TURN = "\n\n(Strategy of your reply: {strategy})"
VANILLA = (
    "{responder} Every turn of yours has two parts: first the strategy in square brackets, then the"
    " reply. The strategies are: {names}. The format is: [strategy] reply"
)

LINE_ENDS = r"\n\r\v\f\x1c-\x1e\x85\u2028\u2029"  # where str.splitlines ends a line


@dataclass(frozen=True)
class Layout:
    """How prompts are laid out, where there is more than one way."""

    strategy_at: str = "turn"  # of rg: one of STRATEGY_PLACES
    history: str = "text"  # of sp: one of HISTORIES


DEFAULT_LAYOUT = Layout()


@dataclass(frozen=True)
class Example:
    """One supporter turn as a module is trained on it."""

    dialogue: str
    turn: int
    messages: Messages
    completion: str


def build_messages(
    task: str,
    dialogue: Dialogue,
    turn: int,
    strategy: str | None = None,
    domain: Domain = ESCONV,
    layout: Layout = DEFAULT_LAYOUT,
) -> Messages:
    """What the module of `task` reads before supporter turn `turn`, with the human history.
    `strategy` is for rg alone."""
    history = dialogue.history(turn)
    names = ", ".join(domain.strategies)
    at_turn = task == "rg" and layout.strategy_at == "turn"
    if task == "sp":
        system = domain.planner.replace("{names}", names)
    elif at_turn:
        system = RESPONDER_AT_TURN.format(responder=domain.responder, names=names)
    elif task == "rg":
        system = RESPONDER.format(responder=domain.responder, names=names, strategy=strategy)
    else:
        tags = ", ".join(f"[{name}]" for name in domain.strategies)
        system = VANILLA.format(responder=domain.responder, names=tags)
    messages = [{"role": "system", "content": system}]
    if task == "sp" and layout.history == "text":
        render = partial(_unlike_a_turn, speakers=domain.speakers)
        flat = flatten(history, domain.speakers, render)
        return [*messages, {"role": "user", "content": flat}]
    wrote = "rg" if task == "rg" else "vanilla"  # as whom the module reads earlier answers
    for past in history:
        if past.speaker == "seeker":
            messages.append({"role": "user", "content": past.text})
        else:
            text = build_completion(wrote, past.strategy, past.text)
            messages.append({"role": "assistant", "content": text})
    if at_turn:
        messages[-1]["content"] += AT_TURN.format(strategy=strategy)
    return messages


def _unlike_a_turn(text: str, speakers: tuple[str, str]) -> str:
    """A text in which no line looks like the beginning of a turn: what the `speakers` are called,
    such as "seeker:", gets a blank before the colon there.

    Otherwise a quoted chat would read as turns, and drop_oldest would cut within the text."""
    return _turn_within_a_text(speakers).sub(r"\1 :", text)


@cache
def _turn_within_a_text(speakers: tuple[str, str]) -> re.Pattern:
    """A line within a text that begins like a turn of a flattened history, perhaps after blanks."""
    names = "|".join(map(re.escape, speakers))
    return re.compile(rf"([{LINE_ENDS}][^\S{LINE_ENDS}]*(?:{names})):", re.IGNORECASE)


def build_completion(task: str, strategy: str, reply: str) -> str:
    """What the module of `task` writes: "strategy", "reply", or "[strategy] reply"."""
    return {"sp": strategy, "rg": reply, "vanilla": f"[{strategy}] {reply}"}[task]


def build_examples(
    task: str, dialogues: list[Dialogue], domain: Domain = ESCONV, layout: Layout = DEFAULT_LAYOUT
) -> list[Example]:
    """Every supporter turn of every dialogue, with the human answer as its completion."""
    examples = []
    for dialogue in dialogues:
        for turn, gold in enumerate(dialogue.supporter_turns()):
            messages = build_messages(task, dialogue, turn, gold.strategy, domain, layout)
            completion = build_completion(task, gold.strategy, gold.text)
            examples.append(Example(dialogue.id, turn, messages, completion))
    return examples


def drop_oldest(messages: Messages, speakers: tuple[str, str]) -> Messages | None:
    """The messages without their oldest exchange. None if there is no exchange to drop. `speakers`
    are the names in a flattened history.

    What stays: all system messages at the beginning, and all that follows the last answer of the
    assistant, which is the latest user turn. An exchange ends with the assistant's answer. A
    history may begin with one, if the assistant spoke first."""
    roles = [message["role"] for message in messages]
    begin = next((i for i, role in enumerate(roles) if role != "system"), len(roles))
    for i in range(begin + 1, len(roles)):
        exchange_ends = roles[i - 1] == "assistant" != roles[i]
        if exchange_ends and "user" in roles[i:]:
            return messages[:begin] + messages[i:]
    if roles[begin:] != ["user"]:
        return None
    flat = _drop_oldest_lines(messages[begin]["content"], speakers)
    return None if flat is None else messages[:begin] + [{"role": "user", "content": flat}]


def _drop_oldest_lines(flat: str, speakers: tuple[str, str]) -> str | None:
    """sp's flattened history without its oldest exchange. None if it has one turn, or if the text
    is no such history, which begins with who is answered ("seeker: ") and ends in a line break."""
    seeker, supporter = speakers
    if not flat.startswith(f"{seeker}: ") or not flat.endswith("\n"):
        return None
    answer = flat.find(f"\n{supporter}: ")
    second = flat.find(f"\n{seeker}: ", answer)
    return None if answer < 0 or second < 0 else flat[second + 1 :]
