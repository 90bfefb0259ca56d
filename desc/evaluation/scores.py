"""What systems answered as scores: the counts of their dialogues, summed up and scored, with 95 %
intervals."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from desc.domain import Strategies
from desc.esconv import Dialogue, gold_strategies
from desc.evaluation.counts import (
    Counts,
    count_predictions,
    count_replies,
    score_predictions,
    score_replies,
)
from desc.evaluation.text import corpus_scores, near_copies
from desc.metrics import (
    bias_of_confusion,
    expected_confusion,
    interval,
    negative_log_likelihood,
    resample,
    scores_of_confusion,
)

FREQUENCIES = "training frequencies"  # the row of a planner that ignores the context
BIASED = ("B", "B greedy", "B expected", "ece")  # too high on few turns, and never below 0


@dataclass(frozen=True)
class Bootstrapped:
    """One score over all dialogues, and over resamples of them (the bootstrap)."""

    value: np.ndarray  # ()
    resampled: np.ndarray  # (samples,)
    dialogues: int  # how many have a value


def bootstrap_scores(
    counts: list[Counts], score: Callable[[Counts], dict[str, np.ndarray]], seed: int
) -> dict[str, Bootstrapped]:
    """The columns that `score` computes from the sum of `counts`, one per dialogue; {} without
    dialogues. The same seed draws the same dialogues for every system."""
    if not counts:
        return {}
    stacked, sums, resampled_sums = {}, {}, {}
    for name in counts[0]:
        by_dialogue = [count[name] for count in counts]
        stacked[name] = np.stack(by_dialogue)
        sums[name] = sum(by_dialogue)
        resampled_sums[name] = resample(by_dialogue, seed=seed)
    alone = score(stacked)  # of each dialogue
    resampled = score(resampled_sums)
    estimates = {}
    for column, value in score(sums).items():
        dialogues = int((~np.isnan(alone[column])).sum())
        estimates[column] = Bootstrapped(value, resampled[column], dialogues)
    return estimates


def subtract(estimate: Bootstrapped, first: Bootstrapped) -> Bootstrapped:
    """The difference of two systems' scores, resample by resample: it is paired by dialogue."""
    return Bootstrapped(
        estimate.value - first.value,
        estimate.resampled - first.resampled,
        min(estimate.dialogues, first.dialogues),
    )


def limits_of(column: str, estimate: Bootstrapped) -> tuple[float, float] | None:
    """The interval of a column's score or difference; None below FEWEST_GROUPS dialogues."""
    biased_estimate = float(estimate.value) if column in BIASED else None
    return interval(estimate.resampled, estimate.dialogues, biased_estimate)


def make_columns(estimates: dict[str, Bootstrapped], first: dict[str, Bootstrapped]) -> dict:
    """Each score with its "interval" and, if `first` (the first system's) has it too, its
    "difference", which is paired by dialogue.

    Below FEWEST_GROUPS dialogues the interval is None, and so are the difference's limits."""
    columns = {}
    for column, estimate in estimates.items():
        limits = limits_of(column, estimate)
        if limits and column in BIASED:
            limits = tuple(max(limit, 0.0) for limit in limits)
        columns[column] = float(estimate.value)
        columns[f"{column} interval"] = limits
        if column in first:
            difference = subtract(estimate, first[column])
            low, high = limits_of(column, difference) or (None, None)
            columns[f"{column} difference"] = (float(difference.value), low, high)
    return columns


def summarise(systems: dict[str, list[dict]], strategies: Strategies, config) -> dict[str, dict]:
    """{system: its row} from {system: one record per dialogue}.

    A row holds each score by COLUMN, "COLUMN interval" (95 %) and, after the first system, "COLUMN
    difference": the difference to the first system and its interval, paired by dialogue. Limits are
    None below desc.metrics.FEWEST_GROUPS dialogues.

    It also holds what single strategies and seeds did, the annotator's errors, and the scores of
    all replies together. `config` is a desc.flags.SampleConfig; its seed draws the resamples."""
    rows = {}
    first = {}
    for name, records in systems.items():
        answered = [record for record in records if record["replies"]]
        predictions = [count_predictions(record, strategies, config) for record in records]
        replies = [count_replies(record) for record in answered]
        estimates = bootstrap_scores(predictions, score_predictions, config.seed)
        estimates |= bootstrap_scores(replies, score_replies, config.seed)

        row = {
            "turns": sum(len(record["gold"]) for record in records),
            "replies": sum(len(record["replies"]) for record in answered),
        }
        row |= make_columns(estimates, first)
        row |= score_each_strategy(sum(counts["sampled"] for counts in predictions), strategies)
        row |= count_errors(answered)
        row |= score_all_replies(answered)
        if not rows:
            first = estimates
        rows[name] = row
    return rows


def score_each_strategy(sampled: np.ndarray, strategies: Strategies) -> dict:
    """The preferences, precision and recall of each strategy, the mean confusion matrix, and each
    seed's scores, from the seeds' confusion matrices (S, K, K)."""
    scores = scores_of_confusion(sampled)
    bias = bias_of_confusion(sampled)
    mean = sampled.mean(0)
    precision = mean.diagonal() / np.maximum(mean.sum(1), 1e-12)
    recall = mean.diagonal() / np.maximum(mean.sum(0), 1e-12)
    return {
        "preferences": dict(zip(strategies, bias.preferences.mean(0).tolist())),
        "precision": dict(zip(strategies, precision.tolist())),
        "recall": dict(zip(strategies, recall.tolist())),
        "confusion": mean.tolist(),
        "by seed": {
            "accuracy": (100 * scores.accuracy).tolist(),
            "Q": (100 * scores.macro_f1).tolist(),
            "B": bias.bias.tolist(),
        },
    }


def count_errors(answered: list[dict]) -> dict[str, Counter]:
    """{"errors": replies by the annotator's error}; {} if no reply was annotated."""
    judged = [annotation for record in answered for annotation in record.get("judged", [])]
    errors = Counter(annotation["error"] for annotation in judged)
    return {"errors": errors} if errors else {}


def score_all_replies(answered: list[dict]) -> dict[str, float]:
    """The text metrics of all replies together, in percent; {} if there are none."""
    if not answered:
        return {}
    human = [text for record in answered for text in record["human"]]
    replies = [text for record in answered for text in record["replies"]]
    return corpus_scores(human, replies) | {"near-copies": 100 * near_copies(replies)}


def frequency_row(train: list[Dialogue], test: list[Dialogue], strategies: Strategies) -> dict:
    """The expected scores of always drawing from the frequencies of the training strategies: what a
    planner reaches that ignores the context."""
    counts = Counter(gold_strategies(train))
    frequencies = np.array([counts[name] for name in strategies]) / counts.total()
    gold = gold_strategies(test)
    probabilities = np.tile(frequencies, (len(gold), 1))
    logps = np.log(np.maximum(probabilities, 1e-12))
    expected = expected_confusion(probabilities, gold, strategies)
    scores = scores_of_confusion(expected)
    return {
        "turns": len(gold),
        "accuracy": float(100 * scores.accuracy),
        "Q": float(100 * scores.macro_f1),
        "Q_W": float(100 * scores.weighted_f1),
        "B expected": float(bias_of_confusion(expected).bias),
        "nll": float(negative_log_likelihood(logps, gold, strategies)),
    }
