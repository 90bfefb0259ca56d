"""Supervised fine-tuning of one module: minimise − log π(human answer | context), per completion token.

    python train_sft.py --task sp                  the Strategy Planner, on the sample dialogues
    torchrun train_sft.py --task rg --model Qwen/Qwen2.5-7B-Instruct --data ESConv.json --split-file split.json

A LoRA adapter is trained on a frozen base model. Its defaults are the paper's (rate 1e-5, batch 32, 3 epochs, rank 16) for a 7B
model. A dialogue's turns are read as one prefix tree (desc/tree.py). Writes OUT/TASK/sft/.
"""

from dataclasses import dataclass

import torch

from desc import cli, distributed
from desc.encoding import Item, encode_example, mark_loss
from desc.esconv import Dialogue, load_splits
from desc.lora import add_adapter
from desc.losses import sft_loss
from desc.modeling import load, sequence_logps
from desc.plan import plan
from desc.prompts import Example, build_examples
from desc.strategies import Strategies, read_strategies
from desc.training import ahead, all_batches, begin_step, due, finish, planner_scores, start, survive, take, update, validated
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
    total = torch.zeros((), device=model.device)
    for _, forest in distributed.portion(model, pack(items, config.share, config.max_tokens, distributed.size())):
        total += sft_loss(sequence_logps(model, forest), sum(len(item.sequences[0].completion) for item in items))
    scores = {} if config.task == "rg" else planner_scores(model, tokenizer, config, dialogues, strategies)
    return {"valid/loss": float(distributed.total(total)), **scores}


def main():
    config = cli.parse(SFTConfig)
    device = distributed.setup()
    strategies = read_strategies(config.strategies)
    splits = load_splits(config.data, config.split_file, strategies, config.seed)
    valid = take(splits["valid"], config.eval_dialogues)
    examples = build_examples(config.task, take(splits["train"], config.train_dialogues), strategies)
    model, tokenizer = load(config.model, config.torch_dtype, device, empty=distributed.size() > 1 or config.plan > 0)

    def encode_all(batch: list[Example]) -> list[Item]:
        return [encode_example(tokenizer, example, config.max_length) for example in batch]

    def prepare(batch: list[Example]):
        """The whole batch, which says what to divide by, and this rank's micro-batches of it."""
        items = encode_all(batch)
        return items, distributed.portion(model, pack(items, config.share, config.max_tokens, distributed.size()))

    if config.show_example:
        return print(mark_loss(tokenizer, encode_all(examples[:1])[0].sequences[0]))
    torch.manual_seed(config.seed)
    add_adapter(model, "sft", config.rank, config.alpha, config.dropout)
    if config.plan:
        return print(plan(model, config, map(encode_all, all_batches(examples, config)), passes=1))
    valid_items = encode_all(build_examples(config.task, valid, strategies))
    run = start(model, config, examples, config.folder / "sft", device)
    for items, batches in ahead(prepare, run.batches[run.step :]):
        begin_step(run, config)
        model.train()
        tokens = sum(len(item.sequences[0].completion) for item in items)  # of the whole batch, before any backward
        total, nodes = 0.0, 0
        for _, forest in batches:
            loss = sft_loss(sequence_logps(model, forest), tokens)
            (loss * distributed.size()).backward()  # FSDP averages gradients over ranks: this makes it their sum
            total, nodes = total + loss.detach(), nodes + len(forest.ids)
        cut = sum(item.turns_cut for item in items) / distributed.size()
        update(run, config, {"loss": total, "nodes": nodes, "turns_cut": cut}, f"turns {items[0].id} … {items[-1].id}")
        if due(run, config.eval_every) or run.step == len(run.batches):
            scores = validate(model, tokenizer, config, valid_items, valid, strategies)
            validated(run, model, config, scores, scores["valid/loss"])
        survive(run, config.save_every)
    finish(run, model, config)


if __name__ == "__main__":
    cli.run(main)
