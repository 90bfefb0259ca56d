"""Inferential Preference Mining: the modules answer the turns of training dialogues, an annotator
names what is wrong with their answers, and each error becomes a pair for the module whose fault it
is: chosen is the human answer, rejected the module's.

The answers (`answer_dialogues`) and the annotations of them (`annotate`) are kept. Which pairs they
make (`route`), and which unpaired answers (`label`), is a pure function of both, so another routing
of the same answers costs nothing."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from desc.domain import NO_ERROR, UNJUDGED, UNREADABLE, Domain
from desc.esconv import Dialogue, Turn
from desc.pairs import Pair, Unpaired
from desc.prompts import DEFAULT_LAYOUT, Layout, build_completion, build_messages

MISMATCH = "strategy mismatch"  # as released: another strategy than the human's
TEMPLATE = "template response"
NOTHING_WRONG = "nothing wrong"  # why an answer makes no pair: the annotator finds no error in it
ROUTINGS = ("released", "paper", "all-to-rg")


@dataclass(frozen=True)
class Case:
    """A supporter turn for an annotator, after `history`, whose last turn is the seeker's."""

    history: tuple[Turn, ...]
    strategy: str
    reply: str


@dataclass(frozen=True)
class Annotation:
    error: str  # one of the domain's labels, or UNREADABLE
    confidence: float  # 0 … 1: the label's share of probability, or an endpoint's own word for it
    explanation: str = ""


Annotator = Callable[[list[Case]], list[Annotation]]  # takes the cases of one dialogue


@dataclass(frozen=True)
class Answer:
    """What the modules answered at supporter turn `turn`, and what the annotator says of it."""

    turn: int
    # Drawn by the planner, or the human's if only replies are mined. None if no strategy could be
    # read in what was written.
    strategy: str | None
    # "" if only strategies are mined. All that was written if no strategy could be read in it.
    reply: str
    judged: Annotation | None = None
    human: Annotation | None = None  # of the human answer, if the routing asks for it
    # 1 if it was drawn (an int, so that counts of drawn answers are whole numbers). Otherwise how
    # often it would be drawn (weigh_strategies).
    weight: float = 1

    @staticmethod
    def read(record: dict) -> "Answer":
        judged, human = (
            record[name] and Annotation(**record[name]) for name in ("judged", "human")
        )
        return Answer(**record | {"judged": judged, "human": human})


def answer_dialogues(
    sampler, task: str, routing: str, dialogues: list[Dialogue], samples: int
) -> list[list[Answer]]:
    """`samples` answers at every supporter turn of each dialogue, on the human history (sampler:
    desc.sampling.LocalSampler or desc.judging.sampler.EndpointSampler).

    As released, each module is asked for its own part: sp for a strategy, rg for a reply under the
    human strategy. Otherwise both answer together, as they will be used: the planner's strategy,
    and the generator's reply under it."""
    turns_of = [[t for t in range(len(dialogue)) for _ in range(samples)] for dialogue in dialogues]
    asked = list(zip(dialogues, turns_of))
    if task == "vanilla":
        return [
            [Answer(turn, strategy, reply) for turn, (strategy, reply) in zip(turns, whole)]
            for turns, whole in zip(turns_of, sampler.whole(asked))
        ]
    drafts = [plan_answers(sampler, task, routing, dialogue, turns) for dialogue, turns in asked]
    if task == "sp" and routing == "released":
        return drafts
    planned = []
    for dialogue, draft in zip(dialogues, drafts):
        planned.append((dialogue, [(a.turn, a.strategy) for a in draft if a.strategy]))
    answered = []
    for draft, replies in zip(drafts, sampler.write(planned)):
        reply = iter(replies)
        answered.append([replace(a, reply=next(reply)) if a.strategy else a for a in draft])
    return answered


def plan_answers(
    sampler, task: str, routing: str, dialogue: Dialogue, turns: list[int]
) -> list[Answer]:
    """An answer without a reply at each of these turns. If no strategy can be read in what the
    planner wrote, all of it is kept in the reply's place."""
    if task == "rg" and routing == "released":
        return [Answer(turn, dialogue.supporter(turn).strategy, "") for turn in turns]
    answers = []
    for turn, text in zip(turns, sampler.plan(dialogue, turns)):
        strategy = sampler.domain.strategies.parse(text)
        answers.append(Answer(turn, strategy, "" if strategy else text))
    return answers


