"""Small random models of several architectures. The tests use them to check windows, caps on the
scores and sinks."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
SMALL |= {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
SMALL |= {"initializer_range": 0.5}  # large, so that attention is not uniform
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
KINDS = {
    "qwen2": {},
    "qwen2 with windows": {
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ALTERNATING,
    },
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "mistral with a window": {"sliding_window": 4},
    "phi3 with a window": {"sliding_window": 4},
    "gemma3_text with windows": {"sliding_window": 4, "layer_types": ALTERNATING},
}
ODD = {  # Their attention is more than a mask: it has caps on the scores, or sinks.
    "gemma2": {
        "layer_types": 3 * ["full_attention"],
        "attn_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 8,
    },
    "gpt_oss": {
        "layer_types": 3 * ["full_attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
}


def configure(kind, **changes):
    return AutoConfig.for_model(kind.split()[0], **SMALL | (KINDS | ODD)[kind] | changes)


def build(config):
    """The stock model with eager attention and random weights, in fp32."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
