"""What an evaluation found, as rows of numbers and as tables."""

from collections import Counter

import numpy as np
import torch

from desc.esconv import Dialogue
from desc.judging import RUBRICS
from desc.metrics import bias_of_confusion, calibration_counts, calibration_error, confusion, corpus_scores, expected_confusion
from desc.metrics import interval, near_copies, negative_log_likelihood, resample, scores_of_confusion, self_repetition, top_hits
from desc.metrics import turn_scores, words
from desc.sampling import temper
from desc.strategies import Strategies

PLAN = ("accuracy", "greedy", "top-2", "top-3", "Q", "Q_W", "B", "B greedy", "B expected", "nll", "ece", "invalid")
TEXT = ("distinct-1", "bleu-1", "f1", "rouge-l", "length", "self-repetition", "near-copies", "corpus distinct-1", "corpus bleu-4", "faultless")
JUDGED = (*RUBRICS, *(f"{rubric} wins" for rubric in RUBRICS), "first shown")
EACH = tuple(turn_scores([], []))


def count_dialogue(record: dict, strategies: Strategies, config) -> dict[str, np.ndarray]:
    """What a system's scores are computed from, of one dialogue: counts and sums, to be added up over dialogues.

    `config` (a desc.cli.SampleConfig) says how strategies are sampled, for the expected confusion matrix."""
    gold, turns, size = record["gold"], len(record["gold"]), len(strategies)
    parsed = [[(g, p) for g, p in zip(gold, drawn) if p] for drawn in record["predicted"]]
    sums = {"turns": np.array(float(turns))}
    sums["sampled"] = np.stack([confusion(*zip(*pairs), strategies) if pairs else np.zeros((size, size)) for pairs in parsed])
    if logps := record["logps"]:
        logps = np.array(logps)
        sums["greedy"] = confusion(gold, [strategies.names[i] for i in logps.argmax(1)], strategies)
        probabilities = temper(torch.from_numpy(logps), config.temperature, config.top_p).numpy()
        sums["expected"] = expected_confusion(probabilities, gold, strategies)
        sums["nll"] = np.array(turns * negative_log_likelihood(logps, gold, strategies))
        sums["top"] = np.array([top_hits(logps, gold, k, strategies) for k in (2, 3)])
        sums["calibration"] = calibration_counts(logps, gold, strategies)
    each = [list(turn_scores(words(human), words(reply)).values()) for human, reply in zip(record["human"], record["replies"])]
    sums["text"] = np.sum([[1, *row] for row in each], axis=0) if each else np.zeros(1 + len(EACH))
    sums["trigrams"] = np.array(self_repetition(record["replies"]), float)
    errors = record.get("errors", [])
    sums["errors"] = np.array([errors.count("none"), len(errors)], float)
    ratings = [[turn[rubric] for turn in record.get("ratings", []) if turn[rubric] is not None] for rubric in RUBRICS]
    sums["ratings"] = np.array([(sum(found), len(found)) for found in ratings], float)
    verdicts = [[turn[rubric] for turn in record.get("verdicts", [])] for rubric in RUBRICS]
    sums["wins"] = np.array([(sum(map(won, found)), len(found)) for found in verdicts], float)
    places = [place for found in verdicts for both in found for place in zip(both, ("ours", "theirs")) if place[0] in ("ours", "theirs")]
    sums["places"] = np.array([sum(said == first for said, first in places), len(places)], float)
    return sums


def won(verdicts: list[str | None]) -> float:
    """1, ½ or 0: a reply wins where it is called better in either place; anything else is a tie."""
    return {("ours", "ours"): 1.0, ("theirs", "theirs"): 0.0}.get(tuple(verdicts), 0.5)


