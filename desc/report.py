"""What an evaluation found, as rows of numbers and as tables."""

from collections import Counter

import numpy as np
import torch

from desc.esconv import Dialogue
from desc.judging import RUBRICS, UNREADABLE
from desc.metrics import (
    bias_of_confusion,
    calibration_counts,
    calibration_error,
    confusion,
    corpus_scores,
    expected_confusion,
    interval,
    near_copies,
    negative_log_likelihood,
    resample,
    scores_of_confusion,
    self_repetition,
    top_hits,
    turn_scores,
    words,
)
from desc.sampling import temper
from desc.strategies import Strategies

PLAN = (
    "accuracy",
    "greedy",
    "top-2",
    "top-3",
    "Q",
    "Q_W",
    "B",
    "B greedy",
    "B expected",
    "nll",
    "ece",
    "invalid",
)
TEXT = (
    "distinct-1",
    "bleu-1",
    "f1",
    "rouge-l",
    "length",
    "self-repetition",
    "near-copies",
    "corpus distinct-1",
    "corpus bleu-4",
)
FREQUENCIES = "training frequencies"  # the row of a planner that knows nothing of the context
JUDGED = (
    "faultless",
    *RUBRICS,
    *(f"{rubric} wins" for rubric in RUBRICS),
    "ties",
    "first shown",
    "unreadable",
)


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


def markdown(lines: list[list[str]]) -> str:
    """A table of its head and its lines."""
    head, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body])


def decimals(column: str) -> int:
    return 3 if column[0] == "B" or column == "nll" else 2 if column in RUBRICS else 1


def tables(rows: dict[str, dict]) -> str:
    """Markdown: a row a system, of the planner, of replies and of the judge, only the columns that
    some row has; then the differences to the first system, with their intervals."""
    parts = []
    for columns in (PLAN, TEXT, JUDGED):
        shown = [c for c in columns if any(c in row for row in rows.values())]
        lines = [
            [name, *(cell(row, c) for c in shown)]
            for name, row in rows.items()
            if any(c in row for c in shown)
        ]
        parts += [markdown([["system", *shown], *lines])] if lines else []
    later = {name: row for name, row in rows.items() if "accuracy difference" in row}
    lines = []
    for column in (*PLAN, *TEXT, *JUDGED):
        found = [row.get(f"{column} difference") for row in later.values()]
        if any(found):
            digits = decimals(column)
            lines.append(
                [
                    column,
                    *(
                        f"{d[0]:+.{digits}f} ({d[1]:+.{digits}f} … {d[2]:+.{digits}f})" if d else ""
                        for d in found
                    ),
                ]
            )
    return "\n\n".join(
        parts + ([markdown([["difference to the first", *later], *lines])] if lines else [])
    )


def cell(row: dict, column: str) -> str:
    """With the interval of what the paper reports, and of what is judged."""
    if column not in row:
        return ""
    digits = decimals(column)
    text = f"{row[column]:.{digits}f}"
    if column not in ("Q", "B", *JUDGED[:-3]) or f"{column} interval" not in row:
        return text
    low, high = row[f"{column} interval"]
    return f"{text} ({low:.{min(digits, 2)}f}–{high:.{min(digits, 2)}f})"


def mining_table(found: dict) -> str:
    """What desc.mining.account says, as text."""
    answers = max(found["answers"], 1)

    def counted(counts: dict) -> str:
        return (
            ", ".join(
                f"{name} {n} ({100 * n / answers:.1f} %)"
                for name, n in sorted(counts.items(), key=lambda c: -c[1])
            )
            or "none"
        )

    lines = [f"{found['answers']} answers, {found['pairs']} pairs"]
    lines += [
        f"{name}: {counted(found[name])}" for name in ("judged", "kept", "dropped") if found[name]
    ]
    rows = [["strategy", "chosen", "rejected"]]
    rows += [
        [name, str(n), str(found["rejected strategies"][name])]
        for name, n in found["chosen strategies"].items()
    ]
    return "\n".join(
        [*lines, "", markdown(rows), *(f"warning: {text}" for text in found["warnings"])]
    )
