"""pytest tests/test_scripts_judged.py

The scripts with an annotator. It is trained here, or behind an endpoint on loopback."""

import json

from scripts import lines, run


def test_an_annotator_is_trained_and_measured(tmp_path, sample):
    labels = tmp_path / "labels.jsonl"
    with open(labels, "w") as file:
        for dialogue in sample[:10]:
            row = {
                "dialogue": dialogue.id,
                "turn": 0,
                "context": [vars(dialogue.turns[0])],
                "strategy": "Others",
                "response": "I see.",
                "label": "none",
            }
            file.write(json.dumps(row) + "\n")
    common = ("--model", "toy", "--out", tmp_path, "--max-length", 4096)

    train = ("train_sft.py", "--task", "annotate", *common)
    assert "give --labels" in run(*train, fails=True)
    train = (*train, "--labels", labels)
    # Two dialogues of ten are held out, and one of the other eight validates.
    assert "7 turns in 1 steps" in run(*train, "--epochs", 1)
    assert "lower --held-out" in run(*train, "--held-out", 1, fails=True)

    measure = ("mine_preferences.py", "--task", "rg", *common, "--agreement", labels)
    assert "give --annotator" in run(*measure, fails=True)
    measure = (*measure, "--annotator", "local")
    assert "give a larger share" in run(*measure, "--held-out", 0, fails=True)
    printed = run(*measure)
    assert "uses the adapter" in printed
    assert "2 turns of 2 dialogues" in printed and "| none | 2 |" in printed


def answer_as_any_module(body):
    """The server's answer to a call: a strategy, a reply or a judgement.

    Turn 1 is judged a strategy mismatch, and every other turn a template response."""
    is_turn_1 = body["messages"][-1]["content"].count("\nseeker: ") == 1
    error = "strategy mismatch" if is_turn_1 else "template response"
    judgement = {"error": error, "explanation": "So.", "confidence": 0.9}
    return {"sp": "Question", "rg": "Hm.", "annotate": json.dumps(judgement)}[body["model"]]


def test_an_endpoint_answers_and_annotates_and_its_judgements_route(tmp_path, server):
    """The endpoint refuses in the middle. The same command then goes on, and asks for no finished
    answer again. The other task reads the same answers."""
    common = ("--out", tmp_path, "--train-dialogues", 2, "--eval-dialogues", 1)
    common += ("--routing", "paper", "--sampler", "endpoint", "--annotator", "endpoint")
    common += ("--endpoint", server.url)
    mine = ("mine_preferences.py", "--task", "sp", *common)
    assert "--endpoint-model" in run(*mine, fails=True)

    model = ("--endpoint-model", "{task}", "--concurrency", 3)
    mine = (*mine, *model)
    server.script = [answer_as_any_module] * 30 + [401]
    printed = run(*mine, fails=True)
    assert "refuses: 401" in printed and "hush" not in printed
    server.script = [answer_as_any_module]
    del server.calls[30:]
    assert "--max-calls: 5 are spent" in run(*mine, "--max-calls", 5, fails=True)
    del server.calls[30:]
    run(*mine)
    settings, *records = lines(tmp_path / "mined" / "answers.jsonl")
    assert "hush" not in json.dumps(settings)
    assert len({record["dialogue"] for record in records}) == len(records) == 3
    answers = [answer for record in records for answer in record["answers"]]
    assert {answer["reply"] for answer in answers} == {"Hm."}
    assert {answer["judged"]["explanation"] for answer in answers} == {"So."}
    # No answer was paid for twice. The five that --max-calls allowed are no longer counted here.
    calls = len(server.calls)
    assert calls == 3 * len(answers) - 5
    assert not list(tmp_path.rglob("calls.*"))

    printed = run(*mine, "--out", tmp_path / "two", ranks=2)
    count = len(answers)
    unread = f"could not be read: annotate 0 of {count}, rg 0 of {count}, sp 0 of {count}\n"
    assert printed.count(unread) == 1
    # Two ranks record the same as a single one.
    assert lines(tmp_path / "two" / "mined" / "answers.jsonl")[1:] == records
    del server.calls[calls:]

    mine = ("mine_preferences.py", "--task", "rg", *common, *model)
    printed = run(*mine, "--review", 3)
    assert len(server.calls) == calls  # the other task reads the same answers
    of_sp = lines(tmp_path / "sp" / "pairs.jsonl")
    of_rg = lines(tmp_path / "rg" / "pairs.jsonl")
    assert {(pair["turn"], pair["error"]) for pair in of_sp} <= {(1, "strategy mismatch")}
    assert 1 not in {pair["turn"] for pair in of_rg}
    assert {pair["error"] for pair in of_rg} == {"template response"}

    account = json.loads((tmp_path / "rg" / "mining.json").read_text())
    assert account["answers"] == len(of_rg) + sum(account["dropped"].values())
    assert account["answers"] == sum(account["judged"].values())
    assert f"{account['answers']} answers, {len(of_rg)} pairs" in printed

    review = tmp_path / "review.csv"
    text = review.read_text(encoding="utf-8-sig")
    review.write_text(text.replace(",Hm.,\n", ",Hm.,none\n"), encoding="utf-8")
    measure = ("mine_preferences.py", "--task", "rg", "--agreement", review, "--model", "toy")
    assert "3 turns of" in run(*measure)
    labelled = review.read_bytes()
    assert "review.csv would be replaced" in run(*mine, "--review", 3, fails=True)
    assert review.read_bytes() == labelled and len(server.calls) == calls


