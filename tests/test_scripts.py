"""pytest tests/test_scripts.py

The four scripts run one after another, as a user runs them, on the toy model and the sample."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module

import pytest
from scripts import ROOT, command, lines, run

from desc import DescError
from desc.calibration import planned_digest
from desc.storage.adapters import adapter_digest
from desc.storage.files import write_lines


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder with the results of SFT, mining and DPO of both modules."""
    out = tmp_path_factory.mktemp("out")
    for task in ("sp", "rg"):
        common = ("--task", task, "--model", "toy", "--out", out, "--eval-dialogues", 1)
        run("train_sft.py", *common, "--train-dialogues", 4, "--lr", 3e-3, "--epochs", 1)
        run("mine_preferences.py", *common, "--train-dialogues", 3, "--max-new-tokens", 6)
        run("train_dpo.py", *common, "--lr", 3e-3, "--batch-size", 8, "--eval-every", 2)
    return out


def evaluate(out, *flags):
    """What evaluate.py prints about the toy in the folder `out`. Its replies are short."""
    return run("evaluate.py", "--model", "toy", "--out", out, "--max-new-tokens", 6, *flags)


def read_results(out):
    return json.loads((out / "eval" / "results.json").read_text())


@pytest.mark.parametrize("task", ["sp", "rg"])
def test_dpo_starts_at_ln_2_and_learns_its_pairs(out, task):
    steps = lines(out / task / "dpo" / "metrics.jsonl")
    assert steps[0]["step"] == 0
    assert steps[0]["valid/loss"] == pytest.approx(0.693147, abs=1e-6)
    assert steps[1]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert steps[1]["rewards/margins"] == 0
    assert steps[-1]["valid/loss"] < 0.69
    assert steps[-1]["valid/rewards/accuracies"] > 0.5
    assert ("valid/nll" in steps[-1]) is (task == "sp")
    score = "valid/nll" if task == "sp" else "valid/loss"
    best = min(step[score] for step in steps if "valid/loss" in step)
    assert best < steps[0][score]


@pytest.mark.parametrize("task", ["sp", "rg"])
def test_artefacts_hold_what_made_them(out, task):
    for stage, rank in (("sft", 16), ("dpo", 32), ("dpo/last", 32)):
        config = json.loads((out / task / stage / "config.json").read_text())
        assert config["task"] == task
        assert config["model"] == "toy"
        assert json.loads((out / task / stage / "adapter_config.json").read_text())["r"] == rank
    assert not list(out.rglob("*.tmp"))
    assert not list(out.rglob("answers.*.jsonl"))
    for pair in lines(out / task / "pairs.jsonl"):
        assert pair["chosen"] != pair["rejected"]
        assert pair["id"] == f"{task}/{pair['dialogue']}/{pair['turn']}"


def test_evaluation_prints_tables_and_keeps_every_answer(out):
    printed = evaluate(out, "--eval-dialogues", 2, "--show", 1, "--seeds", 3)
    for part in (
        "| training frequencies |",
        "\n| sft |",
        "\n| dpo |",
        "\nhuman ",
        "| difference to the first | dpo |",
    ):
        assert part in printed
    settings, *records = lines(out / "eval" / "answers.jsonl")
    assert len(records) == 2
    for record in (record["systems"]["dpo"] for record in records):
        turns = len(record["gold"])
        assert [len(record[key]) for key in ("logps", "human", "replies")] == [turns] * 3
        assert [len(drawn) for drawn in record["predicted"]] == [turns] * 3
    results = read_results(out)
    scores = results["systems"]["sft"]
    answers = [record["systems"]["sft"] for record in records]
    right = sum(
        g == p for r in answers for drawn in r["predicted"] for g, p in zip(r["gold"], drawn)
    )
    assert scores["accuracy"] == pytest.approx(100 * right / scores["turns"] / 3)
    assert scores["Q interval"] is None  # of two dialogues
    digest = adapter_digest(out / "sp" / "dpo")
    assert settings["adapters"]["dpo"]["sp"] == digest
    assert results["facts"]["adapters"]["dpo"]["sp"] == digest
    assert results["facts"]["seeds"] == 3


