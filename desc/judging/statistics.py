"""How far two raters agree: Cohen's κ of labels, rank correlations of ratings."""

from collections.abc import Callable, Sequence

import numpy as np

from desc.metrics import draw_groups

Statistic = Callable[[Sequence[float], Sequence[float]], float]  # of two raters' values
Group = Sequence[tuple[float, float]]  # one dialogue's ratings, a pair of values per reply


def kappa_of_confusion(counts: np.ndarray) -> np.ndarray:
    """Cohen's κ (1960), (…), of two raters' counts (…, K, K).

        κ = (agreement − agreement by chance) / (1 − agreement by chance)

    It is 0 if chance alone agrees fully: both raters gave every turn the same label."""
    share = counts / np.maximum(counts.sum((-2, -1), keepdims=True), 1e-12)
    chance = (share.sum(-1) * share.sum(-2)).sum(-1)
    agreed = np.trace(share, axis1=-2, axis2=-1)
    return np.divide(agreed - chance, 1 - chance, out=np.zeros_like(chance), where=chance < 1)


def signs(values: Sequence[float]) -> np.ndarray:
    """(n, n): 1 if value i is above value j, −1 if it is below, 0 if they are equal.

    The sum of row i is twice the distance of i's rank from the mean rank."""
    return np.sign(np.subtract.outer(values, values))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation ρ (1904), −1 … 1; nan if one side is constant.

    Equal values share the mean of their ranks."""
    return cosine(signs(a).sum(1), signs(b).sum(1))


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's rank correlation τ_b (1945), −1 … 1, which allows for ties; nan if one side is
    constant."""
    return cosine(signs(a), signs(b))


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    """The cosine of the angle between two arrays of one shape; nan if one of them is all 0."""
    norm = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / norm) if norm else float("nan")


def pooled_statistic(statistic: Statistic, groups: Sequence[Group]) -> float:
    """The statistic of all pairs of all groups."""
    pairs = [pair for group in groups for pair in group]
    return statistic([x for x, _ in pairs], [y for _, y in pairs])


def bootstrap_statistic(
    statistic: Statistic, groups: Sequence[Group], samples: int = 300, seed: int = 0
) -> np.ndarray:
    """(samples,): the statistic, each time of the groups that are drawn, with their pairs pooled.

    This is the bootstrap for what is no function of sums, such as a rank correlation, because a
    rank depends on all other values. A value is nan if all drawn ratings of one rater are equal."""
    values = []
    for times_drawn in draw_groups(len(groups), samples, seed):
        drawn = [group for group, times in zip(groups, times_drawn) for _ in range(times)]
        values.append(pooled_statistic(statistic, drawn))
    return np.array(values)
