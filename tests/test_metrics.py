"""pytest tests/test_metrics.py

Each number is checked against one worked by hand, a second implementation in this file,
scikit-learn or SciPy."""

import random
from math import exp, log, sqrt
from types import SimpleNamespace

import numpy as np
import pytest

from desc.domain import ESCONV, Strategies
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


def random_counts(seed: int, strategies: int = 8) -> np.ndarray:
    """(K, K) counts. None of them is 0, so Bradley-Terry strengths exist and 20 sweeps reach
    them."""
    return np.random.default_rng(seed).integers(1, 60, (strategies, strategies)).astype(float)


def random_names(seed: int, turns: int = 300) -> tuple[list[str], list[str]]:
    """(gold, predicted). "Others" is in neither, and one strategy is only in predicted."""
    rng = random.Random(seed)
    return rng.choices(ESCONV.strategies[:6], k=turns), rng.choices(ESCONV.strategies[:7], k=turns)


# Preference bias


def test_confusion_has_rows_predicted_and_columns_gold():
    counts = confusion(["a", "b", "b"], ["a", "a", "b"], Strategies(("a", "b")))
    assert counts.tolist() == [[1, 1], [0, 1]]


def test_bias_of_two_strategies_by_hand():
    """w_ab = 6 (a is predicted and gold is b) and w_ba = 2, so p_a / p_b = w_ab / w_ba = 3. Because
    p_a + p_b = 2, p = (1.5, 0.5).

    The mean is 1, so B = √((0.5² + 0.5²) / 2) = 0.5. The five right predictions do not matter."""
    gold = ["b"] * 6 + ["a"] * 2 + ["a"] * 5
    predicted = ["a"] * 6 + ["b"] * 2 + ["a"] * 5
    result = preference_bias(gold, predicted, Strategies(("a", "b")))
    assert result.preferences == pytest.approx([1.5, 0.5])
    assert result.bias == pytest.approx(0.5)


def test_bias_of_three_strategies_by_hand():
    """The strengths 4 : 2 : 1 are exact, because w_ij / w_ji = p_i / p_j for every pair: w_01 /
    w_10 = 2, w_02 / w_20 = 4, w_12 / w_21 = 2.

    Scaled to a sum of 3, p = (12, 6, 3) / 7. The deviations from 1 are (5, -1, -4) / 7, so B =
    √((25 + 1 + 16) / 49 / 3) = √(2 / 7)."""
    result = bias_of_confusion(np.array([[9.0, 20, 8], [10, 9, 6], [2, 3, 9]]))
    assert result.preferences == pytest.approx(np.array([12, 6, 3]) / 7)
    assert result.bias == pytest.approx(sqrt(2 / 7))


@pytest.mark.parametrize(
    "counts",
    [np.full((8, 8), 7.0), random_counts(0) + random_counts(0).T, np.zeros((8, 8)), np.eye(8) * 5],
)
def test_symmetric_errors_have_no_bias(counts):
    """w_ij = w_ji gives p_i = p_j for every pair. This also holds without turns and without
    errors."""
    result = bias_of_confusion(counts)
    assert result.bias == pytest.approx(0, abs=1e-9)
    assert result.preferences == pytest.approx(np.ones(8))


def bias_in_plain_python(counts: list[list[float]], sweeps: int = 20) -> tuple[float, list[float]]:
    """(B, p) by the formula as the paper states it, without any special cases."""
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


@pytest.mark.parametrize("seed", range(20))
def test_bias_is_zero_exactly_when_strategies_are_used_as_often_as_people_use_them(seed):
    """A sum of permutation matrices, and any number of hits, has equal row and column sums. One
    turn more of one kind ends that. The accuracy may be anything."""
    generator = np.random.default_rng(seed)
    counts = np.diag(generator.integers(0, 500, 8).astype(float))
    for _ in range(40):
        counts += np.eye(8)[generator.permutation(8)]
    assert counts.sum(0).tolist() == counts.sum(1).tolist()
    assert bias_of_confusion(counts, sweeps=200).bias == pytest.approx(0, abs=1e-9)
    counts[2, 5] += 1
    assert bias_of_confusion(counts, sweeps=200).bias > 1e-3


