"""pytest tests/test_storage.py

Files are whole or not there, a folder has one writer, and what is half an adapter is none."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from copy import deepcopy

import pytest
import torch
from scripts import ROOT, command, run

from desc import DescError, cli
from desc.lora import add_adapter, save_adapter, targeted
from desc.storage import files, zoo
from desc.storage.adapters import adapter_digest, has_adapter
from desc.storage.files import append_line, claim_folder, read_lines, read_records, write_json
from desc.storage.journal import Journal, part_files

HOLDER = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from desc.storage.files import claim_folder\n"
    "claim_folder(Path(sys.argv[1]))\n"
    "print('claimed', flush=True)\n"
    "time.sleep(60)\n"
)


@pytest.fixture
def holder(tmp_path):
    """Another process, which writes in tmp_path / "sft"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "sft"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout.readline() == "claimed\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def held_locks(monkeypatch):
    """The locks that a test takes, which it gives back at its end."""
    locks = []
    monkeypatch.setattr(files, "held_locks", locks)
    yield locks
    for lock in locks:
        lock.close()


def test_a_folder_has_one_writer_until_that_ends(holder, tmp_path, held_locks):
    """Even a killed writer leaves the folder free."""
    with pytest.raises(
        DescError, match=rf"sft: another run writes there \(process {holder.pid} on"
    ):
        claim_folder(tmp_path / "sft")
    claim_folder(tmp_path / "dpo")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    claim_folder(tmp_path / "sft")
    assert len(held_locks) == 2


def test_a_second_training_run_is_refused_and_the_first_goes_on(holder, tmp_path):
    options = ("--task", "sp", "--model", "toy", "--train-dialogues", 2, "--eval-dialogues", 1)
    (tmp_path / "sp").mkdir()
    (tmp_path / "sp" / ".sft.lock").symlink_to(tmp_path / ".sft.lock")
    printed = run("train_sft.py", *options, "--out", tmp_path, fails=True)
    assert f"another run writes there (process {holder.pid}" in printed
    assert not (tmp_path / "sp" / "sft").exists()


