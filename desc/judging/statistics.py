"""How far two raters agree: Cohen's κ on labels, rank correlation on ratings."""

from collections.abc import Sequence

import numpy as np


def kappa_of_confusion(counts: np.ndarray) -> np.ndarray:
    """Cohen's κ (1960) of two raters' counts (…, K, K): (agreement − agreement by chance) / (1 −
    agreement by chance).

    0 where chance alone agrees fully: both raters gave every turn the same label."""
    share = counts / np.maximum(counts.sum((-2, -1), keepdims=True), 1e-12)
    chance = (share.sum(-1) * share.sum(-2)).sum(-1)
    agreed = np.trace(share, axis1=-2, axis2=-1)
    return np.divide(agreed - chance, 1 - chance, out=np.zeros_like(chance), where=chance < 1)


def signs(values: Sequence[float]) -> np.ndarray:
    """(n, n): whether value i is above (1), below (−1) or equal to (0) value j. The sum of row i is
    i's rank, twice, about the mean."""
    return np.sign(np.subtract.outer(values, values))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation ρ, −1 … 1; equal values share the mean of their ranks; nan where one side is
    constant."""
    return cosine(signs(a).sum(1), signs(b).sum(1))


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation τ_b, −1 … 1, which allows for ties; nan where one side is constant."""
    return cosine(signs(a), signs(b))


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    norm = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / norm) if norm else float("nan")
