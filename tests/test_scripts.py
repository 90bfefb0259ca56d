"""pytest tests/test_scripts.py

The four scripts run one after another, as a user runs them, on the toy model and the sample."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from scripts import ROOT, command, lines, run

from desc.storage.adapters import adapter_digest


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
    assert scores["Q interval"][0] <= scores["Q"] <= scores["Q interval"][1]
    digest = adapter_digest(out / "sp" / "dpo")
    assert settings["adapters"]["dpo"]["sp"] == digest
    assert results["facts"]["adapters"]["dpo"]["sp"] == digest
    assert results["facts"]["seeds"] == 3


def test_systems_are_compared_on_the_same_turns(out):
    """A system does not differ from itself. With the human strategies, accuracy is 100 and no planner
    is scored."""
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
    assert all(value == [0, 0, 0] for value in same.values())
    assert rows["oracle"]["accuracy"] == 100
    assert "nll" not in rows["oracle"]
    assert rows["oracle"]["length"] > 0
    assert rows["same"]["empathy wins"] == 50
    assert 0 <= rows["base"]["empathy"] <= 5
    assert sum(rows["base"]["errors"].values()) == rows["base"]["replies"]
    _, *records = lines(out / "eval" / "answers.jsonl")
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
