"""Inferential Preference Mining: let the modules answer the turns of training dialogues, have what
they answered judged, and route what is wrong to the module whose fault it is, paired with the human
answer.

A module's answers (`answer_dialogue`) and the judgements on them (`judge`) are kept; which pairs
they make (`route`) is a pure function of them, so another routing of the same answers costs
nothing."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from desc import DescError
from desc.encoding import Item, encode
from desc.esconv import Dialogue, Turn
from desc.prompts import Messages, build_completion, build_messages
from desc.storage.files import read_lines
from desc.strategies import Strategies

MISMATCH = "strategy mismatch"
# what makes a pair for the generator
OF_REPLIES = ("lack of empathy", "early emotion shift", "template response")
LABELS = (MISMATCH, *OF_REPLIES, "emotion misread", "none")
UNREADABLE = "unreadable"  # what an endpoint wrote was no judgement


@dataclass(frozen=True)
class Case:
    """A supporter turn to judge, after `history`, whose last turn is the seeker's."""

    history: tuple[Turn, ...]
    strategy: str
    reply: str


@dataclass(frozen=True)
class Judgement:
    error: str  # one of LABELS, or UNREADABLE
    confidence: float  # 0 … 1: the label's share of probability; an endpoint's own word for it
    explanation: str = ""


Annotator = Callable[[list[Case]], list[Judgement]]  # of one dialogue's cases

ROUTINGS = ("released", "paper", "all-to-rg")
# which errors make a pair for which task
FAULTS = {"sp": (MISMATCH,), "rg": OF_REPLIES, "vanilla": (MISMATCH, *OF_REPLIES)}


@dataclass(frozen=True)
class Pair:
    """One preference. On disk a JSON line in TRL's conversational format (chosen and rejected are
    lists of one message)."""

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
        answers = {
            name: [{"role": "assistant", "content": getattr(self, name)}]
            for name in ("chosen", "rejected")
        }
        return asdict(self) | answers


def encode_pair(tokenizer, pair: Pair, max_length: int) -> Item:
    """The chosen and the rejected answer to one prompt, for DPO."""
    return encode(
        tokenizer, pair.id, pair.dialogue, pair.prompt, [pair.chosen, pair.rejected], max_length
    )


def read_pairs(path: Path, task: str) -> list[Pair]:
    """Pairs of `task` from a file of JSON lines. Raises DescError naming the line where it holds
    none, another task's, or one twice."""
    pairs, ids = [], set()
    for number, record in enumerate(read_lines(path), 1):
        try:
            answers = {name: record[name][0]["content"] for name in ("chosen", "rejected")}
            pair = Pair(**record | answers)
        except (KeyError, TypeError, IndexError) as error:
            raise DescError(
                f"{path}: line {number} is no preference pair ({type(error).__name__}: {error})"
            ) from None
        if pair.task != task or pair.id in ids:
            problem = (
                f"is of task {pair.task!r}, not {task!r}"
                if pair.task != task
                else f"has the id {pair.id!r} of a line before"
            )
            raise DescError(f"{path}: line {number} {problem}")
        ids.add(pair.id)
        pairs.append(pair)
    if not pairs:
        raise DescError(f"{path}: holds no pair")
    return pairs


@dataclass(frozen=True)
class Answer:
    """What the modules said at supporter turn `turn`, and what the annotator says of it."""

    turn: int
    # drawn by the planner, or the human's where only replies are mined; None where none could be
    # read
    strategy: str | None
    # "" where only strategies are mined; whatever was written where no strategy could be read
    reply: str
    judged: Judgement | None = None
    # the same annotator on the human answer, where the routing asks for it
    human: Judgement | None = None

    @staticmethod
    def read(record: dict) -> "Answer":
        judged, human = (record[name] and Judgement(**record[name]) for name in ("judged", "human"))
        return Answer(**record | {"judged": judged, "human": human})


def answer_dialogue(
    sampler, task: str, routing: str, dialogue: Dialogue, samples: int
) -> list[Answer]:
    """`samples` answers at every supporter turn, on the human history (sampler:
    desc.sampling.LocalSampler or EndpointSampler).

    As released, each module is asked for its own part: sp for a strategy, rg for a reply under the
    human strategy. Otherwise both answer together as they will be used: the planner's strategy, and
    the generator's reply under it."""
    turns = [turn for turn in range(len(dialogue)) for _ in range(samples)]
    if task == "vanilla":
        return [Answer(turn, *said) for turn, said in zip(turns, sampler.whole(dialogue, turns))]
    if task == "rg" and routing == "released":
        written = [dialogue.supporter(turn).strategy for turn in turns]
    else:
        written = sampler.plan(dialogue, turns)
    planned = [sampler.strategies.parse(text) for text in written]
    known = [(turn, strategy) for turn, strategy in zip(turns, planned) if strategy]
    replies = iter(
        [""] * len(known)
        if task == "sp" and routing == "released"
        else sampler.write(dialogue, known)
    )
    return [
        Answer(turn, name, next(replies) if name else text)
        for turn, name, text in zip(turns, planned, written)
    ]