def test_bias_agrees_with_a_second_implementation_while_sweeps_still_matter():
    counts = random_counts(1)
    for sweeps in (1, 2, 3):
        _, preferences = bias_in_plain_python(counts.tolist(), sweeps)
        result = bias_of_confusion(counts, sweeps)
        assert result.preferences == pytest.approx(preferences, rel=1e-9)


def test_strengths_satisfy_the_bradley_terry_equations():
    """At maximum likelihood each strategy wins as often as expected: Σ_j w_ij = Σ_j (w_ij + w_ji)
    p_i / (p_i + p_j)."""
    counts = random_counts(2) * (1 - np.eye(8))
    p = bias_of_confusion(counts).preferences
    win_probability = p[:, None] / (p[:, None] + p)
    expected_wins = ((counts + counts.T) * win_probability).sum(1)
    assert counts.sum(1) == pytest.approx(expected_wins, rel=1e-6)


def test_strategy_never_predicted_wrongly_gets_zero():
    """It never wins, so its strength is 0. The other two have p_1 / p_2 = w_12 / w_21 = 3 and a sum
    of 3. So p = (0, 2.25, 0.75)."""
    result = bias_of_confusion(np.array([[4.0, 0, 0], [3, 0, 6], [1, 2, 0]]))
    assert result.preferences == pytest.approx([0, 2.25, 0.75])


@pytest.mark.parametrize("right", [0.0, 4.0])
def test_strategy_never_missed_stays_finite_and_on_top(right):
    """It never loses, so its maximum-likelihood strength is infinite. If `right` is 0, it is absent
    from gold.

    In each sweep it keeps its p while the others fall. So p is finite and near its limit (3, 0, 0),
    whose B is √2."""
    result = bias_of_confusion(np.array([[right, 5, 5], [0, 0, 4], [0, 4, 0]]))
    assert 2.9 < result.preferences[0] < 3
    assert 1.3 < result.bias < sqrt(2)


def test_strategy_in_no_error_stays_finite():
    """It is absent from gold and predictions, so nothing determines its strength, and it keeps its
    p. The others' ratio is w_12 / w_21 = 3."""
    result = bias_of_confusion(np.array([[0.0, 0, 0], [0, 0, 6], [0, 2, 0]]))
    assert np.isfinite(result.preferences).all() and result.preferences[0] > 0
    assert result.preferences[1] / result.preferences[2] == pytest.approx(3)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0)])
def test_a_strategy_in_no_error_is_neither_preferred_nor_avoided(order):
    """Strategy 0 is in no error, so p_0 = 1. w_12 = 6 and w_21 = 2, so p_1 / p_2 = 3. p_1 and p_2
    sum to 2, so they are 1.5 and 0.5. B = √((0 + 0.25 + 0.25) / 3) = 0.4082 in every order of the
    strategies."""
    counts = np.array([[4.0, 0, 0], [0, 0, 6], [0, 2, 0]])[np.ix_(order, order)]
    expected = np.array([1, 1.5, 0.5])[list(order)]
    result = bias_of_confusion(counts)
    np.testing.assert_allclose(result.preferences, expected, rtol=1e-6)
    assert result.bias == pytest.approx(sqrt(0.5 / 3))


def test_errors_all_one_way():
    """0 is predicted for 1 and 2, and 1 for 2, and never the reverse. So 0 has all the strength,
    and B = √((2² + 1 + 1) / 3) = √2."""
    result = bias_of_confusion(np.array([[0.0, 3, 3], [0, 0, 3], [0, 0, 0]]))
    assert result.preferences == pytest.approx([3, 0, 0])
    assert result.bias == pytest.approx(sqrt(2))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(5))
def test_sparse_counts_stay_finite(seed):
    rng = np.random.default_rng(seed)
    for _ in range(100):
        counts = rng.binomial(2, rng.choice([0.02, 0.1, 0.3]), (8, 8)).astype(float)
        result = bias_of_confusion(counts)
        assert np.isfinite(result.preferences).all() and (result.preferences >= 0).all()
        assert result.preferences.sum() == pytest.approx(8)
        # B is at most √(K − 1), its value if one strategy has all the strength.
        assert 0 <= result.bias <= sqrt(7) + 1e-9


