"""Loading a model and its tokenizer, and refusing one that the method cannot rely on."""

from contextlib import contextmanager
from datetime import date as Date
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from desc import DescError, attention
from desc.exactness import check_tree
from desc.forward import sequence_logps  # noqa: F401  public under this name, too
from desc.storage import zoo
from desc.storage.base import base_digest, locate, small_files
from desc.templates import end_of_turn, pin_date


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
    has = torch.cpu.get_capabilities()
    if not has["architecture"].startswith("x86"):
        return has.get("bf16", False)
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return wide and (has["amx_bf16"] or has["avx512_bf16"])


def load(
    name: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    empty: bool = False,
    max_length: int = 2048,
    date: str | None = None,
    chat_template: str | None = None,
):
    """(model, tokenizer) of "toy", "smollm2", a Hub id or a folder. Only safetensors are read, and
    no code from the model's folder is run.

    `dtype` None means native_dtype(device). `empty` leaves the weights on the meta device, because
    they are sharded and read later, or because only their shapes are needed; then the caller calls
    check_tree once they are read. `max_length` is the longest sequence that the model will read.
    `date` is what the chat template takes for today (ISO 8601; None: the day of the call).
    `chat_template` is the source of one to use instead of the model's own; a base model has none.

    Raises DescError if the model cannot be had, if its files lack weights, if its chat template
    cannot be matched (desc.templates.form_of), or if a prefix tree is not exact on it
    (check_tree)."""
    dtype = dtype or native_dtype(device)
    folder = locate(name, weights=not empty)
    with one_line(f"model {name}: cannot be loaded"):
        if empty:
            small_files(folder)
        else:
            base_digest(name)  # looks into all files, too, and refuses those that are not whole
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if getattr(config, "quantization_config", None):
            raise DescError(
                "its weights are quantised; bases in 4 or 8 bits are not read, so use the model"
                " that it was made from"
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    pin_date(tokenizer, date or Date.today().isoformat())
    with one_line(f"model {name}"):
        end = end_of_turn(tokenizer)
        check_vocabulary(config, tokenizer)
    kernel = {"dtype": dtype, "attn_implementation": attention.register()}
    with one_line(f"model {name}: weights cannot be loaded"):
        try:
            model = empty_model(config, kernel) if empty else read_model(folder, kernel).to(device)
        except KeyError as error:
            if error.args != (attention.NAME,):
                raise
            raise DescError(
                "its attention cannot be replaced, so no prefix tree runs on it"
            ) from None
    with one_line(f"model {name}: generation_config.json cannot be read"):
        ends = end_tokens(folder, config, end)
    # A model's own sampling defaults (top_k, repetition penalty) must not leak into ours.
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=end)
    model.name_or_path = name if name not in zoo.MADE_HERE else str(folder)
    model.eval()
    if not empty:
        with one_line(f"model {name}"):
            check_tree(model, max_length)
    return model, tokenizer


@contextmanager
def one_line(what: str):
    """Whatever fails in this context is raised as a DescError of one line that begins with `what`,
    because Transformers' errors have no common base. Out of memory is left as it is."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except DescError as error:
        raise DescError(f"{what}: {error}") from None
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        many = len(lines) > 1 and lines[0].endswith(":")
        reason = " ".join(lines[: 2 if many else 1])[:300] or "no reason given"
        if not isinstance(error, (OSError, ValueError)):
            reason = f"{type(error).__name__}: {reason}"
        raise DescError(f"{what} ({reason})") from None


def empty_model(config, kernel: dict):
    """The model with its parameters on the meta device. Buffers, such as rotary embeddings', are
    computed as ever."""

    def without_values(module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if not parameter.is_meta:  # a tied weight is there already, and must stay one with its twin
            return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    with register_module_parameter_registration_hook(without_values):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **kernel)


def read_model(folder: Path, kernel: dict):
    """The model with its weights, on the CPU.

    Raises DescError if a weight is not in its files, or has another shape there: it would be
    random, and another each time."""
    model, read = AutoModelForCausalLM.from_pretrained(
        folder,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported, and refused here
        **kernel,
    )
    missing, mismatched = sorted(read["missing_keys"]), sorted(read["mismatched_keys"])
    if mismatched:
        name, there, here = mismatched[0]
        raise DescError(
            f"its files hold {name} of shape {tuple(there)}, but its config.json means"
            f" {tuple(here)}; get the model's files again"
        )
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if missing[3:] else "")
        stray = sorted(read["unexpected_keys"])
        hint = f" (they hold {stray[0]} instead)" if stray else ""
        raise DescError(f"its files lack {shown}{hint}; get the model's files again")
    return model


def check_vocabulary(config, tokenizer) -> None:
    """Raises DescError if the tokenizer has tokens that the model has no embedding for."""
    known = config.get_text_config().vocab_size
    largest = max(tokenizer.get_vocab().values())
    if largest >= known:
        raise DescError(
            f"its tokenizer has tokens up to {largest}, but it has embeddings for {known} alone;"
            " resize the embeddings, or use the tokenizer that belongs to it"
        )


def end_tokens(folder: Path, config, end: int) -> list[int]:
    """The tokens that end a reply: `end`, with which the chat template ends one, and then those of
    the model's own generation config."""
    own = config.get_text_config()
    if (folder / "generation_config.json").exists():
        own = GenerationConfig.from_pretrained(folder)
    ends = own.eos_token_id if isinstance(own.eos_token_id, (list, tuple)) else [own.eos_token_id]
    return list(dict.fromkeys([end, *(token for token in ends if isinstance(token, int))]))
