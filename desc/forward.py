"""The one forward pass that all losses and scores use, and the log-probabilities of a forest's
sequences."""

from collections.abc import Callable
from functools import lru_cache, partial
from inspect import signature

import torch
import torch.nn.functional as F
from torch import nn

from desc import DescError, attention
from desc.tree import Forest, dense_mask

ROWS = 128  # of logits that are in fp32 at a time


def decoder_blocks(model) -> nn.ModuleList:
    """The decoder's layers, whatever the architecture calls them: the first list of as many modules
    as the configuration says. Layers that read images lie outside the decoder.

    Raises DescError if there is no such list."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise DescError(f"its {count} layers were not found ({model.config.model_type})")


@lru_cache(maxsize=2)  # reference and policy read the same forest
def tree_mask(forest: Forest, window: int | None):
    """The forest's mask (1, 1, N, N): a bool tensor on the CPU, a BlockMask elsewhere."""
    if forest.ids.device.type == "cpu":
        return dense_mask(forest, window)[None, None]
    return attention.flex_mask(forest, window)


def forward(
    model, ids, depth, mask: Callable, rows: torch.Tensor | int = 0, cache=None
) -> torch.Tensor:
    """Logits (M, V) at the nodes `rows` (M,), or at all N nodes if it is 0: tokens `ids` (N,) at
    positions `depth` (N,).

    mask(window) says what these nodes may see of each other, and before them of what lies in
    `cache`, which then takes them up. It is asked for the whole path (None) and, if the model has
    sliding-window layers, for the last `window` tokens of it."""
    text = model.config.get_text_config()
    window, layer_types = (getattr(text, name, None) for name in ("sliding_window", "layer_types"))
    if window is None or (layer_types and "sliding_attention" not in layer_types):
        masks = mask(None)
    elif layer_types:
        masks = {"full_attention": mask(None), "sliding_attention": mask(window)}
    else:
        masks = mask(window)
    cached = {} if cache is None else {cache_argument(model): cache}
    return model(
        input_ids=ids[None],
        position_ids=depth[None],
        attention_mask=masks,
        logits_to_keep=rows,
        use_cache=cache is not None,
        **cached,
    ).logits[0]


def cache_argument(model) -> str:
    """What this model calls the argument that takes a cache: "cache" since Transformers 5.24, and
    "past_key_values" before. Newer versions warn of the older name."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


class TargetLogps(torch.autograd.Function):
    """log softmax(logits)[target] of each row: logits (M, V), targets (M,) -> (M,) fp32.

    Some rows at a time, because M × V numbers in fp32 are the most that a step would hold. The
    backward pass computes the softmax p again:

        dlogits = (one-hot(target) − p) · dlogps
    """

    @staticmethod
    def forward(ctx, logits, targets):
        ctx.save_for_backward(logits, targets)
        chunks = zip(logits.split(ROWS), targets.split(ROWS))
        return torch.cat([-F.cross_entropy(x.float(), t, reduction="none") for x, t in chunks])

    @staticmethod
    def backward(ctx, dlogps):
        logits, targets = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        for x, t, dx, d in zip(*(part.split(ROWS) for part in (logits, targets, dlogits, dlogps))):
            minus = -x.float().softmax(-1)
            minus[torch.arange(len(t), device=t.device), t] += 1
            dx.copy_(minus.mul_(d[:, None]))
        return dlogits, None


def sequence_logps(model, forest: Forest) -> torch.Tensor:
    """log π(completion | prompt) of every sequence of the forest, summed over the completion's
    tokens: (S,) fp32.

    One forward reads the N nodes. Only the M rows that predict a completion token meet the head, so
    a large vocabulary costs M × V instead of N × V. Log-softmax and sums are in fp32, because in
    bf16 the steps near -200 are 1.0 wide."""
    forest = forest.to(model.device)
    logits = forward(model, forest.ids, forest.depth, partial(tree_mask, forest), forest.rows)
    logps = TargetLogps.apply(logits, forest.targets)  # (M,)
    owned = torch.arange(forest.size, device=logps.device)[:, None] == forest.owner  # (S, M)
    # A product, because index_add on CUDA would sum in another order each time.
    return owned.to(logps.dtype) @ logps  # (S,)
