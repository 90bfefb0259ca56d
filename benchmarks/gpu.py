r"""What is worth measuring on a GPU, piece by piece, in the few minutes that one may be at hand.

    python benchmarks/gpu.py                                    a model of Qwen2.5-7B's shape
    python benchmarks/gpu.py --pieces machine,sp.dialogue,sp.trl --seconds 240
    python benchmarks/gpu.py --model toy --out out/try.jsonl    a try, on a CPU too
    python benchmarks/gpu.py --table out/gpu.jsonl              the tables of what was measured

Every piece runs in a process of its own, which a time limit ends, and a piece that fails stops no
other. Each figure is printed and appended to --out as soon as it is measured. The pieces:

    machine                             the GPU, its matrix peak and its copies
    sp.dialogue, rg.dialogue            DPO with --share dialogue, then with --recompute, too
    sp.trl, rg.trl                      TRL + PEFT on some of these pairs, by batch size
    tests                               pytest --cuda
    scripts                             the programs themselves, on the toy model
    replies                             what a generator writes in one dialogue and in several
    sp.compiled, rg.compiled            as the first, with --compile
    profile                             the kernels of one forest, eager and compiled
    attention                           one layer's attention by number of nodes, beside SDPA
    sp.unshared, rg.unshared            DPO with --share pair and none, on some of these pairs

DPO is reference, policy, backward and AdamW's step, in the dtype that the machine multiplies, with
LoRA of rank 16 on all linear layers. The weights are random, and the dialogues are the sample's,
laid end to end to ESConv's mean length. The first pass compiles and is not counted; the median of
--repeats is. Tree tokens are counted without padding. The share of the matrix peak counts 6 FLOP
for each weight of the decoder's linear layers and each tree token, so computing activations again
counts as nothing."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from contest import DEVICE
from gpu_checks import (
    describe_machine,
    measure_attention,
    measure_replies,
    profile_kernels,
    run_scripts,
    run_tests,
)
from gpu_pieces import last_line, measure_dpo, measure_trl, report

from desc import DescError, cli
from desc.flags import MANY, Config, flag, parse
from desc.storage.files import read_lines

LIMITS = {  # seconds that each piece may take
    "machine": 60,
    "sp.dialogue": 150,
    "sp.trl": 150,
    "tests": 300,
    "scripts": 180,
    "replies": 120,
    "sp.compiled": 200,
    "profile": 150,
    "attention": 120,
    "rg.dialogue": 150,
    "rg.trl": 150,
    "sp.unshared": 120,
    "rg.compiled": 200,
    "rg.unshared": 120,
}


@dataclass
class GPUConfig(Config):
    model: str = flag("qwen2.5-7b", "qwen2.5-7b, qwen2.5-0.5b (random weights), toy, smollm2, …")
    out: str = flag("out/gpu.jsonl", "the file that results are appended to, one JSON line each")
    data: str = flag("sample", "sample (shipped) or a file in ESConv's schema")
    split_file: str | None = flag(None, "JSON with the indices of train, valid and test")
    pieces: str = flag(",".join(LIMITS), "which to run, in this order")
    seconds: int = flag(
        900,
        "for all of it: then the piece at work is ended, and no other begins",
        at_least=1,
        at_most=MANY,
    )
    dialogues: int = flag(
        16,
        "of sp, together 16,000 tree tokens; of rg, whose trees are larger, a quarter",
        at_least=1,
        at_most=1000,
    )
    sizes: list[int] = flag(
        [4096, 8192],
        "--max-tokens to measure; with --recompute twice the largest",
        at_least=1,
        at_most=MANY,
    )
    tries: list[int] = flag([1, 2, 4, 8], "TRL's batch sizes to try", at_least=1, at_most=MANY)
    repeats: int = flag(3, "passes over all pairs; the median counts", at_least=1, at_most=1000)
    table: str | None = flag(None, "print the tables of this file of results, and stop")
    piece: str | None = flag(None, "run this one in this process (what the others are started as)")


def run_piece(config) -> None:
    with redirect_stdout(sys.stderr):
        cli.resolve_auto(config, DEVICE)
    torch.manual_seed(config.seed)
    if "." not in config.piece:
        others = {"machine": describe_machine, "tests": run_tests, "scripts": run_scripts}
        others |= {"profile": profile_kernels, "attention": measure_attention}
        others |= {"replies": measure_replies}
        return others[config.piece](config)
    config.task, contender = config.piece.split(".")
    if contender == "trl":
        return measure_trl(config)
    measure_dpo(config, contender)


def start_piece(config, piece: str, limit: float) -> None:
    """Run a piece in a process of its own, for so many seconds at most, and say how it ended."""
    begin = time.monotonic()
    config.piece = piece
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        # A group of its own, so that what it has started ends with it.
        command = [sys.executable, *sys.argv, "--piece", piece, "--seconds", str(int(limit))]
        process = subprocess.Popen(command, stderr=log, process_group=0)
        problem = None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status, problem = None, f"timed out after {limit:.0f} s"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # all have ended
        process.wait()
        log.seek(0)
        text = log.read()
        if status:
            problem = f"status {status}: {last_line(text)}"
        if problem:
            report(config, {"error": problem, "log": text.splitlines()[-25:]})
    print(f"── {piece}: {time.monotonic() - begin:.1f} s", flush=True)


def run_pieces(config) -> None:
    pieces = config.pieces.split(",")
    unknown = [piece for piece in pieces if piece not in LIMITS]
    if unknown:
        raise DescError(f"--pieces {','.join(unknown)}: should be some of {','.join(LIMITS)}")
    begin = time.monotonic()
    for piece in pieces:
        left = config.seconds - (time.monotonic() - begin)
        if left < 5:
            print(f"{piece}: not begun, the time is over", flush=True)
            continue
        start_piece(config, piece, min(LIMITS[piece], left))


def print_tables(path: str) -> None:
    """Of a file of results; of the same measurement done twice the later counts."""
    records = list(read_lines(Path(path)).values())
    machine = {}
    for record in records:
        if record["piece"] == "machine":
            machine |= record
    if "peak" in machine:
        print(
            f"\n{machine['name']}, torch {machine['torch']}, {machine['dtype']}:"
            f" {machine['peak'] / 1e12:.0f} TFLOP/s in matrix products,"
            f" {machine['bytes copied/s (read + written)'] / 1e12:.2f} TB/s in copies"
        )
    dpo = {}
    for record in records:
        if "contender" in record:
            setting = record.get("max_tokens") or record.get("batch_size")
            dpo[record["task"], record["contender"], setting] = record
    if dpo:
        print("\n" + cli.markdown(dpo_lines(dpo)))
    by_nodes = {}
    for record in records:
        if record["piece"] == "attention" and "nodes" in record:
            by_nodes[record["nodes"], record["way"]] = record
    if by_nodes:
        print("\n" + cli.markdown(attention_lines(by_nodes)))
    sys.stdout.flush()


def dpo_lines(records: dict) -> list[list[str]]:
    """A line for each (task, contender, --max-tokens or batch size)."""
    best = {}  # of TRL
    for (task, contender, _), record in records.items():
        if contender == "trl" and "error" not in record:
            best[task] = max(best.get(task, 0), record["pairs/s"])
    lines = [
        ["task", "contender", "pairs/s", "× TRL", "tree tokens/s", "padded", "sequence tokens/s"]
    ]
    lines[0] += ["of peak", "memory", "estimate", "first pass"]
    for (task, contender, setting), record in sorted(records.items()):
        name = f"{contender}, --max-tokens {setting}"
        if contender == "trl":
            name = f"TRL + PEFT, batch size {setting}"
        if "error" in record:
            lines.append([task, name, record["error"].partition(":")[0], *[""] * 8])
            continue
        padded = record.get("padded tokens/s")
        estimated = record.get("estimate")
        lines.append(
            [
                task,
                name,
                f"{record['pairs/s']:.3g}",
                f"{record['pairs/s'] / best[task]:.1f}" if task in best else "",
                f"{record['tree tokens/s']:,.0f}",
                f"{padded:,.0f}" if padded else "",
                f"{record['sequence tokens/s']:,.0f}",
                f"{100 * record['of peak']:.0f} %",
                f"{record['memory'] / 1e9:.1f} GB",
                f"{estimated / 1e9:.1f} GB" if estimated else "",
                f"{record['first']:.0f} s",
            ]
        )
    return lines


def attention_lines(records: dict) -> list[list[str]]:
    """A line for each (nodes, way)."""
    names = ("mask, ms", "forward, ms", "forward + backward, ms")
    lines = [["nodes", "attention", *names]]
    for (nodes, way), record in sorted(records.items()):
        times = [f"{record[name]:.2f}" if name in record else "" for name in names]
        lines.append([f"{nodes:,}", way, *times])
    return lines


def main():
    config = parse(GPUConfig)
    if config.table:
        print_tables(config.table)
    elif config.piece:
        run_piece(config)
    else:
        # `timeout` and the like: the piece at work ends, too, and the tables are printed
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            run_pieces(config)
        finally:
            if Path(config.out).exists():
                print_tables(config.out)


if __name__ == "__main__":
    cli.run(main)