def score_sums(sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns of a table from count_dialogue's sums, all with leading dimensions (…); percent but for B, nll, ratings and length.

    What several seeds drew is scored apart, and the mean given: the scores of one draw, without the luck of it."""

    def share(key: str, at=...) -> np.ndarray:
        return sums[key][..., 0][at] / np.maximum(sums[key][..., 1][at], 1e-12)

    scores, turns = scores_of_confusion(sums["sampled"]), sums["turns"]
    found = {"accuracy": 100 * scores.accuracy.mean(-1), "Q": 100 * scores.macro_f1.mean(-1), "Q_W": 100 * scores.weighted_f1.mean(-1)}
    found["B"] = bias_of_confusion(sums["sampled"]).bias.mean(-1)
    found["invalid"] = 100 * (1 - sums["sampled"].sum((-2, -1)).mean(-1) / turns)
    if "greedy" in sums:
        found["greedy"] = 100 * scores_of_confusion(sums["greedy"]).accuracy
        found |= {f"top-{k}": 100 * sums["top"][..., i] / turns for i, k in enumerate((2, 3))}
        found |= {f"B {kind}": bias_of_confusion(sums[kind]).bias for kind in ("greedy", "expected")}
        found |= {"nll": sums["nll"] / turns, "ece": 100 * calibration_error(sums["calibration"])}
    if sums["text"][..., 0].any():
        means = sums["text"][..., 1:] / np.maximum(sums["text"][..., :1], 1e-12)
        found |= {name: means[..., i] * (1 if name == "length" else 100) for i, name in enumerate(EACH)}
        found["self-repetition"] = 100 * share("trigrams")
    if sums["errors"].any():
        found["faultless"] = 100 * share("errors")
    if sums["ratings"].any():
        found |= {rubric: share("ratings", (..., i)) for i, rubric in enumerate(RUBRICS)}
    if sums["wins"][..., 1].any():
        found |= {f"{rubric} wins": 100 * share("wins", (..., i)) for i, rubric in enumerate(RUBRICS)}
        found["first shown"] = 100 * share("places")
    return found


def summarise(systems: dict[str, list[dict]], strategies: Strategies, config) -> dict[str, dict]:
    """A row a system: its scores by column, "COLUMN interval" of 95 % and, after the first system, "COLUMN difference" to the first: the
    difference and its interval, paired by dialogue; what single strategies and seeds did; and scores of all replies together."""
    rows, first = {}, None
    for name, records in systems.items():
        counted = [count_dialogue(record, strategies, config) for record in records]
        sums = {key: sum(one[key] for one in counted) for key in counted[0]}
        whole = score_sums(sums)
        drawn = score_sums({key: resample([one[key] for one in counted], seed=config.seed) for key in counted[0]})
        row = {"turns": int(sums["turns"]), "replies": int(sums["text"][0])}
        for column, value in whole.items():
            row |= {column: float(value), f"{column} interval": interval(drawn[column])}
            if first and column in first[0]:
                row[f"{column} difference"] = (float(value - first[0][column]), *interval(drawn[column] - first[1][column]))
        first = first or (whole, drawn)
        row |= by_strategy(sums["sampled"], strategies)
        if found := Counter(error for record in records for error in record.get("errors", [])):
            row["errors"] = found
        if row["replies"]:
            replies, human = ([text for r in records if r["replies"] for text in r[side]] for side in ("replies", "human"))
            row |= corpus_scores(human, replies) | {"near-copies": 100 * near_copies(replies)}
        rows[name] = row
    return rows


def by_strategy(sampled: np.ndarray, strategies: Strategies) -> dict:
    """Of seeds' confusion matrices (S, K, K): the preferences, precision and recall of each strategy, and the mean matrix."""
    mean, scores, bias = sampled.mean(0), scores_of_confusion(sampled), bias_of_confusion(sampled)
    precision, recall = (mean.diagonal() / np.maximum(mean.sum(axis), 1e-12) for axis in (1, 0))
    return {
        "preferences": dict(zip(strategies, bias.preferences.mean(0).tolist())),
        "precision": dict(zip(strategies, precision.tolist())),
        "recall": dict(zip(strategies, recall.tolist())),
        "confusion": mean.tolist(),
        "by seed": {"accuracy": (100 * scores.accuracy).tolist(), "Q": (100 * scores.macro_f1).tolist(), "B": bias.bias.tolist()},
    }


def frequency_row(train: list[Dialogue], test: list[Dialogue], strategies: Strategies) -> dict:
    """The expected scores of always drawing from the training strategies' frequencies: what knowing nothing of the context gives."""
    counts = Counter(turn.strategy for dialogue in train for turn in dialogue.turns[1::2])
    frequencies = np.array([counts[name] for name in strategies]) / counts.total()
    gold = [turn.strategy for dialogue in test for turn in dialogue.turns[1::2]]
    expected = expected_confusion(np.tile(frequencies, (len(gold), 1)), gold, strategies)
    scores = scores_of_confusion(expected)
    logps = np.log(np.maximum(np.tile(frequencies, (len(gold), 1)), 1e-12))
    row = {"accuracy": 100 * scores.accuracy, "Q": 100 * scores.macro_f1, "Q_W": 100 * scores.weighted_f1}
    row |= {"B expected": bias_of_confusion(expected).bias, "nll": negative_log_likelihood(logps, gold, strategies)}
    return {"turns": len(gold)} | {column: float(value) for column, value in row.items()}


def markdown(lines: list[list[str]]) -> str:
    """A table of its head and its lines."""
    head, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body])


