"""An estimate of what a training run will cost, from shapes alone: no weight is loaded, and no step
taken."""

from collections.abc import Iterable

import torch

from desc.encoding import Item
from desc.forward import decoder_blocks
from desc.lora import lora_layers
from desc.training.sharding import outer_modules
from desc.tree import Forest, pack

GB = 1e9


def activation_bytes(model, nodes: int, dtype: torch.dtype, config) -> float:
    """What a forward pass of `nodes` keeps for the backward, roughly: of each decoder layer the
    inputs of its products and of its element-wise steps, those of the norms in fp32, too.

    With `recompute` it keeps the input of each layer, and one layer's worth of the rest."""
    shape = model.config.get_text_config()
    heads, hidden = shape.num_attention_heads, shape.hidden_size
    inner = getattr(shape, "intermediate_size", None) or 4 * hidden
    groups = getattr(shape, "num_key_value_heads", heads)
    width = getattr(shape, "head_dim", None) or hidden // heads
    # queries and keys before and after rotation, values, output
    attention = width * (4 * heads + 4 * groups)
    layer = dtype.itemsize * (6 * hidden + attention + 4 * inner) + 4 * 2 * hidden
    if config.dropout:  # an input and a mask for each adapter
        inputs = sum(linear.in_features for linear in lora_layers(model).values())
        layer += (dtype.itemsize + 1) * inputs / shape.num_hidden_layers
    if not config.recompute:
        return nodes * shape.num_hidden_layers * layer
    return nodes * (layer + shape.num_hidden_layers * dtype.itemsize * hidden)


def bytes_of(module, dtype: torch.dtype) -> int:
    return sum(p.numel() * dtype.itemsize for p in module.parameters())


def memory(model, config, forests: list[Forest]) -> dict[str, float]:
    """Bytes per rank on `config.estimate` ranks. The model is empty (its weights on the meta
    device), and has its adapters."""
    ranks, dtype = config.estimate, config.torch_dtype
    nodes = max(len(forest.ids) for forest in forests)
    targets = max(len(forest.targets) for forest in forests)
    shape = model.config.get_text_config()
    weights = sum(p.numel() * p.itemsize for p in model.parameters() if p.is_meta)
    adapters = sum(p.numel() for p in model.parameters() if not p.is_meta)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    gathered = 0
    if ranks > 1:  # the layer at work, the next one, and both ends, which are one if they are tied
        gathered = 2 * max(bytes_of(layer, dtype) for layer in decoder_blocks(model))
        outside = {p for module in outer_modules(model) for p in module.parameters(recurse=False)}
        gathered += sum(p.numel() for p in outside) * dtype.itemsize
    return {
        "weights": weights / ranks,
        "weights gathered": gathered,
        "adapters": 4 * adapters / ranks,
        "gradients, optimizer": 12 * trained / ranks,  # fp32: the gradient and two moments
        "activations": activation_bytes(model, nodes, dtype, config),
        # and their gradients, both in fp32, too
        "logits": targets * shape.vocab_size * (2 * dtype.itemsize + 2 * 4),
    }


def tokens_without_sharing(forest: Forest) -> int:
    """How many tokens its sequences have, read one at a time: each one's deepest node counts its
    length."""
    lengths = torch.zeros(forest.size)
    lengths.scatter_reduce_(0, forest.owner, forest.depth[forest.rows] + 1.0, "amax")
    return int(lengths.sum())


def estimate(model, config, batches: Iterable[list[Item]], passes: int) -> str:
    """A table of `memory`, and of the tokens of a run over these batches. `passes` counts the
    forwards in which a forest is read (DPO: 2)."""
    steps = [pack(items, config.share, config.max_tokens, config.estimate) for items in batches]
    forests = [forest for step in steps for _, forest in step]
    sizes = memory(model, config, forests)
    sizes["together, a rank"] = sum(sizes.values())
    nodes = sum(len(forest.ids) for forest in forests)
    largest = max(len(forest.ids) for forest in forests)
    times = sum(map(tokens_without_sharing, forests)) / nodes
    lines = [f"{name:<22}{size / GB:9.2f} GB" for name, size in sizes.items()]
    lines += [
        f"steps                 {len(steps):9,}",
        f"tokens of the run     {nodes:9,}   ({times:.1f} times as many without sharing prefixes)",
        f"tokens read           {nodes * passes:9,}   forwards; the largest forest has"
        f" {largest:,} nodes",
    ]
    return "\n".join(lines)
