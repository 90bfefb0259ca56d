"""SFT on the same turns with the same model and the same LoRA: ours, shared by dialogue (compiled, too) and not at all, and TRL + PEFT.

    python benchmarks/sft_step.py --task sp                                               SmolLM2, two sample dialogues
    python benchmarks/sft_step.py --task rg --data ESConv.json --split-file split.json    two of ESConv

As benchmarks/dpo_step.py, which see. The loss is that of the completions alone.
"""

import torch
from contest import CHECKED, Task, compete, encode_all, memory, our_model, sharing, time_ours, train_trl

from desc.esconv import load_splits
from desc.losses import sft_loss
from desc.modeling import sequence_logps
from desc.prompts import build_examples
from desc.strategies import read_strategies
from desc.tree import pack


def make_turns(config) -> list[Task]:
    strategies = read_strategies(config.strategies)
    dialogues = load_splits(config.data, config.split_file, strategies, config.seed)["train"][: config.dialogues]
    examples = build_examples(config.task, dialogues, strategies)
    return [Task(f"{e.dialogue}/{e.turn}", e.dialogue, e.messages, [e.completion]) for e in examples]


def ours(config, turns: list[Task]) -> dict:
    model, items = our_model(config), encode_all(config, turns)
    tokens = sum(len(s.completion) for item in items for s in item.sequences)

    def read():
        for _, forest in pack(items, sharing(config), config.max_tokens):
            sft_loss(sequence_logps(model, forest.to(model.device)), tokens).backward()

    seconds = time_ours(config, read)
    nodes = sum(len(forest.ids) for _, forest in pack(items, sharing(config), config.max_tokens))
    result = {"seconds": seconds, "memory": memory(), "tokens": nodes}
    ((_, forest),) = pack(items[:CHECKED], "dialogue", 10**9)
    with torch.no_grad():
        return result | {"loss": float(sft_loss(sequence_logps(our_model(config, torch.float32), forest), len(forest.targets)))}


def trl(config, turns: list[Task]) -> dict:
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": t.messages, "completion": [{"role": "assistant", "content": t.answers[0]}]} for t in turns]
    tokens = sum(len(s.prompt) + len(s.completion) for item in encode_all(config, turns) for s in item.sequences)
    return train_trl(config, SFTTrainer, SFTConfig, rows, tokens, completion_only_loss=True)


if __name__ == "__main__":
    compete(make_turns, ours, trl, passes=2, unit="turn")
