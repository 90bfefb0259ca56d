"""Supervised fine-tuning of one module: minimise − log π(human answer | context), per completion token.

    python train_sft.py --task sp                  the Strategy Planner, on the sample dialogues
    torchrun train_sft.py --task rg --model Qwen/Qwen2.5-7B-Instruct --data ESConv.json --split-file split.json

A LoRA adapter is trained on a frozen base model. Its defaults are the paper's (rate 1e-5, batch 32, 3 epochs, rank 16) for a 7B
model. A dialogue's turns are read as one prefix tree (desc/tree.py). Writes OUT/TASK/sft/.
"""

from dataclasses import dataclass
from itertools import chain

import torch

from desc import cli, distributed
from desc.encoding import Item, encode, mark_loss
from desc.esconv import Dialogue, load_splits
from desc.lora import add_adapter
from desc.losses import sft_loss
from desc.modeling import load, sequence_logps
from desc.prompts import Example, build_examples
from desc.strategies import Strategies, read_strategies
from desc.training import finish, log, planner_scores, start, take, update, validated
from desc.tree import pack


@dataclass
class SFTConfig(cli.TrainConfig):
    lr: float = cli.flag(1e-5, "peak learning rate; a 135M model wants about 5e-4")
    epochs: int = cli.flag(3, "passes over the training dialogues")
    train_dialogues: int = cli.flag(0, "training dialogues to use, the first of the split; 0 takes all")


@torch.no_grad()
def validate(model, tokenizer, config: SFTConfig, items: list[Item], dialogues: list[Dialogue], strategies: Strategies) -> dict:
    """The loss a token on validation turns; where the module plans, the exact scores of its strategies too."""
    model.eval()
    total, tokens = 0.0, 0
    for _, forest in pack(items, config.share, config.max_tokens):
        total, tokens = total + float(sft_loss(sequence_logps(model, forest), 1)), tokens + len(forest.targets)
    scores = {} if config.task == "rg" else planner_scores(model, tokenizer, config, dialogues, strategies)
    return {"valid/loss": total / tokens, **scores}


def main():
    config = cli.parse(SFTConfig)
    device = distributed.setup()
    strategies = read_strategies(config.strategies)
    splits = load_splits(config.data, config.split_file, strategies, config.seed)
    valid = take(splits["valid"], config.eval_dialogues)
    examples = build_examples(config.task, take(splits["train"], config.train_dialogues), strategies)
    model, tokenizer = load(config.model, config.torch_dtype, device)

    def encode_all(batch: list[Example]) -> list[Item]:
        return [encode(tokenizer, f"{e.dialogue}/{e.turn}", e.dialogue, e.messages, [e.completion], config.max_length) for e in batch]

    if config.show_example:
        return print(mark_loss(tokenizer, encode_all(examples[:1])[0].sequences[0]))
    torch.manual_seed(config.seed)
    add_adapter(model, "sft", config.rank, config.alpha, config.dropout)
    valid_items = encode_all(build_examples(config.task, valid, strategies))
    run = start(model, config, examples, config.folder / "sft")
    for batch in chain(*run.epochs):
        model.train()
        items = encode_all(batch)
        tokens = sum(len(item.sequences[0].completion) for item in items)  # of the whole batch, before any backward
        total, nodes = 0.0, 0
        for _, forest in pack(items, config.share, config.max_tokens):
            loss = sft_loss(sequence_logps(model, forest), tokens)
            loss.backward()
            total, nodes = total + loss.detach(), nodes + len(forest.ids)
        record = {"loss": float(total), **update(run, config.max_grad_norm, f"turns {items[0].id} … {items[-1].id}")}
        log(run, record | {"nodes": nodes, "turns_cut": sum(item.turns_cut for item in items)})
        if run.bar.n % config.eval_every == 0 or run.bar.n == run.bar.total:
            scores = validate(model, tokenizer, config, valid_items, valid, strategies)
            validated(run, model, config, scores, scores["valid/loss"])
    finish(run, model, config)


if __name__ == "__main__":
    cli.run(main)
