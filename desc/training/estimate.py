"""An estimate of what a training run will cost, from shapes alone: no weight is loaded, and no step
taken."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from desc.encoding import Item
from desc.forward import ROWS, decoder_blocks
from desc.lora import lora_layers
from desc.training.batches import deal
from desc.training.sharding import outer_modules
from desc.tree import Forest, pack

GB = 1e9


def activation_bytes(model, nodes: int, dtype: torch.dtype, config) -> float:
    """What a forward pass of `nodes` keeps for the backward on a GPU, and the gradients that the
    backward computes first. tests/test_scale.py compares it with what autograd keeps.

    A layer keeps what its norms read, in fp32; queries, attention's output, and keys and values
    repeated for each head (desc.attention.flex); gate, up and what the gate lets through; and what
    its adapters read. With dropout each adapter keeps inputs of its own, and a mask of one byte
    each. With `recompute` a layer keeps its input, and one layer's worth of the rest is needed at a
    time.

    FlexAttention's log-sum-exp and a compiled layer's savings are left out."""
    shape = model.config.get_text_config()
    layers, heads, hidden = shape.num_hidden_layers, shape.num_attention_heads, shape.hidden_size
    inner = getattr(shape, "intermediate_size", None) or 4 * hidden
    width = getattr(shape, "head_dim", None) or hidden // heads
    adapted = lora_layers(model).values()
    adapters = [adapter for linear in adapted for adapter in linear.adapters.values()]
    # the adapters' inner products, and copies of A and B in the base model's dtype
    lora_ranks = sum(len(adapter.A) for adapter in adapters) / layers
    copies = dtype.itemsize * sum(a.A.numel() + a.B.numel() for a in adapters) / layers
    attention = 4 * width * heads
    layer = dtype.itemsize * (attention + 3 * inner + lora_ranks) + 4 * 2 * hidden
    if config.dropout:
        layer += (dtype.itemsize + 1) * sum(linear.in_features for linear in adapted) / layers
    else:  # all of a layer's adapters share its norms' outputs
        layer += dtype.itemsize * (2 * hidden + inner)
    gradients = nodes * dtype.itemsize * (2 * inner + hidden)
    if not config.recompute:
        return layers * (nodes * layer + copies) + gradients
    return nodes * (layer + layers * dtype.itemsize * hidden) + copies + gradients


def bytes_of(module, dtype: torch.dtype) -> int:
    return sum(p.numel() * dtype.itemsize for p in module.parameters())


def memory(model, config, forests: list[Forest]) -> dict[str, float]:
    """Bytes per rank on `config.estimate` ranks, sharded unless --shard is never. The model is
    empty (its weights on the meta device), and has its adapters."""
    is_sharded = config.estimate > 1 and config.shard != "never"
    parts, dtype = config.estimate if is_sharded else 1, config.torch_dtype
    nodes = max(len(forest.ids) for forest in forests)
    targets = max(len(forest.targets) for forest in forests)
    shape = model.config.get_text_config()
    weights = sum(p.numel() * p.itemsize for p in model.parameters() if p.is_meta)
    adapters = sum(p.numel() for p in model.parameters() if not p.is_meta)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    gathered = 0
    if is_sharded:
        # Both ends stay, and the layer at work. What is gathered is there twice while it is copied:
        # the next layer, or at the beginning of the backward both ends. Tied ends are one.
        layer = max(bytes_of(layer, dtype) for layer in decoder_blocks(model))
        outside = {p for module in outer_modules(model) for p in module.parameters(recurse=False)}
        ends = sum(p.numel() for p in outside) * dtype.itemsize
        gathered = ends + max(ends, 2 * layer)
    return {
        "weights": weights / parts,
        "weights gathered": gathered,
        "adapters": 4 * adapters / parts,
        "gradients, optimizer": 12 * trained / parts,  # fp32: the gradient and two moments
        "activations": activation_bytes(model, nodes, dtype, config),
        # and their gradients, and both of some rows in fp32
        "logits": 2 * shape.vocab_size * (targets * dtype.itemsize + min(targets, ROWS) * 4),
    }


def tokens_without_sharing(forest: Forest) -> int:
    """How many tokens its sequences have, read one at a time: each one's deepest node counts its
    length."""
    lengths = torch.zeros(forest.size)
    lengths.scatter_reduce_(0, forest.owner, forest.depth[forest.rows] + 1.0, "amax")
    return int(lengths.sum())


def forwards_in_a_row(step: list[tuple[list[Item], Forest]], ranks: int) -> int:
    """Nodes that a step reads one after another, because ranks read theirs side by side and wait
    for the one that has most."""
    hands = [[len(forest.ids) for _, forest in hand] for hand in deal(step, ranks)]
    return sum(map(max, zip(*hands)))


def estimate(model, config, batches: Iterable[list[Item]], passes: float) -> str:
    """A table of `memory`, and of the tokens of a run over these batches. `passes` counts the
    forwards in which a forest is read, on average over the epochs (DPO in one: 2)."""
    steps = [pack(items, config.share, config.max_tokens, config.estimate) for items in batches]
    forests = [forest for step in steps for _, forest in step]
    sizes = memory(model, config, forests)
    sizes["together, a rank"] = sum(sizes.values())
    nodes = sum(len(forest.ids) for forest in forests)
    largest = max(len(forest.ids) for forest in forests)
    times = sum(map(tokens_without_sharing, forests)) / nodes
    if config.estimate > 1 and config.shard == "auto":
        copied = memory(model, replace(config, shard="never"), forests)
        sizes["if each has a copy"] = sum(copied.values())
    lines = [f"{name:<22}{size / GB:9.2f} GB" for name, size in sizes.items()]
    lines += [
        f"steps                 {len(steps):9,}",
        f"tokens of the run     {nodes:9,}   ({times:.1f} times as many without sharing prefixes)",
        f"tokens read           {round(nodes * passes):9,}   forwards; the largest forest has"
        f" {largest:,} nodes",
    ]
    if config.estimate > 1:
        longest = sum(forwards_in_a_row(step, config.estimate) for step in steps)
        lines.append(
            f"read in a row         {longest:9,}   of these tokens, as ranks wait for each other;"
            f" {nodes / longest:.1f} of {config.estimate} ranks have work"
        )
    return "\n".join(lines)
