"""Loading a model and its tokenizer, and the one forward pass that everything uses."""

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from desc import DescError, zoo
from desc.encoding import end_of_turn
from desc.tree import Forest, dense_mask


def load(name: str, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"):
    """(model, tokenizer) for "toy", "smollm2", a Hub id or a folder; safetensors only, no code from the Hub is run.

    Raises DescError where it cannot be had, has no chat template, or has layers that a prefix tree cannot run."""
    folder = zoo.locate(name)
    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise DescError(f"--model {name}: cannot be loaded ({str(error).splitlines()[0]})") from None
    if not tokenizer.chat_template:
        raise DescError(f"--model {name}: has no chat template; use an instruct model")
    _check_layers(config, name)
    # On a CPU, backward through SDPA's kernel takes so long that plain matrix products train 1.4 times as fast (N about 700).
    attention = "eager" if torch.device(device).type == "cpu" else "sdpa"
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise DescError(f"--model {name}: weights cannot be loaded ({str(error).splitlines()[0]})") from None
    # A model's own sampling defaults (top_k, repetition penalty) must not leak into ours.
    stop = end_of_turn(tokenizer)
    model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=stop)
    return model.to(device).eval(), tokenizer


def _check_layers(config, name: str) -> None:
    odd = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if odd or not hasattr(config, "num_attention_heads"):
        raise DescError(f"--model {name}: {', '.join(sorted(odd)) or config.model_type} layers cannot run on a prefix tree")


def attention_mask(model, forest: Forest) -> torch.Tensor | dict[str, torch.Tensor]:
    """The tree's mask as Transformers takes it, (1, 1, N, N): bool for SDPA, additive for eager attention; or a dictionary with one
    a kind of layer where only some have a sliding window. A window counts along a token's path, so on depth."""
    window = getattr(model.config, "sliding_window", None)
    layers = getattr(model.config, "layer_types", None)

    def build(window):
        mask = dense_mask(forest, window)[None, None]
        if model.config._attn_implementation == "eager":
            mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill_(~mask, torch.finfo(model.dtype).min)
        return mask

    if window is None or (layers and "sliding_attention" not in layers):
        return build(None)
    return {"full_attention": build(None), "sliding_attention": build(window)} if layers else build(window)


def sequence_logps(model, forest: Forest) -> torch.Tensor:
    """log π(completion | prompt) of every sequence of the forest, summed over the completion's tokens: (S,) fp32.

    One forward over the N nodes. Only the M rows that predict a completion token meet the head, so a large vocabulary costs
    M × V instead of N × V; log-softmax and sums are in fp32 (in bf16, steps near -200 are 1.0 wide)."""
    forest = forest.to(model.device)
    logits = model(
        input_ids=forest.ids[None],  # (1, N)
        position_ids=forest.depth[None],  # (1, N)
        attention_mask=attention_mask(model, forest),
        logits_to_keep=forest.rows,
        use_cache=False,
    ).logits[0]  # (M, V)
    logps = -F.cross_entropy(logits.float(), forest.targets, reduction="none")  # (M,)
    return logps.new_zeros(forest.size).index_add(0, forest.owner, logps)  # (S,)
