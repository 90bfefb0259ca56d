"""What benchmarks/gpu.py measures: a function for each piece, which reports each figure as soon as
it is there."""

import gc
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from contest import (
    CUDA,
    DEVICE,
    make_model,
    make_tokenizer,
    make_trainer,
    matrix_peak,
    memory,
    now,
    product_weights,
    random_model,
    seconds_of_training,
    shape_of,
    training_dialogues,
    typical,
)
from dpo_step import BETA, encode_pairs, loss_of, make_pairs
from scaling import lay_end_to_end

from desc import attention
from desc.lora import add_adapter
from desc.pairs import Pair
from desc.storage.files import append_line
from desc.training import estimate
from desc.training.speed import compile_layers, recompute_activations
from desc.tree import SHARING, Forest, dense_mask, pack, pad

TURNS = 14  # supporter turns of a dialogue, ESConv's mean
SOME = 32  # pairs, where a pair costs the same without the others
NODES = (512, 1024, 2048, 4096, 8192, 16384) if CUDA else (256, 512)
ROOT = Path(__file__).parents[1]


# ── What a piece does with what it measured ───────────────────────────────────────────────────────


def report(config, record: dict) -> None:
    """Save a result, and print it as one line."""
    record = {"piece": config.piece, "time": round(time.time(), 1), **record}
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    append_line(Path(config.out), record)
    shown = {k: v for k, v in record.items() if k not in ("piece", "time")}
    print(f"{config.piece}: " + ", ".join(f"{k} {show(v)}" for k, v in shown.items()), flush=True)


def show(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, list):  # of lines
        return "\n    " + "\n    ".join(map(str, value))
    return f"{value:,}" if type(value) is int else str(value)


def try_to_measure(config, record: dict, measure: Callable[[], dict]) -> bool:
    """Report `record` and what measure() adds to it, or its error. Returns whether it was
    measured."""
    try:
        record = record | measure()
    except torch.OutOfMemoryError as error:
        record = record | {"error": f"out of memory: {str(error)[:120]}"}
    except Exception as error:  # the next measurement may go well
        where = traceback.format_exc().splitlines()[-12:]
        record = record | {"error": f"{type(error).__name__}: {str(error)[:200]}", "log": where}
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    report(config, record)
    return "error" not in record


