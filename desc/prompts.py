"""(task, dialogue, turn) -> the messages a module reads and the completion it should write.

p(strategy, reply | context) = p_SP(strategy | context) · p_RG(reply | context, strategy): `sp` and
`rg` are the two factors, `vanilla` is one model for both. The contents of the system messages
follow the paper's release; the words are our own."""

from dataclasses import dataclass

from desc.esconv import Dialogue, flatten
from desc.strategies import ESCONV, Strategies

TASKS = ("sp", "rg", "vanilla")
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
VANILLA = (
    COUNSELLOR
    + "Every turn of yours has two parts: first the strategy in square brackets, then the reply. "
    "The strategies are: {names}. The format is: [strategy] reply"
)


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
) -> Messages:
    """What the module of `task` reads before supporter turn `turn`, with the human history.
    `strategy` is for rg alone."""
    history = dialogue.history(turn)
    if task == "sp":
        flat = flatten(history, _unlike_a_turn)
        return [
            {"role": "system", "content": PLANNER.format(names=", ".join(strategies))},
            {"role": "user", "content": flat},
        ]
    if task == "rg":
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
    return messages


def _unlike_a_turn(text: str) -> str:
    """A text in which no line looks like the beginning of a turn, because drop_oldest looks for
    those: a blank breaks such a line."""
    return text.replace("\nseeker: ", "\nseeker : ")


def build_completion(task: str, strategy: str, reply: str) -> str:
    """What the module of `task` writes: "strategy", "reply", or "[strategy] reply"."""
    return {"sp": strategy, "rg": reply, "vanilla": f"[{strategy}] {reply}"}[task]


def build_examples(
    task: str, dialogues: list[Dialogue], strategies: Strategies = ESCONV
) -> list[Example]:
    """Every supporter turn of every dialogue, with the human answer as its completion."""
    examples = []
    for dialogue in dialogues:
        for turn, gold in enumerate(dialogue.supporter_turns()):
            messages = build_messages(task, dialogue, turn, gold.strategy, strategies)
            completion = build_completion(task, gold.strategy, gold.text)
            examples.append(Example(dialogue.id, turn, messages, completion))
    return examples


def drop_oldest(messages: Messages) -> Messages | None:
    """The messages without their oldest exchange. The system message and the latest turn stay. None
    if there is no exchange to drop."""
    if len(messages) > 2:
        return messages[:1] + messages[3:]
    system, user = messages
    flat = user["content"]
    # only sp's flattened history ends in a line break
    second = flat.find("\nseeker: ") if flat.endswith("\n") else -1
    return None if second < 0 else [system, {"role": "user", "content": flat[second + 1 :]}]
