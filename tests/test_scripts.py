"""pytest tests/test_scripts.py

The four scripts as a user runs them, one after another, on the toy model and the sample."""

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
    """SFT, mining and DPO of both modules, in a folder."""
    out = tmp_path_factory.mktemp("out")
    common = ("--model", "toy", "--out", out, "--eval-dialogues", 1)
    for task in ("sp", "rg"):
        run(
            "train_sft.py",
            "--task",
            task,
            *common,
            "--train-dialogues",
            4,
            "--lr",
            3e-3,
            "--epochs",
            1,
        )
        run(
            "mine_preferences.py",
            "--task",
            task,
            *common,
            "--train-dialogues",
            3,
            "--max-new-tokens",
            6,
        )
        run(
            "train_dpo.py",
            "--task",
            task,
            *common,
            "--lr",
            3e-3,
            "--batch-size",
            8,
            "--eval-every",
            2,
        )
    return out


@pytest.mark.parametrize("task", ["sp", "rg"])
def test_dpo_starts_at_ln_2_and_learns_its_pairs(out, task):
    steps = lines(out / task / "dpo" / "metrics.jsonl")
    assert steps[0]["step"] == 0 and steps[0]["valid/loss"] == pytest.approx(0.693147, abs=1e-6)
    assert (
        steps[1]["loss"] == pytest.approx(0.693147, abs=1e-6) and steps[1]["rewards/margins"] == 0
    )
    assert steps[-1]["valid/loss"] < 0.69 and steps[-1]["valid/rewards/accuracies"] > 0.5
    assert ("valid/nll" in steps[-1]) is (task == "sp")
    best = min(
        step["valid/nll" if task == "sp" else "valid/loss"]
        for step in steps
        if "valid/loss" in step
    )
    assert best < steps[0]["valid/nll" if task == "sp" else "valid/loss"]


@pytest.mark.parametrize("task", ["sp", "rg"])
def test_artefacts_hold_what_made_them(out, task):
    for stage, rank in (("sft", 16), ("dpo", 32), ("dpo/last", 32)):
        config = json.loads((out / task / stage / "config.json").read_text())
        assert config["task"] == task and config["model"] == "toy"
        assert json.loads((out / task / stage / "adapter_config.json").read_text())["r"] == rank
    assert not list(out.rglob("*.tmp")) and not list(out.rglob("answers.*.jsonl"))
    for pair in lines(out / task / "pairs.jsonl"):
        assert (
            pair["chosen"] != pair["rejected"]
            and pair["id"] == f"{task}/{pair['dialogue']}/{pair['turn']}"
        )


def test_evaluation_prints_tables_and_keeps_every_answer(out):
    printed = run(
        "evaluate.py",
        "--model",
        "toy",
        "--out",
        out,
        "--max-new-tokens",
        6,
        "--eval-dialogues",
        2,
        "--show",
        1,
        "--seeds",
        3,
    )
    assert all(
        name in printed
        for name in (
            "| training frequencies |",
            "\n| sft |",
            "\n| dpo |",
            "\nhuman ",
            "| difference to the first | dpo |",
        )
    )
    settings, *records = lines(out / "eval" / "answers.jsonl")
    assert len(records) == 2
    for record in (record["systems"]["dpo"] for record in records):
        turns = len(record["gold"])
        assert [len(record[key]) for key in ("logps", "human", "replies")] == [turns] * 3
        assert len(record["predicted"]) == 3 and all(
            len(drawn) == turns for drawn in record["predicted"]
        )
    results = json.loads((out / "eval" / "results.json").read_text())
    scores = results["systems"]["sft"]
    answers = [record["systems"]["sft"] for record in records]
    right = sum(
        g == p for r in answers for drawn in r["predicted"] for g, p in zip(r["gold"], drawn)
    )
    assert scores["accuracy"] == pytest.approx(100 * right / scores["turns"] / 3)
    assert scores["Q interval"][0] <= scores["Q"] <= scores["Q interval"][1]
    assert (
        results["facts"]["adapters"]["dpo"]["sp"]
        == settings["adapters"]["dpo"]["sp"]
        == adapter_digest(out / "sp" / "dpo")
        and results["facts"]["seeds"] == 3
    )


