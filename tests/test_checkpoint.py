"""pytest tests/test_checkpoint.py --slow

A run that is killed and started again ends like a run that nothing interrupts."""

import copy
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save
from scripts import ROOT, command, lines, run
from tqdm import tqdm

from desc import DescError
from desc.flags import TrainConfig, training_settings
from desc.lora import add_adapter, lora_layers
from desc.storage.checkpoint import checkpoint_settings, read_checkpoint, write_checkpoint
from desc.storage.files import write_bytes
from desc.training.artefacts import save_artefact
from desc.training.run import Run, keep_best

SETTINGS = {"lr": 0.1, "seed": 0}


def tensors(step):
    return {"A": torch.full((3, 2), float(step)), "exp_avg.A": torch.arange(6.0).view(3, 2) + step}


def write(folder, step, values=None):
    write_checkpoint(
        folder, {"step": step, "best": 2.5, "settings": SETTINGS}, values or tensors(step)
    )


def test_the_newest_is_read_and_two_are_kept(tmp_path):
    assert read_checkpoint(tmp_path, SETTINGS) is None
    for step in (5, 10, 15):
        write(tmp_path, step)
    facts, read = read_checkpoint(tmp_path, SETTINGS)
    assert facts["step"] == 15
    assert facts["best"] == 2.5
    assert read.keys() == tensors(15).keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors(15).items())
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "00000010.safetensors",
        "00000015.safetensors",
    ]
    write(tmp_path, 12)  # A later checkpoint is deleted, because it must have been damaged.
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "00000010.safetensors",
        "00000012.safetensors",
    ]


def test_a_damaged_checkpoint_is_left_aside_and_the_one_before_used(tmp_path, capsys):
    """The newest checkpoint is cut off at every 20th byte. Then each single byte of its facts and
    tensors is changed."""
    for step in (5, 10):
        write(tmp_path, step)
    newest = tmp_path / "00000010.safetensors"
    data = newest.read_bytes()
    damaged = [data[:length] for length in range(0, len(data), 20)]
    changed = [
        *range(data.index(b'{\\"step'), data.index(b"digest")),
        *range(len(data) - 48, len(data)),
    ]
    damaged += [data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :] for i in changed]
    for bad in damaged:
        newest.write_bytes(bad)
        facts, _ = read_checkpoint(tmp_path, SETTINGS)
        assert facts["step"] == 5
        assert "00000010.safetensors is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("settings", ["7", "[]", "[" * 100_000 + "]" * 100_000])
def test_facts_that_are_none_are_left_aside(tmp_path, settings):
    write(tmp_path, 5)
    facts = f'{{"step": 10, "settings": {settings}, "digest": ""}}'
    (tmp_path / "00000010.safetensors").write_bytes(save(tensors(10), {"desc": facts}))
    assert read_checkpoint(tmp_path, SETTINGS)[0]["step"] == 5
    assert checkpoint_settings(tmp_path) == SETTINGS


def test_no_readable_checkpoint_is_an_error(tmp_path):
    write(tmp_path, 5)
    (tmp_path / "00000005.safetensors").write_bytes(b"")
    with pytest.raises(DescError, match="no checkpoint can be read; delete it to start anew"):
        read_checkpoint(tmp_path, SETTINGS)


def test_other_settings_are_refused_by_name(tmp_path):
    write(tmp_path, 5)
    with pytest.raises(
        DescError, match="was begun with another lr, rank: run with the same, or delete it"
    ):
        read_checkpoint(tmp_path, {"lr": 0.2, "seed": 0, "rank": 16})