THOUGHTS = {"finish_reason": "length", "message": {"content": None, "reasoning": "Hm, well"}}


def answer_oddly(body):
    """The answer of any module. On turn 0 a judgement is null, on turn 1 there are only thoughts,
    and on turn 2 it is half a surrogate."""
    turn = body["messages"][-1]["content"].count("\nseeker: ")
    judgements = ['{"error": null}', THOUGHTS, {"message": {"content": "\ud83d"}}]
    judgement = judgements[turn] if turn < 3 else '{"error": "none"}'
    return {"sp": "Question", "rg": "<think>So</think>Hm.", "annotate": judgement}[body["model"]]


def test_odd_answers_are_kept_and_counted_and_stop_no_run(tmp_path, server):
    server.script = [answer_oddly]
    mine = ("mine_preferences.py", "--task", "rg", "--out", tmp_path, "--train-dialogues", 2)
    mine += ("--eval-dialogues", 1, "--routing", "paper", "--sampler", "endpoint")
    mine += ("--annotator", "endpoint", "--endpoint", server.url, "--endpoint-model", "{task}")
    assert "should be a JSON object" in run(*mine, "--template-options", "no", fails=True)
    printed = run(*mine)
    _, *records = lines(tmp_path / "mined" / "answers.jsonl")
    answers = [answer for record in records for answer in record["answers"]]
    assert {answer["reply"] for answer in answers} == {"Hm."}
    labels = [answer["judged"]["error"] for answer in answers]
    assert labels.count("unreadable") == 9 and labels.count("none") == len(labels) - 9
    share = f"{900 / len(labels):.1f} %"
    causes = "3 cut off, 3 no answer of the asked form, 3 odd content"
    assert f"read: annotate 9 of {len(labels)} ({share}: {causes})" in printed
    rooms = [body["max_tokens"] for _, body in server.calls if body["model"] == "annotate"]
    assert rooms.count(1024) == len(labels) and rooms.count(4096) == 3

    calls = len(server.calls)
    assert "could not be read" not in run(*mine)  # because nothing is asked again
    assert len(server.calls) == calls


def test_a_judge_that_thinks_is_told_not_to(tmp_path, server):
    def think(body):
        quiet = body.get("chat_template_kwargs") == {"enable_thinking": False}
        return "4" if quiet else THOUGHTS

    server.script = [think]
    judge = ("evaluate.py", "--systems", "a=sp:base,rg:base", "--model", "toy", "--out", tmp_path)
    judge += ("--eval-dialogues", 1, "--max-new-tokens", 4, "--max-length", 4096)
    judge += ("--judge", "endpoint", "--endpoint", server.url, "--endpoint-model", "m")
    printed = run(*judge, "--judge-tokens", 32)
    count = len(server.calls) // 2
    assert f"read: judge {count} of {count} (100.0 %: {count} cut off)" in printed
    assert {body["max_tokens"] for _, body in server.calls} == {32, 128}
    printed = run(*judge, "--template-options", '{"enable_thinking": false}')
    assert f"read: judge 0 of {count}\n" in printed
    assert len(server.calls) == 3 * count

    ratings = tmp_path / "eval" / "ratings.csv"
    rated = ratings.read_bytes().replace(b"human", b"HUMAN")
    ratings.write_bytes(rated)
    assert "ratings.csv would be replaced" in run(*judge, fails=True)
    assert ratings.read_bytes() == rated and len(server.calls) == 3 * count


def test_what_an_annotator_says_of_labelled_turns_is_paid_for_once(tmp_path, server):
    """Three labelled turns need three calls, of which each run may make two."""
    rows = []
    for turn in range(3):
        context = [{"speaker": "seeker", "text": f"Turn {turn}."}]
        row = {"dialogue": "0", "turn": turn, "context": context, "strategy": "Others"}
        rows.append(json.dumps(row | {"response": "Hm.", "label": "none"}))
    labels = tmp_path / "labels.jsonl"
    labels.write_text("\n".join(rows))
    server.script = ['{"error": "none", "explanation": "So.", "confidence": 0.9}']
    measure = ("mine_preferences.py", "--task", "rg", "--agreement", labels, "--held-out", 1)
    measure += ("--annotator", "endpoint", "--sampler", "endpoint", "--endpoint", server.url)
    measure += ("--endpoint-model", "m", "--max-calls", 2, "--out", tmp_path / "out")
    assert "--max-calls: 2 are spent" in run(*measure, fails=True)
    assert "3 turns of 1 dialogue" in run(*measure)
    assert len(server.calls) == 3
    assert not list(tmp_path.rglob("calls.*"))
