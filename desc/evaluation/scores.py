"""What systems did: counted dialogue by dialogue, then summed up as rows of numbers with
intervals."""

from collections import Counter

import numpy as np
import torch

from desc.esconv import Dialogue
from desc.evaluation.text import corpus_scores, near_copies, self_repetition, turn_scores, words
from desc.judging.judge import RUBRICS
from desc.metrics import (
    bias_of_confusion,
    calibration_counts,
    calibration_error,
    confusion,
    expected_confusion,
    interval,
    negative_log_likelihood,
    resample,
    scores_of_confusion,
    top_hits,
)
from desc.mining import UNREADABLE
from desc.sampling import temper
from desc.strategies import Strategies

FREQUENCIES = "training frequencies"  # the row of a planner that knows nothing of the context


def count_plans(record: dict, strategies: Strategies, config) -> dict[str, np.ndarray]:
    """Of one dialogue, what a planner's scores are computed from: counts and sums, to be added up
    over dialogues.

    `config` (a desc.cli.SampleConfig) says how strategies are sampled, for the expected confusion
    matrix."""
    gold, turns, size = record["gold"], len(record["gold"]), len(strategies)
    parsed = [[(g, p) for g, p in zip(gold, drawn) if p] for drawn in record["predicted"]]
    sums = {"turns": np.array(float(turns))}
    sums["sampled"] = np.stack(
        [
            confusion(*zip(*pairs), strategies) if pairs else np.zeros((size, size))
            for pairs in parsed
        ]
    )
    if record["logps"]:
        logps = np.array(record["logps"])
        sums["greedy"] = confusion(gold, [strategies[i] for i in logps.argmax(1)], strategies)
        probabilities = temper(torch.from_numpy(logps), config.temperature, config.top_p).numpy()
        sums["expected"] = expected_confusion(probabilities, gold, strategies)
        sums["nll"] = np.array(turns * negative_log_likelihood(logps, gold, strategies))
        sums["top"] = np.array([top_hits(logps, gold, k, strategies) for k in (2, 3)])
        sums["calibration"] = calibration_counts(logps, gold, strategies)
    return sums


