"""The metrics of the paper: preference bias B, strategy accuracy and F1, text overlap, and intervals by bootstrap."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from desc.strategies import ESCONV, Strategies


def confusion(gold: Sequence[str], predicted: Sequence[str], strategies: Strategies = ESCONV) -> np.ndarray:
    """(K, K) counts, [i, j] the turns predicted i whose gold is j."""
    counts = np.zeros((len(strategies), len(strategies)))
    for g, p in zip(gold, predicted, strict=True):
        counts[strategies.index(p), strategies.index(g)] += 1
    return counts


@dataclass(frozen=True)
class PreferenceBias:
    bias: float  # B, the population standard deviation of the preferences; 0 is unbiased
    preferences: np.ndarray  # p (K,), summing to K; above 1 is preferred, below 1 avoided


def preference_bias(gold: Sequence[str], predicted: Sequence[str], strategies: Strategies = ESCONV) -> PreferenceBias:
    """Kang et al. 2024: a Bradley-Terry strength for each strategy, "predicted i where gold was j" being a win of i over j."""
    return bias_of_confusion(confusion(gold, predicted, strategies))


def bias_of_confusion(counts: np.ndarray, sweeps: int = 20) -> PreferenceBias:
    """B of a (K, K) confusion matrix, counts or expected counts. Each sweep updates p_i in place (Newman's iteration):

        p_i ← Σ_{j≠i} w_ij p_j / (p_i + p_j)  ÷  Σ_{j≠i} w_ji / (p_i + p_j)

    and divides by the geometric mean of the positive entries. A strategy that is never missed (no gold turn of it was given another
    name) has a zero denominator and an unbounded strength: it keeps its p. One that is never predicted wrongly gets p = 0."""
    w = counts * (1 - np.eye(len(counts)))
    p = np.ones(len(w))
    for _ in range(sweeps):
        for i in range(len(p)):
            pair = p[i] + p
            pair[pair == 0] = 1  # both strengths are zero, and so is every term
            wins, losses = (w[i] * p / pair).sum(), (w[:, i] / pair).sum()
            if losses > 0:
                p[i] = wins / losses
        if (p > 0).any():
            p /= np.exp(np.log(p[p > 0]).mean())
    p *= len(p) / p.sum() if p.sum() > 0 else 1
    return PreferenceBias(float(p.std()), p)


@dataclass(frozen=True)
class StrategyScores:
    accuracy: float
    macro_f1: float  # Q
    weighted_f1: float  # Q_W


def strategy_scores(gold: Sequence[str], predicted: Sequence[str], strategies: Strategies = ESCONV) -> StrategyScores:
    """Accuracy, Q and Q_W, each in 0 … 1, over all strategies of the taxonomy."""
    return scores_of_confusion(confusion(gold, predicted, strategies))


def scores_of_confusion(counts: np.ndarray) -> StrategyScores:
    """F1_i = 2 w_ii / (predicted i + gold i), 0 where a strategy is neither predicted nor gold."""
    hits, predicted, gold = counts.diagonal(), counts.sum(1), counts.sum(0)
    f1 = 2 * hits / np.maximum(predicted + gold, 1e-12)
    total = max(counts.sum(), 1e-12)
    return StrategyScores(float(hits.sum() / total), float(f1.mean()), float((f1 * gold).sum() / total))


def bootstrap(statistic: Callable[[np.ndarray], float], groups: Sequence[np.ndarray], samples: int = 1000, seed: int = 0):
    """A 95 % percentile interval (low, high) of statistic(sum of the groups' arrays), resampling groups with replacement.

    Groups are dialogues: the turns of one dialogue are not independent."""
    stacked, rng = np.stack(groups), np.random.default_rng(seed)
    draws = [statistic(stacked[rng.integers(len(stacked), size=len(stacked))].sum(0)) for _ in range(samples)]
    return tuple(float(x) for x in np.percentile(draws, [2.5, 97.5]))


def expected_confusion(probabilities: np.ndarray, gold: Sequence[str], strategies: Strategies = ESCONV) -> np.ndarray:
    """The (K, K) confusion matrix that sampling from `probabilities` (T, K) has on average: no sampling noise."""
    return probabilities.T @ np.eye(len(strategies))[[strategies.index(name) for name in gold]]


def negative_log_likelihood(logps: np.ndarray, gold: Sequence[str], strategies: Strategies = ESCONV) -> float:
    """− mean log p(gold strategy), nats a turn, of a planner's exact distribution: logps (T, K)."""
    return -float(np.mean([row[strategies.index(name)] for row, name in zip(logps, gold, strict=True)]))
