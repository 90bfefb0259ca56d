"""A preference pair, and the files that hold pairs: ours, and others in TRL's format."""

import sys
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path

from desc import DescError
from desc.encoding import Item, encode
from desc.prompts import Messages
from desc.storage.files import describe, read_field, read_lines

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Pair:
    """One preference. On disk a JSON line in TRL's conversational format (chosen and rejected are
    lists of one message). Pairs that people bring may have no turn (0), strategy or error ("")."""

    id: str
    task: str
    dialogue: str
    turn: int
    strategy: str  # the human supporter's
    error: str  # what is wrong with the rejected answer
    prompt: Messages
    chosen: str
    rejected: str
    weight: float = 1.0  # what the pair counts for in a loss; other tools ignore it

    def record(self) -> dict:
        """As a JSON value. A weight of 1 is left out."""
        answers = {
            name: [{"role": "assistant", "content": getattr(self, name)}]
            for name in ("chosen", "rejected")
        }
        facts = asdict(self) | answers
        if self.weight == 1:
            del facts["weight"]
        return facts


def encode_pair(tokenizer, pair: Pair, max_length: int, speakers: tuple[str, str]) -> Item:
    """The chosen and the rejected answer to one prompt, for DPO. `speakers` as in encode."""
    answers = [pair.chosen, pair.rejected]
    item = encode(tokenizer, pair.id, pair.dialogue, pair.prompt, answers, max_length, speakers)
    return replace(item, weight=pair.weight)


def read_pairs(path: Path, task: str) -> list[Pair]:
    """The pairs of `task` in a file of JSON lines: our own, or TRL's.

    - `chosen` and `rejected` are lists of messages {role, content}. What they share is the prompt,
      and then each has one more message, the assistant's answer.
    - `prompt` is such a list, too. It may be left out if the answers hold it. If both do, they must
      agree.
    - A string stands for one message: as the prompt the user's, as an answer the assistant's.
    - `id`, `dialogue`, `turn`, `strategy`, `error` and `task` may be missing or null. A line
      without an id is called "line 3", and is a dialogue of its own unless it names one.
    - `weight`, what the pair counts for in a loss, is 1 if it is missing or null.
    - Other columns, and other fields of a message, are ignored.

    Raises DescError naming the line that holds no such pair, one of another task, or an id that
    stands twice."""
    pairs, ids = [], set()
    for where, record in read_lines(path).items():
        pair = read_pair(record, task, where.removeprefix(f"{path}: "), where)
        if pair.id in ids:
            raise DescError(f"{where} has the id {pair.id!r} of a line before")
        ids.add(pair.id)
        if pairs and pair.prompt == pairs[-1].prompt:  # pairs of a turn share it in memory
            pair = replace(pair, prompt=pairs[-1].prompt)
        pairs.append(pair)
    if not pairs:
        raise DescError(f"{path}: holds no pair")
    return pairs


def read_pair(record, task: str, name: str, where: str) -> Pair:
    """The pair in the value of a JSON line, as read_pairs describes it.

    `name` is its id and its dialogue if the line names none. Raises DescError that begins with
    `where` if the value is no pair of `task`."""
    chosen = read_messages(record, "chosen", "assistant", where)
    rejected = read_messages(record, "rejected", "assistant", where)
    prompt = []
    if record.get("prompt") is not None:
        prompt = read_messages(record, "prompt", "user", where)
    both = zip(chosen[:-1], rejected[:-1])
    shared = [message for message, _ in takewhile(lambda two: two[0] == two[1], both)]
    if shared and prompt not in (shared[: len(prompt)], shared[-len(prompt) :]):
        raise DescError(
            f"{where}: the messages that chosen and rejected share do not begin or end with the"
            " prompt"
        )
    answers = chosen[len(shared) :], rejected[len(shared) :]
    if [len(messages) for messages in answers] != [1, 1]:
        raise DescError(
            f"{where}: chosen and rejected should differ in one message, the last; after what they"
            f" share they have {len(answers[0])} and {len(answers[1])}"
        )
    for column, messages in zip(("chosen", "rejected"), answers):
        role = messages[0]["role"]
        if role != "assistant":
            raise DescError(
                f"{where}: {column} should end with the assistant's message, not the {role}'s"
            )
    prompt = shared or prompt
    if not any(message["role"] == "user" for message in prompt):
        raise DescError(f"{where}: the prompt has no message of the user's")
    if prompt[-1]["role"] == "assistant":
        raise DescError(f"{where}: the prompt ends with the assistant's message, not the user's")
    if record.get("task") not in (None, task):
        raise DescError(f"{where} is of task {record['task']!r}, not {task!r}")
    facts = read_facts(record, name, where) | {"weight": read_weight(record, where)}
    (chosen,), (rejected,) = answers
    return Pair(
        task=task, prompt=prompt, chosen=chosen["content"], rejected=rejected["content"], **facts
    )


def read_messages(record, column: str, speaker: str, where: str) -> Messages:
    """The messages in a column of a line, each with its role and its content alone. A string is one
    message, whose role is `speaker`.

    Raises DescError if one has another role, or a content that is no text or is blank."""
    if isinstance(record, dict) and isinstance(record.get(column), str):
        record = {column: [{"role": speaker, "content": record[column]}]}
    messages = []
    for number, message in enumerate(read_field(record, column, list, where), 1):
        place = f"{where}, {column}, message {number}"
        role = read_field(message, "role", str, place)
        if role not in ROLES:
            raise DescError(
                f"{place}: field 'role' is {role!r}; it should be one of {', '.join(ROLES)}"
            )
        content = read_field(message, "content", str, place)
        # One blank of the user's stands between two turns of a supporter's (desc.esconv.alternate).
        if not content.strip() and (role, content) != ("user", " "):
            raise DescError(f"{place}: field 'content' is empty")
        messages.append({"role": role, "content": content})
    return messages


def read_facts(record: dict, name: str, where: str) -> dict:
    """What a line says about its pair besides the messages; `name` is its id and its dialogue if it
    names none. Numbers are read as names, too. Raises DescError if a field is of another kind."""
    facts = {"id": name, "dialogue": name, "turn": 0, "strategy": "", "error": ""}
    for fact in facts:
        value = record.get(fact)
        if value is None:
            continue
        if type(value) is int:
            facts[fact] = value if fact == "turn" else str(value)
        elif fact == "turn":
            raise DescError(f"{where}: field 'turn' should be an integer, not {describe(value)}")
        else:
            facts[fact] = read_field(record, fact, str, where)
    return facts


def read_weight(record: dict, where: str) -> float:
    """The weight of a line's pair. Raises DescError if it is no positive, finite number."""
    value = record.get("weight")
    if value is None:
        return 1.0
    if type(value) in (int, float) and 0 < value <= sys.float_info.max:
        return float(value)
    raise DescError(
        f"{where}: field 'weight' should be a positive, finite number, not {describe(value)}"
    )
