"""pytest tests/test_domain.py

Another kind of dialogue than ESConv's: what a domain file may hold, what models then read, and the
example of examples/."""

import json
import re
from pathlib import Path

import pytest
from scripts import ROOT, run

from desc import DescError, cli
from desc.domain import ESCONV, ErrorType, read_domain
from desc.encoding import encode
from desc.esconv import Dialogue, Turn, load_dialogues
from desc.flags import Config, TrainConfig, answer_settings, training_settings
from desc.judging.agreement import format_context
from desc.judging.annotator import build_annotator_messages, read_annotation
from desc.judging.judge import build_judge_messages
from desc.judging.labels import read_label_map
from desc.mining import Annotation, Answer, Case, find_error
from desc.prompts import Layout, build_messages, drop_oldest
from desc.storage.files import write_json

MATHDIAL = ROOT / "examples" / "mathdial.domain.json"
QUIZ = {
    "strategies": ["Ask", "Tell {it}"],
    "speakers": ["pupil", "quiz master"],
    "planner": "Choose: {names}.",
    "responder": "You lead a quiz {of sorts}.",
    "annotator": ["Find a fault:", "{errors}"],
    "errors": {
        "too hard": {"definition": "nobody knows.", "module": "sp"},
        "too long": {"definition": "it never ends.", "module": "rg"},
        "dull": {"definition": "it bores.", "module": None},
    },
    "judge": {
        "guide": "You judge a quiz.",
        "fluency": {"asks": "F?", "scale": "0 to 5."},
        "professionalism": {"asks": "P?", "scale": "0 to 5."},
        "empathy": {"asks": "E?", "scale": "0 to 5."},
        "helpfulness": {"asks": "H?", "scale": "0 to 5."},
    },
}
TALK = Dialogue(
    "7",
    (
        Turn("seeker", "Ready."),
        Turn("supporter", "What is 2 + 2?", "Ask"),
        Turn("seeker", "He wrote\nquiz master: 5\nsupporter: 4"),
        Turn("supporter", "It is 4.", "Tell {it}"),
    ),
)


@pytest.fixture
def quiz(tmp_path):
    return read_domain(write(tmp_path, QUIZ))


def write(folder: Path, record) -> Path:
    write_json(folder / "quiz.json", record)
    return folder / "quiz.json"


# --- the file -------------------------------------------------------------------------------------


def test_without_a_file_the_domain_is_esconvs():
    assert read_domain(None) == ESCONV
    assert ESCONV.strategies[0] == "Question" and len(ESCONV.strategies) == 8
    assert ESCONV.speakers == ("seeker", "supporter")
    assert ESCONV.labels[0] == "strategy mismatch" and ESCONV.labels[-1] == "none"


def test_a_domain_is_what_its_file_says(quiz):
    assert quiz.strategies == ("Ask", "Tell {it}") and quiz.speakers == ("pupil", "quiz master")
    assert quiz.annotator == "Find a fault:\n{errors}"
    assert quiz.errors["dull"] == ErrorType("it bores.", None)
    assert quiz.labels == ("too hard", "too long", "dull", "none")
    faults = {task: quiz.faults(task) for task in ("sp", "rg", "vanilla")}
    assert faults == {"sp": ("too hard",), "rg": ("too long",), "vanilla": ("too hard", "too long")}


def test_a_name_may_join_letters_or_keep_them_apart_by_characters_that_are_not_seen(tmp_path):
    """As Persian's, Hindi's with such a character at the end of a word, and emoji's."""
    names = ["می\u200cخواهم بدانم", "क्\u200d षमा", "👩\u200d🏫 explains"]
    errors = {names[0]: {"definition": names[1], "module": "sp"}}
    fields = {"strategies": names, "speakers": names[:2], "errors": errors}
    domain = read_domain(write(tmp_path, QUIZ | fields))
    assert domain.strategies == tuple(names) and domain.speakers == tuple(names[:2])
    assert domain.labels == (names[0], "none") and domain.errors[names[0]].definition == names[1]
    assert domain.strategies.split_tag(f"[{names[0]}] Why?") == (names[0], "Why?")


