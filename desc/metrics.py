"""The metrics of the paper: preference bias B, strategy accuracy and F1, text overlap; calibration,
repetition, and intervals by bootstrap. What is computed from counts takes any number of leading
dimensions (…), a bootstrap's samples, say."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from desc.strategies import ESCONV, Strategies


def confusion(
    gold: Sequence[str], predicted: Sequence[str], strategies: Strategies = ESCONV
) -> np.ndarray:
    """(K, K) counts, [i, j] the turns predicted i whose gold is j."""
    counts = np.zeros((len(strategies), len(strategies)))
    for g, p in zip(gold, predicted, strict=True):
        counts[strategies.index(p), strategies.index(g)] += 1
    return counts


@dataclass(frozen=True)
class PreferenceBias:
    bias: np.ndarray  # B (…), the population standard deviation of the preferences; 0 is unbiased
    preferences: np.ndarray  # p (…, K), summing to K; above 1 is preferred, below 1 avoided


def preference_bias(
    gold: Sequence[str], predicted: Sequence[str], strategies: Strategies = ESCONV
) -> PreferenceBias:
    """Kang et al. 2024: a Bradley-Terry strength for each strategy, "predicted i where gold was j"
    being a win of i over j."""
    return bias_of_confusion(confusion(gold, predicted, strategies))


def bias_of_confusion(counts: np.ndarray, sweeps: int = 20) -> PreferenceBias:
    """B of confusion matrices (…, K, K), counts or expected counts. Each sweep updates p_i in place
    (Newman's iteration):

        p_i ← Σ_{j≠i} w_ij p_j / (p_i + p_j)  ÷  Σ_{j≠i} w_ji / (p_i + p_j)

    and divides by the geometric mean of the positive entries. The formula leaves three cases open.
    A strategy in no error at all is neither preferred nor avoided: p = 1, apart from the others.
    One that no error missed has a zero denominator and an unbounded strength: its p stays what it
    is before each sweep scales. One that is never predicted wrongly gets p = 0."""
    w = counts * (1 - np.eye(counts.shape[-1]))
    erring = w.sum(-1) + w.sum(-2) > 0
    p = erring.astype(float)
    for _ in range(sweeps):
        for i in range(p.shape[-1]):
            pair = p[..., i, None] + p
            # two strengths of zero: i wins nothing, so its p stays zero whatever it lost
            pair[pair == 0] = 1
            wins, losses = (w[..., i, :] * p / pair).sum(-1), (w[..., i] / pair).sum(-1)
            p[..., i] = np.divide(wins, losses, out=p[..., i].copy(), where=losses > 0)
        logs = np.log(p, out=np.zeros_like(p), where=p > 0)
        p /= np.exp(logs.sum(-1, keepdims=True) / np.maximum((p > 0).sum(-1, keepdims=True), 1))
    scale = erring.sum(-1, keepdims=True) / np.maximum(p.sum(-1, keepdims=True), 1e-12)
    preferences = np.where(erring, p * scale, 1.0)
    return PreferenceBias(preferences.std(-1), preferences)


@dataclass(frozen=True)
class StrategyScores:
    """Each (…), in 0 … 1."""

    accuracy: np.ndarray
    macro_f1: np.ndarray  # Q
    weighted_f1: np.ndarray  # Q_W


def strategy_scores(
    gold: Sequence[str], predicted: Sequence[str], strategies: Strategies = ESCONV
) -> StrategyScores:
    """Accuracy, Q and Q_W, each in 0 … 1, over all strategies of the taxonomy."""
    return scores_of_confusion(confusion(gold, predicted, strategies))


def scores_of_confusion(counts: np.ndarray) -> StrategyScores:
    """F1_i = 2 w_ii / (predicted i + gold i), 0 where a strategy is neither predicted nor gold.
    counts (…, K, K)."""
    hits, predicted, gold = np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), counts.sum(-2)
    f1 = 2 * hits / np.maximum(predicted + gold, 1e-12)
    total = np.maximum(gold.sum(-1), 1e-12)
    return StrategyScores(hits.sum(-1) / total, f1.mean(-1), (f1 * gold).sum(-1) / total)


def kappa_of_confusion(counts: np.ndarray) -> np.ndarray:
    """Cohen's κ (1960) of two raters' counts (…, K, K): (agreement − agreement by chance) / (1 −
    agreement by chance).

    0 where chance alone agrees fully: both raters gave every turn the same label."""
    share = counts / np.maximum(counts.sum((-2, -1), keepdims=True), 1e-12)
    chance = (share.sum(-1) * share.sum(-2)).sum(-1)
    agreed = np.trace(share, axis1=-2, axis2=-1)
    return np.divide(agreed - chance, 1 - chance, out=np.zeros_like(chance), where=chance < 1)


def resample(groups: Sequence[np.ndarray], samples: int = 1000, seed: int = 0) -> np.ndarray:
    """(samples, …): the sum of the groups' arrays (…), each time of as many groups drawn with
    replacement (the bootstrap).

    Groups are dialogues: the turns of one dialogue are not independent. The same seed draws the
    same groups, so that what two systems say of the same dialogues is paired."""
    number = len(groups)
    drawn = np.random.default_rng(seed).multinomial(
        number, np.full(number, 1 / number), size=samples
    )
    return np.tensordot(drawn.astype(float), np.stack(groups), axes=1)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic's values (samples,) on `resample`'s sums."""
    return tuple(float(x) for x in np.percentile(values, [2.5, 97.5]))


def expected_confusion(
    probabilities: np.ndarray, gold: Sequence[str], strategies: Strategies = ESCONV
) -> np.ndarray:
    """The (K, K) confusion matrix that sampling from `probabilities` (T, K) has on average: no
    sampling noise."""
    return probabilities.T @ np.eye(len(strategies))[[strategies.index(name) for name in gold]]


def negative_log_likelihood(
    logps: np.ndarray, gold: Sequence[str], strategies: Strategies = ESCONV
) -> float:
    """− mean log p(gold strategy), nats a turn, of a planner's exact distribution: logps (T, K)."""
    return -float(
        np.mean([row[strategies.index(name)] for row, name in zip(logps, gold, strict=True)])
    )


def top_hits(
    logps: np.ndarray, gold: Sequence[str], k: int, strategies: Strategies = ESCONV
) -> int:
    """In how many turns the gold strategy is among the k likeliest: logps (T, K)."""
    likeliest = np.argsort(-logps, axis=1, kind="stable")[:, :k]
    return sum(strategies.index(name) in row for name, row in zip(gold, likeliest, strict=True))


def calibration_counts(
    logps: np.ndarray, gold: Sequence[str], strategies: Strategies = ESCONV, bins: int = 10
) -> np.ndarray:
    """(bins, 3), to be summed over dialogues: how many turns give their likeliest strategy a
    probability in that tenth of 0 … 1, the sum of these probabilities, and how many of these
    strategies are gold. logps (T, K)."""
    counts, likeliest = np.zeros((bins, 3)), np.exp(logps).max(1)
    for confidence, best, name in zip(likeliest, logps.argmax(1), gold, strict=True):
        counts[min(int(confidence * bins), bins - 1)] += (
            1,
            confidence,
            best == strategies.index(name),
        )
    return counts


def calibration_error(counts: np.ndarray) -> np.ndarray:
    """Expected calibration error (…), 0 … 1 (Guo et al. 2017), of calibration_counts (…, bins, 3):
    |confidence − accuracy|, weighted."""
    return np.abs(counts[..., 1] - counts[..., 2]).sum(-1) / np.maximum(
        counts[..., 0].sum(-1), 1e-12
    )


# What the Treebank conventions part from the word before it: "do|n't", "it|'s".
CLITIC = r"(?:n't|'(?:s|m|d|ll|re|ve))\b"
# A run of full stops, a dash, a clitic, the first half of "can|not", "gon|na", "wan|na", "got|ta";
# else a word, which takes in "'" and "." between letters ("o'clock", "e.g") and "," and ":" before
# digits ("3,000", "10:30"); else one character, by itself.
WORD = re.compile(
    rf"\.\.+|--|{CLITIC}|\b(?:can(?=not\b)|(?:gon|wan)(?=na\b)|got(?=ta\b))"
    rf"|(?:(?!{CLITIC}|--)"
    r"(?:[^\s'.,:;?!@#$%&*()\[\]{}<>\"“”‘’]|(?<=\w)(?:['.](?=\w)|[,:](?=\d))))+|\S"
)


def words(text: str) -> list[str]:
    """Lower-cased words and punctuation marks, nearly those of NLTK's word_tokenize (Treebank
    conventions).

    Of ESConv's 18,376 supporter texts 99.8 % come out as there, quotation marks aside, which stay
    as they are written (there `` and ''); 99.1 % with them. NLTK's sentences were found by a Punkt
    model fitted to ESConv."""
    return WORD.findall(text.lower())


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(tokens[i:] for i in range(n))))


