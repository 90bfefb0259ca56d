"""Run with: pytest tests/test_metrics.py

Each figure is checked against one worked by hand, a second implementation written here,
scikit-learn, NLTK or rouge_score."""

import random
import re
from math import exp, log, sqrt

import numpy as np
import pytest

from desc.evaluation.text import (
    bleu,
    bleu_counts,
    common_subsequence,
    corpus_scores,
    near_copies,
    rouge_l,
    self_repetition,
    turn_scores,
    words,
)
from desc.judging.statistics import kappa_of_confusion, kendall, spearman
from desc.metrics import (
    bias_of_confusion,
    calibration_counts,
    calibration_error,
    confusion,
    expected_confusion,
    interval,
    negative_log_likelihood,
    preference_bias,
    resample,
    scores_of_confusion,
    strategy_scores,
    top_hits,
)
from desc.strategies import ESCONV, Strategies

SENTENCES = (
    "I'm so sorry to hear that. Don't you think it's hard?",
    "That sounds hard... I understand how you feel, and I can't imagine it.",
    "Have you tried talking to your friends about it?",
    "Have you tried to talk to a friend? It's worth a try.",
    "You are so strong!",
    "Hi there",
    "Yes",
    "I think that you should talk to your friends about how you feel, I think so.",
)


def random_counts(seed: int, strategies: int = 8) -> np.ndarray:
    """(K, K) counts, none of them 0, so that Bradley-Terry strengths exist and 20 sweeps find
    them."""
    return np.random.default_rng(seed).integers(1, 60, (strategies, strategies)).astype(float)


def random_names(seed: int, turns: int = 300) -> tuple[list[str], list[str]]:
    """(gold, predicted); "Others" never comes up in either, and one strategy is predicted only."""
    rng = random.Random(seed)
    return rng.choices(ESCONV[:6], k=turns), rng.choices(ESCONV[:7], k=turns)


def random_pairs(seed: int, turns: int = 60) -> tuple[list[str], list[str]]:
    """(references, replies), each one or two of SENTENCES."""
    rng = random.Random(seed)
    return tuple(
        [" ".join(rng.sample(SENTENCES, rng.choice((1, 2)))) for _ in range(turns)]
        for _ in range(2)
    )


def text_scores(references: list[str], replies: list[str]) -> dict[str, float]:
    """The means of turn_scores, × 100 but for the length, and corpus_scores."""
    each = [
        turn_scores(words(gold), words(reply))
        for gold, reply in zip(references, replies, strict=True)
    ] or [turn_scores([], [])]
    means = {
        name: np.mean([scores[name] for scores in each]) * (1 if name == "length" else 100)
        for name in each[0]
    }
    return means | corpus_scores(references, replies)


# Preference bias


def test_confusion_has_rows_predicted_and_columns_gold():
    counts = confusion(["a", "b", "b"], ["a", "a", "b"], Strategies(("a", "b")))
    assert counts.tolist() == [[1, 1], [0, 1]]


def test_bias_of_two_strategies_by_hand():
    """w_ab = 6 (a predicted where gold is b), w_ba = 2, so p_a / p_b = w_ab / w_ba = 3; with p_a +
    p_b = 2, p = (1.5, 0.5).

    The mean is 1, so B = √((0.5² + 0.5²) / 2) = 0.5. The five right predictions do not matter."""
    gold, predicted = ["b"] * 6 + ["a"] * 2 + ["a"] * 5, ["a"] * 6 + ["b"] * 2 + ["a"] * 5
    result = preference_bias(gold, predicted, Strategies(("a", "b")))
    assert result.preferences == pytest.approx([1.5, 0.5])
    assert result.bias == pytest.approx(0.5)


