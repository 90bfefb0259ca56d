"""Loading a model and its tokenizer, and the one forward pass that everything uses."""

import os
import shutil

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from desc import DescError, attention, zoo
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
    kernel = attention.register() if torch.device(device).type == "cpu" else "sdpa"
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=kernel, use_safetensors=True)
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


def compile_layers(model) -> None:
    """Let TorchInductor fuse the element-wise work of the decoder's layers: about 1.5 times as fast on a CPU, after a minute or two.

    Rounding between fused operations stays as it is without, so that a policy equals its reference to the bit there too. Raises
    DescError where a CPU has no C++ compiler."""
    if model.device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise DescError("--compile needs a C++ compiler on a CPU: install g++, or leave the flag out")
    for layer in model.get_submodule("model.layers"):
        layer.compile(dynamic=True, options={"emulate_precision_casts": True})


def attention_mask(config, forest: Forest) -> torch.Tensor | dict[str, torch.Tensor]:
    """The tree's mask as Transformers takes it: (1, 1, N, N) bool, or one a kind of layer where only some have a sliding window.

    A window counts tokens along a path, so on depth."""
    full = dense_mask(forest)[None, None]
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    if window is None or (layers and "sliding_attention" not in layers):
        return full
    sliding = dense_mask(forest, window)[None, None]
    return {"full_attention": full, "sliding_attention": sliding} if layers else sliding


def sequence_logps(model, forest: Forest) -> torch.Tensor:
    """log π(completion | prompt) of every sequence of the forest, summed over the completion's tokens: (S,) fp32.

    One forward over the N nodes. Only the M rows that predict a completion token meet the head, so a large vocabulary costs
    M × V instead of N × V; log-softmax and sums are in fp32 (in bf16, steps near -200 are 1.0 wide)."""
    forest = forest.to(model.device)
    logits = model(
        input_ids=forest.ids[None],  # (1, N)
        position_ids=forest.depth[None],  # (1, N)
        attention_mask=attention_mask(model.config, forest),
        logits_to_keep=forest.rows,
        use_cache=False,
    ).logits[0]  # (M, V)
    logps = -F.cross_entropy(logits.float(), forest.targets, reduction="none")  # (M,)
    return logps.new_zeros(forest.size).index_add(0, forest.owner, logps)  # (S,)
