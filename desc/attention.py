"""Attention over a tree: FlexAttention on CUDA, block by block on the CPU.

FlexAttention skips the blocks of 128 × 128 that a tree's mask hides; it has no backward on the CPU. There, SDPA's CPU kernel is slow backwards and computes what the mask then hides; plain eager attention keeps N × N scores for every head
and layer. Here a block of queries meets only the keys that one of its queries may see: in depth-first order those are the block's
own branches and their ancestors, so other branches and other dialogues cost next to nothing.
"""

from functools import cache, lru_cache

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from desc import DescError
from desc.tree import Forest, sees

NAME = "desc_tree"
BLOCK = 128  # queries at a time, on the CPU


@cache
def compiled_flex():
    return torch.compile(flex_attention)


def flex_mask(forest: Forest, window: int | None = None) -> BlockMask:
    """The tree's mask (tree.sees) for FlexAttention: (1, 1, N, N), N a multiple of 128."""
    rule, nodes = sees(forest, window), len(forest.ids)
    return create_block_mask(lambda batch, head, query, key: rule(query, key), None, None, nodes, nodes, device=forest.ids.device)


def tree_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Transformers' attention interface: query (B, H, N, D), key and value (B, G, L, D) -> (B, N, H, D), None.

    A forest (B = 1, N = L) comes with a BlockMask, or with a bool mask (1, 1, N, N); anything else, as generation with its cache,
    goes through SDPA."""
    if odd := [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]:
        raise DescError(f"this model's attention has {', '.join(odd)}, which is not computed here")
    if isinstance(attention_mask, BlockMask):
        output = compiled_flex()(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None
    if query.device.type != "cpu" or attention_mask is None or query.shape[0] > 1 or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return block_attention(query, key, value, attention_mask, scaling), None


@lru_cache(maxsize=2)  # every layer is given the same mask, or one of two
def cut(mask: torch.Tensor, dtype: torch.dtype) -> list[tuple[slice, torch.Tensor, torch.Tensor]]:
    """A bool mask (1, 1, N, N) in blocks of b queries: which they are, the L keys that one of them may see, and 0 or −∞ (b, L)."""
    blocks = []
    for start in range(0, mask.shape[-1], BLOCK):
        visible = mask[0, 0, start : start + BLOCK]  # (b, N)
        seen = visible.any(0).nonzero()[:, 0]
        hidden = torch.zeros(len(visible), len(seen), dtype=dtype).masked_fill_(~visible[:, seen], -torch.inf)
        blocks.append((slice(start, start + len(visible)), seen, hidden))
    return blocks


class BlockAttention(torch.autograd.Function):
    """softmax(q kᵀ + hidden) v, block by block; query (G, H/G, N, D), scaled, key and value (G, N, D) -> (G, H/G, N, D).

    The backward is written out because autograd's of the gathered keys, a scatter, is slow: with w = softmax(s), o = w v
        dv = wᵀ do,    dw = do vᵀ,    ds = w (dw − Σ w dw),    dq = ds k,    dk = dsᵀ q,   the last two added where keys were gathered."""

    @staticmethod
    def forward(ctx, query, key, value, blocks):
        output, kept = torch.empty_like(query), []
        for block, seen, hidden in blocks:
            scores = torch.bmm(query[:, :, block].flatten(1, 2), key[:, seen].mT)  # (G, H/G · b, L)
            weights = scores.unflatten(1, (-1, len(hidden))).add_(hidden).softmax(-1)
            output[:, :, block] = torch.bmm(weights.flatten(1, 2), value[:, seen]).unflatten(1, (-1, len(hidden)))
            kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.blocks = blocks
        return output

    @staticmethod
    def backward(ctx, doutput):
        query, key, value, *kept = ctx.saved_tensors
        dquery, dkey, dvalue = torch.empty_like(query), torch.zeros_like(key, dtype=torch.float32), torch.zeros_like(value, dtype=torch.float32)
        for (block, seen, hidden), weights in zip(ctx.blocks, kept):
            weights, do = weights.flatten(1, 2), doutput[:, :, block].flatten(1, 2)
            dvalue[:, seen] += torch.bmm(weights.mT, do)
            dweights = torch.bmm(do, value[:, seen].mT)
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)  # the formula above, summed in fp32
            dquery[:, :, block] = torch.bmm(dscores, key[:, seen]).unflatten(1, (-1, len(hidden)))
            dkey[:, seen] += torch.bmm(dscores.mT, query[:, :, block].flatten(1, 2))
        return dquery, dkey.to(key.dtype), dvalue.to(value.dtype), None


@torch.compiler.disable  # its shapes depend on the tree: traced, it would be compiled again for every forest
def block_attention(query, key, value, attention_mask, scaling) -> torch.Tensor:
    """Query (1, H, N, D), key and value (1, G, N, D), bool mask (1, 1, N, N) -> (1, N, H, D)."""
    (_, heads, nodes, width), groups = query.shape, key.shape[1]
    query = (query[0] * scaling).view(groups, heads // groups, nodes, width)
    output = BlockAttention.apply(query, key[0], value[0], cut(attention_mask, query.dtype))
    return output.flatten(0, 1).transpose(0, 1)[None].contiguous()


def register() -> str:
    """Make it known to Transformers; returns the name to give as attn_implementation."""
    AttentionInterface.register(NAME, tree_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
