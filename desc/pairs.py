"""Preferences, in pairs or unpaired, and the files that hold them: ours, and others in TRL's
format."""

import sys
from collections import Counter
from collections.abc import Callable
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
        return as_record(self, "chosen", "rejected")


@dataclass(frozen=True)
class Unpaired:
    """One answer that is desirable or not, for KTO. On disk a JSON line in TRL's unpaired
    conversational format (completion is a list of one message). Answers that people bring may have
    no turn (0), strategy or error ("")."""

    id: str
    task: str
    dialogue: str
    turn: int
    strategy: str  # the one that the answer follows
    error: str  # what is wrong with an answer that is not desirable
    prompt: Messages
    completion: str
    label: bool  # whether the answer is desirable
    weight: float = 1.0  # what the answer counts for in a loss; other tools ignore it
    mismatched: str = ""  # an answer to another prompt, which reading finds

    def record(self) -> dict:
        record = as_record(self, "completion")
        del record["mismatched"]
        return record


def as_record(preference: Pair | Unpaired, *columns: str) -> dict:
    """A preference as a JSON value, whose answers, in `columns`, are lists of one message. A weight
    of 1 is left out."""
    record = asdict(preference)
    for column in columns:
        record[column] = [{"role": "assistant", "content": record[column]}]
    if preference.weight == 1:
        del record["weight"]
    return record


def encode_pair(tokenizer, pair: Pair, max_length: int, speakers: tuple[str, str]) -> Item:
    """The chosen and the rejected answer to one prompt, for DPO. `speakers` as in encode."""
    answers = [pair.chosen, pair.rejected]
    item = encode(tokenizer, pair.id, pair.dialogue, pair.prompt, answers, max_length, speakers)
    return replace(item, weight=pair.weight)


def encode_unpaired(
    tokenizer, answer: Unpaired, max_length: int, speakers: tuple[str, str]
) -> Item:
    """An answer to a prompt, and the mismatched one as if it answered this prompt, for KTO.
    `speakers` as in encode."""
    answers, prompt = [answer.completion, answer.mismatched], answer.prompt
    item = encode(tokenizer, answer.id, answer.dialogue, prompt, answers, max_length, speakers)
    return replace(item, weight=answer.weight, desirable=answer.label)


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
    return read_preferences(path, task, read_pair, "pair")


def read_unpaired(path: Path, task: str) -> list[Unpaired]:
    """The answers to `task` in a file of JSON lines: our own, or TRL's. They are as in read_pairs,
    but for the columns that say what was answered:

    - `completion` is a list of one message, the assistant's answer. A string stands for one, too.
    - `label` is true if the answer is desirable, and false if it is not.

    Each gets a mismatched answer (add_mismatched). Raises DescError as read_pairs does."""
    answers = read_preferences(path, task, read_answer, "answer")
    try:
        return add_mismatched(answers)
    except DescError as error:
        raise DescError(f"{path}: {error}") from None


def add_mismatched(answers: list[Unpaired]) -> list[Unpaired]:
    """The answers, each with one to another prompt, in other words; of its own dialogue if there is
    one, else of any.

    It stands as many places on, cyclically, as the prompt has answers. So the first answer to a
    turn gets the first to the next turn, and mismatched answers are about as desirable as answers
    are. Raises DescError if there is none."""
    dialogues: dict[str, list[Unpaired]] = {}
    for answer in answers:
        dialogues.setdefault(answer.dialogue, []).append(answer)
    answers_to = Counter((answer.dialogue, str(answer.prompt)) for answer in answers)
    found, passed = [], Counter()  # passed: answers of each dialogue that came before
    for number, answer in enumerate(answers):
        dialogue, step = answer.dialogue, answers_to[answer.dialogue, str(answer.prompt)]
        other = next_mismatched(answer, dialogues[dialogue], passed[dialogue] + step)
        if other is None:
            other = next_mismatched(answer, answers, number + step)
        if other is None:
            raise DescError(
                f"KTO needs answers to other prompts, but none differs from that of {answer.id}"
            )
        found.append(replace(answer, mismatched=other))
        passed[dialogue] += 1
    return found


