"""Loading a model and its tokenizer, and the one forward pass that all losses and scores use."""

from collections.abc import Callable
from functools import lru_cache, partial
from inspect import signature

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from desc import DescError, attention
from desc.encoding import end_of_turn
from desc.storage import zoo
from desc.tree import Forest, dense_mask


def native_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 if `device` multiplies bf16 matrices natively, else float32.

    A CPU does so with AMX or AVX512-BF16 (x86), or with the BF16 instructions of Arm, if PyTorch
    was built with oneDNN, which uses them. Any other emulates these products, ten times slower than
    in float32 or worse. This asks what the processor has and times nothing, so the same machine
    always gets the same answer. Like all of PyTorch it heeds ATEN_CPU_CAPABILITY=avx2."""
    if torch.device(device).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.backends.mkldnn.is_available() and _cpu_has_bf16()
    return torch.bfloat16 if native else torch.float32


def _cpu_has_bf16() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        has = torch.cpu.get_capabilities()
    else:  # PyTorch before 2.11, which says nothing of Arm
        amx, avx512 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
        has = {"architecture": "x86_64", "amx_bf16": amx, "avx512_bf16": avx512}
    if not has["architecture"].startswith("x86"):
        return has.get("bf16", False)
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return wide and (has["amx_bf16"] or has["avx512_bf16"])


def load(
    name: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    empty: bool = False,
):
    """(model, tokenizer) of "toy", "smollm2", a Hub id or a folder. Only safetensors are read, and
    no code from the Hub is run.

    `dtype` None means native_dtype(device). `empty` leaves the weights on the meta device, because
    they are sharded and read later, or because only their shapes are needed. Raises DescError if
    the model cannot be had, has no chat template, or has layers that a prefix tree cannot run."""
    folder, dtype = zoo.locate(name), dtype or native_dtype(device)
    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DescError(f"model {name}: cannot be loaded ({reason})") from None
    check_architecture(name, config, tokenizer)
    kernel = {"dtype": dtype, "attn_implementation": attention.register()}
    try:
        if empty:
            with register_module_parameter_registration_hook(_without_values):
                model = AutoModelForCausalLM.from_config(config, **kernel)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **kernel)
            model = model.to(device)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DescError(f"model {name}: weights cannot be loaded ({reason})") from None
    # A model's own sampling defaults (top_k, repetition penalty) must not leak into ours.
    stop = end_of_turn(tokenizer)
    model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=stop)
    model.name_or_path = str(folder)
    return model.eval(), tokenizer


def check_architecture(name: str, config, tokenizer) -> None:
    """Raises DescError if the model has no chat template, or layers that a tree cannot run."""
    if not tokenizer.chat_template:
        raise DescError(f"model {name}: has no chat template; use an instruct model")
    layer_types = set(getattr(config, "layer_types", None) or ())
    other = layer_types - {"full_attention", "sliding_attention"}
    if other or not hasattr(config, "num_attention_heads"):
        kinds = ", ".join(sorted(other)) or config.model_type
        raise DescError(f"model {name}: {kinds} layers cannot run on a prefix tree")


def _without_values(module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    """A hook by which parameters get no values. Buffers, such as rotary embeddings', are computed
    as ever."""
    if not parameter.is_meta:  # a tied weight is on meta already, and must stay one with its twin
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)


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
    window = getattr(model.config, "sliding_window", None)
    layer_types = getattr(model.config, "layer_types", None)
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


def sequence_logps(model, forest: Forest) -> torch.Tensor:
    """log π(completion | prompt) of every sequence of the forest, summed over the completion's
    tokens: (S,) fp32.

    One forward reads the N nodes. Only the M rows that predict a completion token meet the head, so
    a large vocabulary costs M × V instead of N × V. Log-softmax and sums are in fp32, because in
    bf16 the steps near -200 are 1.0 wide."""
    forest = forest.to(model.device)
    logits = forward(model, forest.ids, forest.depth, partial(tree_mask, forest), forest.rows)
    logps = -F.cross_entropy(logits.float(), forest.targets, reduction="none")  # (M,)
    owned = torch.arange(forest.size, device=logps.device)[:, None] == forest.owner  # (S, M)
    # A product, because index_add on CUDA would sum in another order each time.
    return owned.to(logps.dtype) @ logps  # (S,)
