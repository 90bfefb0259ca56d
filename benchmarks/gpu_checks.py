"""The other pieces of benchmarks/gpu.py: the machine, the tests, the programs, replies, the
kernels."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from contest import CUDA, DEVICE, make_tokenizer, matrix_peak, memory, now, shape_of
from dpo_step import encode_pairs, loss_of
from gpu_pieces import (
    forget_peak,
    last_line,
    long_pairs,
    our_model,
    report,
    seconds_of,
    try_to_measure,
)

from desc import attention
from desc.sampling import generate
from desc.training.speed import compile_layers
from desc.tree import Forest, dense_mask, pack, pad

NODES = (512, 1024, 2048, 4096, 8192, 16384) if CUDA else (256, 512)
ROOT = Path(__file__).parents[1]


def describe_machine(config) -> None:
    record = {
        "name": torch.cuda.get_device_name() if CUDA else "CPU",
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if CUDA:
        import triton

        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
        properties = torch.cuda.get_device_properties(0)
        record |= {
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
            "driver, power": subprocess.run(query, capture_output=True, text=True).stdout.strip(),
        }
    report(config, record)
    peak = matrix_peak(config.torch_dtype)
    count = 2**30 if CUDA else 2**24
    source = torch.randint(256, (count,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    seconds_of(lambda: target.copy_(source), 3)
    copied = 2 * count / seconds_of(lambda: target.copy_(source), 20)
    report(config, {"dtype": config.dtype, "peak": peak, "bytes copied/s (read + written)": copied})


def run_tests(config) -> None:
    """pytest; it is asked to stop before its time is over, so that it says what it found."""
    log = Path(config.out).with_suffix(".tests.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "--cuda", "-v", "--tb=short", "--durations=8"]
    command += ["-n", "6", "--dist", "worksteal", "tests"]  # as runs/test.sh --cuda does
    with log.open("w") as file:
        tests = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            tests.wait(max(5, config.seconds - 30))
        except subprocess.TimeoutExpired:
            tests.send_signal(signal.SIGINT)
            try:
                tests.wait(20)
            except subprocess.TimeoutExpired:
                tests.kill()
    lines = log.read_text(errors="replace").splitlines()
    last = lines[-1] if lines else ""
    found = re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)
    counts = {name: int(number) for number, name in found}
    report(config, counts | {"status": tests.returncode, "last lines": lines[-40:]})


def run_script(config, title: str, *command) -> None:
    """Report how a program ended."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True
    )
    record = {"script": title, "seconds": time.perf_counter() - begin}
    if done.returncode:
        record |= {"error": last_line(done.stderr), "log": done.stderr.splitlines()[-15:]}
    report(config, record)


def run_scripts(config) -> None:
    """SFT, mining, DPO and evaluation of both modules, and meanwhile DPO compiled and sharded."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(4) as pool:
        common = ["--model", "toy", "--dtype", config.dtype, "--eval-dialogues", 1]
        short = ["--max-new-tokens", 6]

        def train_module(task: str) -> None:
            flags = [*common, "--task", task, "--out", folder]
            some = ["--train-dialogues", 4]
            run_script(config, f"{task} sft", "train_sft.py", *flags, *some, "--epochs", 1)
            run_script(config, f"{task} mining", "mine_preferences.py", *flags, *some, *short)
            run_script(config, f"{task} dpo", "train_dpo.py", *flags, "--batch-size", 8)

        sample = ["train_dpo.py", *common, "--task", "sp", "--sft", "base", "--pairs", "sample"]
        sample += ["--batch-size", 8, "--out"]
        compiled = "--compile" if CUDA else "--recompute"
        ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 1]
        sharded = [*ranks, *sample, f"{folder}/sharded", "--shard", "always"]
        others = [
            [f"dpo {compiled}", *sample, f"{folder}/compiled", compiled],
            ["torchrun dpo --shard always", *sharded],
        ]
        modules = [pool.submit(train_module, task) for task in ("sp", "rg")]
        jobs = [pool.submit(run_script, config, *other) for other in others]
        for job in modules:
            job.result()
        run_script(config, "evaluate", "evaluate.py", *common, *short, "--out", folder)
        for job in jobs:
            job.result()


def profile_kernels(config) -> None:
    """Which kernels one forest's reference, policy and backward spend their time in."""
    from torch.profiler import ProfilerActivity, profile

    config.task = "sp"
    model = our_model(config)
    items = encode_pairs(config, make_tokenizer(config), long_pairs(config))
    members, forest = pack(items, "dialogue", max(config.sizes))[0]
    forest = forest.to(DEVICE)

    def step():
        loss_of(model, forest, members).backward()

    for way in ("eager", "compiled") if CUDA else ("eager",):
        if way == "compiled":
            compile_layers(model, DEVICE)
        first = seconds_of(step, 2)
        seconds = seconds_of(step, 2)
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if CUDA else [])
        with profile(activities=activities) as profiled:
            step()
            now()
        kernels, busy = list_kernels(profiled.key_averages())
        record = {"way": way, "nodes": len(forest.ids), "first": first, "seconds": seconds}
        report(config, record | {"seconds in kernels": busy, "kernels": kernels})