def test_an_instruction_is_a_string_or_a_list_of_lines(tmp_path):
    """The judge's guide, too."""
    texts = {
        "planner": "{names}:\n\nChoose.",
        "responder": "Lead.\nAsk.",
        "annotator": "a\n{errors}",
    }
    lines = {name: ["", *text.split("\n")] for name, text in texts.items()}
    guide = "You judge\n a quiz."
    listed = QUIZ | lines | {"judge": QUIZ["judge"] | {"guide": guide.split("\n")}}
    domain = read_domain(write(tmp_path, listed))
    assert domain.judge["guide"] == guide and domain.planner == texts["planner"]
    assert domain == read_domain(
        write(tmp_path, QUIZ | texts | {"judge": QUIZ["judge"] | {"guide": guide}})
    )


BAD = {  # {what is wrong: (fields that replace the good ones, what the line says)}
    "unknown field": ({"strategy": []}, "field 'strategy' is unknown; there are strategies,"),
    "no list": ({"strategies": "Ask"}, "field 'strategies' should be a list, not a string"),
    "one strategy": ({"strategies": ["Ask"]}, "'strategies' needs two or more different names"),
    "a stop that is not read": ({"strategies": ["Ask", "Etc."]}, "stops at their ends"),
    "repeated": ({"strategies": ["Ask", "ask "]}, "'strategies' needs two or more different"),
    "brackets": ({"strategies": ["Ask", "[Tell]"]}, "without square brackets"),
    "number": ({"strategies": ["Ask", 7]}, "strategies: should be a string, not 7"),
    "invisible": ({"strategies": ["Ask", "\u200b"]}, "holds characters that cannot be shown"),
    "joiner first": ({"strategies": ["Ask", "\u200cTell"]}, "that cannot be shown"),
    "joiner last": ({"strategies": ["Ask", "Tell\u200d\u200d"]}, "that cannot be shown"),
    "joiner alone": ({"strategies": ["Ask", "Tell \u200c it"]}, "that cannot be shown"),
    "three speakers": ({"speakers": ["a", "b", "c"]}, "'speakers' needs two different names"),
    "same speakers": ({"speakers": ["Pupil", "pupil"]}, "'speakers' needs two different names"),
    "empty speaker": ({"speakers": ["pupil", " "]}, "speakers: a text is empty"),
    "colon": ({"speakers": ["pupil", "master:"]}, "without colons, line breaks"),
    "line break": ({"speakers": ["pupil", "quiz\nmaster"]}, "without colons, line breaks"),
    "no names": ({"planner": "Choose."}, "field 'planner' lacks {names}, which is filled in"),
    "other field": (
        {"planner": "{names} {strategy}"},
        "field 'planner' has {strategy}, but only {names} is filled in there",
    ),
    "field": ({"responder": "Be {names}"}, "'responder' has {names}, but nothing is filled in"),
    "empty": ({"responder": ["", " "]}, "field 'responder' is empty"),
    "null": ({"responder": None}, "field 'responder' should be a string, not null"),
    "mixed lines": ({"annotator": ["{errors}", 1]}, "'annotator' should be a string, not a list"),
    "no errors": ({"errors": {}}, "field 'errors' is empty; an annotator looks for at least one"),
    "upper case": (
        {"errors": {"Dull": {"definition": "x", "module": None}}},
        "errors: 'Dull' should be another name: in lower case",
    ),
    "none": ({"errors": {"none": {"definition": "x", "module": None}}}, "'none' should be another"),
    "module": (
        {"errors": {"dull": {"definition": "x", "module": "vanilla"}}},
        "errors: 'dull': field 'module' should be \"sp\", \"rg\" or null",
    ),
    "no module": ({"errors": {"dull": {"definition": "x"}}}, "'dull': field 'module' should be"),
    "no definition": (
        {"errors": {"dull": {"module": "sp"}}},
        "errors: 'dull': definition: a text is empty",
    ),
    "no object": ({"errors": {"dull": "x"}}, "errors: 'dull': should be an object, not a string"),
    "rubric": ({"judge": {"guide": "x"}}, "judge: field 'fluency' is missing (it has 'guide')"),
    "no guide": ({"judge": {"fluency": {}}}, "judge: field 'guide' is missing (it has 'fluency')"),
    "empty guide": ({"judge": QUIZ["judge"] | {"guide": [" "]}}, "judge: field 'guide' is empty"),
    "field in a guide": (
        {"judge": QUIZ["judge"] | {"guide": "Judge {names}."}},
        "judge: field 'guide' has {names}, but nothing is filled in there",
    ),
    "own rubric": (
        {"judge": QUIZ["judge"] | {"wit": {"asks": "?", "scale": "!"}}},
        "judge: field 'wit' is unknown; there are guide, fluency,",
    ),
    "no scale": ({"judge": QUIZ["judge"] | {"empathy": {"asks": "?"}}}, "empathy: scale: a text"),
}


