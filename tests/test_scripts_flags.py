"""pytest tests/test_scripts_flags.py

Every flag is read, and every mistake ends in one clear line."""

import json
import math
import re
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from scripts import ROOT, lines, run

from desc import DescError, cli, flags
from desc.prompts import DEFAULT_LAYOUT
from desc.storage.files import write_json

SCRIPTS = ("train_sft", "train_dpo", "mine_preferences", "evaluate", "desc.chat.__main__")
BENCHMARKS = ("contest", "scaling", "planning", "gpu")


@pytest.mark.parametrize(
    "script, command_line, message",
    [
        ("train_sft", "--task sp --data nowhere.json", "nowhere.json: cannot be read"),
        (
            "train_sft",
            "--task sp --model no/such-folder/here",
            "model no/such-folder/here: cannot be loaded",
        ),
        ("train_dpo", "--task sp --pairs nowhere", "nowhere/pairs.jsonl: cannot be read"),
        ("train_dpo", "--task sp --model toy --sft nowhere", "finds no adapter in nowhere"),
        (
            "mine_preferences",
            "--task sp --routing all-to-rg --annotator local",
            "for --task rg alone",
        ),
        ("mine_preferences", "--task sp --review 3", "--review needs judged answers"),
        (
            "mine_preferences",
            "--task sp --sft base --calibrate frequencies",
            "--calibrate is fitted for the SFT planner",
        ),
        ("train_sft", "--task sp --model toy --labels x", "are for --task annotate"),
        (
            "train_sft",
            "--task annotate --model toy --labels x --train-dialogues 2",
            "no --train-dialogues",
        ),
        (
            "evaluate",
            "--model toy --systems a=sp:base --judge local --reply-dialogues -1",
            "--reply-dialogues -1 leaves none",
        ),
        ("evaluate", "--systems a=rg:out/rg/sft", "should be NAME=sp:ADAPTER"),
        ("evaluate", "--systems a=sp:x,sp:y", "should be NAME=sp:ADAPTER"),
        ("evaluate", "--systems a=sp:base a=sp:gold", "two have the same name"),
        ("evaluate", "--model toy --systems a=sp:nowhere", "finds no adapter in nowhere"),
        (
            "evaluate",
            "--judge endpoint --systems a=sp:base --model toy",
            "an endpoint needs --endpoint",
        ),
        ("evaluate", "--model toy --out nowhere", "no system to evaluate in nowhere"),
    ],
)
def test_a_users_mistake_is_named_in_one_line(script, command_line, message, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr("sys.argv", [f"{script}.py", *command_line.split()])
    with pytest.raises(DescError) as error:
        import_module(script).main()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--data", "nowhere.json"), "nowhere.json: cannot be read"),  # a DescError
        (("--model", "toy", "--out", "/proc/nowhere"), "/proc/nowhere"),  # an OSError
    ],
)
def test_a_script_ends_with_that_line_alone(arguments, message):
    printed = run("train_sft.py", "--task", "sp", *arguments, fails=True)
    assert printed.startswith("error: ")
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    "kind, flag, value, allowed",
    [
        (flags.TrainConfig, "--rank", "0", "from 1 to 4096"),
        (flags.TrainConfig, "--eval-dialogues", "-1", "from 0 to 1000000"),
        (flags.TrainConfig, "--alpha", "0.0", "from 1e-06 to 10000"),
        (flags.TrainConfig, "--max-grad-norm", "-1.0", "from 0 to 1000000"),
        (flags.TrainConfig, "--dropout", "1.0", "from 0 to 0.99"),
        (flags.TrainConfig, "--warmup", "nan", "from 0 to 1"),
        (flags.SampleConfig, "--top-p", "0.0", "from 1e-06 to 1"),
    ],
)
def test_a_number_out_of_range_is_an_error(kind, flag, value, allowed, monkeypatch):
    task = ["--task", "sp"] if kind is flags.TrainConfig else []
    monkeypatch.setattr("sys.argv", ["script.py", flag, value, *task])
    with pytest.raises(DescError, match=f"^{flag} {value}: should be {allowed}$"):
        flags.parse(kind)


def test_every_number_of_a_list_is_in_its_range(monkeypatch):
    @dataclass
    class Sizes(flags.Config):
        sizes: list[int] = flags.flag([1, 2], "sizes", at_least=1, at_most=8)

    monkeypatch.setattr("sys.argv", ["script.py", "--sizes", "3", "8"])
    assert flags.parse(Sizes).sizes == [3, 8]
    monkeypatch.setattr("sys.argv", ["script.py", "--sizes", "3", "9"])
    with pytest.raises(DescError, match="^--sizes 9: should be from 1 to 8$"):
        flags.parse(Sizes)


