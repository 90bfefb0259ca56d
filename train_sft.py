"""Supervised fine-tuning of one module: minimise − log π(human answer | context), per completion token.

    python train_sft.py --task sp                  the Strategy Planner, on the sample dialogues
    torchrun train_sft.py --task rg --model Qwen/Qwen2.5-7B-Instruct --data ESConv.json --split-file split.json

A LoRA adapter is trained on a frozen base model. Its defaults are the paper's (rate 1e-5, batch 32, 3 epochs, rank 16) for a 7B
model. A dialogue's turns are read as one prefix tree (desc/tree.py). Writes OUT/TASK/sft/.
"""

from dataclasses import dataclass

import torch
from tqdm import tqdm

from desc import cli, distributed
from desc.encoding import encode, mark_loss
from desc.esconv import load_splits
from desc.lora import add_adapter, save_adapter
from desc.losses import sft_loss
from desc.modeling import load, sequence_logps
from desc.prompts import build_examples
from desc.strategies import read_strategies
from desc.training import fresh_log, log, make_batches, make_optimizer, make_schedule, planner_scores, take, update
from desc.tree import pack


@dataclass
class SFTConfig(cli.TrainConfig):
    lr: float = cli.flag(1e-5, "peak learning rate; a 135M model wants about 5e-4")
    epochs: int = cli.flag(3, "passes over the training dialogues")
    train_dialogues: int = cli.flag(0, "training dialogues to use, the first of the split; 0 takes all")


def main():
    config = cli.parse(SFTConfig)
    device = distributed.setup()
    folder = config.folder / "sft"
    strategies = read_strategies(config.strategies)
    splits = load_splits(config.data, config.split_file, strategies, config.seed)
    valid = take(splits["valid"], config.eval_dialogues)
    examples = build_examples(config.task, take(splits["train"], config.train_dialogues), strategies)
    valid_examples = build_examples(config.task, valid, strategies)

    model, tokenizer = load(config.model, config.torch_dtype, device)

    def encode_all(batch):
        return [encode(tokenizer, f"{e.dialogue}/{e.turn}", e.dialogue, e.messages, [e.completion], config.max_length) for e in batch]

    if config.show_example:
        return print(mark_loss(tokenizer, encode_all(examples[:1])[0].sequences[0]))
    torch.manual_seed(config.seed)
    add_adapter(model, "sft", config.rank, config.alpha, config.dropout)
    epochs = [make_batches(examples, config.batch_size, config.share, config.seed, epoch) for epoch in range(config.epochs)]
    steps = sum(map(len, epochs))
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    schedule = make_schedule(optimizer, steps, config.warmup)
    metrics = fresh_log(folder)
    best_at, last_at = (folder, folder / "last") if config.keep == "best" else (folder / "best", folder)
    print(f"SFT of {config.task}: {config.model}, {len(examples)} turns of {config.data}, {steps} steps, into {folder}")

    @torch.no_grad()
    def validate() -> dict:
        """Loss per token on validation turns; where the module plans, the exact scores of its strategies too."""
        model.eval()
        nll, tokens = 0.0, 0
        for _, forest in pack(encode_all(valid_examples), config.share, config.max_tokens):
            nll, tokens = nll - float(sequence_logps(model, forest).sum()), tokens + len(forest.targets)
        scores = {} if config.task == "rg" else planner_scores(model, tokenizer, config, valid, strategies)
        return {"valid/loss": nll / tokens, **scores}

    step, best, bar = 0, float("inf"), tqdm(total=steps, desc=f"sft {config.task}", dynamic_ncols=True)
    for epoch in epochs:
        for batch in epoch:
            model.train()
            items = encode_all(batch)
            tokens = sum(len(sequence.completion) for item in items for sequence in item.sequences)
            total, nodes = 0.0, 0
            for _, forest in pack(items, config.share, config.max_tokens):
                loss = sft_loss(sequence_logps(model, forest), tokens)
                loss.backward()
                total, nodes = total + loss.detach(), nodes + len(forest.ids)
            rate = schedule.get_last_lr()[0]
            norm = update(optimizer, schedule, config.max_grad_norm, f"step {step + 1}, turns {items[0].id} … {items[-1].id}")
            step += 1
            bar.update()
            cut = sum(item.turns_cut for item in items)
            log(metrics, {"step": step, "loss": float(total), "lr": rate, "grad_norm": norm, "nodes": nodes, "turns_cut": cut}, bar)
            if step % config.eval_every == 0 or step == steps:
                scores = validate()
                log(metrics, {"step": step, **scores}, bar)
                if scores["valid/loss"] < best:
                    best = scores["valid/loss"]
                    save_adapter(model, best_at)
                    cli.save_config(config, best_at)
    bar.close()
    save_adapter(model, last_at)
    cli.save_config(config, last_at)
    print(f"best validation loss {best:.4f}; the adapter that later steps use ({config.keep}) is in {folder}")


if __name__ == "__main__":
    cli.run(main)
