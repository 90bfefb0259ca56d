"""The proof, on the model at hand, that a prefix tree is exact: it is tried out when a model is
loaded, instead of a list of architectures that may or may not be."""

import math
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch.distributed.tensor import DTensor

from desc import DescError, attention
from desc.encoding import TokenSequence
from desc.forward import decoder_blocks, forward
from desc.tree import Forest, dense_mask, grow

# How far apart two computations of the same log-probabilities may be, as a share of their spread
# over the vocabulary. Measured on tiny models of 26 architectures with 36 draws of weights each: in
# fp32 the exact ones differ by at most 6e-6, and the others by at least 2e-4.
TOLERANCE = 1e-4
# In bf16 the stock attention differs from its own fp32 by 0.003 to 0.11, and the tree from the
# stock attention by at most 2.7 times as much, and by at most 0.12.
NOISE_RATIO = 4
SHARDED_TOLERANCE = 0.15  # of a sharded model in bf16, whose fp32 is not at hand
PLAIN = "decoder with plain attention, such as Llama or Qwen"


def check_tree(model, max_length: int) -> None:
    """Prove on this model that a prefix tree is exact: each token gets the log-probabilities that
    it gets in a sequence of its own, with the stock attention.

    Three branches of different lengths are read as a tree and one by one, in fp32 (a layer at a
    time, so there is no second copy of the weights) and in the model's own dtype. Then one branch
    is moved to the last positions before `max_length`: this must not change the others. A sharded
    model is read in its own dtype alone. Raises DescError if the numbers differ, or if the model
    cannot read a tree."""
    text = model.config.get_text_config()
    refuse_odd_layers(text)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randperm(text.vocab_size, generator=generator)[:24].tolist()
    sequences = [
        TokenSequence(tokens[:10], tokens[10:14]),
        TokenSequence(tokens[:10], tokens[14:17]),
        TokenSequence(tokens[:7] + tokens[17:20], tokens[20:24]),
    ]
    with torch.no_grad(), small_window(text):
        try:
            compare(model, sequences, max_length)
        except (DescError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # layers may fail on a tree in any way
            reason = str(error).strip().partition("\n")[0]
            raise DescError(
                f"its layers cannot run on a prefix tree ({type(error).__name__}: {reason}); use a"
                f" {PLAIN}"
            ) from None


def refuse_odd_layers(text) -> None:
    """Raises DescError if a model has layers for which the tree has no mask.

    Some differ only beyond what is tried out here. An example are Llama 4's chunks of 8192 tokens,
    beside which it scales by a token's place in the batch."""
    odd = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if odd:
        raise DescError(
            f"its layers are of the type {', '.join(sorted(odd))}, on which no prefix tree is read;"
            f" use a {PLAIN}"
        )


def compare(model, sequences: list[TokenSequence], max_length: int) -> None:
    """check_tree on these sequences."""
    forest = grow(sequences)
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    tolerance, exact = TOLERANCE, None
    if model.dtype != torch.float32 and sharded:
        tolerance = SHARDED_TOLERANCE
    elif model.dtype != torch.float32:
        with in_fp32(model):
            exact = read_alone(model, sequences)
            refuse_inexact(read_tree(model, forest), exact, TOLERANCE)
    alone, tree = read_alone(model, sequences), read_tree(model, forest)
    if exact is not None:
        tolerance = max(TOLERANCE, NOISE_RATIO * difference(alone, exact))
    refuse_inexact(tree, alone, tolerance)
    refuse_dependent(model, forest, tree, max_length)


def read_alone(model, sequences: list[TokenSequence]) -> torch.Tensor:
    """The log-probabilities (M, V) at the rows that predict completions, in the stock attention:
    a batch of the sequences, filled up at their ends, which a causal model does not look at."""
    inputs = [prompt + completion[:-1] for prompt, completion in sequences]
    longest = max(map(len, inputs))
    ids = torch.tensor([ids + ids[:1] * (longest - len(ids)) for ids in inputs])
    model.set_attn_implementation("eager")
    try:
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
    finally:
        model.set_attn_implementation(attention.NAME)
    rows = [
        logits[i, len(prompt) - 1 : len(prompt) + len(completion) - 1]
        for i, (prompt, completion) in enumerate(sequences)
    ]
    return torch.cat(rows).float().log_softmax(-1)


def read_tree(model, forest: Forest) -> torch.Tensor:
    """The log-probabilities (M, V) at a forest's rows."""

    def mask(window: int | None) -> torch.Tensor:
        return dense_mask(forest, window)[None, None].to(model.device)

    ids, depth, rows = (x.to(model.device) for x in (forest.ids, forest.depth, forest.rows))
    return forward(model, ids, depth, mask, rows).float().log_softmax(-1)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far log-probabilities a (M, V) are from b (M, V), as a share of b's spread over the
    vocabulary: the median over the rows, because in a mixture of experts rounding may send a token
    to another expert, which changes the rest of its branch."""
    spread = (b - b.mean(-1, keepdim=True)).norm(dim=-1)
    shares = (a - b).norm(dim=-1) / spread
    return float(shares.median()) if shares.isfinite().all() else math.inf


def refuse_inexact(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    """Raises DescError if what the tree says (M, V) is not what sequences say of their own."""
    share = difference(a, b)
    if share > tolerance:
        raise DescError(
            f"a prefix tree is not exact on its layers (log-probabilities differ by {share:.2g} of"
            f" their spread, more than {tolerance:.2g}); use a {PLAIN}"
        )


def refuse_dependent(model, forest: Forest, tree: torch.Tensor, max_length: int) -> None:
    """Raises DescError if one branch at the last positions before `max_length` changes what the
    `tree` (M, V) says of the others, or if the model has no such positions."""
    moved = forest.rows[forest.owner == 0][1:]  # what sequence 0 shares with no other
    depth = forest.depth.clone()
    depth[moved] += max(0, max_length - 1 - int(depth[moved[-1]]))
    text = model.config.get_text_config()
    limit = positions_of(text)
    has_rope = getattr(text, "rope_parameters", None)
    if not has_rope and max_length > limit:  # it looks positions up in a table
        raise DescError(f"it reads at most {limit} tokens; lower max_length to that")
    far = read_tree(model, replace(forest, depth=depth))
    others = forest.owner > 0
    if difference(far[others], tree[others]) > TOLERANCE:  # in bf16, too, most rows are the same
        raise DescError(
            "its positions depend on the longest sequence in a tree if that has more than"
            f" {limit} tokens (RoPE that is scaled by length); lower max_length to {limit}"
        )


def positions_of(text) -> float:
    """The length for which a model's positions were made, before they are scaled."""
    rope = getattr(text, "rope_parameters", None) or {}
    lengths = (
        rope.get("original_max_position_embeddings"),
        getattr(text, "original_max_position_embeddings", None),
        getattr(text, "max_position_embeddings", None),
    )
    return min((length for length in lengths if length), default=math.inf)


@contextmanager
def small_window(text):
    """In this context a model with sliding windows has small ones, so that a short tree shows
    whether they are heeded."""
    window = getattr(text, "sliding_window", None)
    try:
        if window:
            text.sliding_window = min(window, 4)
        yield
    finally:
        if window:
            text.sliding_window = window


@contextmanager
def in_fp32(model):
    """In this context the model computes in fp32. A layer's weights are widened while it runs, one
    layer after another, so no second copy of all is made."""
    narrow: dict[torch.Tensor, torch.Tensor] = {}  # each widened tensor's own values

    def widen(module, *_, recurse: bool):
        for tensor in [*module.parameters(recurse), *module.buffers(recurse)]:
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                narrow[tensor] = tensor.data
                tensor.data = tensor.data.float()

    def restore(module, *_, recurse: bool):
        for tensor in [*module.parameters(recurse), *module.buffers(recurse)]:
            if tensor in narrow:
                tensor.data = narrow.pop(tensor)

    blocks = list(decoder_blocks(model))
    within = {module for block in blocks for module in block.modules()}
    with ExitStack() as hooks:
        for module in model.modules():
            if module in within and module not in blocks:
                continue
            recurse = module in blocks
            before = module.register_forward_pre_hook(partial(widen, recurse=recurse))
            after = module.register_forward_hook(
                partial(restore, recurse=recurse), always_call=True
            )
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        yield