def distinct(grams: Sequence[tuple[str, ...]]) -> float:
    """The share of different n-grams (Li et al. 2016), 0 … 1; 0 where there are none."""
    return len(set(grams)) / max(len(grams), 1)


def bleu_counts(reference: list[str], reply: list[str]) -> np.ndarray:
    """(5, 2), to be summed over turns: the lengths (reference, reply), then for n = 1 … 4 the
    n-grams (matched, of the reply)."""
    rows = [(len(reference), len(reply))]
    for n in range(1, 5):
        found = Counter(ngrams(reply, n))
        # A reply too short for an n-gram counts as one without a match, as in NLTK.
        rows.append(((found & Counter(ngrams(reference, n))).total(), max(found.total(), 1)))
    return np.array(rows, float)


def bleu(counts: np.ndarray) -> np.ndarray:
    """BLEU-1 … BLEU-4 (4,), each in 0 … 1 (Papineni et al. 2002), from bleu_counts; 0 where no word
    matches.

    The first order without a match counts as 1/2 of a match, the second as 1/4, … (NIST's
    smoothing, NLTK's method 3)."""
    (reference, reply), (matches, totals) = counts[0], counts[1:].T
    if matches[0] == 0:
        return np.zeros(4)
    missing = matches == 0
    precisions = np.where(missing, 0.5 ** missing.cumsum(), matches) / totals
    brevity = min(0.0, 1 - reference / reply)
    return np.exp(brevity + np.log(precisions).cumsum() / np.arange(1, 5))