@pytest.mark.parametrize("fields, line", BAD.values(), ids=BAD)
def test_what_cannot_be_used_is_named(tmp_path, fields, line):
    path = write(tmp_path, QUIZ | fields)
    with pytest.raises(DescError) as refused:
        read_domain(path)
    assert str(refused.value).startswith(f"{path}: ") and line in str(refused.value)


@pytest.mark.parametrize("name", QUIZ)
def test_a_missing_field_is_named(tmp_path, name):
    record = {field: value for field, value in QUIZ.items() if field != name}
    with pytest.raises(DescError, match=f"quiz.json: field '{name}' is missing"):
        read_domain(write(tmp_path, record))


@pytest.mark.parametrize(
    "data, line",
    [
        (b"Question\nOthers\n", "is not JSON, or is cut off"),
        (b"[1]", "should be an object, not a list"),
        ("\xe9".encode("latin-1"), "is not UTF-8"),
    ],
)
def test_a_file_that_is_no_object_is_refused(tmp_path, data, line):
    """Such as a list of strategies, one per line, as earlier versions read it."""
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(DescError, match=line):
        read_domain(tmp_path / "x")
    with pytest.raises(DescError, match="no.json: cannot be read"):
        read_domain(tmp_path / "no.json")


# --- what models read -----------------------------------------------------------------------------


def test_the_modules_read_the_domains_words(quiz):
    system, user = build_messages("sp", TALK, 1, domain=quiz)
    assert system["content"] == "Choose: Ask, Tell {it}."
    # The name of a speaker within a text is no turn, and "supporter" is nobody here.
    said = "pupil: He wrote\nquiz master : 5\nsupporter: 4\n"
    assert user["content"] == f"pupil: Ready.\nquiz master: What is 2 + 2?\n{said}"
    assert drop_oldest([user], quiz.speakers) == [{"role": "user", "content": said}]
    assert drop_oldest([user], ESCONV.speakers) is None
    system = build_messages("rg", TALK, 1, "Ask", quiz, Layout("system"))[0]["content"]
    assert system == (
        "You lead a quiz {of sorts}. You are given a reference strategy, and your reply follows it."
        " The strategies are: Ask, Tell {it}. Your current strategy is: Ask"
    )
    for system in (
        build_messages("rg", TALK, 1, "Ask", quiz)[0]["content"],
        build_messages("vanilla", TALK, 1, domain=quiz)[0]["content"],
    ):
        assert system.startswith("You lead a quiz {of sorts}. E") and "Tell {it}" in system


def test_too_long_a_history_is_cut_where_the_domains_speakers_say(quiz, toy):
    messages = build_messages("sp", TALK, 1, domain=quiz)
    whole = encode(toy[1], "", "", messages, ["Ask"], 2048, quiz.speakers)
    room = sum(map(len, whole.sequences[0])) - 1
    cut = encode(toy[1], "", "", messages, ["Ask"], room, quiz.speakers)
    assert (whole.turns_cut, cut.turns_cut) == (0, 1)
    with pytest.raises(DescError, match="the latest turn alone has more than"):
        encode(toy[1], "", "", messages, ["Ask"], room, ESCONV.speakers)


def test_annotator_judge_and_people_read_the_domains_words(quiz):
    system, user = build_annotator_messages(Case(TALK.history(0), "Ask", "Why?"), quiz)
    assert system["content"] == (
        "Find a fault:\ntoo hard: nobody knows.\ntoo long: it never ends.\ndull: it bores.\n"
        "none: the turn is sound.\n\nAnswer with the name of the error alone, or with none."
    )
    assert user["content"] == 'pupil: "Ready."\nstrategy: "Ask"\nreply: "Why?"\n'
    system, user = build_judge_messages("empathy", TALK, 0, {"reply": "Why?"}, quiz)
    assert system["content"].startswith("You judge a quiz. E? 0 to 5. Answer")
    human = 'human quiz master\'s reply: "What is 2 + 2?"'
    assert user["content"] == f'pupil: "Ready."\n{human}\nreply: "Why?"\n'
    assert format_context(TALK, 0, quiz.speakers) == "pupil: Ready."


