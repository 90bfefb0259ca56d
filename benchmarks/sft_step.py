"""SFT on the same turns with the same model and the same LoRA: ours, shared by dialogue (compiled,
too) and not at all, and TRL + PEFT.

    python benchmarks/sft_step.py --task sp         SmolLM2, two sample dialogues
    python benchmarks/sft_step.py --task rg --data ESConv.json --split-file split.json

As benchmarks/dpo_step.py, which see. The loss is that of the completions alone.
"""

from dataclasses import replace

import torch
from contest import compete, make_tokenizer, read_ours, train_trl

from desc.encoding import Item, TokenSequence, encode_example
from desc.esconv import Dialogue
from desc.forward import sequence_logps
from desc.losses import sft_loss
from desc.prompts import Example, build_examples
from desc.templates import end_of_turn
from desc.tree import Forest


def make_turns(config, dialogues: list[Dialogue]) -> list[Example]:
    return build_examples(config.task, dialogues, config.read_domain(), config.layout)


def encode_turns(config, turns: list[Example]) -> list[Item]:
    """With what the chat template writes after an end of turn, as TRL has it: SmolLM2's line
    break."""
    tokenizer = make_tokenizer(config)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]
    ids = tokenizer(
        tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False
    ).input_ids
    after = ids[len(ids) - ids[::-1].index(end_of_turn(tokenizer)) :]
    speakers = config.read_domain().speakers
    items = [encode_example(tokenizer, turn, config.max_length, speakers) for turn in turns]
    return [
        replace(
            item, sequences=[TokenSequence(s.prompt, s.completion + after) for s in item.sequences]
        )
        for item in items
    ]


def loss_of(model, forest: Forest, items: list[Item]) -> torch.Tensor:
    return sft_loss(
        sequence_logps(model, forest),
        sum(len(s.completion) for item in items for s in item.sequences),
    )


def ours(config, turns: list[Example]) -> dict:
    return read_ours(config, encode_turns(config, turns), loss_of)


def trl(config, turns: list[Example]) -> dict:
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"prompt": e.messages, "completion": [{"role": "assistant", "content": e.completion}]}
        for e in turns
    ]
    return train_trl(
        config, SFTTrainer, SFTConfig, rows, encode_turns(config, turns), completion_only_loss=True
    )


if __name__ == "__main__":
    compete(make_turns, ours, trl, passes=2, unit="turn")
