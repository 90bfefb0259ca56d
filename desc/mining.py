"""Inferential Preference Mining: let a module answer the turns of training dialogues, and pair what it got wrong with the human answer."""

from dataclasses import asdict, dataclass
from pathlib import Path

from desc import DescError
from desc.encoding import Item, encode
from desc.esconv import Dialogue, Turn
from desc.files import read_lines
from desc.prompts import Messages, build_completion, build_messages
from desc.sampling import plan_dialogue, write_dialogue
from desc.strategies import Strategies


@dataclass(frozen=True)
class Pair:
    """One preference. On disk a JSON line in TRL's conversational format (chosen and rejected are lists of one message)."""

    id: str
    task: str
    dialogue: str
    turn: int
    strategy: str  # the human supporter's
    error: str  # what is wrong with the rejected answer
    prompt: Messages
    chosen: str
    rejected: str

    def record(self) -> dict:
        answers = {name: [{"role": "assistant", "content": getattr(self, name)}] for name in ("chosen", "rejected")}
        return asdict(self) | answers


def encode_pair(tokenizer, pair: Pair, max_length: int) -> Item:
    """The chosen and the rejected answer to one prompt, for DPO."""
    return encode(tokenizer, pair.id, pair.dialogue, pair.prompt, [pair.chosen, pair.rejected], max_length)


def read_pairs(path: Path, task: str) -> list[Pair]:
    """Pairs of `task` from a file of JSON lines. Raises DescError naming the line where it holds none, another task's, or one twice."""
    pairs, ids = [], set()
    for number, record in enumerate(read_lines(path), 1):
        try:
            answers = {name: record[name][0]["content"] for name in ("chosen", "rejected")}
            pair = Pair(**record | answers)
        except (KeyError, TypeError, IndexError) as error:
            raise DescError(f"{path}: line {number} is no preference pair ({type(error).__name__}: {error})") from None
        if pair.task != task or pair.id in ids:
            problem = f"is of task {pair.task!r}, not {task!r}" if pair.task != task else f"has the id {pair.id!r} of a line before"
            raise DescError(f"{path}: line {number} {problem}")
        ids.add(pair.id)
        pairs.append(pair)
    if not pairs:
        raise DescError(f"{path}: holds no pair")
    return pairs


def find_error(task: str, gold: Turn, strategy: str, reply: str) -> str | None:
    """What is wrong with an answer, or None where it makes no pair: the one place for an annotator to sit.

    Without one (the released SP rule), another strategy than the human's is a mismatch, and a reply that differs from the human's is
    taken to be worse, "unjudged". An empty reply, or the same but for white space, teaches nothing."""
    if task != "rg" and strategy != gold.strategy:
        return "strategy mismatch"
    if task == "sp" or not reply or reply.split() == gold.text.split():
        return None
    return "unjudged"


def answer_dialogue(model, tokenizer, config, dialogue: Dialogue, strategies: Strategies) -> list[tuple[str, str]]:
    """One sampled (strategy, reply) for every supporter turn, on the human history: what the module of config.task would have done.

    The reply is "" for sp; rg answers under the human strategy."""
    if config.task == "rg":
        planned = [dialogue.supporter(turn).strategy for turn in range(len(dialogue))]
    else:
        _, planned = plan_dialogue(model, tokenizer, config, config.task, dialogue, strategies)
    if config.task == "sp":
        return [(strategy, "") for strategy in planned]
    return list(zip(planned, write_dialogue(model, tokenizer, config, config.task, dialogue, planned, strategies)))


def mine_dialogue(model, tokenizer, config, dialogue: Dialogue, strategies: Strategies) -> list[Pair]:
    """The pairs of one dialogue: chosen the human answer, rejected the module's."""
    task, pairs = config.task, []
    for turn, (strategy, reply) in enumerate(answer_dialogue(model, tokenizer, config, dialogue, strategies)):
        gold = dialogue.supporter(turn)
        if (error := find_error(task, gold, strategy, reply)) is None:
            continue
        prompt = build_messages(task, dialogue, turn, gold.strategy, strategies)
        chosen, rejected = build_completion(task, gold.strategy, gold.text), build_completion(task, strategy, reply)
        pairs.append(Pair(f"{task}/{dialogue.id}/{turn}", task, dialogue.id, turn, gold.strategy, error, prompt, chosen, rejected))
    return pairs
