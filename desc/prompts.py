"""(task, dialogue, turn) -> the messages a module reads and the completion it should write.

p(strategy, reply | context) = p_SP(strategy | context) · p_RG(reply | context, strategy): `sp` and
`rg` are the two factors, `vanilla` is one model for both. The contents of the system messages
follow the paper's release; the words are our own."""

import re
from dataclasses import dataclass

from desc.esconv import SPEAKERS, Dialogue, flatten
from desc.strategies import ESCONV, Strategies

TASKS = ("sp", "rg", "vanilla")
# Where rg is told its strategy: in the last message, so that all eight share what comes before, or
# in the system message, as in the paper's release.
STRATEGY_PLACES = ("system", "turn")
Messages = list[dict[str, str]]  # [{"role": "system" | "user" | "assistant", "content": …}, …]

PLANNER = (
    "You are an expert in emotional support. Below is a conversation between a seeker, who is in"
    " distress, and a supporter. Identify the strategy that the supporter should use in the next"
    " turn. The strategies are: {names}. Answer with the name of one strategy alone, and nothing"
    " else."
)
COUNSELLOR = (
    "You are a professional psychologist who supports a person in emotional distress. Speak"
    " naturally, as in a chat: neither too long nor too short, without lecturing, and fitted to"
    " what this person has told you. "
)
RESPONDER = (
    COUNSELLOR
    + "You are given a reference strategy, and your reply follows it. The strategies are: {names}."
    " Your current strategy is: {strategy}"
)
RESPONDER_AT_TURN = (
    COUNSELLOR
    + "Each time you are given a strategy, and your reply follows it. The strategies are: {names}."
)
AT_TURN = "\n\n(Strategy of your reply: {strategy})"
VANILLA = (
    COUNSELLOR
    + "Every turn of yours has two parts: first the strategy in square brackets, then the reply. "
    "The strategies are: {names}. The format is: [strategy] reply"
)

# A line within a text that begins like a turn of a flattened history, perhaps after blanks. Lines
# end where str.splitlines ends them.
LINE_ENDS = r"\n\r\v\f\x1c-\x1e\x85\u2028\u2029"
SPEAKER = "|".join(sorted(set(SPEAKERS.values())))
TURN_WITHIN_A_TEXT = re.compile(rf"([{LINE_ENDS}][^\S{LINE_ENDS}]*(?:{SPEAKER})):", re.IGNORECASE)


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
    strategies: Strategies = ESCONV,
    strategy_at: str = "system",
) -> Messages:
    """What the module of `task` reads before supporter turn `turn`, with the human history.
    `strategy` is for rg alone, and so is where it stands, `strategy_at` (STRATEGY_PLACES)."""
    history = dialogue.history(turn)
    if task == "sp":
        flat = flatten(history, _unlike_a_turn)
        return [
            {"role": "system", "content": PLANNER.format(names=", ".join(strategies))},
            {"role": "user", "content": flat},
        ]
    at_turn = task == "rg" and strategy_at == "turn"
    if at_turn:
        system = RESPONDER_AT_TURN.format(names=", ".join(strategies))
    elif task == "rg":
        system = RESPONDER.format(names=", ".join(strategies), strategy=strategy)
    else:
        system = VANILLA.format(names=", ".join(f"[{name}]" for name in strategies))
    messages = [{"role": "system", "content": system}]
    for past in history:
        if past.speaker == "seeker":
            messages.append({"role": "user", "content": past.text})
        else:
            text = build_completion(task, past.strategy, past.text)
            messages.append({"role": "assistant", "content": text})
    if at_turn:
        messages[-1]["content"] += AT_TURN.format(strategy=strategy)
    return messages


def _unlike_a_turn(text: str) -> str:
    """A text in which no line looks like the beginning of a turn: "seeker:" and "supporter:" get a
    blank before the colon there.

    Otherwise a quoted chat would read as turns, and drop_oldest would cut within the text."""
    return TURN_WITHIN_A_TEXT.sub(r"\1 :", text)


def build_completion(task: str, strategy: str, reply: str) -> str:
    """What the module of `task` writes: "strategy", "reply", or "[strategy] reply"."""
    return {"sp": strategy, "rg": reply, "vanilla": f"[{strategy}] {reply}"}[task]


def build_examples(
    task: str,
    dialogues: list[Dialogue],
    strategies: Strategies = ESCONV,
    strategy_at: str = "system",
) -> list[Example]:
    """Every supporter turn of every dialogue, with the human answer as its completion."""
    examples = []
    for dialogue in dialogues:
        for turn, gold in enumerate(dialogue.supporter_turns()):
            messages = build_messages(task, dialogue, turn, gold.strategy, strategies, strategy_at)
            completion = build_completion(task, gold.strategy, gold.text)
            examples.append(Example(dialogue.id, turn, messages, completion))
    return examples


def drop_oldest(messages: Messages) -> Messages | None:
    """The messages without their oldest exchange. None if there is no exchange to drop.

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
    flat = _drop_oldest_lines(messages[begin]["content"])
    return None if flat is None else messages[:begin] + [{"role": "user", "content": flat}]


def _drop_oldest_lines(flat: str) -> str | None:
    """sp's flattened history without its oldest exchange. None if it has one turn, or if the text
    is no such history, which begins with "seeker: " and ends in a line break."""
    if not flat.startswith("seeker: ") or not flat.endswith("\n"):
        return None
    answer = flat.find("\nsupporter: ")
    second = flat.find("\nseeker: ", answer)
    return None if answer < 0 or second < 0 else flat[second + 1 :]