def measure_replies(config) -> None:
    """What a generator writes at all turns of a dialogue, which grow together, and of several
    dialogues at once."""
    config.task = "rg"
    model, tokenizer = our_model(config), make_tokenizer(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id  # as a trained model has it
    prompts = {}  # by dialogue
    for item in encode_pairs(config, tokenizer, long_pairs(config)):
        prompts.setdefault(item.dialogue, []).append(item.sequences[0].prompt)
    settings = SimpleNamespace(temperature=0.7, top_p=0.95, max_new_tokens=32)
    for count in sorted({min(count, len(prompts)) for count in (1, 2, 4, 8, 16)}):
        groups = list(prompts.values())[:count]
        for repeat in (1, 2):  # the first loads kernels

            def measure(groups=groups):
                forget_peak()
                begin = now()
                written = generate(model, groups, settings, list(range(len(groups))))
                tokens = sum(len(ids) for texts in written for ids in texts)
                seconds = now() - begin
                return {
                    "tokens": tokens,
                    "seconds": seconds,
                    "tokens/s": tokens / seconds,
                    "memory": memory(),
                }

            try_to_measure(config, {"dialogues": len(groups), "repeat": repeat}, measure)


def list_kernels(averages) -> tuple[list[str], float]:
    """(Of the 15 kernels that took longest a line each, the seconds of all.)"""
    times = []
    for event in averages:
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu == CUDA and not event.is_user_annotation:
            micros = event.self_device_time_total if CUDA else event.self_cpu_time_total
            times.append((micros, event.count, event.key))
    total = sum(micros for micros, _, _ in times)
    lines = [f"{'ms':>9}  {'share':>5}  {'calls':>6}  kernel"]
    for micros, count, name in sorted(times, reverse=True)[:15]:
        share = 100 * micros / max(total, 1)
        lines.append(f"{micros / 1e3:9.2f}  {share:4.1f}%  {count:6}  {name[:100]}")
    return lines, total / 1e6


def first_nodes(forest: Forest, count: int) -> Forest:
    """In depth-first order the first nodes are a forest of their own; its targets do not matter."""
    return replace(
        forest,
        ids=forest.ids[:count],
        depth=forest.depth[:count],
        end=forest.end[:count].clamp(max=count),
    )


def measure_attention(config) -> None:
    """One layer's attention on the first nodes of a planner's forest: milliseconds."""
    config.task = "sp"
    shape = shape_of(config).get_text_config()
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    width = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    items = encode_pairs(config, make_tokenizer(config), long_pairs(config))
    ((_, whole),) = pack(items, "dialogue", 10**9)
    # what Transformers' SDPA asks of a layer
    module = SimpleNamespace(num_key_value_groups=heads // groups, training=True)

    def dense(forest):
        return dense_mask(forest)[None, None]

    ways = {"flex": attention.flex_mask, "sdpa": dense} if CUDA else {"blocks": dense}
    for nodes in NODES:
        forest = pad(first_nodes(whole, nodes), attention.FLEX_BLOCK)
        moved = [getattr(forest, name).to(DEVICE) for name in ("ids", "depth", "end")]
        forest = replace(forest, ids=moved[0], depth=moved[1], end=moved[2])
        q, k, v = (
            torch.randn(1, n, len(forest.ids), width, device=DEVICE, dtype=config.torch_dtype)
            for n in (heads, groups, groups)
        )
        for way, make_mask in ways.items():
            if way == "sdpa" and nodes > 8192:
                continue

            def measure(make_mask=make_mask, forest=forest, q=q, k=k, v=v):
                return time_attention(module, make_mask, forest, q, k, v)

            try_to_measure(config, {"nodes": nodes, "way": way}, measure)


def time_attention(module, make_mask: Callable, forest: Forest, q, k, v) -> dict:
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    mask, scaling = make_mask(forest), q.shape[-1] ** -0.5
    upstream = torch.randn_like(q.transpose(1, 2))

    def forward():
        with torch.no_grad():
            attention.tree_attention(module, q, k, v, mask, scaling)

    def both():
        attention.tree_attention(module, *leaves, mask, scaling)[0].backward(upstream)

    times = 20 if CUDA else 1
    result = {"first": seconds_of(forward) + seconds_of(both)}  # compiles
    calls = {"mask": lambda: make_mask(forest), "forward": forward, "forward + backward": both}
    for name, call in calls.items():
        seconds_of(call, 3)
        result[f"{name}, ms"] = 1000 * seconds_of(call, times)
    return result
