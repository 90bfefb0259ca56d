"""The pieces of benchmarks/gpu.py that compare DPO with TRL, and how a piece reports each figure as
soon as it is there."""

import gc
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
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
from desc.tree import SHARING, Forest, pack

TURNS = 14  # supporter turns of a dialogue, ESConv's mean
SOME = 32  # pairs, where a pair costs the same without the others


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


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it said nothing"


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
