"""An estimate of what a training run will cost, from shapes alone: no weight is loaded, and no step
taken."""

from collections.abc import Iterable

import torch

from desc.encoding import Item
from desc.tree import Forest, pack

GB = 1e9


def activation_bytes(shape, nodes: int, dtype: torch.dtype, config) -> float:
    """What a forward pass of `nodes` keeps for the backward, roughly: a decoder layer's inputs of
    its products and of its element-wise steps, of which the norms' are in fp32 too. With
    `recompute` only each layer's input, and one layer's worth."""
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    heads, groups = (
        shape.num_attention_heads,
        getattr(shape, "num_key_value_heads", shape.num_attention_heads),
    )
    # queries and keys before and after rotation, values, output
    attention = head * (4 * heads + 4 * groups)
    layer = (
        dtype.itemsize * (6 * shape.hidden_size + attention + 4 * shape.intermediate_size)
        + 4 * 2 * shape.hidden_size
    )
    if config.dropout:  # an input of its own, and a mask, for each of the seven adapters
        layer += (dtype.itemsize + 1) * (
            5 * shape.hidden_size + heads * head + shape.intermediate_size
        )
    if not config.recompute:
        return nodes * shape.num_hidden_layers * layer
    return nodes * (layer + shape.num_hidden_layers * dtype.itemsize * shape.hidden_size)


def memory(model, config, forests: list[Forest]) -> dict[str, float]:
    """Bytes per rank on `config.estimate` ranks. The model is empty (its weights on the meta
    device), and has its adapters."""
    ranks, dtype = config.estimate, config.torch_dtype
    widest, rows = max(len(f.ids) for f in forests), max(len(f.rows) for f in forests)
    shape = model.config.get_text_config()
    adapters = sum(p.numel() for p in model.parameters() if not p.is_meta)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    units = [
        sum(p.numel() * dtype.itemsize for p in layer.parameters()) for layer in model.model.layers
    ]
    # once if tied
    ends = {
        id(p): p.numel() * dtype.itemsize
        for m in (model.model.embed_tokens, model.lm_head)
        for p in m.parameters()
    }
    return {
        "weights": sum(p.numel() * p.itemsize for p in model.parameters() if p.is_meta) / ranks,
        # the layer at work, the next, and both ends
        "weights gathered": 2 * max(units) + sum(ends.values()) if ranks > 1 else 0,
        "adapters": 4 * adapters / ranks,
        "gradients, optimizer": 12 * trained / ranks,  # fp32: gradient, two moments
        "activations": activation_bytes(shape, widest, dtype, config),
        # and their gradients, in fp32 too
        "logits": rows * shape.vocab_size * (2 * dtype.itemsize + 2 * 4),
    }


def estimate(model, config, batches: Iterable[list[Item]], passes: int) -> str:
    """A table of `memory` and of the tokens of a run over these batches; `passes` counts the
    forwards a forest is read in (DPO: 2)."""
    steps = [pack(items, config.share, config.max_tokens, config.estimate) for items in batches]
    forests = [forest for step in steps for _, forest in step]
    sizes, nodes = memory(model, config, forests), sum(len(f.ids) for f in forests)
    alone = sum(
        int(torch.zeros(f.size).scatter_reduce(0, f.owner, f.depth[f.rows] + 1.0, "amax").sum())
        for f in forests
    )
    lines = [
        f"{name:<22}{size / GB:9.2f} GB"
        for name, size in (sizes | {"together, a rank": sum(sizes.values())}).items()
    ]
    lines += [
        f"steps                 {len(steps):9,}",
        (
            f"tokens of the run     {nodes:9,}   ({alone / nodes:.1f} times as many without sharing"
            " prefixes)"
        ),
        (
            f"tokens read           {nodes * passes:9,}   forwards; the largest forest has"
            f" {max(len(f.ids) for f in forests):,} nodes"
        ),
    ]
    return "\n".join(lines)