def test_renaming_strategies_permutes_preferences():
    counts = random_counts(3)
    order = np.random.default_rng(0).permutation(8)
    plain = bias_of_confusion(counts)
    permuted = bias_of_confusion(counts[np.ix_(order, order)])
    assert permuted.preferences == pytest.approx(plain.preferences[order], rel=1e-6)
    assert permuted.bias == pytest.approx(plain.bias, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 0.5, 1000])
def test_scaling_the_counts_leaves_the_scores(scale):
    counts = random_counts(4)
    bias = bias_of_confusion(counts).bias
    macro_f1 = scores_of_confusion(counts).macro_f1
    assert bias_of_confusion(counts * scale).bias == pytest.approx(bias)
    assert scores_of_confusion(counts * scale).macro_f1 == pytest.approx(macro_f1)


# Strategy scores


@pytest.mark.parametrize("seed", range(5))
def test_strategy_scores_agree_with_scikit_learn(seed):
    sklearn = pytest.importorskip("sklearn.metrics")
    gold, predicted = random_names(seed)

    def f1(average: str) -> float:
        names = list(ESCONV.strategies)
        return sklearn.f1_score(gold, predicted, labels=names, average=average, zero_division=0)

    scores = strategy_scores(gold, predicted)
    assert scores.accuracy == pytest.approx(sklearn.accuracy_score(gold, predicted))
    assert scores.macro_f1 == pytest.approx(f1("macro"))
    assert scores.weighted_f1 == pytest.approx(f1("weighted"))


def test_strategy_scores_by_hand():
    """a has 1 hit, 2 predicted, 1 gold and F1 2/3. b has 1 hit, 1 predicted, 2 gold and F1 2/3. c
    has none of them and F1 0.

    Q = (2/3 + 2/3 + 0) / 3 = 4/9, and Q_W = (1 · 2/3 + 2 · 2/3 + 0) / 3 = 2/3."""
    scores = strategy_scores(["a", "b", "b"], ["a", "a", "b"], Strategies(("a", "b", "c")))
    assert scores.accuracy == pytest.approx(2 / 3)
    assert scores.macro_f1 == pytest.approx(4 / 9)
    assert scores.weighted_f1 == pytest.approx(2 / 3)


def test_strategy_scores_of_no_turns_are_zero():
    scores = strategy_scores([], [])
    assert (scores.accuracy, scores.macro_f1, scores.weighted_f1) == (0, 0, 0)


# Exact distributions


def test_expected_confusion_of_certain_predictions_is_their_confusion():
    gold, predicted = random_names(0)
    certain = np.eye(8)[[ESCONV.strategies.index(name) for name in predicted]]
    assert (expected_confusion(certain, gold) == confusion(gold, predicted)).all()


def test_expected_confusion_is_the_average_over_samples():
    """Each entry of the average of S samples has a standard error of at most √(T / 4 / S) = √(40 /
    4 / 4000) = 0.05."""
    rng = np.random.default_rng(0)
    gold, _ = random_names(1, turns=40)
    probabilities = rng.dirichlet(np.ones(8), size=40)
    draws = np.stack([rng.choice(8, size=4000, p=row) for row in probabilities], 1)
    average = sum(confusion(gold, [ESCONV.strategies[i] for i in draw]) for draw in draws) / len(
        draws
    )
    expected = expected_confusion(probabilities, gold)
    assert expected.sum() == pytest.approx(40)
    assert np.abs(average - expected).max() < 5 * 0.05


def test_negative_log_likelihood_by_hand():
    """Gold "a" has probability 1/2 and gold "b" 1/8. So the result is −(ln 1/2 + ln 1/8) / 2 =
    (ln 2 + 3 ln 2) / 2 = 2 ln 2."""
    logps = np.log([[1 / 2, 1 / 2], [7 / 8, 1 / 8]])
    nll = negative_log_likelihood(logps, ["a", "b"], Strategies(("a", "b")))
    assert nll == pytest.approx(2 * log(2))


def test_negative_log_likelihood_of_a_uniform_planner():
    assert negative_log_likelihood(
        np.full((5, 8), -log(8)), ESCONV.strategies[:5]
    ) == pytest.approx(log(8))


# Bootstrap


