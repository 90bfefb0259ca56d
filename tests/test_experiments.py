"""pytest tests/test_experiments.py

Records of experiments, and the tables that are made from them (benchmarks/experiments.py)."""

import sys

import pytest
from scripts import ROOT, run

sys.path.append(str(ROOT / "benchmarks"))
from experiments import cell, error_table, group_lines, identity, mean_and_half_width, recipe, table  # noqa: E402


def make_line(
    system: str, seed: int, q: float, half: float = 1, difference=None, lr: float = 5e-5
) -> dict:
    row = {"Q": q, "Q interval": [q - half, q + half]}
    if difference is not None:
        row["Q difference"] = [difference, difference - half, difference + half]
    made = {"sp": {"flags": {"seed": seed, "lr": lr}, "steps": seed}}
    line = {"system": system, "seed": seed, "adapters": {}, "made": made, "scores": row}
    return line | {"evaluation": {"seed": seed, "test dialogues": 130}}


def test_the_interval_over_seeds_and_dialogues_by_hand():
    """Three seeds with 16, 17, 18: standard deviation 1, Student's t 4.30, so 4.30 / √3 = 2.483.
    With half-widths of 1 for the dialogues √(1 + 2.483²) = 2.676."""
    values, limits = [16.0, 17.0, 18.0], [(15.0, 17.0), (16.0, 18.0), (17.0, 19.0)]
    assert mean_and_half_width(values, limits) == pytest.approx((17, 2.6764), abs=1e-4)
    assert mean_and_half_width([16.0], [(15.0, 17.5)]) == (16, 1.25)
    assert mean_and_half_width([16.0, 17.0], [None, None]) == (16.5, None)


def test_a_table_has_a_line_for_each_system():
    lines = [make_line("sft", seed, 16.0 + seed, 1) for seed in range(3)]
    lines += [make_line("dpo", 0, 15.0, 1, difference=-1.0)]
    (groups,) = group_lines(lines).values()
    assert [len(group) for group in groups.values()] == [3, 1]
    assert table(groups, ("Q", "B")).splitlines()[2:] == [
        "| sft | 3 | 17.0 ± 2.7 |",  # no column B: no system has it
        "| dpo | 1 | 15.0 ± 1.0* |",
    ]
    assert cell(groups["dpo"], "Q", difference=True) == "−1.0 ± 1.0*"
    assert table(groups, ("B",)) == ""


def test_errors_are_in_percent_of_what_was_annotated():
    """By hand: of 4 replies 3 are sound, and of 2 one is, so 75 and 50, on average 62.5."""
    lines = [make_line("sft", seed, 16) for seed in (0, 1)]
    lines[0]["scores"]["errors"] = {"none": 3, "template response": 1}
    lines[1]["scores"]["errors"] = {"none": 1, "emotion misread": 1}
    (groups,) = group_lines([*lines, make_line("dpo", 0, 15)]).values()
    assert error_table(groups).splitlines()[0] == (
        "| system | emotion misread | none | template response |"
    )
    assert error_table(groups).splitlines()[2:] == ["| sft | 25.0 | 62.5 | 12.5 |"]
    assert error_table({"dpo": groups["dpo"]}) == ""


def test_another_recipe_is_another_system_and_another_evaluation_another_table():
    lines = [make_line("sft", 0, 16), make_line("sft", 0, 18, lr=5e-4), make_line("sft", 1, 17)]
    forty = {"seed": 0, "test dialogues": 40}
    tables = group_lines([*lines, make_line("sft", 2, 15) | {"evaluation": forty}])
    assert list(tables) == ["test dialogues 130", "test dialogues 40"]
    sizes = [{name: len(group) for name, group in groups.items()} for groups in tables.values()]
    assert sizes == [{"sft": 2, "sft (2)": 1}, {"sft": 1}]


def test_flags_that_change_nothing_make_no_other_recipe():
    """A planner is told no strategy, and older lines have no objective."""
    sp, rg = {"task": "sp", "beta": 0.5}, {"task": "rg", "strategy_at": "turn"}
    later = {"strategy_at": "turn", "objective": "dpo", "margin": 1.0, "seed": 3}
    assert recipe({"sft": sp | later}) == recipe({"sft": sp})
    assert recipe(sp | {"objective": "ipo"}) != recipe(sp)
    assert recipe(rg) != recipe(rg | {"strategy_at": "system"})


def test_lines_are_the_same_experiment_if_seed_adapters_and_evaluation_are():
    one, again, other = (make_line("sft", seed, q) for seed, q in ((0, 1), (0, 2), (1, 1)))
    assert identity(one) == identity(again) != identity(other)
    assert identity(one) != identity(one | {"evaluation": {"temperature": 0.5}})


def test_an_evaluation_is_recorded_once(tmp_path):
    """With what made each adapter: its flags, those of its pairs, and those of its reference."""
    flags = ("--task", "sp", "--model", "toy", "--out", tmp_path, "--eval-dialogues", 1)
    run("train_sft.py", *flags, "--train-dialogues", 2, "--epochs", 1)
    run("mine_preferences.py", *flags, "--train-dialogues", 2)
    run("train_dpo.py", *flags)
    systems = (f"sft=sp:{tmp_path}/sp/sft", f"dpo=sp:{tmp_path}/sp/dpo")
    run("evaluate.py", *flags[2:], "--systems", *systems, "--calibrate", "frequencies")
    records = tmp_path / "lines.jsonl"
    record = ("--record", tmp_path / "eval", "--file", records, "--plot", tmp_path / "x.png")
    printed = run("benchmarks/experiments.py", *record)
    assert "5 new lines" in printed and "| dpo calibrated | 1 |" in printed
    assert (tmp_path / "x.png").stat().st_size > 10_000
    before = records.read_bytes()
    assert '"beta": 0.5' in before.decode() and '"pairs":' in before.decode()
    assert "0 new lines" in run("benchmarks/experiments.py", *record[:4])
    assert records.read_bytes() == before