def test_half_written_files_of_a_killed_writer_are_deleted(tmp_path, held_locks):
    folder = tmp_path / "sft"
    folder.mkdir()
    (folder / f"config.json.12ab{files.TEMPORARY}").write_text("{")
    (folder / "notes.tmp").write_text("people's")
    claim_folder(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.tmp"]


def test_two_writers_of_one_name_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    """The second write happens while the first is about to be renamed."""
    replace, names = os.replace, []

    def replace_late(temporary, path):
        names.append(temporary)
        if len(names) == 1:
            write_json(path, "second")
        replace(temporary, path)

    monkeypatch.setattr(os, "replace", replace_late)
    write_json(tmp_path / "x.json", "first")
    assert len(set(names)) == 2
    assert json.loads((tmp_path / "x.json").read_text()) == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    """As the scripts print it. The file that was there stays."""
    write_json(tmp_path / "x.json", 1)

    def no_room(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    problems = []
    monkeypatch.setattr(cli, "fail", problems.append)
    for write in (write_json, append_line):
        cli.run(lambda write=write: write(tmp_path / "x.json", 2))
        line, *_ = problems
        problems.clear()
        assert line.startswith(f"{tmp_path / 'x.json'}: the disk is full; what was written before")
    assert json.loads((tmp_path / "x.json").read_text().splitlines()[0]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_names_that_are_not_utf8_are_kept(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / "x.json", {"out": name})
    append_line(tmp_path / "x.jsonl", {"out": name})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["out"] == name
    assert list(read_lines(tmp_path / "x.jsonl").values()) == [{"out": name}]
    out = tmp_path / name
    options = ("--task", "sp", "--model", "toy", "--train-dialogues", 1, "--eval-dialogues", 1)
    run("mine_preferences.py", *options, "--out", out)
    assert json.loads((out / "sp" / "config.json").read_text(encoding="utf-8"))["out"] == str(out)


@pytest.mark.parametrize("text", ['{"a": 1}', '[{"a": 1}]', '{"a": 1}\n{"a": 2}', '{\n"a": 1}'])
def test_a_pipe_is_read_once(text):
    receiving, sending = os.pipe()
    os.write(sending, text.encode())
    os.close(sending)
    try:
        assert read_records(f"/dev/fd/{receiving}")[0] == {"a": 1}
    finally:
        os.close(receiving)


def test_a_journal_touches_only_its_own_parts(tmp_path):
    """Copies that people made beside it are neither read nor deleted."""
    theirs = [
        "answers.backup.jsonl",
        "answers.0.bak.jsonl",
        "answers.01.jsonl",
        "answers.2025-1.jsonl",
    ]
    for name in theirs:
        (tmp_path / name).write_text('{"seed": 9}\n{"key": "b"}\n')
    journal = Journal(tmp_path, "answers", {"seed": 1})
    journal.append({"key": "a"})
    assert [path.name for path in part_files(tmp_path, "answers")] == ["answers.0.jsonl"]
    assert journal.finish(["a"]) == [{"key": "a"}]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted([*theirs, "answers.jsonl"])


@pytest.fixture
def adapter(tmp_path, toy):
    model = deepcopy(toy[0])
    add_adapter(model, "sft", rank=2)
    save_adapter(model, tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_half_an_adapter_is_refused(name, adapter):
    assert has_adapter(adapter) and adapter_digest(adapter)
    (adapter / name).unlink()
    for look in (has_adapter, adapter_digest):
        with pytest.raises(DescError, match="holds half an adapter, adapter_"):
            look(adapter)


def test_an_adapters_digest_depends_on_both_files(adapter):
    digests = {adapter_digest(adapter)}
    settings = json.loads((adapter / "adapter_config.json").read_text())
    write_json(adapter / "adapter_config.json", settings | {"lora_alpha": 99})
    digests.add(adapter_digest(adapter))
    assert len(digests) == 2


def test_patterns_of_adapters_that_never_end_or_match_nothing_are_refused():
    linears = {f"{'a' * 40}.q": torch.nn.Linear(1, 1)}
    begin = time.monotonic()
    with pytest.raises(DescError, match="takes too long to match"):
        targeted(linears, "(a|a)*")
    assert time.monotonic() - begin < 10
    with pytest.raises(DescError, match="is no regular expression"):
        targeted(linears, "(")
    with pytest.raises(DescError, match="matches no linear layer"):
        targeted(linears, ["k"])


def test_errors_are_printable_and_of_a_bearable_length():
    shown = cli.printable("a\x1b[31mb" + "x" * 100_000 + "do this")
    assert shown.startswith("a\ufffd[31mb") and shown.endswith("do this")
    assert len(shown) < 2100


def test_an_error_begins_on_a_line_of_its_own(tmp_path):
    """The bar is open when the error comes."""
    code = (
        "from desc import DescError, cli\n"
        "def main():\n"
        "    bar = cli.progress(None, 10, 'title', 'units')\n"
        "    bar.update()\n"
        "    raise DescError('such and such')\n"
        "cli.run(main)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "error: such and such"


@pytest.mark.parametrize(
    "raised",
    [
        "MemoryError()",
        "torch.OutOfMemoryError('CUDA out of memory')",
        'RuntimeError("DefaultCPUAllocator: can\'t allocate memory: you tried to allocate")',
    ],
)
def test_out_of_memory_names_the_flags_that_help(raised):
    code = f"import torch\nfrom desc import cli\ndef main():\n    raise {raised}\ncli.run(main)\n"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: out of memory.") and "--max-tokens" in line


def test_out_with_a_tilde_is_the_home(tmp_path):
    environment = os.environ | {"HOME": str(tmp_path), "DESC_CACHE": str(zoo.cache_folder())}
    options = ("--task", "sp", "--model", "toy", "--train-dialogues", "1", "--eval-dialogues", "1")
    subprocess.run(
        command("mine_preferences.py", *options, "--out=~/x"), env=environment, check=True, cwd=ROOT
    )
    assert (tmp_path / "x" / "sp" / "pairs.jsonl").exists()
