"""pytest tests/test_experiments.py

Records of experiments, and the tables that are made from them (benchmarks/experiments.py)."""

import sys

import pytest
from scripts import ROOT, run

sys.path.append(str(ROOT / "benchmarks"))
import experiment_tables as tables  # noqa: E402
from experiments import group_lines, identity, recipe  # noqa: E402


def make_line(
    system: str, seed: int, q: float, half: float = 1, difference=None, lr: float = 5e-5
) -> dict:
    row = {"Q": q, "Q interval": [q - half, q + half]}
    if difference is not None:
        row["Q difference"] = [difference, difference - half, difference + half]
    made = {"sp": {"flags": {"seed": seed, "lr": lr}, "steps": seed}}
    line = {"system": system, "seed": seed, "adapters": {}, "made": made, "scores": row}
    line |= {"calibrate": "frequencies", "first": "sft", "fitted on": 271}
    return line | {"evaluation": {"seed": seed, "test dialogues": 130}}


def test_the_interval_over_seeds_and_dialogues_by_hand():
    """Three seeds with 16, 17, 18: standard deviation 1, Student's t 4.30, so 4.30 / √3 = 2.483.
    With half-widths of 1 for the dialogues √(1 + 2.483²) = 2.676."""
    values, limits = [16.0, 17.0, 18.0], [(15.0, 17.0), (16.0, 18.0), (17.0, 19.0)]
    assert tables.interval_of_mean(values, limits) == pytest.approx((17, 2.6764), abs=1e-4)
    assert tables.interval_of_mean([16.0], [(15.0, 17.5)]) == (16.25, 1.25)
    assert tables.interval_of_mean([16.0, 17.0], [None, None]) is None


def test_b_shows_the_ends_of_its_interval():
    """Its estimate is biased, so it does not stand in the middle."""
    line = make_line("sft", 0, 16)
    line["scores"] = {"B": 0.2, "B interval": [0.05, 0.25], "B difference": [0.1, -0.05, 0.2]}
    assert tables.cell([line], "B") == "0.200 (0.050 … 0.250)*"
    assert tables.cell([line], "B", difference=True) == "+0.100 (−0.050 … +0.200)*"


def test_a_table_has_a_line_for_each_system():
    lines = [make_line("sft", seed, 16.0 + seed, 1) for seed in range(3)]
    lines += [make_line("dpo", 0, 15.0, 1, difference=-1.0)]
    (groups,) = group_lines(lines).values()
    assert [len(group) for group in groups.values()] == [3, 1]
    assert tables.table(groups, ("Q", "B")).splitlines()[2:] == [
        "| sft | 3 | 17.0 ± 2.7 |",  # no column B: no system has it
        "| dpo | 1 | 15.0 ± 1.0* |",
    ]
    assert tables.cell(groups["dpo"], "Q", difference=True) == "−1.0 ± 1.0*"
    assert tables.table(groups, ("B",)) == ""


def test_errors_are_in_percent_of_what_was_annotated():
    """By hand: of 4 replies 3 are sound, and of 2 one is, so 75 and 50, on average 62.5."""
    lines = [make_line("sft", seed, 16) for seed in (0, 1)]
    lines[0]["scores"]["errors"] = {"none": 3, "template response": 1}
    lines[1]["scores"]["errors"] = {"none": 1, "emotion misread": 1}
    (groups,) = group_lines([*lines, make_line("dpo", 0, 15)]).values()
    assert tables.error_table(groups).splitlines()[0] == (
        "| system | emotion misread | none | template response |"
    )
    assert tables.error_table(groups).splitlines()[2:] == ["| sft | 25.0 | 62.5 | 12.5 |"]
    assert tables.error_table({"dpo": groups["dpo"]}) == ""


def test_q_and_b_by_way_to_calibrate():
    """The means of two seeds by hand, at the temperature of the evaluation and at 1. There is no
    row for a temperature at which no point lies, and none for a planner without a frontier."""
    lines = [make_line("sft", seed, 16) for seed in (0, 1)]
    for line, q in zip(lines, (16.0, 17.0)):
        line["evaluation"] |= {"temperature": 0.7}
        points = [{"T": 0.7, "Q": q, "B": q / 100}, {"T": 1.0, "Q": q - 2, "B": 0.1}]
        line["frontier"] = {"none": points, "frequencies": points[:1]}
    other = make_line("written", 0, 16) | {"evaluation": lines[0]["evaluation"], "frontier": None}
    (groups,) = group_lines([*lines, other]).values()
    assert tables.ways_table(groups).splitlines() == [
        "| system | T | none | frequencies | likelihood | prior | oracle |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| sft | 0.7 | 16.5, 0.165 | 16.5, 0.165 |  |  |  |",
        "| sft | 1 | 14.5, 0.100 |  |  |  |  |",
    ]
    for line in lines:
        line["evaluation"]["temperature"] = 0.42
    assert len(tables.ways_table(groups).splitlines()) == 3
    assert tables.ways_table({"written": groups["written"]}) == ""


def test_what_makes_two_lines_one_system():
    """The seed of their training; which calibration it was; and what it is compared with."""
    plain, again = make_line("sft", 0, 16), make_line("sft", 0, 18)
    calibrated = make_line("sft calibrated", 0, 16)
    likelihood = calibrated | {"calibrate": "likelihood"}
    assert identity(calibrated) != identity(likelihood)
    assert identity(plain) == identity(plain | {"calibrate": "likelihood"})
    lines = [plain, again | {"evaluation": plain["evaluation"] | {"seed": 1}}]
    (groups,) = group_lines([*lines, calibrated, likelihood]).values()
    assert {name: len(group) for name, group in groups.items()} == {
        "sft": 1,  # one training seed, whatever the draws' seed
        "sft calibrated": 1,
        "sft calibrated (2)": 1,
    }


def test_differences_are_to_one_system(capsys):
    lines = [make_line("law", 0, 16, difference=2), make_line("law", 1, 16, difference=4)]
    lines[1]["first"] = "vanilla"
    tables.print_tables("here", next(iter(group_lines(lines).values())))
    to_sft, to_vanilla = capsys.readouterr().out.split("Differences to ")[1:]
    assert to_sft.startswith("sft\n") and "| law | 1 | +2.0 ± 1.0* |" in to_sft
    assert to_vanilla.startswith("vanilla\n") and "| law | 1 | +4.0 ± 1.0* |" in to_vanilla


def test_another_recipe_is_another_system_and_another_evaluation_another_table():
    lines = [make_line("sft", 0, 16), make_line("sft", 0, 18, lr=5e-4), make_line("sft", 1, 17)]
    forty = {"seed": 0, "test dialogues": 40}
    found = group_lines([*lines, make_line("sft", 2, 15) | {"evaluation": forty}])
    assert list(found) == ["test dialogues 130", "test dialogues 40"]
    sizes = [{name: len(group) for name, group in groups.items()} for groups in found.values()]
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


def test_the_lines_of_docs_make_the_tables_of_docs():
    """Three training seeds of each planner, and every row of the first table as it was printed."""
    printed = run("benchmarks/experiments.py")
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for name in ("sft", "dpo", "law calibrated", "vanilla-dpo"):
        (row, *_) = [line for line in printed.splitlines() if line.startswith(f"| {name} | 3 |")]
        assert row.split(" | ")[2:6] == find_row(results, name).split(" | ")[2:6]


def find_row(text: str, name: str) -> str:
    """The first table row of a system."""
    return next(line for line in text.splitlines() if line.startswith(f"| {name} |"))


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