def test_bias_of_three_strategies_by_hand():
    """Strengths 4 : 2 : 1 are exact: w_ij / w_ji = p_i / p_j for every pair, w_01 / w_10 = 2, w_02
    / w_20 = 4, w_12 / w_21 = 2.

    Scaled to a sum of 3: p = (12, 6, 3) / 7. Deviations from 1: (5, -1, -4) / 7, so B = √((25 + 1 +
    16) / 49 / 3) = √(2 / 7)."""
    result = bias_of_confusion(np.array([[9.0, 20, 8], [10, 9, 6], [2, 3, 9]]))
    assert result.preferences == pytest.approx(np.array([12, 6, 3]) / 7)
    assert result.bias == pytest.approx(sqrt(2 / 7))


@pytest.mark.parametrize(
    "counts",
    [np.full((8, 8), 7.0), random_counts(0) + random_counts(0).T, np.zeros((8, 8)), np.eye(8) * 5],
)
def test_symmetric_errors_have_no_bias(counts):
    """w_ij = w_ji gives p_i = p_j for every pair; this includes no turns, and no errors."""
    result = bias_of_confusion(counts)
    assert result.bias == pytest.approx(0, abs=1e-9)
    assert result.preferences == pytest.approx(np.ones(8))


def bias_in_plain_python(counts: list[list[float]], sweeps: int = 20) -> tuple[float, list[float]]:
    """(B, p) by the formula as shared/paper.md states it, without any guard."""
    size = len(counts)
    p = [1.0] * size
    for _ in range(sweeps):
        for i in range(size):
            others = [j for j in range(size) if j != i]
            won = sum(counts[i][j] * p[j] / (p[i] + p[j]) for j in others)
            p[i] = won / sum(counts[j][i] / (p[i] + p[j]) for j in others)
        positive = [x for x in p if x > 0]
        mean = exp(sum(log(x) for x in positive) / len(positive))
        p = [x / mean for x in p]
    p = [x * size / sum(p) for x in p]
    return sqrt(sum((x - sum(p) / size) ** 2 for x in p) / size), p


@pytest.mark.parametrize("seed", range(20))
def test_bias_agrees_with_a_second_implementation(seed):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(1, 20, (8, 8))).astype(float)  # skewed, with some zeros
    bias, preferences = bias_in_plain_python(counts.tolist())
    result = bias_of_confusion(counts)
    assert result.bias == pytest.approx(bias, rel=1e-9)
    assert result.preferences == pytest.approx(preferences, rel=1e-9)


def test_bias_agrees_with_a_second_implementation_while_sweeps_still_matter():
    counts = random_counts(1)
    for sweeps in (1, 2, 3):
        result = bias_of_confusion(counts, sweeps)
        assert result.preferences == pytest.approx(
            bias_in_plain_python(counts.tolist(), sweeps)[1], rel=1e-9
        )


def test_strengths_satisfy_the_bradley_terry_equations():
    """At maximum likelihood each strategy wins as often as expected: Σ_j w_ij = Σ_j (w_ij + w_ji)
    p_i / (p_i + p_j)."""
    counts = random_counts(2) * (1 - np.eye(8))
    p = bias_of_confusion(counts).preferences
    assert counts.sum(1) == pytest.approx(
        ((counts + counts.T) * p[:, None] / (p[:, None] + p)).sum(1), rel=1e-6
    )


def test_strategy_never_predicted_wrongly_gets_zero():
    """It never wins, so its strength is 0; the other two have p_1 / p_2 = w_12 / w_21 = 3 and a sum
    of 3: (0, 2.25, 0.75)."""
    assert bias_of_confusion(
        np.array([[4.0, 0, 0], [3, 0, 6], [1, 2, 0]])
    ).preferences == pytest.approx([0, 2.25, 0.75])


@pytest.mark.parametrize("right", [0.0, 4.0])
def test_strategy_never_missed_stays_finite_and_on_top(right):
    """It never loses (`right` = 0: it is absent from gold), so its maximum-likelihood strength is
    infinite.

    It keeps its p while the others fall, sweep after sweep: near the limit p = (3, 0, 0), where B =
    √2, but finite."""
    result = bias_of_confusion(np.array([[right, 5, 5], [0, 0, 4], [0, 4, 0]]))
    assert 2.9 < result.preferences[0] < 3
    assert 1.3 < result.bias < sqrt(2)