def test_systems_are_compared_on_the_same_turns(out):
    """A system does not differ from itself. With the human strategies, accuracy is 100 and no
    planner is scored."""
    adapters = f"sp:{out}/sp/sft,rg:{out}/rg/sft"
    systems = (
        f"first={adapters}",
        f"same={adapters}",
        f"oracle=rg:{out}/rg/sft,sp:gold",
        "base=vanilla:base",
    )
    judges = ("--judge", "local", "--annotator", "local", "--max-length", 4096)
    dialogues = ("--eval-dialogues", 2, "--reply-dialogues", 1)
    evaluate(out, *dialogues, *judges, "--systems", *systems)
    rows = read_results(out)["systems"]
    same = {key: value for key, value in rows["same"].items() if key.endswith("difference")}
    assert same.keys() > {
        "Q difference",
        "B difference",
        "nll difference",
        "f1 difference",
        "empathy difference",
    }
    assert all(value == [0, None, None] for value in same.values())
    assert rows["oracle"]["accuracy"] == 100
    assert "nll" not in rows["oracle"]
    assert rows["oracle"]["length"] > 0
    assert rows["same"]["empathy wins"] == 50
    assert 0 <= rows["base"]["empathy"] <= 5
    assert sum(rows["base"]["errors"].values()) == rows["base"]["replies"]
    settings, *records = lines(out / "eval" / "answers.jsonl")
    assert settings["first"] == "first"  # with another one the verdicts would be others
    for answers in (record["systems"] for record in records):
        assert answers["first"] == {
            key: value for key, value in answers["same"].items() if key != "verdicts"
        }
    transcript = [line for record in records for line in record["judgements"]]
    # Each of four systems is judged by four rubrics. Each of three is compared with the first by
    # the same rubrics, in both orders.
    assert len(transcript) == rows["first"]["replies"] * (4 * 4 + 3 * 4 * 2)
    ratings = (out / "eval" / "ratings.csv").read_text(encoding="utf-8-sig")
    assert ratings.count("empathy judge") == 1
    assert "no row has both" in run(
        "evaluate.py", "--correlate", out / "eval" / "ratings.csv", fails=True
    )


def test_a_module_is_asked_in_its_own_way(out):
    """The base model has no adapter, but sp and vanilla read other prompts. An adapter is used for
    its own task alone."""
    quick = ("--eval-dialogues", 1, "--reply-dialogues", -1, "--systems")
    evaluate(out, *quick, "sp=sp:base", "vanilla=vanilla:base")
    _, record = lines(out / "eval" / "answers.jsonl")
    assert record["systems"]["sp"]["logps"] != record["systems"]["vanilla"]["logps"]
    turned = ("evaluate.py", "--model", "toy", "--out", out, *quick, f"x=sp:{out}/rg/sft")
    assert f"{out}/rg/sft: was trained for rg, not for sp" in run(*turned, fails=True)


def test_an_adapter_of_an_earlier_run_does_not_stay(tmp_path):
    """With another --keep the other adapter has a folder of its own."""
    flags = ("--task", "sp", "--model", "toy", "--out", tmp_path, "--eval-dialogues", 1)
    train = ("train_sft.py", *flags, "--train-dialogues", 1, "--epochs", 1)
    for kept, other in (("best", "last"), ("last", "best")):
        run(*train, "--keep", kept)
        folders = [path.name for path in (tmp_path / "sp" / "sft").iterdir() if path.is_dir()]
        assert folders == [other]


def test_a_calibrated_planner_stands_beside_itself(out):
    """All its log-probabilities are shifted by the same offsets, up to a constant of the turn."""
    planner = f"sft=sp:{out}/sp/sft,rg:{out}/rg/sft"
    flags = ("--eval-dialogues", 2, "--reply-dialogues", 1, "--calibrate", "frequencies")
    evaluate(out, *flags, "--systems", planner, "base=sp:base")
    results = read_results(out)
    names = ["training frequencies", "sft", "sft calibrated", "base"]
    assert list(results["systems"]) == names
    assert list(results["frontiers"]) == ["sft", "base"]
    assert list(results["frontiers"]["base"]) == ["none", "oracle"]
    settings, *records = lines(out / "eval" / "answers.jsonl")
    assert settings["fitted on"] == {"sft calibrated": planned_digest(out / "sp" / "sft")}
    shifts = []
    for record in records:
        raw, calibrated = (record["systems"][name]["logps"] for name in names[1:3])
        shifts += [[b - a for a, b in zip(*rows)] for rows in zip(raw, calibrated)]
    offsets = [[value - shift[0] for value in shift] for shift in shifts]
    assert len(offsets) > 2 and max(map(abs, offsets[0])) > 0.1
    for each in offsets:
        assert each == pytest.approx(offsets[0], abs=1e-4)
    free = ("--calibrate", "prior", "--decode", "free", "--systems", planner)
    printed = run("evaluate.py", "--model", "toy", "--out", out, *free, fails=True)
    assert "--calibrate needs --decode scored" in printed