def numbers_of(kind) -> dict[str, type]:
    """The flags of a configuration that hold a number or several: {name: int or float}."""
    numbers = {}
    for name, hint in get_type_hints(kind).items():
        for part in (hint, *get_args(hint)):  # float | None, list[int]
            if part in (int, float):
                numbers[name] = part
    return numbers


@pytest.mark.parametrize("script", (*SCRIPTS, *BENCHMARKS))
def test_every_number_has_two_finite_ends(script, monkeypatch):
    """A new flag without a range fails here. Numbers beyond either end, nan and inf are refused."""
    for folder in (ROOT, ROOT / "benchmarks"):
        monkeypatch.syspath_prepend(str(folder))
    configs = [
        kind
        for kind in vars(import_module(script)).values()
        if isinstance(kind, type) and issubclass(kind, flags.Config)
    ]
    assert configs
    for kind in configs:
        needed = ["--task", "sp"] if issubclass(kind, flags.TaskConfig) else []
        monkeypatch.setattr("sys.argv", ["script.py", *needed])
        flags.parse(kind)  # the defaults are in range
        by_name = {f.name: f for f in fields(kind)}
        for name, number in numbers_of(kind).items():
            low, high = by_name[name].metadata["range"]
            assert low is not None and high is not None, f"--{name} of {kind} has no range"
            assert math.isfinite(low) and math.isfinite(high), f"--{name} of {kind}"
            bad = [low - 1, high + 1, 10**30]
            if number is float:
                bad += ["nan", "inf", "-inf"]
            for value in bad:
                argument = f"--{name.replace('_', '-')}={value}"
                monkeypatch.setattr("sys.argv", ["script.py", *needed, argument])
                with pytest.raises(DescError, match=": should be from "):
                    flags.parse(kind)


def test_an_unknown_flag_is_an_error():
    assert "unrecognized arguments: --learning-rate" in run(
        "train_sft.py", "--task", "sp", "--learning-rate", "1", fails=True
    )


def test_show_example_marks_the_completion():
    printed = run("train_dpo.py", "--task", "rg", "--model", "toy", "--show-example")
    chosen, rejected = re.findall("»(.*?)«", printed, re.S)
    assert chosen != rejected
    for text in (chosen, rejected):
        assert text.endswith("<|end|>")
        assert text.count("<|") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    module = import_module(script)
    own_configs = (
        kind
        for name, kind in vars(module).items()
        if name.endswith("Config") and kind.__module__ == script
    )
    config = next(own_configs, flags.SampleConfig)  # chat has none of its own
    code = "".join(
        path.read_text() for path in [Path(module.__file__), *(ROOT / "desc").rglob("*.py")]
    )
    assert not [
        f.name
        for f in fields(config)
        if not re.search(rf"config\.{f.name}\b|self\.{f.name}\b", code)
    ]


@pytest.mark.parametrize(
    "made_with, flag, given, refused",
    [
        ({"task": "rg", "strategy_at": "turn"}, "strategy_at", "system", True),
        ({"task": "rg", "strategy_at": "turn"}, "strategy_at", "turn", False),
        ({"task": "rg"}, "strategy_at", "turn", True),  # made before there was the flag
        ({"task": "rg"}, "strategy_at", "system", False),
        ({"task": "sp", "strategy_at": "turn"}, "strategy_at", "system", False),
        ({}, "strategy_at", "turn", False),  # an adapter that others made
        ({"task": "sp", "history": "messages"}, "history", "text", True),
        ({"task": "sp", "history": "messages"}, "history", "messages", False),
        ({"task": "sp"}, "history", "messages", True),
        ({"task": "sp"}, "history", "text", False),
        ({"task": "vanilla", "history": "text"}, "history", "messages", False),
        ({}, "history", "messages", False),
    ],
)
def test_an_artefact_with_another_layout_is_refused(made_with, flag, given, refused):
    config = flags.Config(**{flag: given})
    message = f"was made with --{flag.replace('_', '-')}"
    with pytest.raises(DescError, match=message) if refused else nullcontext():
        cli.refuse_other_prompts(config, Path("out/sp/sft"), made_with)


@pytest.mark.parametrize(
    "made_with", [{"task": "sp", "history": "letters"}, {"task": "rg", "strategy_at": ["turn"]}]
)
def test_a_layout_that_no_flag_knows_is_refused(made_with):
    with pytest.raises(DescError, match="out/sp/sft/config.json: knows no Layout"):
        cli.layout_of(Path("out/sp/sft"), made_with, DEFAULT_LAYOUT)


def test_a_planner_that_reads_messages(tmp_path):
    """Every program that makes something takes --history, and refuses what was made with the other
    one."""
    flags_of_all = ("--model", "toy", "--out", tmp_path, "--eval-dialogues", 1)
    common = ("--task", "sp", *flags_of_all)
    train = ("train_dpo.py", *common, "--sft", "base", "--history", "messages")
    assert "sp: was made with --history text; give that flag" in run(*train, fails=True)
    common += ("--history", "messages")
    run("train_sft.py", *common, "--train-dialogues", 2, "--epochs", 1)
    run("mine_preferences.py", *common, "--train-dialogues", 2)
    roles = [message["role"] for message in lines(tmp_path / "sp" / "pairs.jsonl")[-1]["prompt"]]
    assert roles[0] == "system" and roles[1:4] == ["user", "assistant", "user"]
    run("train_dpo.py", *common)


