"""The Q–B frontier of planners: what each reaches at every temperature, as it is and calibrated.

All of it is computed from exact distributions that were scored already, so it costs nothing."""

from functools import partial
from pathlib import Path

import numpy as np
import torch

from desc.calibration import PLANNED, WAYS, Planned, read_planned, strategy_frequencies
from desc.domain import Strategies
from desc.evaluation.systems import System
from desc.metrics import bias_of_confusion, expected_confusion, scores_of_confusion
from desc.sampling import temper

TEMPERATURES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.25, 1.5)
ORACLE = "oracle"  # offsets by how often people use each strategy at the test turns themselves


def frontiers(
    systems: list[System], answers: dict[str, list[dict]], strategies: Strategies
) -> dict[str, dict[str, list[dict]]]:
    """{system: {way: points}} of the systems that are not calibrated yet, and whose planner scored
    all strategies. A point is {"T", "accuracy", "Q", "Q_W", "B"}, expected for strategies sampled
    at that temperature and top_p 1: in percent, but for T and B.

    The ways are "none"; those of WAYS, if training has saved what the planner plans for validation
    turns beside its adapter; and ORACLE. At the last one B is 0 for each planner at each T, so its
    Q says what they know of the context, whatever luck their offsets had. `answers` is {system: its
    records}. Raises DescError if what training has saved is damaged."""
    found = {}
    for system in systems:
        records = answers[system.name]
        if system.calibrated or not records[0]["logps"]:
            continue
        logps = torch.tensor([row for record in records for row in record["logps"]])
        gold = [name for record in records for name in record["gold"]]
        fits = {"none": None}  # {way: (temperature, top_p) -> Calibration}
        if (Path(system.planner_adapter) / PLANNED).exists():
            planned = read_planned(system.planner_adapter, strategies)
            fits |= {way: partial(planned.fit, way) for way in WAYS}
        indices = torch.tensor([strategies.index(name) for name in gold])
        counts = [gold.count(name) for name in strategies]
        frequencies = strategy_frequencies(counts, added=1e-6)
        fits[ORACLE] = partial(Planned(logps, indices, frequencies).fit, "frequencies")
        found[system.name] = {way: [] for way in fits}
        for way, fit in fits.items():
            for T in TEMPERATURES:
                shifted = fit(T, 1.0).apply(logps) if fit else logps
                point = score_point(temper(shifted, T, 1.0), gold, strategies)
                found[system.name][way].append({"T": T} | point)
    return found


def score_point(
    probabilities: torch.Tensor, gold: list[str], strategies: Strategies
) -> dict[str, float]:
    """The expected scores of sampling from `probabilities` (T, K)."""
    counts = expected_confusion(probabilities.numpy().astype(np.float64), gold, strategies)
    scores, bias = scores_of_confusion(counts), bias_of_confusion(counts).bias
    percent = {"accuracy": scores.accuracy, "Q": scores.macro_f1, "Q_W": scores.weighted_f1}
    return {name: float(100 * value) for name, value in percent.items()} | {"B": float(bias)}