def judge(
    annotator: Annotator, routing: str, dialogue: Dialogue, answers: list[Answer]
) -> list[Answer]:
    """The answers with their judgements; as released, those of the human answers too. Equal answers
    to a turn are judged once."""
    theirs = {
        a: Case(dialogue.history(a.turn), a.strategy, a.reply)
        for a in answers
        if a.reply and a.strategy
    }
    gold = {a.turn: dialogue.supporter(a.turn) for a in theirs if routing == "released"}
    ours = {
        turn: Case(dialogue.history(turn), human.strategy, human.text)
        for turn, human in gold.items()
    }
    cases = [*theirs.values(), *ours.values()]
    judged = annotator(cases) if cases else []
    of_answer, of_human = dict(zip(theirs, judged)), dict(zip(ours, judged[len(theirs) :]))
    return [replace(a, judged=of_answer.get(a), human=of_human.get(a.turn)) for a in answers]


def find_error(
    task: str, routing: str, gold: Turn, answer: Answer, least: float = 0.0
) -> tuple[str | None, str]:
    """(what is wrong with an answer, ""), or (None, why it makes no pair). `least` is the
    confidence that a judgement must have.

    released   sp: the strategy differs from the human's.
               rg, vanilla: the annotator finds fault with the answer, and none with the human's.
               Without an annotator any reply that differs from the human's is taken to be worse
               ("unjudged").
    paper      what the annotator says decides: a strategy mismatch is the planner's fault, the
               errors of replies are the generator's.
    all-to-rg  the ablation: a mismatch is the generator's fault too."""
    if answer.strategy is None or (task != "sp" and not answer.reply):
        return None, "empty or unreadable answer"
    if (
        build_completion(task, answer.strategy, answer.reply).split()
        == build_completion(task, gold.strategy, gold.text).split()
    ):
        return None, "the human answer"
    if routing == "released" and (task == "sp" or answer.judged is None):
        return (MISMATCH if task != "rg" and answer.strategy != gold.strategy else "unjudged"), ""
    if answer.judged is None:
        return None, "empty or unreadable answer"
    error = answer.judged.error
    if error in ("none", UNREADABLE) or answer.judged.confidence < least:
        return None, {"none": "nothing wrong", UNREADABLE: "unreadable judgement"}.get(
            error, "unsure judgement"
        )
    if error not in FAULTS[task] and not (routing == "all-to-rg" and error == MISMATCH):
        return None, f"not this module's fault: {error}"
    if answer.human and answer.human.error in (*OF_REPLIES, UNREADABLE):
        return None, "no sound human answer"
    return error, ""


def route(
    task: str,
    routing: str,
    dialogue: Dialogue,
    answers: list[Answer],
    strategies: Strategies,
    least: float = 0.0,
) -> tuple[list[Pair], list[str], Counter]:
    """The pairs of one dialogue, chosen the human answer, rejected the modules'; the strategies of
    the rejected; and how many answers made none, by reason.

    A pair's prompt for rg names the human strategy, which the chosen reply follows."""
    pairs, planned, dropped, seen = [], [], Counter(), set()
    for answer in answers:
        gold = dialogue.supporter(answer.turn)
        error, reason = find_error(task, routing, gold, answer, least)
        if error is None:
            dropped[reason] += 1
            continue
        rejected = build_completion(task, answer.strategy, answer.reply)
        if (same := (answer.turn, *rejected.split())) in seen:
            dropped["repeated"] += 1
            continue
        seen.add(same)
        number = sum(pair.turn == answer.turn for pair in pairs)
        name = f"{task}/{dialogue.id}/{answer.turn}" + (f"/{number}" if number else "")
        prompt = build_messages(task, dialogue, answer.turn, gold.strategy, strategies)
        chosen = build_completion(task, gold.strategy, gold.text)
        pairs.append(
            Pair(
                name, task, dialogue.id, answer.turn, gold.strategy, error, prompt, chosen, rejected
            )
        )
        planned.append(answer.strategy)
    return pairs, planned, dropped


def account(
    task: str,
    routed: Iterable[tuple[list[Answer], list[Pair], list[str], Counter]],
    strategies: Strategies,
) -> dict:
    """What was found, kept and dropped over dialogues, each its answers and what `route` makes of
    them, and what looks wrong: too much of one strategy, or too few template responses, are how the
    paper says that mining fails."""
    answers, pairs, rejected, dropped = [], [], [], Counter()
    for said, kept, planned, reasons in routed:
        answers, pairs, rejected, dropped = (
            answers + said,
            pairs + kept,
            rejected + planned,
            dropped + reasons,
        )
    found = {
        "answers": len(answers),
        "judged": Counter(a.judged.error for a in answers if a.judged),
        "pairs": len(pairs),
        "kept": Counter(pair.error for pair in pairs),
        "dropped": dropped,
        "chosen strategies": {
            name: sum(pair.strategy == name for pair in pairs) for name in strategies
        },
        "rejected strategies": {name: rejected.count(name) for name in strategies},
        "warnings": [],
    }
    for side in ("chosen strategies", "rejected strategies"):
        name = max(found[side], key=found[side].get)
        if found[side][name] > len(pairs) / 2 and len(pairs) >= 20:
            share = f"{100 * found[side][name] / len(pairs):.0f} %"
            found["warnings"].append(
                f"{name} makes {share} of the {side}: DPO would learn little else"
            )
    if task != "sp" and found["judged"] and found["kept"]["template response"] < 0.05 * len(pairs):
        found["warnings"].append(
            "fewer than 5 % of the pairs are template responses: replies may stay generic"
        )
    return found