def word_f1(reference: list[str], reply: list[str]) -> float:
    """Unigram F1, 0 … 1: the harmonic mean of precision and recall of the words as multisets."""
    return 2 * (Counter(reference) & Counter(reply)).total() / max(len(reference) + len(reply), 1)


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)  # row[j]: of the words of `a` so far and b[:j]
    for x in a:
        above, row = row, [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
    return row[-1]


def rouge_l(reference: list[str], reply: list[str], beta: float = 1.2) -> float:
    """F of the longest common subsequence, 0 … 1, recall weighing beta² times precision (Lin
    2004)."""
    common = common_subsequence(reference, reply)
    # F = (1 + β²) P R / (R + β² P) with P = common / |reply| and R = common / |reference|,
    # multiplied out.
    return (1 + beta**2) * common / max(len(reply) + beta**2 * len(reference), 1)


def turn_scores(reference: list[str], reply: list[str]) -> dict[str, float]:
    """The text metrics of one turn, from its words; each in 0 … 1 but the length."""
    scores = {f"distinct-{n}": distinct(ngrams(reply, n)) for n in (1, 2, 3)}
    scores |= {f"bleu-{n}": score for n, score in enumerate(bleu(bleu_counts(reference, reply)), 1)}
    return scores | {
        "f1": word_f1(reference, reply),
        "rouge-l": rouge_l(reference, reply),
        "length": len(reply),
    }


def self_repetition(replies: Sequence[str]) -> tuple[int, int]:
    """(repeated, all) trigrams of one dialogue's replies, repeated being those that stand in an
    earlier reply too."""
    said, repeated, total = set(), 0, 0
    for reply in replies:
        grams = ngrams(words(reply), 3)
        repeated, total = repeated + sum(gram in said for gram in grams), total + len(grams)
        said.update(grams)
    return repeated, total


def near_copies(replies: Sequence[str], least: float = 0.9) -> float:
    """The share of replies, 0 … 1, whose set of words agrees with that of another reply: 2 |a ∩ b|
    / (|a| + |b|) ≥ `least` (Dice)."""
    bags = [set(words(reply)) for reply in replies]
    number = {word: i for i, word in enumerate(sorted(set().union(*bags)))}
    held = np.zeros((len(bags), len(number)), np.float32)
    for row, bag in zip(held, bags):
        row[[number[word] for word in bag]] = 1
    size = held.sum(1)
    alike = 2 * (held @ held.T) >= least * (size[:, None] + size) - 1e-6
    np.fill_diagonal(alike, False)
    return float(alike.any(1).mean()) if len(bags) else 0.0


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


def corpus_scores(references: Sequence[str], replies: Sequence[str]) -> dict[str, float]:
    """Of all replies together, × 100: "corpus distinct-n" over all their n-grams, "corpus bleu-n"
    from the summed counts.

    That is usual elsewhere; the paper's are means over turns (`turn_scores`), and very different
    figures. 0 where there are none."""
    turns = [
        (words(gold), words(reply)) for gold, reply in zip(references, replies, strict=True)
    ] or [([], [])]
    scores = {
        f"corpus distinct-{n}": distinct([gram for _, reply in turns for gram in ngrams(reply, n)])
        for n in (1, 2, 3)
    }
    scores |= {
        f"corpus bleu-{n}": float(score)
        for n, score in enumerate(bleu(sum(bleu_counts(*turn) for turn in turns)), 1)
    }
    return {name: 100 * score for name, score in scores.items()}
