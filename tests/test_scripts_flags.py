"""pytest tests/test_scripts_flags.py

Every flag is read, and every mistake ends in one clear line."""

import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
from scripts import ROOT, run

from desc import DescError, flags

SCRIPTS = ("train_sft", "train_dpo", "mine_preferences", "evaluate", "desc.chat.__main__")


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
        (flags.TrainConfig, "--rank", "0", "at least 1"),
        (flags.TrainConfig, "--eval-dialogues", "-1", "at least 0"),
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