def random_dialogues(seed: int, number: int) -> list[np.ndarray]:
    """Confusion matrices of `number` dialogues of 10 turns, right about 4 times in 10."""
    rng = np.random.default_rng(seed)
    shares = (np.eye(8) * 0.4 + 0.6 / 8) / 8
    return [rng.multinomial(10, shares.ravel()).reshape(8, 8) for _ in range(number)]


def accuracy(counts: np.ndarray) -> np.ndarray:
    return scores_of_confusion(counts).accuracy


def accuracy_interval(groups: list[np.ndarray], **settings) -> tuple[float, float] | None:
    return interval(accuracy(resample(groups, **settings)), len(groups))


def test_bootstrap_interval_contains_the_estimate():
    groups = random_dialogues(0, 60)
    low, high = accuracy_interval(groups)
    assert low < accuracy(sum(groups)) < high


def test_bootstrap_interval_is_as_wide_as_theory_says():
    """The mean of n dialogues' accuracies has a standard error of sd / √n. The interval is about
    2 · 1.96 standard errors wide."""
    groups = random_dialogues(1, 100)
    standard_error = np.std([accuracy(group) for group in groups]) / sqrt(100)
    low, high = accuracy_interval(groups, samples=4000)
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.08)


def test_bootstrap_interval_shrinks_with_more_groups():
    """In theory 16 times as many groups give a quarter of the width."""
    low, high = accuracy_interval(random_dialogues(2, 25))
    narrow_low, narrow_high = accuracy_interval(random_dialogues(2, 400))
    assert narrow_high - narrow_low < (high - low) / 2


def test_bootstrap_interval_of_equal_groups_is_a_point():
    assert accuracy_interval([np.eye(8)] * 5) == (1, 1)
    assert interval(np.full(9, 0.5), 5, biased_estimate=0.5) == (0.5, 0.5)


def test_fewer_than_five_groups_have_no_interval():
    for number in (1, 2, 4):
        assert accuracy_interval([np.eye(8)] * number) is None
    assert interval(np.arange(9.0), 4, biased_estimate=0.5) is None


def test_an_interval_leaves_out_undefined_values():
    values = np.array([np.nan, *(0.1 * i for i in range(11))])
    assert interval(values, 5) == pytest.approx((0.025, 0.975))
    assert interval(np.array([np.nan, np.nan]), 5) is None


def test_the_interval_of_a_biased_statistic_by_hand():
    """The percentiles of 0, 0.1, … 1 are 0.025 and 0.975. The estimate 0.4 gives 0.8 − 0.975 and
    0.8 − 0.025."""
    values = np.arange(11) / 10
    assert interval(values, 5, biased_estimate=0.4) == pytest.approx((-0.175, 0.775))


@pytest.mark.parametrize("method", ["percentile", "basic"])
def test_intervals_agree_with_scipy(method):
    """SciPy gets the values of the same resamples."""
    stats = pytest.importorskip("scipy.stats")
    groups = np.stack(random_dialogues(4, 20))
    estimate = float(bias_of_confusion(groups.sum(0)).bias)
    values = bias_of_confusion(resample(groups)).bias
    oracle = stats.bootstrap(
        (np.arange(20),),
        lambda drawn: bias_of_confusion(groups[drawn].sum(0)).bias,
        n_resamples=0,
        bootstrap_result=SimpleNamespace(bootstrap_distribution=values),
        vectorized=False,
        method=method,
    ).confidence_interval
    biased_estimate = estimate if method == "basic" else None
    assert interval(values, 20, biased_estimate) == pytest.approx((oracle.low, oracle.high))


# Coverage: simulated dialogues of planners whose scores over all possible turns are known. A
# planner hits with a dialogue's share, HITS, and draws from fixed frequencies otherwise.
ESCONV_SHARES = np.array([20.7, 5.9, 7.8, 9.4, 16.1, 15.6, 6.2, 18.3]) / 100
HITS = (0.04, 0.22)
PLANNERS = [
    ESCONV_SHARES * [1.7, 0.6, 0.7, 0.8, 1.2, 1.1, 0.7, 0.75],
    ESCONV_SHARES * [1.3, 0.8, 0.9, 0.9, 1.05, 1.0, 0.9, 0.85],
]


