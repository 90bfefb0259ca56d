"""pytest tests/test_checkpoint.py --slow

A run that is killed and started again ends as if nothing had happened."""

import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
from scripts import command, lines, run

from desc import DescError
from desc.storage.checkpoint import read_checkpoint, write_checkpoint
from desc.storage.files import write_bytes

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
    assert facts["step"] == 15 and facts["best"] == 2.5 and read.keys() == tensors(15).keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors(15).items())
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "00000010.safetensors",
        "00000015.safetensors",
    ]
    write(tmp_path, 12)  # what is later than the newest can only have been damaged
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "00000010.safetensors",
        "00000012.safetensors",
    ]


def test_a_damaged_checkpoint_is_left_aside_and_the_one_before_used(tmp_path, capsys):
    """Cut off at every 20th byte, and with any one of its facts' and tensors' bytes changed."""
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
        assert facts["step"] == 5 and "00000010.safetensors is damaged" in capsys.readouterr().out


def test_nothing_whole_is_an_error(tmp_path):
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


TRAIN = (
    "--task",
    "sp",
    "--model",
    "toy",
    "--eval-dialogues",
    1,
    "--train-dialogues",
    6,
    "--lr",
    3e-3,
    "--batch-size",
    8,
)


def sft(out, *more):
    return (
        "train_sft.py",
        *TRAIN,
        "--epochs",
        2,
        "--eval-every",
        4,
        "--save-every",
        1,
        "--out",
        out,
        *more,
    )


def same_run(one, other):
    """Adapters equal to the bit, the same numbers logged, and no checkpoint left."""
    for folder in ("", "last"):
        a, b = (out / "sp" / "sft" / folder / "adapter_model.safetensors" for out in (one, other))
        assert a.read_bytes() == b.read_bytes()
    logged = [
        [
            {k: v for k, v in record.items() if k != "time"}
            for record in lines(out / "sp" / "sft" / "metrics.jsonl")
        ]
        for out in (one, other)
    ]
    assert (
        logged[0] == logged[1]
        and not list(one.rglob("checkpoints"))
        and not list(one.rglob("*.tmp"))
    )


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
    """At the edge of an epoch, with dropout, and refused with another learning rate in between."""
    process = begin(*sft(tmp_path))
    wait_for_step(process, tmp_path, 3)
    process.send_signal(signal.SIGTERM)
    assert (
        "the same command goes on from there" in process.communicate()[0]
        and process.returncode == 143
    )
    assert "checkpoints was begun with another lr" in run(*sft(tmp_path, "--lr", 1e-3), fails=True)
    assert "from step" in run(*sft(tmp_path))
    same_run(tmp_path, whole)


@pytest.mark.slow
def test_killed_twenty_times_the_run_ends_bit_for_bit(whole, tmp_path):
    """SIGKILL up to a tenth of a second after one to three new checkpoints: every step is saved, so
    that many hit a save; when the last step is near, some hit the end."""
    out, kills, draw = tmp_path / "out", 0, random.Random(0)
    checkpoints = out / "sp" / "sft" / "checkpoints"
    while kills < 20:
        before, process = set(checkpoints.glob("*.safetensors")), begin(*sft(out))
        seen, wanted = set(), draw.randint(1, 3)
        while process.poll() is None and len(seen) < wanted:
            seen |= set(checkpoints.glob("*.safetensors")) - before
            time.sleep(0.001)
        time.sleep(draw.random() * 0.1)
        process.kill()
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            kills += 1
        else:  # it had ended: compare, and begin anew
            same_run(out, whole)
            shutil.rmtree(out)
    run(*sft(out))
    same_run(out, whole)


def test_half_a_file_is_not_left_where_the_disk_is_full(tmp_path, monkeypatch):
    write_bytes(tmp_path / "file", b"before")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_bytes(tmp_path / "file", b"after")
    assert (tmp_path / "file").read_bytes() == b"before" and [
        path.name for path in tmp_path.iterdir()
    ] == ["file"]
