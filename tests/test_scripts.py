"""pytest tests/test_scripts.py

The four scripts as a user runs them, one after another, on the toy model and the sample
dialogues."""

import json
import os
import re
import signal
import subprocess
import time
from dataclasses import fields

import pytest
from scripts import ROOT, command, lines, run

from desc import DescError, cli
from desc.lora import digest


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
    said = run(
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
        name in said
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
        == digest(out / "sp" / "dpo")
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
    for said in (record["systems"] for record in records):
        assert said["one"] == {
            key: value for key, value in said["same"].items() if key != "verdicts"
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
    said = run("mine_preferences.py", *flags, "--max-new-tokens", 7, "--out", tmp_path, fails=True)
    assert "was begun with another max_new_tokens" in said
    run("mine_preferences.py", *flags, "--max-new-tokens", 6, "--out", tmp_path)
    mined = lines(tmp_path / "sp" / "pairs.jsonl")
    assert mined == [json.loads(line) for line in whole.splitlines()]


def test_an_annotator_is_trained_and_measured(tmp_path, sample):
    labelled = [
        {
            "dialogue": d.id,
            "turn": 0,
            "context": [vars(d.turns[0])],
            "strategy": "Others",
            "response": "I see.",
            "label": "none",
        }
        for d in sample[:10]
    ]
    (tmp_path / "labels.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in labelled)
    )
    common = ("--model", "toy", "--out", tmp_path, "--max-length", 4096)
    assert "give --labels" in run("train_sft.py", "--task", "annotate", *common, fails=True)
    said = run(
        "train_sft.py",
        "--task",
        "annotate",
        *common,
        "--labels",
        tmp_path / "labels.jsonl",
        "--epochs",
        1,
    )
    # two dialogues of ten are held out, one of the other eight validates
    assert "7 examples in 1 steps" in said
    assert "lower --held-out" in run(
        "train_sft.py",
        "--task",
        "annotate",
        *common,
        "--labels",
        tmp_path / "labels.jsonl",
        "--held-out",
        1,
        fails=True,
    )
    flags = ("--task", "rg", *common, "--agreement", tmp_path / "labels.jsonl")
    assert "give a larger share" in run(
        "mine_preferences.py", *flags, "--annotator", "local", "--held-out", 0, fails=True
    )
    assert "give --annotator" in run("mine_preferences.py", *flags, fails=True)
    said = run("mine_preferences.py", *flags, "--annotator", "local")
    assert (
        "uses the adapter" in said and "2 turns of 2 dialogues" in said and "| none | 2 |" in said
    )


def test_an_endpoint_answers_and_judges_and_its_word_routes(tmp_path, server):
    """It writes "Hm." under the strategy Question, a template response but for what is said at turn
    1: there the strategy is wrong. It refuses in the middle; the same command then goes on and asks
    for nothing twice."""

    def answer(body):
        user = body["messages"][-1]["content"]
        said = "strategy mismatch" if user.count("\nseeker: ") == 1 else "template response"
        return {
            "sp": "Question",
            "rg": "Hm.",
            "annotate": json.dumps({"error": said, "explanation": "So.", "confidence": 0.9}),
        }[body["model"]]

    common = (
        "--out",
        tmp_path,
        "--train-dialogues",
        2,
        "--eval-dialogues",
        1,
        "--routing",
        "paper",
        "--sampler",
        "endpoint",
    )
    common += (
        "--annotator",
        "endpoint",
        "--endpoint",
        server.url,
        "--endpoint-model",
        "{task}",
        "--concurrency",
        3,
    )
    assert "--endpoint-model" in run(
        "mine_preferences.py", "--task", "sp", *common[:-4], fails=True
    )
    server.script = [answer] * 30 + [401]
    said = run("mine_preferences.py", "--task", "sp", *common, fails=True)
    assert "refuses: 401" in said and "hush" not in said
    server.script = [answer]
    del server.calls[30:]
    assert "--max-calls: 5 are spent" in run(
        "mine_preferences.py", "--task", "sp", *common, "--max-calls", 5, fails=True
    )
    del server.calls[30:]
    run("mine_preferences.py", "--task", "sp", *common)
    settings, *records = lines(tmp_path / "mined" / "answers.jsonl")
    turns = sum(len(record["answers"]) for record in records)
    dialogues = [record["dialogue"] for record in records]
    assert "hush" not in json.dumps(settings) and len(set(dialogues)) == len(dialogues) == 3
    assert all(
        answer["reply"] == "Hm." and answer["judged"]["explanation"] == "So."
        for r in records
        for answer in r["answers"]
    )
    calls = len(server.calls)
    # what the refusal cut off was asked again, what was done was not
    assert 3 * turns <= calls < 3 * turns + 30
    run("mine_preferences.py", "--task", "sp", *common, "--out", tmp_path / "two", ranks=2)
    # two ranks find what one finds
    assert lines(tmp_path / "two" / "mined" / "answers.jsonl")[1:] == records
    del server.calls[calls:]
    said = run("mine_preferences.py", "--task", "rg", *common, "--review", 3)
    assert len(server.calls) == calls  # the other task reads the same answers
    pairs = {task: lines(tmp_path / task / "pairs.jsonl") for task in ("sp", "rg")}
    assert {pair["turn"] for pair in pairs["sp"]} <= {1} and all(
        pair["error"] == "strategy mismatch" for pair in pairs["sp"]
    )
    assert 1 not in {pair["turn"] for pair in pairs["rg"]} and all(
        pair["error"] == "template response" for pair in pairs["rg"]
    )
    found = json.loads((tmp_path / "rg" / "mining.json").read_text())
    assert (
        len(pairs["rg"]) + sum(found["dropped"].values())
        == found["answers"]
        == sum(found["judged"].values())
    )
    assert f"{found['answers']} answers, {len(pairs['rg'])} pairs" in said
    review = (tmp_path / "review.csv").read_text(encoding="utf-8-sig")
    (tmp_path / "review.csv").write_text(review.replace(",Hm.,\n", ",Hm.,none\n"), encoding="utf-8")
    assert "3 turns of" in run(
        "mine_preferences.py",
        "--task",
        "rg",
        "--agreement",
        tmp_path / "review.csv",
        "--model",
        "toy",
    )


def test_dpo_alone_says_what_it_uses_and_what_would_be_better(tmp_path):
    said = run(
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
        assert part in said
    assert (tmp_path / "sp" / "dpo" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "script, flags, says",
    [
        (
            "train_sft.py",
            ("--task", "sp", "--data", "nowhere.json"),
            "nowhere.json: cannot be read",
        ),
        (
            "train_sft.py",
            ("--task", "sp", "--model", "no/such-folder/here"),
            "--model no/such-folder/here: cannot be loaded",
        ),
        (
            "train_sft.py",
            ("--task", "sp", "--model", "toy", "--out", "/proc/nowhere"),
            "/proc/nowhere",
        ),
        (
            "train_dpo.py",
            ("--task", "sp", "--pairs", "nowhere"),
            "nowhere/pairs.jsonl: cannot be read",
        ),
        (
            "train_dpo.py",
            ("--task", "sp", "--model", "toy", "--sft", "nowhere"),
            "finds no adapter in nowhere",
        ),
        (
            "mine_preferences.py",
            ("--task", "sp", "--routing", "all-to-rg", "--annotator", "local"),
            "for --task rg alone",
        ),
        ("mine_preferences.py", ("--task", "sp", "--review", "3"), "--review needs judged answers"),
        ("evaluate.py", ("--systems", "a=rg:out/rg/sft"), "should be NAME=sp:ADAPTER"),
        ("evaluate.py", ("--systems", "a=sp:x,sp:y"), "should be NAME=sp:ADAPTER"),
        ("evaluate.py", ("--systems", "a=sp:base", "a=sp:gold"), "two have the same name"),
        (
            "evaluate.py",
            ("--model", "toy", "--systems", "a=sp:nowhere"),
            "finds no adapter in nowhere",
        ),
        (
            "evaluate.py",
            ("--judge", "endpoint", "--systems", "a=sp:base", "--model", "toy"),
            "an endpoint needs --endpoint",
        ),
        ("evaluate.py", ("--model", "toy", "--out", "nowhere"), "no system to evaluate in nowhere"),
    ],
)
def test_a_users_mistake_ends_in_one_line(script, flags, says):
    said = run(script, *flags, fails=True)
    assert (
        says in said
        and "Traceback" not in said
        and said.startswith("error: ")
        and said.count("\n") == 1
    )


@pytest.mark.parametrize(
    "kind, flag, value, allowed",
    [
        (cli.TrainConfig, "--rank", "0", "at least 1"),
        (cli.TrainConfig, "--eval-dialogues", "-1", "at least 0"),
        (cli.TrainConfig, "--dropout", "1.0", "from 0 to 0.99"),
        (cli.TrainConfig, "--warmup", "nan", "from 0 to 1"),
        (cli.SampleConfig, "--top-p", "0.0", "from 1e-06 to 1"),
    ],
)
def test_a_number_out_of_range_is_an_error(kind, flag, value, allowed, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["script.py", flag, value] + ["--task", "sp"] * (kind is cli.TrainConfig)
    )
    with pytest.raises(DescError, match=f"^{flag} {value}: should be {allowed}$"):
        cli.parse(kind)


def test_an_unknown_flag_is_an_error():
    assert "unrecognized arguments: --learning-rate" in run(
        "train_sft.py", "--task", "sp", "--learning-rate", "1", fails=True
    )


def test_show_example_marks_the_completion():
    said = run("train_dpo.py", "--task", "rg", "--model", "toy", "--show-example")
    chosen, rejected = re.findall("»(.*?)«", said, re.S)
    assert chosen != rejected and all(
        text.endswith("<|end|>") and text.count("<|") == 1 for text in (chosen, rejected)
    )


@pytest.mark.parametrize(
    "script", ["train_sft", "train_dpo", "mine_preferences", "evaluate", "chat"]
)
def test_every_flag_is_read(script, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    module = __import__(script)
    own = (
        kind
        for name, kind in vars(module).items()
        if name.endswith("Config") and kind.__module__ == script
    )
    config = next(own, cli.SampleConfig)  # chat.py adds none
    code = "".join(
        path.read_text() for path in [ROOT / f"{script}.py", *(ROOT / "desc").glob("*.py")]
    )
    assert not [
        f.name
        for f in fields(config)
        if not re.search(rf"config\.{f.name}\b|self\.{f.name}\b", code)
    ]