def weigh_strategies(sampler, dialogue: Dialogue) -> list[Answer]:
    """All strategies that a planner may draw at every supporter turn, each with its probability as
    its weight (sampler: desc.sampling.LocalSampler).

    Sums over these answers are what sums over drawn answers are on average."""
    answers = []
    for turn, probabilities in enumerate(sampler.distribution(dialogue).tolist()):
        for strategy, probability in zip(sampler.domain.strategies, probabilities):
            if probability > 0:
                answers.append(Answer(turn, strategy, "", weight=probability))
    return answers


def annotate(
    annotator: Annotator, routing: str, dialogue: Dialogue, answers: list[Answer]
) -> list[Answer]:
    """The answers with the annotator's annotations; as released, with those of the human answers,
    too. Equal answers to a turn are annotated once."""
    complete = [answer for answer in answers if answer.reply and answer.strategy]
    cases: dict[object, Case] = {}  # by answer, and by turn for the human answer
    for answer in complete:
        history = dialogue.history(answer.turn)
        cases[answer] = Case(history, answer.strategy, answer.reply)
    if routing == "released":
        for answer in complete:
            human = dialogue.supporter(answer.turn)
            cases[answer.turn] = Case(dialogue.history(answer.turn), human.strategy, human.text)
    if not cases:
        return answers
    judged = dict(zip(cases, annotator(list(cases.values()))))
    return [
        replace(answer, judged=judged.get(answer), human=judged.get(answer.turn))
        for answer in answers
    ]


def find_error(
    task: str,
    routing: str,
    gold: Turn,
    answer: Answer,
    domain: Domain,
    least_confidence: float = 0.0,
) -> tuple[str | None, str]:
    """(the error of an answer that makes a pair, ""), or (None, why it makes none).

    An annotation needs `least_confidence`. What makes a pair depends on the routing:

    released   sp: the strategy differs from the human's.
               rg, vanilla: the annotator finds fault with the answer, and none with the human's.
               Without an annotator any reply that differs from the human's is taken to be worse
               (UNJUDGED).
    paper      The annotator decides. The domain says whose fault an error is: in ESConv's a
               strategy mismatch is the planner's, and the errors of replies are the generator's.
    all-to-rg  The ablation: the planner's errors are the generator's fault, too."""
    if answer.strategy is None or (task != "sp" and not answer.reply):
        return None, "empty or unreadable answer"
    written = build_completion(task, answer.strategy, answer.reply)
    if written.split() == build_completion(task, gold.strategy, gold.text).split():
        return None, "the human answer"
    if routing == "released" and (task == "sp" or answer.judged is None):
        other_strategy = task != "rg" and answer.strategy != gold.strategy
        return (MISMATCH if other_strategy else UNJUDGED), ""
    if answer.judged is None:
        return None, "empty or unreadable answer"
    error = answer.judged.error
    if error == NO_ERROR:
        return None, NOTHING_WRONG
    if error == UNREADABLE:
        return None, "unreadable judgement"
    if answer.judged.confidence < least_confidence:
        return None, "unsure judgement"
    if error not in domain.faults("vanilla" if routing == "all-to-rg" else task):
        return None, f"not this module's fault: {error}"
    if not is_sound(answer.human, domain):
        return None, "no sound human answer"
    return error, ""


def is_sound(human: Annotation | None, domain: Domain) -> bool:
    """Whether an annotation of a human answer lets it be chosen; None: nobody was asked."""
    return human is None or human.error not in (*domain.faults("rg"), UNREADABLE)


@dataclass
class Routed:
    """The pairs of some dialogues, and what became of their answers."""

    answers: list[Answer] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    rejected_strategies: list[str] = field(default_factory=list)  # of each pair
    # what the answers weigh that made no pair, by reason
    dropped: Counter = field(default_factory=Counter)


def route(
    task: str,
    routing: str,
    dialogues: Iterable[tuple[Dialogue, list[Answer]]],
    domain: Domain,
    least_confidence: float = 0.0,
    layout: Layout = DEFAULT_LAYOUT,
) -> Routed:
    """The pairs that dialogues' answers make: chosen is the human answer, rejected the modules'.

    A pair's prompt for rg names the human strategy, which the chosen reply follows. Equal answers
    to a turn make one pair. A pair weighs what its answer weighs."""
    routed = Routed()
    for dialogue, answers in dialogues:
        routed.answers += answers
        seen: set[tuple[str, ...]] = set()  # rejected answers: the turn and the words
        pairs_of_turn: Counter = Counter()
        for answer in answers:
            turn = answer.turn
            gold = dialogue.supporter(turn)
            error, reason = find_error(task, routing, gold, answer, domain, least_confidence)
            if error is None:
                routed.dropped[reason] += answer.weight
                continue
            rejected = build_completion(task, answer.strategy, answer.reply)
            same = (str(turn), *rejected.split())
            if same in seen:
                routed.dropped["repeated"] += answer.weight
                continue
            seen.add(same)
            name = f"{task}/{dialogue.id}/{turn}"
            if answer.weight != 1:
                name += f"/{answer.strategy}"
            elif pairs_of_turn[turn]:
                name += f"/{pairs_of_turn[turn]}"
            pairs_of_turn[turn] += 1
            prompt = build_messages(task, dialogue, turn, gold.strategy, domain, layout)
            chosen = build_completion(task, gold.strategy, gold.text)
            facts = name, task, dialogue.id, turn, gold.strategy, error
            routed.pairs.append(Pair(*facts, prompt, chosen, rejected, answer.weight))
            routed.rejected_strategies.append(answer.strategy)
    return routed


