"""pytest tests/test_calibration.py

Offsets worked by hand, and what they promise on random planners."""

import math

import pytest
import torch
import torch.nn.functional as F

from desc import DescError
from desc.calibration import (
    PLANNED,
    WAYS,
    Calibration,
    correct_prior,
    match_frequencies,
    maximise_likelihood,
    planned_digest,
    read_calibration,
    strategy_frequencies,
)
from desc.domain import Strategies
from desc.evaluation.frontier import frontiers
from desc.evaluation.systems import System
from desc.flags import SampleConfig
from desc.metrics import bias_of_confusion
from desc.sampling import temper
from desc.storage.files import write_lines


def draw(seed: int, *shape: int) -> torch.Tensor:
    """Normal numbers in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_planner(seed: int, turns: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """(logps (T, 8), gold (T,)). The planner knows something of the context, is far too sure, and
    prefers some strategies."""
    generator = torch.Generator().manual_seed(seed)
    gold = torch.multinomial(torch.arange(1.0, 9.0), turns, True, generator=generator)
    knows = 0.8 * F.one_hot(gold, 8) + 0.6 * draw(seed, turns, 8)
    return (3 * knows + 1.5 * draw(seed + 1, 8)).log_softmax(-1), gold


def people(gold: torch.Tensor) -> torch.Tensor:
    return torch.bincount(gold, minlength=8) / gold.numel()


def close(tensor, expected, atol=1e-8):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(tensor.double(), expected, atol=atol, rtol=0)


def test_offsets_of_a_planner_that_ignores_the_context_by_hand():
    """p = (¾, ¼) at every turn, and people use both evenly. The offsets must differ by ln 3."""
    logps = torch.tensor([[0.75, 0.25]] * 5, dtype=torch.float64).log()
    fitted = match_frequencies(logps, torch.tensor([0.5, 0.5], dtype=torch.float64))
    close(fitted.offsets, [-math.log(3) / 2, math.log(3) / 2])
    close(fitted.apply(logps).exp(), [[0.5, 0.5]] * 5)


def test_a_temperature_sharpens_before_the_offsets_by_hand():
    """p = (⅔, ⅓) at T ½ is 4 : 1, and an offset of ln 2 makes it 8 : 1."""
    logps = torch.tensor([[2 / 3, 1 / 3]], dtype=torch.float64).log()
    offsets = torch.tensor([math.log(2), 0.0], dtype=torch.float64)
    close(Calibration(0.5, offsets).apply(logps).exp(), [[8 / 9, 1 / 9]])


@pytest.mark.parametrize(
    "temperature, top_p, within", [(0.3, 1, 1e-8), (1, 1, 1e-8), (2, 1, 1e-8), (0.7, 0.95, 2e-3)]
)
def test_matched_frequencies_are_those_of_what_is_sampled(temperature, top_p, within):
    logps, gold = random_planner(0)
    frequencies = strategy_frequencies(torch.bincount(gold, minlength=8).tolist())
    fitted = match_frequencies(logps, frequencies, temperature, top_p)
    close(temper(fitted.apply(logps), temperature, top_p).mean(0), frequencies, within)


@pytest.mark.parametrize("seed", range(3))
def test_matched_frequencies_leave_no_bias(seed):
    """The expected confusion matrix then has equal row and column sums."""
    logps, gold = random_planner(seed)
    right = F.one_hot(gold, 8).double()
    before = logps.exp().T @ right
    calibrated = match_frequencies(logps, people(gold).double()).apply(logps)
    after = calibrated.exp().T @ right
    assert bias_of_confusion(before.numpy(), sweeps=200).bias > 0.2
    assert bias_of_confusion(after.numpy(), sweeps=200).bias == pytest.approx(0, abs=1e-6)


def test_no_other_temperature_or_offset_is_likelier():
    logps, gold = random_planner(1)
    fitted = maximise_likelihood(logps, gold)

    def objective(temperature, offsets):
        scores = logps / temperature + offsets
        return F.cross_entropy(scores, gold, reduction="sum") + 0.5 * offsets.square().sum()

    best = objective(fitted.temperature, fitted.offsets)
    for factor in (0.99, 1.01):
        assert objective(fitted.temperature * factor, fitted.offsets) > best
    for direction in torch.eye(8):
        for step in (-0.01, 0.01):
            assert objective(fitted.temperature, fitted.offsets + step * direction) > best


def test_the_likeliest_calibration_finds_the_temperature_and_offsets_that_were_hidden():
    true = (1.2 * draw(2, 40_000, 8)).log_softmax(-1)
    gold = torch.multinomial(true.exp(), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    hidden = draw(3, 8)
    hidden -= hidden.mean()
    fitted = maximise_likelihood((0.7 * (true - hidden)).log_softmax(-1), gold)
    assert fitted.temperature == pytest.approx(0.7, abs=0.02)
    close(fitted.offsets, hidden, atol=0.06)


def test_the_likeliest_calibration_matches_the_frequencies_of_its_turns():
    """But for the pull to 0, whose derivative is each offset: the turns that are missing."""
    logps, gold = random_planner(3)
    fitted = maximise_likelihood(logps, gold)
    missing = torch.bincount(gold, minlength=8) - fitted.apply(logps).exp().sum(0)
    close(missing, fitted.offsets, atol=1e-3)


def test_a_strategy_that_nobody_used_keeps_a_chance():
    close(strategy_frequencies([0, 8]), [0.1, 0.9])
    logps, gold = random_planner(4)
    fitted = maximise_likelihood(logps, gold.where(gold != 7, 6))
    assert fitted.offsets.isfinite().all()


def test_prior_correction_by_hand():
    """Strategies of ¾ and ¼: a planner that knows only these becomes even."""
    frequencies = torch.tensor([0.75, 0.25], dtype=torch.float64)
    close(correct_prior(frequencies).apply(frequencies.log()[None]).exp(), [[0.5, 0.5]])


PAIR = Strategies(("Ask", "Tell"))


def write_planned(folder, *turns: dict, counts=(29, 9)) -> None:
    write_lines(folder / PLANNED, [{"counts": dict(zip(PAIR, counts))}, *turns])


def sampled(way: str) -> SampleConfig:
    return SampleConfig(calibrate=way, temperature=1, top_p=1)


def test_a_calibration_is_fitted_on_what_lies_beside_the_adapter(tmp_path):
    """People ask in 30 of 40 turns (one is added to each count), the planner in half of its."""
    write_planned(tmp_path, *[{"turn": "0/0", "gold": "Ask", "logps": [-0.5, -0.5]}] * 2)
    fitted = read_calibration(tmp_path, sampled("frequencies"), PAIR)
    close(fitted.offsets, [math.log(3) / 2, -math.log(3) / 2])
    fitted = read_calibration(tmp_path, sampled("prior"), PAIR)
    close(fitted.offsets, [-math.log(3) / 2, math.log(3) / 2])
    fitted = read_calibration(tmp_path, sampled("likelihood"), PAIR)
    assert fitted.offsets[0] > 0


def test_what_cannot_be_fitted_on_is_refused(tmp_path):
    with pytest.raises(DescError, match="validation.jsonl is missing: .*; train the planner again"):
        read_calibration(tmp_path, sampled("prior"), PAIR)
    for text in ("", '{"counts": {"Ask": "x", "Tell": 1}}\n{}\n'):
        (tmp_path / "validation.jsonl").write_text(text)
        with pytest.raises(DescError, match="train the planner again|field 'counts'"):
            read_calibration(tmp_path, sampled("prior"), PAIR)
    write_planned(tmp_path, {"turn": "0/0", "gold": "Ask", "logps": [-0.5, -0.5]})
    before = planned_digest(tmp_path)
    write_planned(tmp_path, {"turn": "0/0", "gold": "Ask", "logps": [-0.5, -0.6]})
    assert before != planned_digest(tmp_path) and planned_digest(tmp_path / "nowhere") == ""
    with pytest.raises(DescError, match="was made with other strategies"):
        read_calibration(tmp_path, sampled("prior"), Strategies(("Ask", "Say")))
    write_planned(tmp_path, {"turn": "0/0", "gold": "Ask"})
    with pytest.raises(DescError, match="line 2: field 'logps'"):
        read_calibration(tmp_path, sampled("frequencies"), PAIR)
    for gold, logps in (("Say", [-0.5, -0.5]), ("Ask", [-0.5]), ("Ask", [-0.5, "x"])):
        write_planned(tmp_path, {"turn": "0/0", "gold": gold, "logps": logps})
        with pytest.raises(DescError, match="line 2: is no turn of these strategies"):
            read_calibration(tmp_path, sampled("frequencies"), PAIR)


def frontier_of(logps: list, gold: list, folder, calibrated: bool = False) -> dict:
    """The frontiers of one system that answered one dialogue; its adapter lies in `folder`."""
    system = System("x", "sp", str(folder), calibrated=calibrated)
    answers = {"x": [{"logps": logps, "gold": gold}]}
    return frontiers([system], answers, PAIR).get("x", {})


def test_a_frontier_by_hand(tmp_path):
    """Two turns, Ask and Tell, and Ask is planned with ⅔ in both. At T ½ that is ⅘, so the expected
    confusion matrix is [[⅘, ⅘], [⅕, ⅕]]: accuracy ½, F1 of Ask 2·⅘ / (⁸⁄₅ + 1) and of
    Tell 2·⅕ / (⅖ + 1). A win of Ask over Tell weighs ⅘, the reverse ⅕, so p = (1.6, 0.4)."""
    planned = torch.tensor([[2 / 3, 1 / 3]] * 2).log().tolist()
    found = frontier_of(planned, ["Ask", "Tell"], tmp_path)
    point = next(point for point in found["none"] if point["T"] == 0.5)
    assert point["accuracy"] == pytest.approx(50)
    assert point["Q"] == pytest.approx(100 * (1.6 / 2.6 + 0.4 / 1.4) / 2)
    assert point["B"] == pytest.approx(0.6)
    assert list(found) == ["none", "oracle"]
    for point in found["oracle"]:  # both strategies with ½ in both turns
        assert (point["accuracy"], point["Q"]) == pytest.approx((50, 50))
        assert point["B"] == pytest.approx(0, abs=1e-6)


def test_a_calibrated_frontier_has_no_bias_at_any_temperature(tmp_path):
    """If the validation turns are the test turns, and people are as frequent in training."""
    planned = [[-0.2, -1.7], [-0.9, -0.5], [-0.1, -2.4], [-0.3, -1.3]]
    turns = [{"turn": "0/0", "gold": "Ask", "logps": row} for row in planned]
    write_planned(tmp_path, *turns, counts=(999_999, 999_999))
    found = frontier_of(planned, ["Ask", "Tell", "Tell", "Ask"], tmp_path)
    assert list(found) == ["none", *WAYS, "oracle"]
    assert min(point["B"] for point in found["none"]) > 0.1
    assert max(point["B"] for point in found["frequencies"]) < 1e-3
    for point, oracle in zip(found["frequencies"], found["oracle"]):
        assert point == pytest.approx(oracle, abs=1e-3)


def test_a_system_that_is_calibrated_or_was_not_scored_has_no_frontier(tmp_path):
    assert frontier_of([[-0.2, -1.7]], ["Ask"], tmp_path, calibrated=True) == {}
    assert frontier_of([], [], tmp_path) == {}