def test_strategy_in_no_error_stays_finite():
    """Absent from gold and predictions, it has no strength of its own: it keeps its p. The others'
    ratio is w_12 / w_21 = 3."""
    result = bias_of_confusion(np.array([[0.0, 0, 0], [0, 0, 6], [0, 2, 0]]))
    assert np.isfinite(result.preferences).all() and result.preferences[0] > 0
    assert result.preferences[1] / result.preferences[2] == pytest.approx(3)


def test_errors_all_one_way():
    """0 is taken for 1 and 2, and 1 for 2, never the other way about: 0 has all the strength, B =
    √((2² + 1 + 1) / 3) = √2."""
    result = bias_of_confusion(np.array([[0.0, 3, 3], [0, 0, 3], [0, 0, 0]]))
    assert result.preferences == pytest.approx([3, 0, 0])
    assert result.bias == pytest.approx(sqrt(2))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(5))
def test_sparse_counts_stay_finite(seed):
    rng = np.random.default_rng(seed)
    for _ in range(100):
        result = bias_of_confusion(
            rng.binomial(2, rng.choice([0.02, 0.1, 0.3]), (8, 8)).astype(float)
        )
        assert np.isfinite(result.preferences).all() and (result.preferences >= 0).all()
        assert result.preferences.sum() == pytest.approx(8)
        # √(K − 1), where one strategy has all the strength
        assert 0 <= result.bias <= sqrt(7) + 1e-9


def test_renaming_strategies_permutes_preferences():
    counts, order = random_counts(3), np.random.default_rng(0).permutation(8)
    plain, permuted = bias_of_confusion(counts), bias_of_confusion(counts[np.ix_(order, order)])
    assert permuted.preferences == pytest.approx(plain.preferences[order], rel=1e-6)
    assert permuted.bias == pytest.approx(plain.bias, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 0.5, 1000])
def test_scaling_the_counts_leaves_the_scores(scale):
    counts = random_counts(4)
    assert bias_of_confusion(counts * scale).bias == pytest.approx(bias_of_confusion(counts).bias)
    assert scores_of_confusion(counts * scale).macro_f1 == pytest.approx(
        scores_of_confusion(counts).macro_f1
    )


# Strategy scores


@pytest.mark.parametrize("seed", range(5))
def test_strategy_scores_agree_with_scikit_learn(seed):
    sklearn = pytest.importorskip("sklearn.metrics")
    gold, predicted = random_names(seed)
    macro, weighted = (
        sklearn.f1_score(gold, predicted, labels=list(ESCONV), average=kind, zero_division=0)
        for kind in ("macro", "weighted")
    )
    scores = strategy_scores(gold, predicted)
    assert scores.accuracy == pytest.approx(sklearn.accuracy_score(gold, predicted))
    assert (scores.macro_f1, scores.weighted_f1) == pytest.approx((macro, weighted))


def test_strategy_scores_by_hand():
    """a: 1 hit, 2 predicted, 1 gold, F1 2/3; b: 1 hit, 1 predicted, 2 gold, F1 2/3; c: neither, F1
    0.

    Q = (2/3 + 2/3 + 0) / 3 = 4/9, Q_W = (1 · 2/3 + 2 · 2/3 + 0) / 3 = 2/3."""
    scores = strategy_scores(["a", "b", "b"], ["a", "a", "b"], Strategies(("a", "b", "c")))
    assert (scores.accuracy, scores.macro_f1, scores.weighted_f1) == pytest.approx(
        (2 / 3, 4 / 9, 2 / 3)
    )


def test_strategy_scores_of_no_turns_are_zero():
    scores = strategy_scores([], [])
    assert (scores.accuracy, scores.macro_f1, scores.weighted_f1) == (0, 0, 0)


# Exact distributions


def test_expected_confusion_of_certain_predictions_is_their_confusion():
    gold, predicted = random_names(0)
    certain = np.eye(8)[[ESCONV.index(name) for name in predicted]]
    assert (expected_confusion(certain, gold) == confusion(gold, predicted)).all()