def next_mismatched(answer: Unpaired, others: list[Unpaired], start: int) -> str | None:
    """The first of `others`, from number `start` on and cyclically, that is in other words and to
    another prompt than `answer`; None if there is none."""
    for number in range(start, start + len(others)):
        other = others[number % len(others)]
        same_words = other.completion.split() == answer.completion.split()
        if not same_words and other.prompt != answer.prompt:
            return other.completion
    return None


def read_preferences(path: Path, task: str, read: Callable, unit: str) -> list:
    """What `read`, read_pair or read_answer, makes of each line. `unit` is what an error calls
    it."""
    preferences, ids = [], set()
    for where, record in read_lines(path).items():
        preference = read(record, task, where.removeprefix(f"{path}: "), where)
        if preference.id in ids:
            raise DescError(f"{where} has the id {preference.id!r} of a line before")
        ids.add(preference.id)
        before = preferences[-1].prompt if preferences else None
        if preference.prompt == before:  # those of a turn share it in memory
            preference = replace(preference, prompt=before)
        preferences.append(preference)
    if not preferences:
        raise DescError(f"{path}: holds no {unit}")
    return preferences


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
    (chosen,), (rejected,) = answers
    check_messages(shared or prompt, {"chosen": chosen, "rejected": rejected}, where)
    return Pair(
        prompt=shared or prompt,
        chosen=chosen["content"],
        rejected=rejected["content"],
        **read_facts(record, task, name, where),
    )


def read_answer(record, task: str, name: str, where: str) -> Unpaired:
    """The answer in the value of a JSON line, as read_unpaired describes it; else as read_pair."""
    completion = read_messages(record, "completion", "assistant", where)
    prompt = read_messages(record, "prompt", "user", where)
    if len(completion) != 1:
        raise DescError(
            f"{where}: completion should hold one message, the answer, not {len(completion)}"
        )
    check_messages(prompt, {"completion": completion[0]}, where)
    label = record.get("label")
    if not isinstance(label, bool):
        raise DescError(f"{where}: field 'label' should be true or false, not {describe(label)}")
    facts = read_facts(record, task, name, where)
    return Unpaired(prompt=prompt, completion=completion[0]["content"], label=label, **facts)


def check_messages(prompt: Messages, answers: dict[str, dict[str, str]], where: str) -> None:
    """Raises DescError if an answer, by its column, is not the assistant's, or if the prompt is not
    what the user ends."""
    for column, message in answers.items():
        if message["role"] != "assistant":
            raise DescError(
                f"{where}: {column} should end with the assistant's message, not the"
                f" {message['role']}'s"
            )
    if not any(message["role"] == "user" for message in prompt):
        raise DescError(f"{where}: the prompt has no message of the user's")
    if prompt[-1]["role"] == "assistant":
        raise DescError(f"{where}: the prompt ends with the assistant's message, not the user's")


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


def read_facts(record: dict, task: str, name: str, where: str) -> dict:
    """What a line says about its pair or answer besides the messages; `name` is its id and its
    dialogue if it names none. Numbers are read as names, too. Raises DescError if a field is of
    another kind, or the line of another task."""
    if record.get("task") not in (None, task):
        raise DescError(f"{where} is of task {record['task']!r}, not {task!r}")
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
    return facts | {"task": task, "weight": read_weight(record, where)}


def read_weight(record: dict, where: str) -> float:
    """The weight of a line's pair or answer. Raises DescError if it is no positive, finite
    number."""
    value = record.get("weight")
    if value is None:
        return 1.0
    if type(value) in (int, float) and 0 < value <= sys.float_info.max:
        return float(value)
    raise DescError(
        f"{where}: field 'weight' should be a positive, finite number, not {describe(value)}"
    )