def score_plans(sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A planner's columns from count_plans' sums, all with leading dimensions (…); percent but for
    B and nll.

    What several seeds drew is scored apart, and the mean given: the scores of one draw, without the
    luck of it."""
    scores, turns = scores_of_confusion(sums["sampled"]), sums["turns"]
    found = {
        "accuracy": 100 * scores.accuracy.mean(-1),
        "Q": 100 * scores.macro_f1.mean(-1),
        "Q_W": 100 * scores.weighted_f1.mean(-1),
    }
    found["B"] = bias_of_confusion(sums["sampled"]).bias.mean(-1)
    found["invalid"] = 100 * (1 - sums["sampled"].sum((-2, -1)).mean(-1) / turns)
    if "greedy" in sums:
        found["greedy"] = 100 * scores_of_confusion(sums["greedy"]).accuracy
        found |= {f"top-{k}": 100 * sums["top"][..., i] / turns for i, k in enumerate((2, 3))}
        found |= {
            f"B {kind}": bias_of_confusion(sums[kind]).bias for kind in ("greedy", "expected")
        }
        found |= {"nll": sums["nll"] / turns, "ece": 100 * calibration_error(sums["calibration"])}
    return found


def count_replies(record: dict) -> dict[str, np.ndarray]:
    """Of one dialogue, each column of its replies, of what the annotator found in them and of the
    judge's word: (sum, number)."""
    pairs = zip(record["human"], record["replies"], strict=True)
    each = [turn_scores(words(human), words(reply)) for human, reply in pairs]
    found = {
        name: [scores[name] * (1 if name == "length" else 100) for scores in each]
        for name in each[0]
    }
    judged, ratings, verdicts = (record.get(kind, []) for kind in ("judged", "ratings", "verdicts"))
    errors = [one["error"] for one in judged]
    found["faultless"] = [100 * (error == "none") for error in errors if error != UNREADABLE]
    points = {rubric: [won(turn[rubric]) for turn in verdicts] for rubric in RUBRICS}
    for rubric in RUBRICS:
        found[rubric] = [turn[rubric] for turn in ratings if turn[rubric] is not None]
        found[f"{rubric} wins"] = [100 * p for p in points[rubric] if p is not None]
    found["ties"] = [100 * (p == 0.5) for ps in points.values() for p in ps if p is not None]
    places = [
        place
        for turn in verdicts
        for both in turn.values()
        for place in zip(both, ("ours", "theirs"))
    ]
    found["first shown"] = [
        100 * (said == first) for said, first in places if said in ("ours", "theirs")
    ]
    said = [
        *errors,
        *(rating for turn in ratings for rating in turn.values()),
        *(said for said, _ in places),
    ]
    found["unreadable"] = [100 * (word in (None, UNREADABLE)) for word in said]
    sums = {column: np.array([sum(values), len(values)], float) for column, values in found.items()}
    return sums | {"self-repetition": np.array([100, 1]) * self_repetition(record["replies"])}


def won(verdicts: list[str | None]) -> float | None:
    """1, ½ or 0: a reply wins where it is called better in both places; None where a verdict could
    not be read."""
    return (
        None
        if None in verdicts
        else {("ours", "ours"): 1.0, ("theirs", "theirs"): 0.0}.get(tuple(verdicts), 0.5)
    )


def score_replies(sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns of which there is something, from count_replies' sums."""
    return {
        column: pair[..., 0] / np.maximum(pair[..., 1], 1e-12)
        for column, pair in sums.items()
        if pair[..., 1].any()
    }


def summarise(systems: dict[str, list[dict]], strategies: Strategies, config) -> dict[str, dict]:
    """A row a system: its scores by column, "COLUMN interval" of 95 % and, after the first system,
    "COLUMN difference" to the first: the difference and its interval, paired by dialogue; what
    single strategies and seeds did; and scores of all replies together."""
    rows, first = {}, {}
    for name, records in systems.items():
        answered = [record for record in records if record["replies"]]
        row = {
            "turns": sum(len(r["gold"]) for r in records),
            "replies": sum(len(r["replies"]) for r in answered),
        }
        plans = [count_plans(record, strategies, config) for record in records]
        for counted, score in (
            (plans, score_plans),
            ([count_replies(record) for record in answered], score_replies),
        ):
            if not counted:
                continue
            whole = score({key: sum(one[key] for one in counted) for key in counted[0]})
            drawn = score(
                {
                    key: resample([one[key] for one in counted], seed=config.seed)
                    for key in counted[0]
                }
            )
            for column, value in whole.items():
                row |= {column: float(value), f"{column} interval": interval(drawn[column])}
                if column in first:
                    row[f"{column} difference"] = (
                        float(value - first[column][0]),
                        *interval(drawn[column] - first[column][1]),
                    )
                elif not rows:
                    first[column] = value, drawn[column]
        row |= by_strategy(sum(one["sampled"] for one in plans), strategies)
        if found := Counter(
            judged["error"] for record in answered for judged in record.get("judged", [])
        ):
            row["errors"] = found
        if answered:
            replies, human = (
                [text for record in answered for text in record[side]]
                for side in ("replies", "human")
            )
            row |= corpus_scores(human, replies) | {"near-copies": 100 * near_copies(replies)}
        rows[name] = row
    return rows


def by_strategy(sampled: np.ndarray, strategies: Strategies) -> dict:
    """Of seeds' confusion matrices (S, K, K): the preferences, precision and recall of each
    strategy, and the mean matrix."""
    mean, scores, bias = sampled.mean(0), scores_of_confusion(sampled), bias_of_confusion(sampled)
    precision, recall = (mean.diagonal() / np.maximum(mean.sum(axis), 1e-12) for axis in (1, 0))
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


def frequency_row(train: list[Dialogue], test: list[Dialogue], strategies: Strategies) -> dict:
    """The expected scores of always drawing from the training strategies' frequencies: what knowing
    nothing of the context gives."""
    counts = Counter(turn.strategy for dialogue in train for turn in dialogue.turns[1::2])
    frequencies = np.array([counts[name] for name in strategies]) / counts.total()
    gold = [turn.strategy for dialogue in test for turn in dialogue.turns[1::2]]
    always = np.tile(frequencies, (len(gold), 1))
    expected, logps = (
        expected_confusion(always, gold, strategies),
        np.log(np.maximum(always, 1e-12)),
    )
    scores = scores_of_confusion(expected)
    row = {
        "accuracy": 100 * scores.accuracy,
        "Q": 100 * scores.macro_f1,
        "Q_W": 100 * scores.weighted_f1,
    }
    row |= {
        "B expected": bias_of_confusion(expected).bias,
        "nll": negative_log_likelihood(logps, gold, strategies),
    }
    return {"turns": len(gold)} | {column: float(value) for column, value in row.items()}