def test_expected_confusion_is_the_average_over_samples():
    """Each entry of the average of S samples has a standard error of at most √(T / 4 / S) = √(40 /
    4 / 4000) = 0.05."""
    rng, (gold, _) = np.random.default_rng(0), random_names(1, turns=40)
    probabilities = rng.dirichlet(np.ones(8), size=40)
    draws = np.stack([rng.choice(8, size=4000, p=row) for row in probabilities], 1)
    average = sum(confusion(gold, [ESCONV[i] for i in draw]) for draw in draws) / len(draws)
    expected = expected_confusion(probabilities, gold)
    assert expected.sum() == pytest.approx(40)
    assert np.abs(average - expected).max() < 5 * 0.05


def test_negative_log_likelihood_by_hand():
    """Gold "a" at 1/2 and gold "b" at 1/8: −(ln 1/2 + ln 1/8) / 2 = (ln 2 + 3 ln 2) / 2 = 2 ln
    2."""
    logps = np.log([[1 / 2, 1 / 2], [7 / 8, 1 / 8]])
    assert negative_log_likelihood(logps, ["a", "b"], Strategies(("a", "b"))) == pytest.approx(
        2 * log(2)
    )


def test_negative_log_likelihood_of_a_uniform_planner():
    assert negative_log_likelihood(np.full((5, 8), -log(8)), ESCONV[:5]) == pytest.approx(log(8))


# Bootstrap


def dialogues(seed: int, number: int) -> list[np.ndarray]:
    """Confusion matrices of `number` dialogues of 10 turns, right about 4 times in 10."""
    rng = np.random.default_rng(seed)
    return [
        rng.multinomial(10, (np.eye(8) * 0.4 + 0.6 / 8).ravel() / 8).reshape(8, 8)
        for _ in range(number)
    ]


def accuracy(counts: np.ndarray) -> np.ndarray:
    return scores_of_confusion(counts).accuracy


def test_bootstrap_interval_contains_the_estimate():
    groups = dialogues(0, 60)
    low, high = interval(accuracy(resample(groups)))
    assert low < accuracy(sum(groups)) < high


def test_bootstrap_interval_is_as_wide_as_theory_says():
    """The mean of n dialogues' accuracies has a standard error of sd / √n, so the interval is about
    2 · 1.96 of those wide."""
    groups = dialogues(1, 100)
    low, high = interval(accuracy(resample(groups, samples=4000)))
    assert high - low == pytest.approx(
        2 * 1.96 * np.std([accuracy(g) for g in groups]) / sqrt(100), rel=0.08
    )


def test_bootstrap_interval_shrinks_with_more_groups():
    few, many = (interval(accuracy(resample(dialogues(2, number)))) for number in (25, 400))
    assert many[1] - many[0] < (few[1] - few[0]) / 2  # in theory a quarter


def test_bootstrap_interval_of_equal_groups_is_a_point():
    assert interval(accuracy(resample([np.eye(8), np.eye(8)]))) == (1, 1)


def test_bootstrap_repeats_with_its_seed():
    groups = dialogues(3, 20)
    assert interval(accuracy(resample(groups, seed=5))) == interval(
        accuracy(resample(groups, seed=5))
    )
    assert interval(accuracy(resample(groups, seed=5))) != interval(
        accuracy(resample(groups, seed=6))
    )


def test_a_paired_difference_has_the_interval_of_the_differences():
    """One system is right once more in every dialogue of ten turns: the difference is 0.1 in every
    sample, however accuracy varies."""
    rng = np.random.default_rng(0)
    first = [np.array([[n, 0], [10 - n, 0]]) for n in rng.integers(0, 10, 40)]
    second = [counts + [[1, 0], [-1, 0]] for counts in first]
    a, b = (accuracy(resample(groups, seed=3)) for groups in (first, second))
    assert a.std() > 0.02 and interval(b - a) == pytest.approx((0.1, 0.1))


