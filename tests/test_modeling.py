"""pytest tests/test_modeling.py

The dtypes that a processor multiplies natively, how a run keeps its dtype, and both names of the
argument that passes a cache."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from scripts import ROOT, run

from desc import cli, flags
from desc.forward import cache_argument
from desc.modeling import load, native_dtype
from desc.storage.checkpoint import checkpoint_settings
from desc.storage.journal import Journal, journal_settings

X86 = {"architecture": "x86_64", "amx_bf16": False, "avx512_bf16": False}


@pytest.mark.parametrize(
    "capabilities, level, dtype",
    [
        (X86 | {"amx_bf16": True}, "AVX512", torch.bfloat16),
        (X86 | {"avx512_bf16": True}, "AVX512", torch.bfloat16),
        (X86, "AVX512", torch.float32),  # Skylake: AVX-512, but no bf16
        (X86, "AVX2", torch.float32),
        (X86 | {"amx_bf16": True}, "AVX2", torch.float32),  # PyTorch was told to use AVX2
        ({"architecture": "aarch64", "bf16": True}, "SVE256", torch.bfloat16),
        ({"architecture": "aarch64", "bf16": False}, "DEFAULT", torch.float32),
    ],
)
def test_a_cpu_computes_in_what_it_multiplies_natively(capabilities, level, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert native_dtype("cpu") == dtype


def test_without_onednn_nothing_uses_bf16_instructions(monkeypatch):
    """A Mac is an example: its processor has such instructions, but PyTorch has no oneDNN there."""
    capabilities = {"architecture": "arm64", "bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert native_dtype("cpu") == torch.float32


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_is_asked_whether_it_emulates(native, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation
    )
    assert native_dtype("cuda:0") == (torch.bfloat16 if native else torch.float32)


def test_load_follows_the_processor(monkeypatch):
    monkeypatch.setattr("desc.modeling.native_dtype", lambda device: torch.float64)
    assert load("toy")[0].dtype == torch.float64
    assert load("toy", torch.float32)[0].dtype == torch.float32


def test_auto_is_replaced_by_what_a_run_was_begun_with(monkeypatch, capsys):
    monkeypatch.setattr(cli, "native_dtype", lambda device: torch.float32)
    printed = []
    for flag, begun in (("auto", {}), ("auto", {"dtype": "bfloat16"}), ("bfloat16", {})):
        config = flags.Config(dtype=flag)
        cli.resolve_auto(config, torch.device("cpu"), begun)
        printed.append((config.torch_dtype, capsys.readouterr().out))
    assert printed == [
        (
            torch.float32,
            "smollm2 computes in float32 on cpu, because bfloat16 would be emulated here\n",
        ),
        (torch.bfloat16, "smollm2 computes in bfloat16 on cpu, as this run was begun\n"),
        (torch.bfloat16, "smollm2 computes in bfloat16 on cpu\n"),
    ]


def test_a_run_that_moves_to_another_machine_keeps_its_dtype(tmp_path):
    """The run was begun in the dtype that this machine would not choose. It stopped after one
    step."""
    other = "float32" if native_dtype("cpu") == torch.bfloat16 else "bfloat16"
    options = ("--task", "sp", "--model", "toy", "--out", tmp_path, "--eval-dialogues", 1)
    options += ("--train-dialogues", 3, "--epochs", 2, "--batch-size", 8)
    checkpoints = tmp_path / "sp" / "sft" / "checkpoints"
    assert checkpoint_settings(checkpoints) == {}
    stop_after_one_step = (
        "import os, runpy, signal, sys\n"
        "from desc.training import run\n"
        "clip_and_step = run.clip_and_step\n"
        "def once(*args):\n"
        "    clip_and_step(*args)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "run.clip_and_step = once\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    program = [sys.executable, "-c", stop_after_one_step, str(ROOT / "train_sft.py")]
    begun = subprocess.run(
        [*program, *map(str, options), "--dtype", other], capture_output=True, text=True, cwd=ROOT
    )
    assert "stopped after step 1" in begun.stdout
    assert checkpoint_settings(checkpoints)["dtype"] == other
    resumed = run("train_sft.py", *options)
    assert f"computes in {other} on cpu, as this run was begun" in resumed
    assert "from step 1 on" in resumed
    config = json.loads((tmp_path / "sp" / "sft" / "config.json").read_text())
    assert config["dtype"] == other


def test_answers_on_another_machine_are_not_asked_for_again(tmp_path):
    """A finished mining run is repeated in its own dtype, so no answer is made again."""
    other = "float32" if native_dtype("cpu") == torch.bfloat16 else "bfloat16"
    options = ("--task", "sp", "--model", "toy", "--out", tmp_path)
    options += ("--train-dialogues", 2, "--eval-dialogues", 1)
    run("mine_preferences.py", *options, "--dtype", other)
    printed = run("mine_preferences.py", *options)
    assert f"computes in {other}" in printed
    assert "3 of 3 dialogues are answered already" in printed


def test_a_journal_knows_what_it_was_begun_with(tmp_path):
    wanted = {"model": "toy", "dtype": "auto"}
    begun = {"model": "toy", "dtype": "float32"}
    assert journal_settings(tmp_path, "answers", wanted) == {}
    Journal(tmp_path, "answers", begun).append({"key": "a"})
    assert journal_settings(tmp_path, "answers", wanted) == begun
    (tmp_path / "answers.0.jsonl").write_text('{"dty')  # a kill cut it off
    assert journal_settings(tmp_path, "answers", wanted) == {}


def test_a_finished_journal_counts_only_if_it_would_be_reused(tmp_path):
    (tmp_path / "answers.jsonl").write_text('{"model": "toy", "dtype": "float32"}\n{"key": "a"}\n')
    same = journal_settings(tmp_path, "answers", {"model": "toy", "dtype": "auto"})
    assert same == {"model": "toy", "dtype": "float32"}
    assert journal_settings(tmp_path, "answers", {"model": "other", "dtype": "auto"}) == {}


def test_both_names_of_the_cache():
    old = SimpleNamespace(forward=lambda input_ids, past_key_values=None: None)
    new = SimpleNamespace(forward=lambda input_ids, cache=None: None)
    assert (cache_argument(old), cache_argument(new)) == ("past_key_values", "cache")