def test_systems_are_compared_on_the_same_turns(out):
    """A system against itself differs by nothing; with the human strategies accuracy is 100, and no
    planner is scored."""
    adapters = f"sp:{out}/sp/sft,rg:{out}/rg/sft"
    systems = (
        f"one={adapters}",
        f"same={adapters}",
        f"oracle=rg:{out}/rg/sft,sp:gold",
        "base=vanilla:base",
    )
    flags = (
        "--model",
        "toy",
        "--out",
        out,
        "--max-new-tokens",
        6,
        "--eval-dialogues",
        2,
        "--reply-dialogues",
        1,
    )
    run(
        "evaluate.py",
        *flags,
        "--judge",
        "local",
        "--annotator",
        "local",
        "--max-length",
        4096,
        "--systems",
        *systems,
    )
    rows = json.loads((out / "eval" / "results.json").read_text())["systems"]
    same = {key: value for key, value in rows["same"].items() if key.endswith("difference")}
    assert same.keys() > {
        "Q difference",
        "B difference",
        "nll difference",
        "f1 difference",
        "empathy difference",
    }
    assert all(value == [0, 0, 0] for value in same.values())
    assert (
        rows["oracle"]["accuracy"] == 100
        and "nll" not in rows["oracle"]
        and rows["oracle"]["length"] > 0
    )
    assert (
        rows["same"]["empathy wins"] == 50
        and 0 <= rows["base"]["empathy"] <= 5
        and sum(rows["base"]["errors"].values()) == rows["base"]["replies"]
    )
    _, *records = lines(out / "eval" / "answers.jsonl")
    for printed in (record["systems"] for record in records):
        assert printed["one"] == {
            key: value for key, value in printed["same"].items() if key != "verdicts"
        }
    transcript, replies = (
        [line for record in records for line in record["judgements"]],
        rows["one"]["replies"],
    )
    # four systems by four rubrics; three against the first, in two orders
    assert len(transcript) == replies * (4 * 4 + 3 * 4 * 2)
    ratings = (out / "eval" / "ratings.csv").read_text(encoding="utf-8-sig")
    assert ratings.count("empathy judge") == 1
    assert "no row has both" in run(
        "evaluate.py", "--correlate", out / "eval" / "ratings.csv", fails=True
    )


def test_free_decoding_reports_what_could_not_be_parsed(out):
    flags = ("--decode", "free", "--systems", f"sft=sp:{out}/sp/sft", "--reply-dialogues", -1)
    run(
        "evaluate.py",
        "--model",
        "toy",
        "--out",
        out,
        "--max-new-tokens",
        6,
        "--eval-dialogues",
        1,
        *flags,
    )
    _, record = lines(out / "eval" / "answers.jsonl")
    scores = json.loads((out / "eval" / "results.json").read_text())["systems"]["sft"]
    (predicted,) = record["systems"]["sft"]["predicted"]
    assert (
        scores["invalid"] == pytest.approx(100 * predicted.count(None) / len(predicted))
        and scores["invalid"] > 0
    )


def test_mining_killed_and_run_again_loses_and_doubles_nothing(out, tmp_path):
    flags = ("--task", "sp", "--model", "toy", "--train-dialogues", 3, "--eval-dialogues", 1)
    whole = (out / "sp" / "pairs.jsonl").read_bytes()
    (tmp_path / "sp").mkdir()
    os.symlink(out / "sp" / "sft", tmp_path / "sp" / "sft")
    mine = command("mine_preferences.py", *flags, "--max-new-tokens", 6, "--out", tmp_path)
    killed, journal = (
        subprocess.Popen(mine, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL),
        tmp_path / "sp" / "answers.0.jsonl",
    )
    while killed.poll() is None and not (
        journal.exists() and journal.read_bytes().count(b"\n") > 1
    ):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    with open(journal, "ab") as file:
        file.write(b'{"split": "train", "dialo')  # a line that the kill cut off
    printed = run(
        "mine_preferences.py", *flags, "--max-new-tokens", 7, "--out", tmp_path, fails=True
    )
    assert "was begun with another max_new_tokens" in printed
    run("mine_preferences.py", *flags, "--max-new-tokens", 6, "--out", tmp_path)
    mined = lines(tmp_path / "sp" / "pairs.jsonl")
    assert mined == [json.loads(line) for line in whole.splitlines()]


def test_dpo_alone_says_what_it_uses_and_what_would_be_better(tmp_path):
    printed = run(
        "train_dpo.py",
        "--task",
        "sp",
        "--model",
        "toy",
        "--out",
        tmp_path,
        "--eval-dialogues",
        1,
        cwd=tmp_path,
    )
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
    """README's first command, as it stands, on SmolLM2."""
    environment = os.environ | {"OUT": str(tmp_path), "VENV": sys.prefix}
    done = subprocess.run(
        [ROOT / "runs" / "quickstart.sh"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "warn" not in (done.stdout + done.stderr).lower()
    assert (tmp_path / "report.html").exists() and "done in" in done.stdout