def test_leading_dimensions_give_what_each_matrix_gives_alone():
    rng = np.random.default_rng(1)
    counts = (
        rng.binomial(2, rng.choice([0.02, 0.1, 0.3], (40, 1, 1)), (40, 8, 8))
        .reshape(5, 8, 8, 8)
        .astype(float)
    )
    bias, scores, kappa = (
        bias_of_confusion(counts),
        scores_of_confusion(counts),
        kappa_of_confusion(counts),
    )
    assert bias.bias.shape == kappa.shape == (5, 8) and bias.preferences.shape == (5, 8, 8)
    for at in np.ndindex(5, 8):
        alone = bias_of_confusion(counts[at])
        assert bias.preferences[at] == pytest.approx(alone.preferences, rel=1e-12) and bias.bias[
            at
        ] == pytest.approx(alone.bias)
        assert scores.macro_f1[at] == pytest.approx(scores_of_confusion(counts[at]).macro_f1)
        assert kappa[at] == pytest.approx(kappa_of_confusion(counts[at]))


# Calibration


def planner(seed: int, turns: int) -> tuple[np.ndarray, list[str]]:
    """(logps (T, 8), gold names)"""
    rng = np.random.default_rng(seed)
    return np.log(rng.dirichlet(np.full(8, 0.5), turns)), [
        ESCONV[i] for i in rng.integers(0, 8, turns)
    ]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_hits_against_scikit_learn(k):
    metrics = pytest.importorskip("sklearn.metrics")
    logps, gold = planner(k, 200)
    expected = metrics.top_k_accuracy_score(
        [ESCONV.index(name) for name in gold], logps, k=k, labels=range(8), normalize=False
    )
    assert top_hits(logps, gold, k) == expected


def test_calibration_error_by_hand():
    """Two turns at 0.8, one of them right, and two at 0.6, both right: |2 · 0.8 − 1| + |2 · 0.6 −
    2| = 0.6 + 0.8, over 4 turns 0.35."""
    names = Strategies(("a", "b"))
    logps = np.log([[0.8, 0.2], [0.2, 0.8], [0.6, 0.4], [0.4, 0.6]])
    counts = calibration_counts(logps, ["a", "a", "a", "b"], names)
    assert calibration_error(counts) == pytest.approx(0.35)
    assert calibration_error(np.stack([counts, 3 * counts, 0 * counts])) == pytest.approx(
        [0.35, 0.35, 0]
    )


def test_a_calibrated_planner_has_no_calibration_error():
    rng, (logps, _) = np.random.default_rng(7), planner(7, 20000)
    gold = [ESCONV[rng.choice(8, p=row)] for row in np.exp(logps)]
    assert calibration_error(calibration_counts(logps, gold)) < 0.015
    assert (
        calibration_error(
            calibration_counts(
                np.log(np.exp(logps) ** 3 / (np.exp(logps) ** 3).sum(1, keepdims=True)), gold
            )
        )
        > 0.1
    )


def test_full_confidence_falls_into_the_last_bin():
    counts = calibration_counts(np.array([[0.0, -np.inf]]), ["a"], Strategies(("a", "b")))
    assert counts[9].tolist() == [1, 1, 1] and counts.sum() == 3


# Repetition and rank correlation


def test_self_repetition_counts_trigrams_of_earlier_replies():
    """The first reply has 3 trigrams. The second has 4, of which "i am here" and "am here for" were
    said before; within a reply nothing repeats."""
    assert self_repetition(["I am here for you", "Yes, I am here for"]) == (2, 7)
    assert self_repetition(["go go go go", "Hm"]) == (0, 2)


def test_near_copies_are_replies_that_have_a_twin():
    twins = [
        "I am so sorry to hear that you lost your job.",
        "i am so sorry to hear that you lost your Job!",
    ]
    assert near_copies([*twins, "What happened?", ""]) == pytest.approx(2 / 4)
    assert near_copies(twins[:1]) == near_copies([]) == 0
    assert near_copies(["a b c d e f g h i", "a b c d e f g h j"], 8 / 9) == 1  # 2 · 8 / 18
    assert near_copies(["a b c d e f g h i", "a b c d e f g h j"]) == 0


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlations_against_scipy(seed):
    stats = pytest.importorskip("scipy.stats")
    a, b = np.random.default_rng(seed).integers(0, 6, (2, 30)) + np.arange(30) // 10
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert kendall(a, b) == pytest.approx(stats.kendalltau(a, b).statistic)


