"""Small random models of several architectures. The tests use them to check windows, caps on the
scores and sinks."""

import pytest
import torch
import transformers
from packaging.version import Version
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


# --- what docs/models.md lists --------------------------------------------------------------------

QKV = "q_proj k_proj v_proj"
LLAMA = QKV + " o_proj gate_proj up_proj down_proj"
LATENT = "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj gate_proj up_proj down_proj"
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {  # multi-head latent attention; its keys are wider than its values
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
} | EXPERTS
GEMMA4 = {
    "sliding_window": 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 850,
    "global_head_dim": 8,
    "num_kv_shared_layers": 1,
    "num_hidden_layers": 4,
    "layer_types": 2 * ["sliding_attention", "full_attention"],
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,  # as many as the decoder has
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
# model_type: (what its configuration has beside SMALL, the layers that get adapters by default)
EXACT = {
    "llama": ({}, LLAMA),
    "qwen2": ({}, LLAMA),
    "qwen3": ({}, LLAMA),
    "qwen3_moe": ({"num_experts": 4} | EXPERTS, QKV + " o_proj"),
    "mistral": ({"sliding_window": 4}, LLAMA),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, QKV + " o_proj"),
    "gemma3_text": ({"sliding_window": 4, "layer_types": ALTERNATING}, LLAMA),
    "gemma3": ({"vision_config": VISION, "mm_tokens_per_image": 4}, LLAMA),
    "gemma4_text": (GEMMA4, LLAMA + " per_layer_input_gate per_layer_projection"),
    "phi": ({}, QKV + " dense fc1 fc2"),
    "phi3": ({}, "qkv_proj o_proj gate_up_proj down_proj"),
    "glm4": ({}, QKV + " o_proj gate_up_proj down_proj"),
    "granite": ({}, LLAMA),
    "olmo2": ({}, LLAMA),
    "olmoe": ({"num_experts": 4} | EXPERTS, QKV + " o_proj"),
    "smollm3": ({}, LLAMA),
    "starcoder2": ({}, QKV + " o_proj c_fc c_proj"),
    "nemotron": ({}, QKV + " o_proj up_proj down_proj"),
    "gpt_neox": ({}, "query_key_value dense dense_h_to_4h dense_4h_to_h"),
    "stablelm": ({"hidden_dropout": 0.1, "attention_dropout": 0.1}, LLAMA),
    "cohere2": ({"sliding_window": 4}, LLAMA),
    "deepseek_v2": (MLA, LATENT),
    "deepseek_v3": (MLA, LATENT),
    "minicpm3": (MLA, LATENT),
    "gptj": ({"rotary_dim": 4, "resid_pdrop": 0.1}, QKV + " out_proj fc_in fc_out"),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, QKV + " out_proj fc1 fc2"),
}
HYBRID = "its layers are of the type linear_attention"
UNMASKED = "its layers cannot run on a prefix tree"
FIXED = "its attention cannot be replaced"
# model_type: (what its configuration has beside SMALL, what the error says)
REFUSED = {
    "gemma2": ({}, "this model's attention has softcap"),
    "gpt_oss": ({"num_local_experts": 2, "num_experts_per_tok": 1}, "attention has s_aux"),
    "gpt2": ({}, "decoder has no linear layer"),  # it has Conv1D
    "falcon": ({"head_dim": None}, FIXED),
    "gpt_neo": (
        {
            "head_dim": None,
            "num_layers": 3,
            "num_heads": 4,
            "attention_types": [[["global", "local", "global"], 1]],
        },
        FIXED,
    ),
    "bloom": ({}, UNMASKED),
    "mpt": ({"head_dim": None, "d_model": 32, "n_heads": 4, "n_layers": 3}, UNMASKED),
    "xglm": (
        {"head_dim": None, "d_model": 32, "ffn_dim": 48, "attention_heads": 4, "num_layers": 3},
        "a prefix tree is not exact on its layers",
    ),
    "llama4_text": (
        {"num_local_experts": 2, "moe_layers": [1], "interleave_moe_layer_step": 2},
        "its layers are of the type chunked_attention",
    ),
    "mamba": ({}, HYBRID),
    "jamba": ({}, HYBRID),
    "bamba": (
        {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
        HYBRID,
    ),
    "qwen3_next": ({"num_experts": 4} | EXPERTS, HYBRID),
    "lfm2": (
        {"layer_types": ["conv", "full_attention", "conv"]},
        "its layers are of the type conv",
    ),
}


def configure_type(model_type: str, **changes):
    """A tiny model of EXACT or REFUSED, for the toy's tokenizer."""
    if model_type == "gptj" and Version(transformers.__version__) < Version("5.24"):
        pytest.skip("GPT-J's attention can be replaced since Transformers 5.24")
    settings = SMALL | {"vocab_size": 850, "max_position_embeddings": 4096}
    if model_type == "gemma3":  # its decoder has a configuration of its own
        extra = EXACT[model_type][0]
        return AutoConfig.for_model(model_type, text_config=settings | changes, **extra)
    settings |= (EXACT | REFUSED)[model_type][0] | changes
    settings = {name: value for name, value in settings.items() if value is not None}
    return AutoConfig.for_model(model_type, **settings)
