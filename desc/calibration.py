"""Calibration of a planner: a temperature, and one offset for each strategy, that are fitted on
validation turns. No weight changes.

B is 0 exactly if a planner uses each strategy as often as people do (desc/metrics.py), whatever it
knows of the context. K offsets can do that, so B can be had for nothing."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from desc import DescError
from desc.domain import Strategies
from desc.sampling import temper
from desc.storage.files import read_field, read_lines

PLANNED = "validation.jsonl"  # beside a planner's adapter: what it plans for validation turns
WAYS = ("frequencies", "likelihood", "prior")
SWEEPS = 500


@dataclass(frozen=True)
class Calibration:
    """log p'(s | x) = log p(s | x) / temperature + offsets[s] − a constant of x. Strategies are
    sampled from p' at the temperature and top_p of sampling, as from p."""

    temperature: float
    offsets: torch.Tensor  # (K,) fp64 nats; their mean is 0

    def apply(self, logps: torch.Tensor) -> torch.Tensor:
        """Calibrated log-probabilities (T, K) fp64, of a planner's exact ones (T, K)."""
        return (logps.double() / self.temperature + self.offsets).log_softmax(-1)


def strategy_frequencies(counts: list[int], added: float = 1.0) -> torch.Tensor:
    """How often people use each strategy (K,) fp64, from its counts. Something is added to each, so
    that a strategy that was never seen keeps a chance."""
    counted = torch.tensor(counts, dtype=torch.float64) + added
    return counted / counted.sum()


def match_frequencies(
    logps: torch.Tensor, frequencies: torch.Tensor, temperature: float = 1.0, top_p: float = 1.0
) -> Calibration:
    """The offsets with which strategies sampled at `temperature` and `top_p` on the turns of
    `logps` (T, K) are as frequent as `frequencies` (K,). They need no human answers to these turns.

    Each sweep moves every offset by what its strategy lacks (iterative proportional fitting, Deming
    and Stephan 1940). At top_p 1 that converges. What top_p cuts off comes and goes by whole turns,
    so the steps become smaller, and the best of all offsets are kept. At temperature 0 a strategy
    is either taken or not; a step of 0.1 nats then serves as a start."""
    wanted = frequencies.log()
    calibration = Calibration(1.0, torch.zeros_like(wanted))
    best, least = calibration, torch.inf
    for sweep in range(SWEEPS):
        sampled = temper(calibration.apply(logps), temperature, top_p).double().mean(0)
        lacking = wanted - sampled.clamp(min=1e-6).log()
        if lacking.abs().max() < least:
            best, least = calibration, lacking.abs().max()
        if least < 1e-9:
            break
        step = max(temperature, 0.1) * min(1, 50 / (1 + sweep))
        offsets = calibration.offsets + step * lacking
        calibration = Calibration(1.0, offsets - offsets.mean())
    return best


def maximise_likelihood(logps: torch.Tensor, gold: torch.Tensor) -> Calibration:
    """The temperature and the offsets under which the human strategies `gold` (T,), indices, are
    likeliest, of `logps` (T, K): bias-corrected temperature scaling (Alexandari et al. 2020).

    At the maximum the mean distribution is the frequencies of `gold`, because that is where the
    derivative by each offset is zero. So this also matches frequencies, of these turns, if
    strategies are sampled at T 1. To keep a strategy that is missing in `gold`, each offset is
    drawn to 0 as by one turn's worth of evidence."""
    logps = logps.double()
    sharpness = torch.zeros((), dtype=torch.float64, requires_grad=True)  # log 1/temperature
    offsets = torch.zeros(logps.shape[1], dtype=torch.float64, requires_grad=True)
    until = {"max_iter": 500, "tolerance_grad": 1e-9, "tolerance_change": 0}
    optimizer = torch.optim.LBFGS([sharpness, offsets], line_search_fn="strong_wolfe", **until)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(logps * sharpness.exp() + offsets, gold, reduction="sum")
        loss = (loss + 0.5 * offsets.square().sum()) / len(gold)
        loss.backward()
        return loss

    optimizer.step(closure)
    fitted = offsets.detach()
    return Calibration(float((-sharpness.detach()).exp()), fitted - fitted.mean())


def correct_prior(frequencies: torch.Tensor) -> Calibration:
    """log p − log frequency: prior correction (Menon et al. 2021, logit adjustment). It
    aims at using all strategies evenly, which is not what people do."""
    offsets = -frequencies.log()
    return Calibration(1.0, offsets - offsets.mean())


@dataclass(frozen=True)
class Planned:
    """What a planner plans for T validation turns, and how often people use each strategy."""

    logps: torch.Tensor  # (T, K)
    gold: torch.Tensor  # (T,) indices of people's strategies
    frequencies: torch.Tensor  # (K,) of the training turns

    def fit(self, way: str, temperature: float, top_p: float) -> Calibration:
        """The calibration of one of WAYS, for sampling at `temperature` and `top_p`."""
        if way == "prior":
            return correct_prior(self.frequencies)
        if way == "likelihood":
            return maximise_likelihood(self.logps, self.gold)
        return match_frequencies(self.logps, self.frequencies, temperature, top_p)


def read_planned(folder: str | Path, strategies: Strategies) -> Planned:
    """What training has saved beside a planner's adapter in `folder`, as PLANNED.

    Raises DescError if that is missing or damaged, or was made with other strategies."""
    path = Path(folder) / PLANNED
    if not path.exists():
        raise DescError(
            f"{path} is missing: a calibration is fitted on it; train the planner again"
        )
    (where, first), *turns = list(read_lines(path).items()) or [(str(path), {})]
    counts = read_field(first, "counts", dict, where)
    counted = all(type(count) is int and count >= 0 for count in counts.values())
    if tuple(counts) != strategies or not counted or not turns:
        raise DescError(f"{path}: was made with other strategies; train the planner again")
    logps, gold = [], []
    for where, turn in turns:
        row = read_field(turn, "logps", list, where)
        name = read_field(turn, "gold", str, where)
        numbers = [value for value in row if isinstance(value, float)]
        if name not in strategies or len(row) != len(strategies) or numbers != row:
            raise DescError(f"{where}: is no turn of these strategies; train the planner again")
        logps.append(row)
        gold.append(strategies.index(name))
    frequencies = strategy_frequencies(list(counts.values()))
    return Planned(torch.tensor(logps), torch.tensor(gold), frequencies)


def planned_digest(folder: str | Path) -> str:
    """SHA-256 of what a calibration is fitted on; "" if it is missing."""
    path = Path(folder) / PLANNED
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def read_calibration(folder: str | Path, config, strategies: Strategies) -> Calibration | None:
    """How the planner whose adapter lies in `folder` is calibrated for sampling as `config` (a
    desc.flags.SampleConfig) says; None for --calibrate none. Raises DescError as read_planned."""
    if config.calibrate == "none":
        return None
    planned = read_planned(folder, strategies)
    return planned.fit(config.calibrate, config.temperature, config.top_p)