def test_rank_correlation_of_a_constant_is_undefined():
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3])) and np.isnan(kendall([1, 2, 3], [2, 2, 2]))


# Words


@pytest.mark.parametrize(
    "text, expected",
    [
        ("I'm sure you don't.", "i 'm sure you do n't ."),
        ("It's 10:30, isn't it?!", "it 's 10:30 , is n't it ? !"),
        ("Well... that costs $3,000", "well ... that costs $ 3,000"),
        ("He can't; I cannot -- we're gonna", "he ca n't ; i can not -- we 're gon na"),
        ("my parents' well-known 'idea'", "my parents ' well-known ' idea '"),
        ("At 5 o'clock (e.g. today)", "at 5 o'clock ( e.g . today )"),
        ("  ", ""),
    ],
)
def test_words(text, expected):
    assert words(text) == expected.split()


def test_words_agree_with_nltk():
    """NLTK's word tokeniser wants one sentence at a time; these end at "." "?" "!" before white
    space."""
    nltk = pytest.importorskip("nltk.tokenize")
    for text in SENTENCES:
        tokens = [
            nltk.NLTKWordTokenizer().tokenize(sentence)
            for sentence in re.split(r"(?<=[.?!])\s+", text)
        ]
        assert words(text) == [word.lower() for word in sum(tokens, [])]


# Text overlap


def test_identical_texts_score_100():
    """All three have four words or more, as BLEU-4 wants."""
    texts = list(SENTENCES[:3])
    scores = text_scores(texts, texts)
    names = [f"{corpus}bleu-{n}" for corpus in ("", "corpus ") for n in (1, 2, 3, 4)] + [
        "f1",
        "rouge-l",
    ]
    assert [scores[name] for name in names] == pytest.approx([100] * len(names))


def test_distinct_by_hand():
    """In "a a b a b": 2 of 5 words, 3 of 4 pairs (aa ab ba ab), 3 of 3 triples. In "a b": 2 of 2,
    1 of 1, no triple, which counts as 0.

    Per turn and averaged: 70, 87.5, 50. Of both together: 2 of 7 words, 3 of 5 pairs, 3 of 3
    triples."""
    scores = text_scores(["x", "x"], ["a a b a b", "a b"])
    assert [scores[f"distinct-{n}"] for n in (1, 2, 3)] == pytest.approx([70, 87.5, 50])
    assert [scores[f"corpus distinct-{n}"] for n in (1, 2, 3)] == pytest.approx([200 / 7, 60, 100])
    assert scores["length"] == 3.5


def test_f1_by_hand():
    """In common "the" twice and "cat" once: overlap 3, precision 3/4, recall 3/6, F1 = 2 · 3 / (4 +
    6) = 0.6."""
    assert text_scores(["the cat saw the big dog"], ["the the cat the"])["f1"] == pytest.approx(60)


def test_rouge_l_by_hand():
    """With "a b d" in common: P = 3/4, R = 3/5, β² = 1.44,
    F = 2.44 · 0.45 / (0.6 + 1.44 · 0.75) = 1.098 / 1.68."""
    assert rouge_l("a b c d e".split(), "a b x d".split()) == pytest.approx(1.098 / 1.68)


@pytest.mark.parametrize("seed", range(3))
def test_rouge_l_agrees_with_rouge_score(seed):
    """rouge_score gives P and R of the longest common subsequence, and F with β = 1; F with β = 1.2
    follows from P and R."""
    scorer_module, rng = pytest.importorskip("rouge_score.rouge_scorer"), random.Random(seed)
    scorer = scorer_module.RougeScorer(["rougeL"])
    for _ in range(50):
        reference, reply = (rng.choices("abcdef", k=rng.randint(1, 15)) for _ in range(2))
        score = scorer.score(" ".join(reference), " ".join(reply))["rougeL"]
        assert common_subsequence(reference, reply) / len(reference) == pytest.approx(score.recall)
        assert rouge_l(reference, reply, beta=1) == pytest.approx(score.fmeasure)
        weighed = score.recall + 1.44 * score.precision
        assert rouge_l(reference, reply) == pytest.approx(
            2.44 * score.precision * score.recall / weighed if weighed else 0
        )