def score_planner(counts: np.ndarray) -> np.ndarray:
    """(3, …): accuracy, Q and B of confusion matrices (…, 8, 8)."""
    scores = scores_of_confusion(counts)
    return np.stack([scores.accuracy, scores.macro_f1, bias_of_confusion(counts).bias])


def true_scores() -> np.ndarray:
    """(2, 3): both planners' scores of the expected confusion matrix."""
    hit = np.mean(HITS)
    confusions = [
        (hit * np.eye(8) + (1 - hit) * shares[:, None] / shares.sum()) * ESCONV_SHARES
        for shares in PLANNERS
    ]
    return score_planner(np.stack(confusions)).T


def simulate_dialogues(number: int, rng: np.random.Generator) -> np.ndarray:
    """(number, 2, 8, 8): both planners' confusion matrices of 6 … 18 turns of each dialogue, which
    has its own frequencies of gold strategies."""
    counts = np.zeros((number, 2, 8, 8))
    for dialogue in range(number):
        turns = rng.integers(6, 19)
        gold = rng.choice(8, turns, p=rng.dirichlet(20 * ESCONV_SHARES))
        hit = rng.choice(HITS)
        for planner, shares in enumerate(PLANNERS):
            drawn = rng.choice(8, turns, p=shares / shares.sum())
            predicted = np.where(rng.random(turns) < hit, gold, drawn)
            np.add.at(counts[dialogue, planner], (predicted, gold), 1)
    return counts


