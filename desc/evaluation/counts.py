"""What one dialogue adds to each score: counts and sums, which are added up over dialogues before
anything is divided."""

from collections.abc import Iterable

import numpy as np
import torch

from desc.domain import UNREADABLE, Strategies
from desc.evaluation.text import self_repetition, turn_scores, words
from desc.judging.judge import RUBRICS
from desc.metrics import (
    bias_of_confusion,
    calibration_counts,
    calibration_error,
    confusion,
    expected_confusion,
    negative_log_likelihood,
    scores_of_confusion,
    top_hits,
)
from desc.sampling import temper

TOP = (2, 3)  # the k of the columns top-k
VERDICT_ORDER = ("ours", "theirs")  # in this order a verdict's two replies are shown first

Counts = dict[str, np.ndarray]  # what is added up over dialogues, by name


def count_predictions(record: dict, strategies: Strategies, config) -> Counts:
    """The counts and sums of one dialogue that a planner's scores are computed from.

    `config` (a desc.flags.SampleConfig) says how strategies are sampled, because the expected
    confusion matrix depends on it."""
    gold = record["gold"]
    turns = len(gold)
    sampled = [confusion_of_parsed(gold, drawn, strategies) for drawn in record["predicted"]]
    counts = {"turns": np.array(float(turns)), "sampled": np.stack(sampled)}
    if not record["logps"]:
        return counts
    logps = np.array(record["logps"])
    likeliest = [strategies[i] for i in logps.argmax(1)]
    probabilities = temper(torch.from_numpy(logps), config.temperature, config.top_p).numpy()
    counts["greedy"] = confusion(gold, likeliest, strategies)
    counts["expected"] = expected_confusion(probabilities, gold, strategies)
    counts["nll"] = np.array(turns * negative_log_likelihood(logps, gold, strategies))
    counts["top"] = np.array([top_hits(logps, gold, k, strategies) for k in TOP])
    counts["calibration"] = calibration_counts(logps, gold, strategies)
    return counts


def confusion_of_parsed(
    gold: list[str], predicted: list[str | None], strategies: Strategies
) -> np.ndarray:
    """The confusion matrix (K, K) of the turns whose prediction could be parsed."""
    parsed = [turn for turn, name in enumerate(predicted) if name]
    return confusion([gold[t] for t in parsed], [predicted[t] for t in parsed], strategies)


def score_predictions(counts: Counts) -> dict[str, np.ndarray]:
    """A planner's columns from sums of count_predictions, all with leading dimensions (…).

    In percent, but for B and nll. Each seed's draws are scored by themselves, and the mean over
    seeds is given: what to expect of one draw, without its luck."""
    turns = counts["turns"]
    scores = scores_of_confusion(counts["sampled"])
    parsed = counts["sampled"].sum((-2, -1)).mean(-1)
    columns = {
        "accuracy": 100 * scores.accuracy.mean(-1),
        "Q": 100 * scores.macro_f1.mean(-1),
        "Q_W": 100 * scores.weighted_f1.mean(-1),
        "B": bias_of_confusion(counts["sampled"]).bias.mean(-1),
        "invalid": 100 * (1 - parsed / turns),
    }
    if "greedy" not in counts:
        return columns
    greedy = scores_of_confusion(counts["greedy"])
    columns |= {"greedy": 100 * greedy.accuracy, "Q greedy": 100 * greedy.macro_f1}
    for i, k in enumerate(TOP):
        columns[f"top-{k}"] = 100 * counts["top"][..., i] / turns
    for kind in ("greedy", "expected"):
        columns[f"B {kind}"] = bias_of_confusion(counts[kind]).bias
    columns["nll"] = counts["nll"] / turns
    columns["ece"] = 100 * calibration_error(counts["calibration"])
    return columns


