"""Attention over a tree: FlexAttention on CUDA, block by block on the CPU.

FlexAttention skips the blocks of 128 × 128 that a tree's mask hides, but it has no backward on the
CPU. There we take one block of queries after another. In depth-first order the queries of a block
see little but the block's own branches and their ancestors, so it reads those keys alone: other
branches and other dialogues cost next to nothing."""

from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from desc import DescError
from desc.tree import Forest, sees

NAME = "desc_tree"
FLEX_BLOCK = 128  # FlexAttention's own
BLOCK = 192  # queries at a time, on the CPU
# Keys are read as one run if the run has at most so many times their number, because reading a run
# is cheaper than gathering keys.
SPARSE = 1.3


def compile_for_all_lengths(function, **settings):
    """torch.compile for any length at once: a kernel for each length would meet the limit of
    compilations, after which PyTorch falls back to N × N.

    PyTorch takes equal sizes for one size, unless it is told not to (use_duck_shape). If a first
    length happened to be the model's width, other lengths would be compiled again.

    With two windows a layer has seven graphs, and PyTorch's own limit is 8. So the limit is raised.

    Numbers such as LoRA's scale are no lengths, and stay constants. Otherwise PyTorch makes them
    tensors on the CPU and compiles C++ for these, which took most of a first step's minute."""
    torch.fx.experimental._config.use_duck_shape = False
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.specialize_float = True
    return torch.compile(function, dynamic=True, **settings)


@cache
def compiled_flex():
    return compile_for_all_lengths(flex_attention)


def flex(query, key, value, **settings):
    """FlexAttention, compiled. Within a compiled layer it is compiled with that.

    Each of the H heads gets a key and a value of its own. FlexAttention could let heads share them
    (enable_gqa), but in its backward pass one multiprocessor then walks through all that do: with
    28 heads on 4 keys and 8,192 nodes, forward and backward took 5.0 ms on an H100, and 2.4 ms this
    way."""
    times = query.shape[1] // key.shape[1]
    if times > 1:
        key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
    kernel = flex_attention if torch.compiler.is_compiling() else compiled_flex()
    return kernel(query, key, value, **settings)


def flex_mask(forest: Forest, window: int | None = None) -> BlockMask:
    """The tree's mask (tree.sees) for FlexAttention: (1, 1, N, N), N a multiple of 128.

    A block of keys is seen by the queries up to their ends. So the block of queries q0 … q1 after
    it sees all of it if q1 lies before the nearest end, and some of it if q0 lies before the
    furthest. That needs memory for N + (N / 128)² numbers; FlexAttention's create_block_mask would
    try the rule on all N² pairs."""
    # The kernel reads a number that is a tensor. For an int it would be compiled anew.
    limit = None if window is None else torch.full((), window, device=forest.ids.device)
    rule = sees(forest, limit)

    def visible(batch, head, query, key):
        return rule(query, key)

    end, depth = forest.end.view(-1, FLEX_BLOCK), forest.depth.view(-1, FLEX_BLOCK)
    block = torch.arange(len(end), device=end.device)
    first = block[:, None] * FLEX_BLOCK  # query of each block, (B, 1) beside the keys' (B,)
    before = block < block[:, None]
    some = before & (first < end.amax(1)) | (block == block[:, None])  # (B, B)
    every = before & (first + FLEX_BLOCK <= end.amin(1))
    if window is not None:  # pairs of nodes are so many tokens apart, or more, or less
        some &= depth.amin(1)[:, None] - depth.amax(1) < window
        every &= depth.amax(1)[:, None] - depth.amin(1) < window
    # Where a block is not seen as a whole, FlexAttention asks the rule about each pair.
    blocks = *listed(some & ~every), *listed(every)
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=FLEX_BLOCK, mask_mod=visible)


def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Bool (B, B) as FlexAttention takes it, int32: how many columns are true in each row
    (1, 1, B), and the columns, these first (1, 1, B, B)."""
    columns = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int()[None, None], columns.int()[None, None]


def tree_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Transformers' attention interface: query (B, H, N, D), key (B, G, L, D) and
    value (B, G, L, E) -> (B, N, H, E), None.

    A forest (B = 1, N = L) comes with a BlockMask, or on the CPU with a bool mask (1, 1, N, N).
    Anything else, such as generation with its cache, goes through SDPA. Raises DescError for
    attention with more to it than a mask."""
    extra = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    if extra:
        raise DescError(
            f"this model's attention has {', '.join(extra)}, which is not computed here"
        )
    if isinstance(attention_mask, BlockMask):
        output = flex(query, key, value, block_mask=attention_mask, scale=scaling)
        return output.transpose(1, 2).contiguous(), None
    is_forest = query.shape[0] == 1 and query.shape[2] == key.shape[2]
    if query.device.type == "cpu" and attention_mask is not None and is_forest:
        return BlockAttention.apply(query, key, value, attention_mask, scaling), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )


class SameMemory:
    """A tensor as a key of a cache: equal if it is the same memory. Autograd hands on other objects
    for it. The memory is not freed while this lives."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __hash__(self):
        return self.tensor.data_ptr()

    def __eq__(self, other):
        a, b = self.tensor, other.tensor
        return a.data_ptr() == b.data_ptr() and a.shape == b.shape


@lru_cache(maxsize=2)  # every layer is given the same mask, or one of two
def mask_blocks(mask: SameMemory, dtype: torch.dtype) -> list[tuple[slice, slice | Tensor, Tensor]]:
    """A bool mask (1, 1, N, N) as blocks of b queries: (these queries, the L keys that any of them
    may see, 0 or −∞ for each of both (b, L))."""
    visible_keys, blocks = mask.tensor[0, 0], []
    for start in range(0, len(visible_keys), BLOCK):
        visible = visible_keys[start : start + BLOCK]  # (b, N)
        keys = visible.any(0).nonzero()[:, 0]
        run = slice(int(keys[0]), int(keys[-1]) + 1)
        if run.stop - run.start < SPARSE * len(keys):
            keys = run
        hidden = torch.zeros(visible[:, keys].shape, dtype=dtype)
        hidden.masked_fill_(~visible[:, keys], -torch.inf)
        blocks.append((slice(start, start + len(visible)), keys, hidden))
    return blocks


class BlockAttention(torch.autograd.Function):
    """softmax(scaling · q kᵀ) v, one block of queries after another.

    query (1, H, N, D), key (1, G, N, D), value (1, G, N, E), bool mask (1, 1, N, N) ->
    (1, N, H, E).

    Forward is SDPA on each block. SDPA's backward is slow on the CPU, so ours is written out. It
    computes the weights w again instead of keeping them: a DPO step is then 1.3 times as fast as
    with plain products. With s = scaling · q kᵀ, w = softmax(s), o = w v:

        dv = wᵀ do,  dw = do vᵀ,  ds = w (dw − Σ w dw),  dq = scaling · ds k,  dk = scaling · dsᵀ q
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, scaling):
        ctx.save_for_backward(query, key, value, mask)
        ctx.scaling = scaling
        output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        for queries, keys, hidden in mask_blocks(SameMemory(mask), query.dtype):
            q, k, v = query[:, :, queries], key[:, :, keys], value[:, :, keys]
            o = F.scaled_dot_product_attention(q, k, v, hidden, scale=scaling, enable_gqa=True)
            output[:, queries] = o.transpose(1, 2)
        return output

    @staticmethod
    def backward(ctx, doutput):
        query, key, value, mask = ctx.saved_tensors
        (_, heads, nodes, width), groups = query.shape, key.shape[1]
        # G groups of H/G heads that share a key
        query = (query[0] * ctx.scaling).view(groups, heads // groups, nodes, width)
        doutput = doutput[0].transpose(0, 1).unflatten(0, (groups, -1))
        dquery = query.new_empty(query.shape)
        dkey, dvalue = (x.new_zeros(x.shape[1:], dtype=torch.float32) for x in (key, value))
        for queries, keys, hidden in mask_blocks(SameMemory(mask), query.dtype):
            q, do = query[:, :, queries].flatten(1, 2), doutput[:, :, queries].flatten(1, 2)
            k, v = key[0][:, keys], value[0][:, keys]  # (G, L, D)
            scores = torch.bmm(q, k.mT).unflatten(1, (-1, len(hidden)))  # (G, H/G, b, L)
            w = scores.add_(hidden).softmax(-1).flatten(1, 2)  # (G, H/G · b, L)
            dvalue[:, keys] += torch.bmm(w.mT, do)
            ds = torch._softmax_backward_data(torch.bmm(do, v.mT), w, -1, w.dtype)
            dquery[:, :, queries] = torch.bmm(ds, k).unflatten(1, (-1, len(hidden)))
            dkey[:, keys] += torch.bmm(ds.mT, q)
        dquery = (dquery * ctx.scaling).flatten(0, 1)[None]
        return dquery, dkey.to(key.dtype)[None], dvalue.to(value.dtype)[None], None, None


def register() -> str:
    """Make it known to Transformers; returns the name to give as attn_implementation.

    SDPA is told not to use cuDNN, which makes a plan for each new length of keys. In generation
    that is one a token. One took 0.14 s on an H200, and 0.44 s on a B200
    (github.com/modelscope/FunASR/issues/3704).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    AttentionInterface.register(NAME, tree_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