def measure_coverage(dialogues: int, repeats: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """(3, 3) of percentile and (3, 3) of basic intervals: the share of them that hold the true
    value, 0 … 1. Rows are the two planners and their difference; columns are accuracy, Q and B."""
    rng = np.random.default_rng(0)
    truth = true_scores()
    truth = np.stack([*truth, truth[1] - truth[0]])
    percentile, basic = np.zeros((3, 3)), np.zeros((3, 3))
    for repeat in range(repeats):
        groups = simulate_dialogues(dialogues, rng)
        estimates = score_planner(groups.sum(0)).T  # (2, 3)
        resampled = score_planner(resample(groups, seed=repeat)).transpose(2, 0, 1)  # (2, 3, 1000)
        estimates = np.stack([*estimates, estimates[1] - estimates[0]])
        resampled = np.stack([*resampled, resampled[1] - resampled[0]])
        for place in np.ndindex(3, 3):
            low, high = interval(resampled[place], dialogues)
            percentile[place] += low <= truth[place] <= high
            low, high = interval(resampled[place], dialogues, estimates[place])
            basic[place] += low <= truth[place] <= high
    return percentile / repeats, basic / repeats


@pytest.mark.slow
@pytest.mark.parametrize("dialogues, lowest", [(10, 0.78), (30, 0.84), (100, 0.88)])
def test_intervals_cover_nearly_as_often_as_they_claim(dialogues, lowest):
    """On few dialogues any bootstrap covers less than it claims. A coverage of 0.95 has a standard
    error of √(0.95 · 0.05 / 200) = 0.015, one of 0.85 has 0.025.

    Accuracy and Q have the percentile interval. B needs that of a biased statistic, because the
    percentile interval of the second planner's B, which is 0.15, misses it nearly always on ten
    dialogues, and often on a hundred."""
    percentile, basic = measure_coverage(dialogues)
    print(f"{dialogues} dialogues: percentile {percentile.tolist()}, basic {basic.tolist()}")
    covered = np.column_stack([percentile[:, :2], basic[:, 2]])
    assert (covered >= lowest).all() and (covered <= 0.99).all()
    assert percentile[1, 2] < 0.65  # of B
    if dialogues == 10:
        assert percentile[0, 2] < 0.35 and percentile[1, 2] < 0.05


def test_bootstrap_repeats_with_its_seed():
    groups = random_dialogues(3, 20)
    assert accuracy_interval(groups, seed=5) == accuracy_interval(groups, seed=5)
    assert accuracy_interval(groups, seed=5) != accuracy_interval(groups, seed=6)


def test_a_paired_difference_has_the_interval_of_the_differences():
    """In every dialogue of ten turns the second system is right in one turn more than the first. So
    the difference is 0.1 in every resample, although each accuracy varies."""
    rng = np.random.default_rng(0)
    first = [np.array([[n, 0], [10 - n, 0]]) for n in rng.integers(0, 10, 40)]
    second = [counts + [[1, 0], [-1, 0]] for counts in first]
    first_accuracy = accuracy(resample(first, seed=3))
    second_accuracy = accuracy(resample(second, seed=3))
    assert first_accuracy.std() > 0.02
    assert interval(second_accuracy - first_accuracy, 40) == pytest.approx((0.1, 0.1))


def test_leading_dimensions_give_what_each_matrix_gives_alone():
    rng = np.random.default_rng(1)
    density = rng.choice([0.02, 0.1, 0.3], (40, 1, 1))
    counts = rng.binomial(2, density, (40, 8, 8)).reshape(5, 8, 8, 8).astype(float)
    bias = bias_of_confusion(counts)
    scores = scores_of_confusion(counts)
    kappa = kappa_of_confusion(counts)
    assert bias.bias.shape == kappa.shape == (5, 8)
    assert bias.preferences.shape == (5, 8, 8)
    for index in np.ndindex(5, 8):
        alone = bias_of_confusion(counts[index])
        assert bias.preferences[index] == pytest.approx(alone.preferences, rel=1e-12)
        assert bias.bias[index] == pytest.approx(alone.bias)
        assert scores.macro_f1[index] == pytest.approx(scores_of_confusion(counts[index]).macro_f1)
        assert kappa[index] == pytest.approx(kappa_of_confusion(counts[index]))


# Calibration


def random_planner(seed: int, turns: int) -> tuple[np.ndarray, list[str]]:
    """(log-probabilities (T, 8), gold names (T)). They are independent of each other."""
    rng = np.random.default_rng(seed)
    logps = np.log(rng.dirichlet(np.full(8, 0.5), turns))
    return logps, [ESCONV.strategies[i] for i in rng.integers(0, 8, turns)]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_hits_against_scikit_learn(k):
    sklearn = pytest.importorskip("sklearn.metrics")
    logps, gold = random_planner(k, 200)
    indices = [ESCONV.strategies.index(name) for name in gold]
    expected = sklearn.top_k_accuracy_score(indices, logps, k=k, labels=range(8), normalize=False)
    assert top_hits(logps, gold, k) == expected


def test_calibration_error_by_hand():
    """Two turns have confidence 0.8, and one of them is right. Two have 0.6, and both are right. So
    |2 · 0.8 − 1| + |2 · 0.6 − 2| = 0.6 + 0.8, which is 0.35 per turn."""
    names = Strategies(("a", "b"))
    logps = np.log([[0.8, 0.2], [0.2, 0.8], [0.6, 0.4], [0.4, 0.6]])
    counts = calibration_counts(logps, ["a", "a", "a", "b"], names)
    assert calibration_error(counts) == pytest.approx(0.35)
    several = np.stack([counts, 3 * counts, 0 * counts])
    assert calibration_error(several) == pytest.approx([0.35, 0.35, 0])


def test_a_calibrated_planner_has_no_calibration_error():
    """Gold is drawn from the planner's own probabilities. Their cubes are too confident."""
    logps, _ = random_planner(7, 20000)
    rng = np.random.default_rng(7)
    gold = [ESCONV.strategies[rng.choice(8, p=probabilities)] for probabilities in np.exp(logps)]
    assert calibration_error(calibration_counts(logps, gold)) < 0.015
    cubed = np.exp(logps) ** 3
    too_confident = np.log(cubed / cubed.sum(1, keepdims=True))
    assert calibration_error(calibration_counts(too_confident, gold)) > 0.1


def test_full_confidence_falls_into_the_last_bin():
    counts = calibration_counts(np.array([[0.0, -np.inf]]), ["a"], Strategies(("a", "b")))
    assert counts[9].tolist() == [1, 1, 1] and counts.sum() == 3


# Rank correlation


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlations_against_scipy(seed):
    stats = pytest.importorskip("scipy.stats")
    a, b = np.random.default_rng(seed).integers(0, 6, (2, 30)) + np.arange(30) // 10
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert kendall(a, b) == pytest.approx(stats.kendalltau(a, b).statistic)


def test_rank_correlation_of_a_constant_is_undefined():
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))
    assert np.isnan(kendall([1, 2, 3], [2, 2, 2]))
