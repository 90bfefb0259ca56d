"""What a training run leaves: an adapter with what made it, and what a server needs for it."""

from pathlib import Path

from desc import DescError
from desc.cli import save_config
from desc.flags import TrainConfig
from desc.lora import export_adapters
from desc.storage.adapters import CHAT_TEMPLATE, write_adapter
from desc.storage.files import encode_text, write_bytes
from desc.training.ranks import rank
from desc.training.sharding import whole

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes


def save_artefact(model, config: TrainConfig, folder: Path, base: str) -> int:
    """The model's adapters as one, with what made it: the configuration, and the digest of the base
    that the run was begun on. Every rank must call this; the first writes. Returns the rank of the
    one: the sum of theirs. Raises DescError if a value is not finite."""
    settings, halves = export_adapters(model, whole)
    if not all(half.isfinite().all() for half in halves.values()):
        raise DescError("the adapter has values that are not finite; lower --lr")
    if rank() == 0:
        write_adapter(folder, settings, halves)
        save_config(config, folder, base)
    return settings["r"]


def save_template(config: TrainConfig, folder: Path) -> None:
    """Put the template of --chat-template beside the adapter in `folder`, for servers and later
    steps. Without the flag, remove one that an earlier run has left there."""
    template = config.read_chat_template()
    if template is None:
        (folder / CHAT_TEMPLATE).unlink(missing_ok=True)
    else:
        write_bytes(folder / CHAT_TEMPLATE, encode_text(template))


def serving_advice(adapter_rank: int) -> str:
    """A line that says which --max-lora-rank of vLLM such an adapter needs; "" if it is the rank
    itself.

    vLLM reserves that rank for each adapter and fills it up with zeros. It refuses adapters of a
    larger rank (PEFTHelper.validate_legal, BaseLinearLayerWithLoRA.set_lora)."""
    if adapter_rank in VLLM_RANKS:
        return ""
    if adapter_rank > max(VLLM_RANKS):
        return (
            f"the adapter's rank is {adapter_rank}, but vLLM serves at most {max(VLLM_RANKS)}:"
            " merge it into the base model (README), or train with a lower --rank; those of SFT and"
            " DPO add up"
        )
    larger = min(size for size in VLLM_RANKS if size > adapter_rank)
    return f"the adapter's rank is {adapter_rank}: vLLM serves it with --max-lora-rank {larger}"