def nltk_bleu(pairs: list[tuple[list[str], list[str]]]) -> list[float]:
    """BLEU-1 … BLEU-4 of (reference, reply) pairs."""
    module = pytest.importorskip("nltk.translate.bleu_score")
    smoothing = module.SmoothingFunction().method3
    references, replies = [[reference] for reference, _ in pairs], [reply for _, reply in pairs]
    return [
        module.corpus_bleu(references, replies, weights=[1 / n] * n, smoothing_function=smoothing)
        for n in (1, 2, 3, 4)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_bleu_agrees_with_nltk(seed):
    """From one turn to many, short replies and empty ones among them."""
    rng = random.Random(seed)
    for turns in [1] * 60 + [2, 5, 20]:
        pairs = [
            tuple(rng.choices("abcdefgh", k=rng.randint(0, 12)) for _ in range(2))
            for _ in range(turns)
        ]
        assert bleu(sum(bleu_counts(*pair) for pair in pairs)) == pytest.approx(nltk_bleu(pairs))


def test_text_scores_average_bleu_over_turns_and_sum_its_counts_over_the_corpus():
    references, replies = random_pairs(0)
    pairs = [(words(reference), words(reply)) for reference, reply in zip(references, replies)]
    scores = text_scores(references, replies)
    each = 100 * np.mean([nltk_bleu([pair]) for pair in pairs], axis=0)
    assert [scores[f"bleu-{n}"] for n in (1, 2, 3, 4)] == pytest.approx(each)
    assert [scores[f"corpus bleu-{n}"] for n in (1, 2, 3, 4)] == pytest.approx(
        100 * np.array(nltk_bleu(pairs))
    )


@pytest.mark.parametrize(
    "references, replies", [(["Hello there."], [""]), ([""], [""]), ([], []), ([""], ["..."])]
)
def test_empty_texts_overlap_by_zero(references, replies):
    scores = text_scores(references, replies)
    names = [name for name in scores if "bleu" in name or name in ("f1", "rouge-l")]
    assert len(scores) == 17 and len(names) == 10
    assert all(scores[name] == 0 for name in names)
    if replies != ["..."]:
        assert set(scores.values()) == {0}


def test_an_empty_reply_counts_as_a_turn():
    one = text_scores(["You are so strong!"], ["You are strong!"])
    two = text_scores(["You are so strong!"] * 2, ["You are strong!", ""])
    for name in ("distinct-1", "bleu-1", "f1", "rouge-l", "length"):
        assert two[name] == pytest.approx(one[name] / 2)


def test_order_of_turns_does_not_matter():
    references, replies = random_pairs(1)
    order = np.random.default_rng(0).permutation(len(replies))
    shuffled = text_scores([references[i] for i in order], [replies[i] for i in order])
    assert shuffled == pytest.approx(text_scores(references, replies))


def test_unequal_numbers_of_texts_are_an_error():
    with pytest.raises(ValueError):
        text_scores(["a", "b"], ["a"])


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0)])
def test_a_strategy_in_no_error_is_neither_preferred_nor_avoided(order):
    """Strategy 0 is in no error: p = 1. Of 1 and 2, w_12 = 6 and w_21 = 2, so p_1 / p_2 = 3, which
    sum to 2: 1.5 and 0.5. B = √((0 + 0.25 + 0.25) / 3) = 0.4082, however the strategies are
    ordered."""
    counts = np.array([[4.0, 0, 0], [0, 0, 6], [0, 2, 0]])[np.ix_(order, order)]
    found = bias_of_confusion(counts)
    np.testing.assert_allclose(found.preferences, np.array([1, 1.5, 0.5])[list(order)], rtol=1e-6)
    assert found.bias == pytest.approx(sqrt(0.5 / 3))