def test_a_calibrated_planner_is_mined(out, tmp_path):
    """Its errors are others, with the same seed; and only a planner that is here is calibrated."""
    shutil.copytree(out / "sp" / "sft", tmp_path / "sp" / "sft")
    mine = ("mine_preferences.py", "--model", "toy", "--train-dialogues", 3, "--eval-dialogues", 1)
    run(*mine, "--task", "sp", "--out", tmp_path, "--calibrate", "frequencies")
    drawn = [
        [
            answer["strategy"]
            for line in lines(place / "sp" / "answers.jsonl")[1:]
            for answer in line["answers"]
        ]
        for place in (out, tmp_path)
    ]
    assert len(drawn[0]) == len(drawn[1]) and drawn[0] != drawn[1]
    printed = run(*mine, "--task", "rg", "--out", out, "--calibrate", "frequencies", fails=True)
    assert "--calibrate needs a planner that answers here" in printed
    (tmp_path / "sp" / "sft" / "validation.jsonl").unlink()
    again = (*mine, "--task", "sp", "--out", tmp_path, "--calibrate", "prior")
    assert "validation.jsonl is missing" in run(*again, fails=True)


def test_free_decoding_reports_what_could_not_be_parsed(out):
    dialogues = ("--eval-dialogues", 1, "--reply-dialogues", -1)
    evaluate(out, *dialogues, "--decode", "free", "--systems", f"sft=sp:{out}/sp/sft")
    _, record = lines(out / "eval" / "answers.jsonl")
    scores = read_results(out)["systems"]["sft"]
    (predicted,) = record["systems"]["sft"]["predicted"]
    assert scores["invalid"] == pytest.approx(100 * predicted.count(None) / len(predicted))
    assert scores["invalid"] > 0