def label(
    task: str,
    routing: str,
    dialogues: Iterable[tuple[Dialogue, list[Answer]]],
    domain: Domain,
    least_confidence: float = 0.0,
    layout: Layout = DEFAULT_LAYOUT,
) -> list[Unpaired]:
    """The answers of dialogues without pairs, for KTO. Desirable are each turn's human answer, if
    it is sound, and the answers in which the annotator finds nothing wrong. Not desirable are those
    that make a pair (find_error). All others are left out.

    A prompt for rg names the strategy that its own answer follows. Equal answers to a turn are kept
    once. A human answer weighs 1, and another what it weighs as a mined one."""
    labelled = []
    for dialogue, answers in dialogues:
        seen: set[tuple[str, ...]] = set()  # the turn and the words
        answers_of_turn: Counter = Counter()
        for answer in answers:
            turn, gold = answer.turn, dialogue.supporter(answer.turn)
            error, reason = find_error(task, routing, gold, answer, domain, least_confidence)
            candidates = []  # strategy, reply, error, weight
            if is_sound(answer.human, domain):
                candidates.append((gold.strategy, gold.text, "", 1))
            sound = reason == NOTHING_WRONG and answer.judged.confidence >= least_confidence
            if error or sound:
                candidates.append((answer.strategy, answer.reply, error or "", answer.weight))
            for strategy, reply, error, weight in candidates:
                completion = build_completion(task, strategy, reply)
                same = (str(turn), *completion.split())
                if same in seen:
                    continue
                seen.add(same)
                name = f"{task}/{dialogue.id}/{turn}/{answers_of_turn[turn]}"
                answers_of_turn[turn] += 1
                prompt = build_messages(task, dialogue, turn, strategy, domain, layout)
                facts = name, task, dialogue.id, turn, strategy, error
                labelled.append(Unpaired(*facts, prompt, completion, not error, weight))
    return labelled


def account(task: str, routed: Routed, domain: Domain) -> dict:
    """What was mined, kept and dropped, as mining.json has it, with warnings. But for the number of
    pairs all counts are by weight, which is how often something is drawn on average.

    It warns of too much of one strategy, or of too few template responses, if the domain has that
    error: that is how mining fails, according to the paper."""
    kept, chosen, rejected = Counter(), Counter(), Counter()
    for pair, strategy in zip(routed.pairs, routed.rejected_strategies):
        kept[pair.error] += pair.weight
        chosen[pair.strategy] += pair.weight
        rejected[strategy] += pair.weight
    weight = sum(kept.values())
    counts = {
        "answers": rounded(sum(answer.weight for answer in routed.answers)),
        "judged": Counter(answer.judged.error for answer in routed.answers if answer.judged),
        "pairs": len(routed.pairs),
        "weight of pairs": rounded(weight),
        "kept": {error: rounded(n) for error, n in kept.items()},
        "dropped": {reason: rounded(n) for reason, n in routed.dropped.items()},
        "chosen strategies": {name: rounded(chosen[name]) for name in domain.strategies},
        "rejected strategies": {name: rounded(rejected[name]) for name in domain.strategies},
    }
    warnings = []
    for side in ("chosen strategies", "rejected strategies"):
        name = max(counts[side], key=counts[side].get)
        if weight >= 20 and counts[side][name] > weight / 2:
            share = f"{100 * counts[side][name] / weight:.0f} %"
            warnings.append(f"{name} makes {share} of the {side}: DPO would learn little else")
    few_templates = TEMPLATE in domain.errors and kept[TEMPLATE] < 0.05 * weight
    if task != "sp" and counts["judged"] and few_templates:
        warnings.append(
            "fewer than 5 % of the pairs are template responses: replies may stay generic"
        )
    return counts | {"warnings": warnings}


def rounded(weight: float) -> float:
    """To hundredths, and an int if that is a whole number."""
    nearest = round(weight, 2)
    return int(nearest) if nearest == int(nearest) else nearest
