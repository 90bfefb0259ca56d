"""Attention over a tree on the CPU, block by block.

SDPA's CPU kernel is slow backwards and computes what the mask then hides; plain eager attention keeps N × N scores for every head
and layer. Here a block of queries meets only the keys that one of its queries may see: in depth-first order those are the block's
own branches and their ancestors, so other branches and other dialogues cost next to nothing.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from desc import DescError

NAME = "desc_blocks"
BLOCK = 256


@torch.compiler.disable  # its shapes depend on the tree: traced, it would be compiled again for every forest
def block_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Transformers' attention interface: query (B, H, N, D), key and value (B, G, L, D) -> (B, N, H, D), None.

    A forest (B = 1, N = L, bool mask (1, 1, N, N)) goes block by block; anything else, as generation with its cache, through SDPA."""
    if odd := [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]:
        raise DescError(f"this model's attention has {', '.join(odd)}, which is not computed here")
    if attention_mask is None or query.shape[0] > 1 or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    (_, heads, nodes, width), groups = query.shape, key.shape[1]
    query = (query[0] * scaling).view(groups, heads // groups, nodes, width)
    outputs = []
    for start in range(0, nodes, BLOCK):
        visible = attention_mask[0, 0, start : start + BLOCK]  # (b, N)
        seen = visible.any(0).nonzero()[:, 0]  # (L,)
        block = query[:, :, start : start + BLOCK].flatten(1, 2)  # (G, H/G · b, D)
        scores = torch.bmm(block, key[0, :, seen].mT).unflatten(1, (-1, len(visible)))  # (G, H/G, b, L)
        hidden = torch.zeros_like(scores[0, 0]).masked_fill_(~visible[:, seen], -torch.inf)  # (b, L)
        weights = scores.add_(hidden).softmax(-1).flatten(1, 2)
        outputs.append(torch.bmm(weights, value[0, :, seen]).unflatten(1, (-1, len(visible))))
    output = torch.cat(outputs, dim=2)  # (G, H/G, N, D)
    return output.flatten(0, 1).transpose(0, 1)[None].contiguous(), None


def register() -> str:
    """Make it known to Transformers; returns the name to give as attn_implementation."""
    AttentionInterface.register(NAME, block_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
