"""DPO on the same pairs with the same model and the same LoRA: ours, shared by dialogue (compiled,
too), by pair and not at all, and TRL + PEFT.

    python benchmarks/dpo_step.py --task sp         SmolLM2, two sample dialogues
    python benchmarks/dpo_step.py --task rg --data ESConv.json --split-file split.json
    python benchmarks/dpo_step.py --task sp --model qwen2.5-7b    that shape, for its speed alone

Each contender runs in a process of its own, one after another, over all pairs: reference, policy,
backward. TRL trains as a careful user would set it: the same dtype, no gradient checkpointing, the
reference that it makes itself, the batch size that is fastest. Prints the machine and the dtype,
pairs/s, the ratio to TRL, peak memory, tokens read, the share of this machine's matrix peak in that
dtype (measured by each process; counted are the products with the weights) and the fp32 loss of the
first pairs."""

import random

import torch
from contest import compete, make_model, make_tokenizer, read_ours, train_trl

from desc.encoding import Item
from desc.esconv import Dialogue
from desc.forward import sequence_logps
from desc.lora import adapter_off
from desc.losses import dpo_loss
from desc.pairs import Pair, encode_pair
from desc.prompts import build_examples
from desc.tree import Forest

BETA = 0.5


def make_pairs(config, dialogues: list[Dialogue]) -> list[Pair]:
    """The human answer and, for sp, a wrong strategy, else what was said at another turn."""
    domain, draw = config.read_domain(), random.Random(config.seed)
    examples = build_examples(config.task, dialogues, domain, config.layout)
    pairs = []
    for e in examples:
        others = (
            domain.strategies if config.task == "sp" else [other.completion for other in examples]
        )
        rejected = draw.choice([text for text in others if text != e.completion])
        name = f"{e.dialogue}/{e.turn}"
        pairs.append(
            Pair(
                name,
                config.task,
                e.dialogue,
                e.turn,
                "",
                "made up",
                e.messages,
                e.completion,
                rejected,
            )
        )
    return pairs


def encode_pairs(config, tokenizer, pairs: list[Pair]) -> list[Item]:
    speakers = config.read_domain().speakers
    return [encode_pair(tokenizer, pair, config.max_length, speakers) for pair in pairs]


def loss_of(model, forest: Forest, items: list[Item]) -> torch.Tensor:
    with torch.no_grad(), adapter_off(model, "dpo"):
        reference = sequence_logps(model, forest)
    policy = sequence_logps(model, forest)
    return dpo_loss(policy[0::2], policy[1::2], reference[0::2], reference[1::2], BETA)[
        0
    ].sum() / len(items)


def ours(config, pairs: list[Pair]) -> dict:
    return read_ours(config, encode_pairs(config, make_tokenizer(config), pairs), loss_of)


def trl(config, pairs: list[Pair]) -> dict:
    from trl import DPOConfig, DPOTrainer

    rows = [{key: pair.record()[key] for key in ("prompt", "chosen", "rejected")} for pair in pairs]

    # for the loss alone: without it TRL's reference is a copy of the adapter, and every loss is ln
    # 2
    def base():
        return (make_model(config, torch.float32, "sdpa"),)

    items = encode_pairs(config, make_tokenizer(config), pairs)
    return train_trl(config, DPOTrainer, DPOConfig, rows, items, base, beta=BETA)


if __name__ == "__main__":
    compete(make_pairs, ours, trl, passes=3, unit="pair")