def test_flags_that_change_no_step_may_differ_from_the_checkpoints(tmp_path):
    """Checkpoints of earlier versions hold all flags that there were. With each of the free ones
    changed they are read; with any other they are refused."""
    begun = TrainConfig(task="sp", dtype="float32")
    settings = {name: value for name, value in asdict(begun).items() if name != "history"}
    write_checkpoint(tmp_path, {"step": 5, "best": 2.5, "settings": settings}, tensors(5))
    free = {"out": "elsewhere", "max_tokens": 512, "recompute": True, "compile": True}
    free |= {"eval_every": 7, "save_every": 9}
    for name, value in free.items():
        config = replace(begun, **{name: value})
        assert read_checkpoint(tmp_path, training_settings(config))[0]["step"] == 5
    others = {"model": "toy", "seed": 1, "dtype": "bfloat16", "max_length": 99, "data": "esconv"}
    others |= {"eval_dialogues": 3, "batch_size": 8, "share": "none", "rank": 8, "alpha": 8}
    others |= {
        "history": "messages",
        "dropout": 0.0,
        "warmup": 0.2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.0,
    }
    others |= {
        "keep": "last",
        "split_file": "split.json",
        "domain": str(ROOT / "examples" / "mathdial.domain.json"),
        "chat_template": str(ROOT / "examples" / "chat_template.jinja"),
    }
    for name, value in others.items():
        config = replace(begun, **{name: value})
        with pytest.raises(DescError, match=f"was begun with another {name}: run with the same"):
            read_checkpoint(tmp_path, training_settings(config))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        write(disk, 5)
        with pytest.raises(OSError, match="No space left"):
            write(disk, 10, {"A": torch.zeros(100_000)})
        assert [path.name for path in disk.iterdir()] == ["00000005.safetensors"]
        assert read_checkpoint(disk, SETTINGS)[0]["step"] == 5
    finally:
        subprocess.run(["umount", disk], check=True)


def sft(out, *flags):
    data = ("--eval-dialogues", 1, "--train-dialogues", 6)
    steps = ("--lr", 3e-3, "--batch-size", 8, "--epochs", 2, "--eval-every", 4, "--save-every", 1)
    return "train_sft.py", "--task", "sp", "--model", "toy", *data, *steps, "--out", out, *flags