def decimals(column: str) -> int:
    return 3 if column[0] == "B" or column == "nll" else 2 if column in RUBRICS else 1


def tables(rows: dict[str, dict]) -> str:
    """Markdown: a row a system, of the planner, of replies and of the judge, only the columns that some row has; then the differences
    to the first system, with their intervals."""
    parts = []
    for columns in (PLAN, TEXT, JUDGED):
        shown = [c for c in columns if any(c in row for row in rows.values())]
        lines = [[name, *(cell(row, c) for c in shown)] for name, row in rows.items() if any(c in row for c in shown)]
        parts += [markdown([["system", *shown], *lines])] if lines else []
    later = {name: row for name, row in rows.items() if "accuracy difference" in row}
    lines = []
    for column in (*PLAN, *TEXT, *RUBRICS):
        found = [row.get(f"{column} difference") for row in later.values()]
        if any(found):
            digits = decimals(column)
            lines.append([column, *(f"{d[0]:+.{digits}f} ({d[1]:+.{digits}f} … {d[2]:+.{digits}f})" if d else "" for d in found)])
    return "\n\n".join(parts + ([markdown([["difference to the first", *later], *lines])] if lines else []))


def cell(row: dict, column: str) -> str:
    """With the interval of what the paper reports, and of what is judged."""
    if column not in row:
        return ""
    digits = decimals(column)
    text = f"{row[column]:.{digits}f}"
    if column not in ("Q", "B", *JUDGED) or f"{column} interval" not in row:
        return text
    low, high = row[f"{column} interval"]
    return f"{text} ({low:.{min(digits, 2)}f}–{high:.{min(digits, 2)}f})"


def mining_table(found: dict) -> str:
    """What desc.mining.account says, as text."""
    answers = max(found["answers"], 1)

    def counted(counts: dict) -> str:
        return ", ".join(f"{name} {n} ({100 * n / answers:.1f} %)" for name, n in sorted(counts.items(), key=lambda c: -c[1])) or "none"

    lines = [f"{found['answers']} answers, {found['pairs']} pairs"]
    lines += [f"{name}: {counted(found[name])}" for name in ("judged", "kept", "dropped") if found[name]]
    rows = [["strategy", "chosen", "rejected"]]
    rows += [[name, str(n), str(found["rejected strategies"][name])] for name, n in found["chosen strategies"].items()]
    return "\n".join([*lines, "", markdown(rows), *(f"warning: {text}" for text in found["warnings"])])
