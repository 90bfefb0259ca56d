"""The Q–B frontier of planners: what each reaches at every temperature, as it is and calibrated.

All of it is computed from exact distributions that were scored already, so it costs nothing."""

from pathlib import Path

import numpy as np
import torch

from desc.calibration import PLANNED, WAYS, read_planned
from desc.domain import Strategies
from desc.evaluation.systems import System
from desc.metrics import bias_of_confusion, expected_confusion, scores_of_confusion
from desc.sampling import temper

TEMPERATURES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.25, 1.5)


def frontiers(
    systems: list[System], answers: dict[str, list[dict]], strategies: Strategies
) -> dict[str, dict[str, list[dict]]]:
    """{system: {"none" or a way to calibrate: points}} of the systems that are not calibrated yet,
    and whose planner scored all strategies. A point is {"T", "accuracy", "Q", "Q_W", "B"}, expected
    for strategies sampled at that temperature and top_p 1: in percent, but for T and B.

    `answers` is {system: its records}. A planner is calibrated if training has saved what it plans
    for validation turns beside its adapter. Raises DescError if that is damaged."""
    found = {}
    for system in systems:
        records = answers[system.name]
        if system.calibrated or not records[0]["logps"]:
            continue
        logps = torch.tensor([row for record in records for row in record["logps"]])
        gold = [name for record in records for name in record["gold"]]
        planned, ways = None, ("none",)
        if (Path(system.planner_adapter) / PLANNED).exists():
            planned, ways = read_planned(system.planner_adapter, strategies), ("none", *WAYS)
        found[system.name] = {way: [] for way in ways}
        for way, points in found[system.name].items():
            for T in TEMPERATURES:
                shifted = logps if way == "none" else planned.fit(way, T, 1.0).apply(logps)
                points.append({"T": T} | score_point(temper(shifted, T, 1.0), gold, strategies))
    return found


def score_point(
    probabilities: torch.Tensor, gold: list[str], strategies: Strategies
) -> dict[str, float]:
    """The expected scores of sampling from `probabilities` (T, K)."""
    counts = expected_confusion(probabilities.numpy().astype(np.float64), gold, strategies)
    scores, bias = scores_of_confusion(counts), bias_of_confusion(counts).bias
    percent = {"accuracy": scores.accuracy, "Q": scores.macro_f1, "Q_W": scores.weighted_f1}
    return {name: float(100 * value) for name, value in percent.items()} | {"B": float(bias)}