def count_replies(record: dict) -> Counts:
    """(sum, number) of the values in each column of one dialogue's replies, of the annotator's
    annotations of them and of the judge's ratings and verdicts."""
    annotations = count_annotations(record.get("judged", []))
    ratings = count_ratings(record.get("ratings", []))
    verdicts = count_verdicts(record.get("verdicts", []))

    values = count_text(record["human"], record["replies"])
    values["faultless"] = annotations["faultless"]
    for rubric in RUBRICS:
        values[rubric] = ratings[rubric]
        values[f"{rubric} wins"] = verdicts[f"{rubric} wins"]
    for column in ("ties", "first shown"):
        values[column] = verdicts[column]
    values["unreadable"] = [
        *annotations["unreadable"],
        *ratings["unreadable"],
        *verdicts["unreadable"],
    ]
    counts = {column: np.array([sum(each), len(each)], float) for column, each in values.items()}
    repeated, trigrams = self_repetition(record["replies"])
    counts["self-repetition"] = np.array([100 * repeated, trigrams])
    return counts


def count_text(human: list[str], replies: list[str]) -> dict[str, list[float]]:
    """Each turn's text metrics by column, in percent, but for the length in words."""
    pairs = zip(human, replies, strict=True)
    turns = [turn_scores(words(reference), words(reply)) for reference, reply in pairs]
    values = {}
    for column in turns[0]:
        scale = 1 if column == "length" else 100
        values[column] = [scale * scores[column] for scores in turns]
    return values


def count_annotations(judged: list[dict]) -> dict[str, list[float]]:
    """Of the annotator's annotations: which replies have no error, and which annotations are
    unreadable."""
    errors = [annotation["error"] for annotation in judged]
    readable = [error for error in errors if error != UNREADABLE]
    return {
        "faultless": to_percent(error == "none" for error in readable),
        "unreadable": to_percent(error == UNREADABLE for error in errors),
    }


def count_ratings(ratings: list[dict[str, float | None]]) -> dict[str, list[float]]:
    """The judge's readable ratings by rubric, 0 … 5, and which ones are unreadable."""
    values = {}
    for rubric in RUBRICS:
        values[rubric] = [turn[rubric] for turn in ratings if turn[rubric] is not None]
    values["unreadable"] = to_percent(
        rating is None for turn in ratings for rating in turn.values()
    )
    return values


def count_verdicts(verdicts: list[dict[str, list[str | None]]]) -> dict[str, list[float]]:
    """Of the judge's verdicts against the first system: wins by rubric, ties, which verdicts
    preferred the reply shown first, and which ones are unreadable."""
    values = {"ties": [], "first shown": [], "unreadable": []}
    for rubric in RUBRICS:
        pairs = [turn[rubric] for turn in verdicts]
        points = [score_verdicts(pair) for pair in pairs]
        readable = [point for point in points if point is not None]
        values[f"{rubric} wins"] = [100 * point for point in readable]
        values["ties"] += to_percent(point == 0.5 for point in readable)

        shown = [(verdict, first) for pair in pairs for verdict, first in zip(pair, VERDICT_ORDER)]
        decided = [(verdict, first) for verdict, first in shown if verdict in VERDICT_ORDER]
        values["first shown"] += to_percent(verdict == first for verdict, first in decided)
        values["unreadable"] += to_percent(verdict is None for verdict, _ in shown)
    return values


def score_verdicts(pair: list[str | None]) -> float | None:
    """1 if a reply is called better in both orders, 0 if the other one is, ½ otherwise. None if a
    verdict is unreadable."""
    if None in pair:
        return None
    if set(pair) == {"ours"}:
        return 1.0
    if set(pair) == {"theirs"}:
        return 0.0
    return 0.5


def to_percent(flags: Iterable[bool]) -> list[float]:
    """100 for each true flag and 0 for each false one, so that their mean is a percentage."""
    return [100.0 if flag else 0.0 for flag in flags]


def score_replies(counts: Counts) -> dict[str, np.ndarray]:
    """The mean of each column that has any values, from sums of count_replies (…, 2); nan where
    there are none."""
    means = {}
    for column, pair in counts.items():
        total, number = pair[..., 0], pair[..., 1]
        if number.any():
            undefined = np.full(total.shape, np.nan)
            means[column] = np.divide(total, number, out=undefined, where=number > 0)
    return means