def test_an_error_goes_to_the_module_that_the_domain_says(quiz):
    assert read_annotation("Too long.", quiz.labels).error == "too long"
    assert read_annotation("lack of empathy", quiz.labels).error == "unreadable"
    expected = {"too hard": ("sp", "vanilla"), "too long": ("rg", "vanilla"), "dull": ()}
    for error, tasks in expected.items():
        answer = Answer(0, "Ask", "Hm.", Annotation(error, 1.0))
        for task in ("sp", "rg", "vanilla"):
            found, _ = find_error(task, "paper", TALK.supporter(0), answer, quiz)
            equal = task == "sp"  # the planner chose as people did, so there is no pair
            assert found == (error if task in tasks and not equal else None)


def test_published_labels_are_known_as_far_as_the_domain_has_them(quiz):
    known = read_label_map(None, quiz.labels)
    assert known["N/A"] == "none" and known["too hard"] == "too hard"
    assert "Mismatched Strategy" not in known
    assert read_label_map(None, ESCONV.labels)["Mismatched Strategy"] == "strategy mismatch"


# --- what is made for a domain --------------------------------------------------------------------


def test_a_digest_is_of_what_the_module_reads(tmp_path, quiz):
    """So a judge may be told other words without training anew."""
    others = {"planner": "Pick: {names}", "responder": "Be brief.", "speakers": ["a", "b"]}
    others |= {"strategies": ["Ask", "Tell"], "judge": QUIZ["judge"] | {"guide": "Judge."}}
    readers = {"planner": ["sp"], "responder": ["rg", "vanilla"], "judge": ["judge"]}
    readers |= {"speakers": ["sp", "annotate", "judge"], "strategies": ["sp", "rg", "vanilla"]}
    for name, value in others.items():
        other = read_domain(write(tmp_path, QUIZ | {name: value}))
        modules = ("sp", "rg", "vanilla", "annotate", "judge")
        differing = [each for each in modules if other.digest(each) != quiz.digest(each)]
        assert differing == readers[name]
    # An annotator does not read whose fault an error is.
    moved = {"dull": QUIZ["errors"]["dull"] | {"module": "rg"}}
    other = read_domain(write(tmp_path, QUIZ | {"errors": QUIZ["errors"] | moved}))
    assert other.faults("rg") == ("too long", "dull")
    assert other.digest("annotate") == quiz.digest("annotate")


@pytest.mark.parametrize(
    "made_with, given, refused",
    [
        ({"task": "sp"}, None, None),  # made before there was the flag
        ({"task": "sp"}, "quiz", "was made for another domain than .*quiz.json; give no --domain"),
        (
            {"task": "sp", "domain_digest": "other", "domain": "o.json"},
            None,
            "give --domain o.json",
        ),
        ({"task": "sp", "domain_digest": ESCONV.digest("sp")}, None, None),
        ({"task": "sp", "domain_digest": ["odd"]}, None, "domain than ESConv; make it again"),
        ({"task": "sp", "strategies": "five.txt"}, None, "with --strategies, which --domain has"),
        ({"task": ["odd"]}, "quiz", None),
        ({}, "quiz", None),  # an adapter, or pairs, that others made
    ],
)
def test_an_artefact_of_another_domain_is_refused(tmp_path, made_with, given, refused):
    config = Config(domain=given and str(write(tmp_path, QUIZ)))
    if refused:
        with pytest.raises(DescError, match=f"out/sp/sft: .*{refused}"):
            cli.refuse_other_prompts(config, Path("out/sp/sft"), made_with)
    else:
        cli.refuse_other_prompts(config, Path("out/sp/sft"), made_with)


def test_a_run_goes_on_with_the_same_domain_wherever_its_file_lies(tmp_path):
    (tmp_path / "a").mkdir()
    files = [write(tmp_path, QUIZ), write(tmp_path / "a", QUIZ | {"judge": ESCONV.judge})]
    here, there = (training_settings(TrainConfig(task="sp", domain=str(file))) for file in files)
    assert here == there
    assert here["domain"] != training_settings(TrainConfig(task="sp"))["domain"] is None
    here, there = (answer_settings(Config(domain=str(file)), ["sp", "judge"]) for file in files)
    assert here["domain"]["sp"] == there["domain"]["sp"]
    assert here["domain"]["judge"] != there["domain"]["judge"]


# --- the example ----------------------------------------------------------------------------------