def assert_same_run(first, second):
    """The adapters are equal to the bit, and the logged numbers are the same. The first run has
    left no checkpoint."""
    for folder in ("", "last"):
        a, b = (
            out / "sp" / "sft" / folder / "adapter_model.safetensors" for out in (first, second)
        )
        assert a.read_bytes() == b.read_bytes()
    logged = [
        [
            {k: v for k, v in record.items() if k != "time"}
            for record in lines(out / "sp" / "sft" / "metrics.jsonl")
        ]
        for out in (first, second)
    ]
    assert logged[0] == logged[1]
    assert not list(first.rglob("checkpoints"))
    assert not list(first.rglob("*.tmp"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole")
    run(*sft(out))
    return out


def begin(*flags):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(*flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def wait_for_step(process, out, step):
    checkpoint = out / "sp" / "sft" / "checkpoints" / f"{step:08d}.safetensors"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.005)


def test_sigterm_ends_with_a_checkpoint_and_the_same_command_goes_on(whole, tmp_path):
    """The signal comes at the end of an epoch, and there is dropout. In between, another learning
    rate is refused."""
    process = begin(*sft(tmp_path))
    wait_for_step(process, tmp_path, 3)
    process.send_signal(signal.SIGTERM)
    assert "the same command goes on from there" in process.communicate()[0]
    assert process.returncode == 143
    assert "checkpoints was begun with another lr" in run(*sft(tmp_path, "--lr", 1e-3), fails=True)
    assert "from step" in run(*sft(tmp_path))
    assert_same_run(tmp_path, whole)


def test_a_run_that_was_moved_goes_on_with_flags_that_change_no_step(whole, tmp_path):
    """A batch is one dialogue here, which is read as one tree with any --max-tokens. So the last
    adapter is the same to the bit."""
    begun, moved = tmp_path / "begun", tmp_path / "moved"
    process = begin(*sft(begun))
    wait_for_step(process, begun, 3)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    begun.rename(moved)
    flags = ("--max-tokens", 300, "--recompute", "--eval-every", 5, "--save-every", 2)
    assert "from step" in run(*sft(moved, *flags))
    last = "sp/sft/last/adapter_model.safetensors"
    assert (moved / last).read_bytes() == (whole / last).read_bytes()


@pytest.mark.slow
def test_killed_twenty_times_the_run_ends_bit_for_bit(whole, tmp_path):
    """SIGKILL comes up to a tenth of a second after one to three new checkpoints. Every step is
    saved, so many kills hit a save. Near the last step, some hit the end of the run."""
    out = tmp_path / "out"
    checkpoints = out / "sp" / "sft" / "checkpoints"
    draw = random.Random(0)
    kills = 0
    while kills < 20:
        before = set(checkpoints.glob("*.safetensors"))
        process = begin(*sft(out))
        new, enough = set(), draw.randint(1, 3)
        while process.poll() is None and len(new) < enough:
            new |= set(checkpoints.glob("*.safetensors")) - before
            time.sleep(0.001)
        time.sleep(draw.random() * 0.1)
        process.kill()
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            kills += 1
        else:  # The run had ended, so a new one is begun.
            assert_same_run(out, whole)
            shutil.rmtree(out)
    run(*sft(out))
    assert_same_run(out, whole)


def test_half_a_file_is_not_left_if_the_disk_is_full(tmp_path, monkeypatch):
    write_bytes(tmp_path / "file", b"before")

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        write_bytes(tmp_path / "file", b"after")
    assert (tmp_path / "file").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


FAIL_AT_THE_FIRST_STEP = (
    "import runpy, sys\n"
    "from desc import DescError\n"
    "from desc.training import run\n"
    "def clip_and_step(*args):\n"
    "    raise DescError('the first step fails')\n"
    "run.clip_and_step = clip_and_step\n"
    "sys.argv = sys.argv[1:]\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')\n"
)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_finished_artefact_stays_until_another_is_whole(whole, tmp_path):
    """A run with another seed fails at its first step, after it has scored the untrained adapter.
    Run again, it replaces what was there."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    finished = contents(out / "sp" / "sft")
    other = sft(out, "--seed", 1)
    program = [sys.executable, "-c", FAIL_AT_THE_FIRST_STEP, ROOT / other[0], *other[1:]]
    ended = subprocess.run(list(map(str, program)), capture_output=True, text=True, cwd=ROOT)
    assert ended.stderr.splitlines()[-1] == "error: the first step fails"
    shutil.rmtree(out / "sp" / "sft" / "checkpoints")
    assert contents(out / "sp" / "sft") == finished
    run(*other)
    replaced = contents(out / "sp" / "sft")
    assert replaced.keys() == finished.keys()
    assert replaced["adapter_model.safetensors"] != finished["adapter_model.safetensors"]
    assert replaced["metrics.jsonl"] != finished["metrics.jsonl"]


def test_a_score_that_is_not_finite_ends_the_run(tmp_path):
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight])
    begun = Run([[]], {"w": weight}, optimizer, tmp_path, {}, tqdm(disable=True))
    begun.work.mkdir()
    for score in (math.inf, math.nan):
        with pytest.raises(DescError, match="step 0: the validation score is not finite"):
            keep_best(begun, None, None, {"valid/loss": score}, score)
    assert [path.name for path in begun.work.iterdir()] == ["metrics.jsonl"]


def test_weights_that_are_not_finite_are_not_saved(toy, tmp_path):
    model = copy.deepcopy(toy[0])
    add_adapter(model, "sft", rank=2)
    layer = next(iter(lora_layers(model).values()))
    layer.adapters["sft"].B.data[0, 0] = torch.nan
    with pytest.raises(DescError, match="values that are not finite; lower --lr"):
        save_artefact(model, None, tmp_path / "sft", "")
    assert not (tmp_path / "sft").exists()
