"""pytest tests/test_scripts_judged.py

The scripts with an annotator: one that is trained, and one behind an endpoint on loopback."""

import json

from scripts import lines, run


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
    assert "7 turns in 1 steps" in said
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