def forget_peak() -> None:
    """Count the most memory that is held from here on."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()


def seconds_of(call: Callable, times: int = 1) -> float:
    """Of one of so many calls, which are timed as one stretch."""
    begin = now()
    for _ in range(times):
        call()
    return (now() - begin) / times


# ── DPO ───────────────────────────────────────────────────────────────────────────────────────────


def long_pairs(config) -> list[Pair]:
    """Of some dialogues of TURNS turns. Each begins with another dialogue of the data."""
    dialogues, pairs = training_dialogues(config), []
    for i in range(config.dialogues if config.task == "sp" else -(-config.dialogues // 4)):
        start = i % len(dialogues)
        long = lay_end_to_end(dialogues[start:] + dialogues[:start], TURNS)
        pairs += make_pairs(config, [replace(long, id=str(i))])
    return pairs


def some_of(pairs: list[Pair]) -> list[Pair]:
    """SOME of them, whose mean length is that of all."""
    return typical(pairs, min(SOME, len(pairs)), lambda pair: len(str(pair.prompt)))


def estimated_memory(config, forests: list[Forest], recompute: bool) -> float:
    """What desc says that a step over these forests needs."""
    empty = random_model(config, config.torch_dtype, attention.register(), torch.device("meta"))
    add_adapter(empty, "dpo")
    settings = SimpleNamespace(
        estimate=1, shard="never", torch_dtype=config.torch_dtype, dropout=0.0, recompute=recompute
    )
    return sum(estimate.memory(empty, settings, forests).values())


def our_model(config):
    model = make_model(config, config.torch_dtype, attention.register())
    add_adapter(model, "dpo")
    return model


def rates(config, model, pairs: int, tree: int, sequence: int, seconds: float) -> dict:
    """What is said of ours and of TRL alike."""
    peak = matrix_peak(config.torch_dtype)
    return {
        "pairs": pairs,
        "seconds": seconds,
        "pairs/s": pairs / seconds,
        "tree tokens/s": tree / seconds,
        "sequence tokens/s": sequence / seconds,
        "of peak": 6 * product_weights(model) * tree / seconds / peak,
        "peak": peak,
    }


def measure_ours(config, model, items, share: str, max_tokens: int, recompute: bool) -> dict:
    """DPO over all items, again and again."""
    model.zero_grad()
    plain = [forest for _, forest in pack(items, share, max_tokens)]
    forests = [forest.to(DEVICE) for forest in plain]  # padded, on a GPU
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)

    def step():
        for forest in forests:
            loss_of(model, forest, items).backward()
        optimizer.step()
        optimizer.zero_grad()

    first = seconds_of(step)
    forget_peak()
    seconds = statistics.median([seconds_of(step) for _ in range(config.repeats)])
    held = memory()
    tree = sum(forest.nodes for forest in forests)
    sequence = sum(map(estimate.tokens_without_sharing, plain))
    return rates(config, model, len(items), tree, sequence, seconds) | {
        "padded tokens/s": sum(len(forest.ids) for forest in forests) / seconds,
        "forests": len(forests),
        "largest": max(len(forest.ids) for forest in forests),
        "memory": held,
        "estimate": estimated_memory(config, forests, recompute),
        "first": first,
    }


def measure_dpo(config, contender: str) -> None:
    begin = now()
    model, tokenizer, pairs = our_model(config), make_tokenizer(config), long_pairs(config)
    report(config, {"seconds to make the model": now() - begin})
    ways = {"dialogue": ["dialogue", "recompute"], "unshared": ["pair", "none"]}
    for way in ways.get(contender, [contender]):
        share = way if way in SHARING else "dialogue"
        items = encode_pairs(config, tokenizer, pairs if share == "dialogue" else some_of(pairs))
        if way == "compiled":
            compile_layers(model, DEVICE)
        if way == "recompute":
            recompute_activations(model)
        for size in [2 * max(config.sizes)] if way == "recompute" else config.sizes:
            record = {"task": config.task, "contender": way, "max_tokens": size}

            def measure(share=share, items=items, size=size, way=way):
                return measure_ours(config, model, items, share, size, way == "recompute")

            try_to_measure(config, record, measure)


def measure_trl(config) -> None:
    """The batch sizes on the same pairs, until memory runs out."""
    import peft
    from trl import DPOConfig, DPOTrainer

    base, pairs = make_model(config, config.torch_dtype, "sdpa"), some_of(long_pairs(config))
    rows = [{key: pair.record()[key] for key in ("prompt", "chosen", "rejected")} for pair in pairs]
    items = encode_pairs(config, make_tokenizer(config), pairs)
    tokens = sum(len(s.prompt) + len(s.completion) for item in items for s in item.sequences)

    def train(batch_size) -> float:
        lora = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
        model = peft.get_peft_model(base, lora)
        try:
            with tempfile.TemporaryDirectory() as folder:
                settings = {"output_dir": folder, "beta": BETA}
                trainer = make_trainer(
                    config, (DPOTrainer, DPOConfig), rows, batch_size, model, **settings
                )
                return seconds_of_training(trainer)
        finally:
            model.unload()

    def measure(batch_size) -> dict:
        first = train(batch_size)  # each new length loads kernels
        forget_peak()
        seconds = train(batch_size)
        held = memory()
        found = rates(config, base, len(rows), tokens, tokens, seconds)
        return found | {"memory": held, "first": first}

    for batch_size in config.tries:
        record = {"task": config.task, "contender": "trl", "batch_size": batch_size}
        if not try_to_measure(config, record, lambda size=batch_size: measure(size)):
            break


# ── The other pieces ──────────────────────────────────────────────────────────────────────────────


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
    command += ["-n", "6", "--dist", "loadfile", "tests"]  # as runs/test.sh --cuda does
    with log.open("w") as file:
        tests = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            tests.wait(max(5, config.seconds - 30))
        except subprocess.TimeoutExpired:
            tests.send_signal(signal.SIGINT)
            tests.wait()
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
    """SFT, mining and DPO of both modules, three kinds of DPO at a time, and an evaluation."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(4) as pool:
        common = ["--model", "toy", "--dtype", config.dtype]
        short = ["--max-new-tokens", 6]

        def train_module(task: str) -> list:
            """Its DPO runs, which have begun."""
            flags = [*common, "--task", task, "--eval-dialogues", 1]
            here = [*flags, "--out", folder]
            some = ["--train-dialogues", 4]
            run_script(config, f"{task} sft", "train_sft.py", *here, *some, "--epochs", 1)
            run_script(config, f"{task} mining", "mine_preferences.py", *here, *some, *short)
            dpo = [
                "--batch-size",
                8,
                "--sft",
                f"{folder}/{task}/sft",
                "--pairs",
                f"{folder}/{task}",
            ]
            jobs = [("dpo", ["train_dpo.py", *here])]
            if task == "sp":
                compiled = ["--compile"] if CUDA else ["--recompute"]
                other = [*flags, "--out", f"{folder}/compiled"]
                jobs.append((f"dpo {compiled[0]}", ["train_dpo.py", *other, *compiled]))
                ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 1]
                other = [*flags, "--out", f"{folder}/sharded"]
                sharded = [*ranks, "train_dpo.py", *other, "--shard", "always"]
                jobs.append(("torchrun dpo --shard always", sharded))
            return [
                pool.submit(run_script, config, f"{task} {title}", *command, *dpo)
                for title, command in jobs
            ]

        with ThreadPoolExecutor(2) as modules:
            begun = list(modules.map(train_module, ("sp", "rg")))
        for job in sum(begun, []):
            job.result()
        flags = ["--out", folder, "--eval-dialogues", 1, *short]
        run_script(config, "evaluate", "evaluate.py", *common, *flags)


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


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it said nothing"