@pytest.mark.parametrize(
    "task, flag, ways, said, planner",
    [
        ("sp", "history", ("text", "messages"), "logps", ""),
        ("rg", "strategy_at", ("turn", "system"), "replies", "sp:gold,"),
    ],
)
def test_an_evaluation_asks_each_adapter_as_it_was_trained(
    task, flag, ways, said, planner, tmp_path
):
    """Systems of both ways are compared in one evaluation. The flag changes only what the base
    model reads."""
    common = ("--model", "toy", "--eval-dialogues", 1)
    training = ("--task", task, "--train-dialogues", 1, "--epochs", 1)
    run("train_sft.py", *common, *training, "--out", tmp_path / ways[0])
    shutil.copytree(tmp_path / ways[0] / task / "sft", tmp_path / ways[1] / task / "sft")
    file = tmp_path / ways[1] / task / "sft" / "config.json"
    write_json(file, json.loads(file.read_text()) | {flag: ways[1]})

    systems = [f"{way}={planner}{task}:{tmp_path / way / task / 'sft'}" for way in ways]
    systems.append(f"base={planner}{task}:base")
    # What the toy writes depends little on what it reads, so it writes more than a few words.
    more = ("--temperature", 0.4, "--max-new-tokens", 24, "--eval-dialogues", 3)
    said_by = {}
    for way in ways:
        given = (f"--{flag.replace('_', '-')}", way, "--out", tmp_path / "eval of" / way)
        run("evaluate.py", *common, *given, *more, "--systems", *systems)
        _, *records = lines(tmp_path / "eval of" / way / "eval" / "answers.jsonl")
        said_by[way] = {
            name: [record["systems"][name][said] for record in records] for name in (*ways, "base")
        }
        results = tmp_path / "eval of" / way / "eval" / "results.json"
        layouts = json.loads(results.read_text())["facts"]["layouts"]
        laid_out = {name: layout[task][flag] for name, layout in layouts.items()}
        assert laid_out == {ways[0]: ways[0], ways[1]: ways[1], "base": way}
    for way in ways:
        assert said_by[ways[0]][way] == said_by[ways[1]][way]
    assert said_by[ways[0]][ways[0]] != said_by[ways[0]][ways[1]]
    assert said_by[ways[0]]["base"] != said_by[ways[1]]["base"]


def test_the_shipped_pairs_have_their_strategy_in_the_last_message(tmp_path):
    for pair in lines(ROOT / "desc" / "data" / "rg" / "pairs.jsonl"):
        assert pair["prompt"][-1]["content"].endswith(
            f"(Strategy of your reply: {pair['strategy']})"
        )
    options = ("--task", "rg", "--model", "toy", "--out", tmp_path, "--strategy-at", "system")
    printed = run("train_dpo.py", *options, fails=True)
    assert "was made with --strategy-at turn; give that flag, or make it again" in printed


def test_pairs_with_the_strategy_in_another_place_are_refused(tmp_path):
    write_json(tmp_path / "config.json", {"task": "rg", "strategy_at": "system"})
    options = ("--task", "rg", "--model", "toy", "--sft", "base", "--pairs", tmp_path)
    printed = run("train_dpo.py", *options, "--out", tmp_path, fails=True)
    assert f"{tmp_path}: was made with --strategy-at system" in printed


def test_own_data_needs_its_own_adapters_and_pairs(tmp_path):
    """A step that failed should not go unnoticed. What the sample does by itself must be asked
    for."""
    data = ("--data", ROOT / "desc" / "data" / "sample.json", "--train-dialogues", 1)
    common = ("--task", "sp", "--model", "toy", "--out", tmp_path, "--eval-dialogues", 1)
    mine = ("mine_preferences.py", *common, *data)
    assert "sp/sft: train it first, or ask for the base model" in run(*mine, fails=True)
    train = ("train_dpo.py", *common, *data[:2])
    assert "sp: first run mine_preferences.py --task sp, or give" in run(*train, fails=True)
    assert not list(tmp_path.rglob("*.jsonl"))

    assert "mines the base model as sp" in run(*mine, "--sft", "base")
    assert "sp/sft: train it first, or ask for the base model" in run(*train, fails=True)
    printed = run(*train, "--sft", "base")
    assert (
        "the reference is the base model" in printed and f"uses the pairs in {tmp_path}" in printed
    )
    assert "data/sp" in run(*train, "--sft", "base", "--pairs", "sample", "--show-example")