ROWS = [
    {
        "question": "What is 2 + 3? ",
        "student_incorrect_solution": "2 + 3 = 6\n 6",
        "conversation": "Teacher: (generic)Hi Ann, how did you add?|EOM|Ann: On my fingers: one."
        "|EOM|Teacher: (probing)|EOM|Teacher: (focus)Count (again): two,\nthen three."
        "|EOM|Student: 5!",
    },
    {
        "question": "1 + 1?",
        "student_incorrect_solution": "3",
        "conversation": "Student: I say 3|EOM|Teacher: (telling)It is 2",
    },
]


def test_mathdial_becomes_dialogues_of_student_and_teacher(tmp_path, monkeypatch):
    source, target = tmp_path / "test.jsonl", tmp_path / "mathdial.json"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import mathdial

    mathdial.main(str(source), str(target), str(tmp_path / "split.json"))
    first, second = load_dialogues(target, read_domain(MATHDIAL).strategies)
    assert first.turns == (
        Turn("seeker", "The problem: What is 2 + 3?\nMy solution: 2 + 3 = 6\n 6"),
        Turn("supporter", "Hi Ann, how did you add?", "generic"),
        Turn("seeker", "On my fingers: one."),
        Turn("supporter", "Count (again): two,\nthen three.", "focus"),
    )
    assert second.turns == (
        Turn("seeker", "The problem: 1 + 1?\nMy solution: 3\nI say 3"),
        Turn("supporter", "It is 2", "telling"),
    )


def test_mathdial_is_split_by_problem(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import mathdial

    rows = [{"question": str(i // 3)} for i in range(60)]
    split = mathdial.split_by_problem(rows)
    assert {part: len(indices) for part, indices in split.items()} == {
        "train": 48,
        "valid": 6,
        "test": 6,
    }
    assert sorted(sum(split.values(), [])) == list(range(60))
    problems = [{i // 3 for i in indices} for indices in split.values()]
    assert sum(map(len, problems)) == len(set.union(*problems)) == 20


def test_a_planner_of_another_domain_is_trained_mined_aligned_and_evaluated(tmp_path):
    """And its adapter is used with that domain alone."""
    dialogues = []
    for number in range(5):
        said = [("usr", f"{number}?"), ("sys", "Two."), ("usr", "Oh."), ("sys", "Four.")]
        dialog = [{"speaker": speaker, "text": text} for speaker, text in said]
        dialog[1]["strategy"], dialog[3]["strategy"] = "focus", "telling"
        dialogues.append({"dialog": dialog})
    write_json(tmp_path / "data.json", dialogues)
    common = ("--model", "toy", "--out", tmp_path / "out", "--data", tmp_path / "data.json")
    domain = ("--domain", MATHDIAL)
    sp = ("--task", "sp")
    shown = run("train_sft.py", *sp, *common, *domain, "--show-example")
    assert "expert in tutoring" in shown and "student: " in shown and "»focus<" in shown
    run("train_sft.py", *sp, *common, *domain, "--epochs", 1)
    saved = json.loads((tmp_path / "out/sp/sft/config.json").read_text())
    assert saved["domain"] == str(MATHDIAL)
    assert saved["domain_digest"] == read_domain(MATHDIAL).digest("sp")
    run("mine_preferences.py", *sp, *common, *domain)
    (pair, *_) = (tmp_path / "out/sp/pairs.jsonl").read_text().splitlines()
    assert "student: " in pair and "seeker" not in pair
    run("train_dpo.py", *sp, *common, *domain)
    printed = run("evaluate.py", *common, *domain, "--reply-dialogues", -1, "--show", 1)
    assert "\nstudent   " in printed and "| dpo |" in printed
    # ESConv's strategies are not those of the data, so the sample's data is read here.
    refused = run("train_dpo.py", *sp, "--model", "toy", "--out", tmp_path / "out", fails=True)
    assert "was made for another domain than ESConv; give --domain" in refused
    assert str(MATHDIAL) in refused


def test_a_conversation_uses_the_domains_words(tmp_path):
    said = "2 + 2 = 5\n/strategy Question\n/quit\n"
    flags = ("--model", "toy", "--out", tmp_path, "--max-new-tokens", 4)
    printed = run("desc.chat", *flags, "--domain", MATHDIAL, stdin=said)
    assert re.search(r"^teacher \[(focus|probing|telling|generic)\]: ", printed, re.MULTILINE)
    assert "'Question' is no strategy; there are focus, probing, telling, generic" in printed


def test_a_file_of_strategies_is_no_flag_any_more():
    printed = run("train_sft.py", "--task", "sp", "--strategies", "x", fails=True)
    assert "unrecognized arguments: --strategies x" in printed