def test_mining_killed_and_run_again_loses_and_doubles_nothing(out, tmp_path):
    common = ("--task", "sp", "--model", "toy", "--train-dialogues", 3, "--eval-dialogues", 1)
    common += ("--out", tmp_path)
    (tmp_path / "sp").mkdir()
    os.symlink(out / "sp" / "sft", tmp_path / "sp" / "sft")
    mine = ("mine_preferences.py", *common, "--max-new-tokens", 6)
    journal = tmp_path / "sp" / "answers.0.jsonl"
    killed = subprocess.Popen(command(*mine), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while killed.poll() is None and not (
        journal.exists() and journal.read_bytes().count(b"\n") > 1
    ):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    with open(journal, "ab") as file:
        file.write(b'{"split": "train", "dialo')  # a line that the kill cut off
    printed = run("mine_preferences.py", *common, "--max-new-tokens", 7, fails=True)
    assert "was begun with another max_new_tokens" in printed
    run(*mine)
    assert lines(tmp_path / "sp" / "pairs.jsonl") == lines(out / "sp" / "pairs.jsonl")


def test_a_kill_between_dialogues_that_are_answered_at_once_changes_nothing(out, tmp_path):
    """Of those that are mined and evaluated at once, the first has its line already."""
    for task in ("sp", "rg"):
        shutil.copytree(out / task / "sft", tmp_path / task / "sft")
    common = ("--model", "toy", "--out", tmp_path, "--max-new-tokens", 6, "--max-tokens", 4096)
    mine = ("mine_preferences.py", *common, "--task", "rg", "--train-dialogues", 2)
    for steps, folder in (
        ((*mine, "--eval-dialogues", 1), tmp_path / "rg"),
        (("evaluate.py", *common, "--eval-dialogues", 3), tmp_path / "eval"),
    ):
        run(*steps)
        whole = (folder / "answers.jsonl").read_bytes()
        begun = b"".join(whole.splitlines(keepends=True)[:2])
        (folder / "answers.jsonl").unlink()
        (folder / "answers.0.jsonl").write_bytes(begun)
        run(*steps)
        assert (folder / "answers.jsonl").read_bytes() == whole


def test_dpo_alone_says_what_it_uses_and_what_would_be_better(tmp_path):
    flags = ("--task", "sp", "--model", "toy", "--out", tmp_path, "--eval-dialogues", 1)
    printed = run("train_dpo.py", *flags, cwd=tmp_path)
    for part in (
        "finds no pairs",
        "mine_preferences.py --task sp",
        "finds no adapter",
        "train_sft.py --task sp",
    ):
        assert part in printed
    assert (tmp_path / "sp" / "dpo" / "adapter_model.safetensors").exists()


def write_pairs(folder, pairs, valid_pairs):
    """Both files of pairs, in TRL's three columns, from (prompt, chosen, rejected) texts."""
    folder.mkdir()
    for name, texts in (("pairs", pairs), ("pairs.valid", valid_pairs)):
        records = [dict(zip(("prompt", "chosen", "rejected"), three)) for three in texts]
        write_lines(folder / f"{name}.jsonl", records)


def train_on(folder, *flags):
    """What train_dpo.py prints about the pairs in a folder."""
    common = ("--task", "rg", "--model", "toy", "--out", folder.parent, "--pairs", folder)
    return run("train_dpo.py", *common, *flags)


def find_problem(monkeypatch, script, *flags):
    """The DescError with which a script on the toy model ends."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr("sys.argv", [script, *map(str, flags), "--model", "toy"])
    with pytest.raises(DescError) as error:
        import_module(script).main()
    return str(error.value)


@pytest.mark.parametrize("share", ["dialogue", "none"])
def test_pairs_of_one_name_in_both_files_keep_their_own_reference(tmp_path, share):
    """No line has an id, so both files have a "line 1" and a "line 2". With two epochs all pairs
    are scored before the first step, and there the policy still is its reference. Training with a
    rate of 0 leaves it there."""
    pairs = [("Hi", "Good morning to you.", "No."), ("I feel low", "Why is that?", "So what?")]
    write_pairs(tmp_path / "pairs", pairs, [("I lost my job", "I am sorry.", "Next!"), *pairs[:1]])
    train_on(tmp_path / "pairs", "--epochs", 2, "--lr", 0, "--share", share)
    for step in lines(tmp_path / "rg" / "dpo" / "metrics.jsonl"):
        loss = step.get("loss", step.get("valid/loss"))
        assert loss == pytest.approx(0.693147, abs=1e-6)


def test_pairs_with_equal_answers_are_left_out_and_counted(tmp_path, monkeypatch):
    good, equal = ("Hi", "Good morning.", "No."), ("Hi", "Yes.", "Yes.")
    write_pairs(tmp_path / "some", [equal, good, good], [good, equal])
    printed = train_on(tmp_path / "some")
    assert "leaves out 1 of 3 pairs: chosen and rejected are the same" in printed
    assert "leaves out 1 of 2 validation pairs" in printed
    assert "2 pairs in 1 steps" in printed

    dpo = (monkeypatch, "train_dpo", "--task", "rg", "--out", tmp_path, "--pairs")
    write_pairs(tmp_path / "all", [equal, equal], [good])
    problem = "chosen and rejected are the same in all 2 pairs; there is nothing to prefer"
    assert find_problem(*dpo, tmp_path / "all") == problem
    write_pairs(tmp_path / "valid", [good], [equal])
    problem = "chosen and rejected are the same in all 1 validation pairs; there is nothing to"
    assert find_problem(*dpo, tmp_path / "valid").startswith(problem)


@pytest.mark.parametrize("estimate", [(), ("--estimate", 2)])
def test_turns_that_are_too_long_end_training_before_the_first_step(
    tmp_path, estimate, monkeypatch
):
    """The estimate and the run say the same: of turns and of pairs, to train or to validate on."""

    def problem(*flags):
        return find_problem(monkeypatch, *flags, "--out", tmp_path, *estimate)

    sft = ("train_sft", "--task", "sp", "--train-dialogues", 2, "--max-length")
    assert problem(*sft, 300).startswith("3 of 13 turns cannot be encoded; the first: 0/1: ")
    assert problem(*sft, 328).startswith(
        "1 of 17 validation turns cannot be encoded; the first: 28/4: "
    )
    short, long = ("Hi", "Hello.", "No."), ("Hi " * 300, "Hello.", "No.")
    write_pairs(tmp_path / "pairs", [short] * 9 + [long], [short])
    write_pairs(tmp_path / "valid", [short], [short, long])
    dpo = ("train_dpo", "--task", "rg", "--max-length", 200, "--pairs")
    assert problem(*dpo, tmp_path / "pairs").startswith(
        "1 of 10 pairs cannot be encoded; the first: line 10: "
    )
    assert problem(*dpo, tmp_path / "valid").startswith(
        "1 of 2 validation pairs cannot be encoded; the first: line 2: "
    )
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.slow
def test_the_quickstart_runs_without_a_warning(tmp_path):
    """The first command of the README runs unchanged, on SmolLM2."""
    environment = os.environ | {"OUT": str(tmp_path), "VENV": sys.prefix}
    done = subprocess.run(
        [ROOT / "runs" / "quickstart.sh"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "warn" not in (done.stdout + done.stderr).lower()
    assert (tmp_path / "report.html").exists()
    assert "done in" in done.stdout
