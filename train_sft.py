"""Supervised fine-tuning of one module: minimise − log π(human answer | context), per completion
token.

    python train_sft.py --task sp                  the Strategy Planner, on the sample dialogues
    torchrun train_sft.py --task rg --model Qwen/Qwen2.5-7B-Instruct \
        --data ESConv.json --split-file split.json

A LoRA adapter is trained on a frozen base model. Its defaults are the paper's (rate 1e-5, batch 32,
3 epochs, rank 16) for a 7B model. A dialogue's turns are read as one prefix tree (desc/tree.py).
Writes OUT/TASK/sft/. --task annotate learns from --labels what is wrong with supporters' turns, for
mine_preferences.py --annotator local."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from desc import DescError, cli, distributed
from desc.agreement import balance, hold_out, read_labels
from desc.checkpoint import checkpoint_settings
from desc.encoding import Item, encode_example, mark_loss
from desc.esconv import Dialogue, load_splits
from desc.lora import add_adapter
from desc.losses import sft_loss
from desc.modeling import load, sequence_logps
from desc.plan import plan
from desc.prompts import TASKS, Example, build_examples
from desc.strategies import Strategies, read_strategies
from desc.training import (
    ahead,
    all_batches,
    begin_step,
    due,
    finish,
    planner_scores,
    start,
    survive,
    update,
    validated,
)


@dataclass
class SFTConfig(cli.TrainConfig):
    lr: float = cli.flag(1e-5, "peak learning rate; a 135M model wants about 5e-4")
    epochs: int = cli.flag(3, "passes over the training dialogues")
    train_dialogues: int = cli.flag(
        0, "training dialogues to use, the first of the split; 0 takes all"
    )
    task: Literal[(*TASKS, "annotate")] = field(
        kw_only=True, metadata={"help": "planner, generator, both in one model, or annotator"}
    )
    labels: str | None = cli.flag(
        None,
        "for annotate: labelled turns (JSON lines, or the annotations published with DecoupledESC)",
    )
    label_map: str | None = cli.flag(None, "for annotate: JSON from the file's labels to ours")
    held_out: float = cli.flag(
        0.2,
        "for annotate: the share of labelled dialogues, the last, that are kept for"
        " mine_preferences --agreement",
    )


def find_examples(
    config: SFTConfig, splits: dict[str, list[Dialogue]], strategies: Strategies
) -> tuple[list[Example], list[Example]]:
    """To train and to validate on."""
    if config.task != "annotate":
        parts = (
            splits["train"][: config.train_dialogues or None],
            splits["valid"][: config.eval_dialogues or None],
        )
        return tuple(build_examples(config.task, part, strategies) for part in parts)
    if not config.labels:
        raise DescError("--task annotate learns from labelled turns: give --labels FILE")
    rest, _ = hold_out(
        read_labels(config.labels, splits["test"], strategies, config.label_map), config.held_out
    )
    train, valid = ([one.example() for one in part] for part in hold_out(balance(rest), 0.1))
    if not train or not valid:
        raise DescError(
            f"{config.labels}: too few dialogues to train and to validate on; label more, or lower"
            " --held-out"
        )
    return train, valid


@torch.no_grad()
def validate(
    model,
    tokenizer,
    config: SFTConfig,
    items: list[Item],
    dialogues: list[Dialogue],
    strategies: Strategies,
) -> dict:
    """The loss a token on validation turns; where the module plans, the exact scores of its
    strategies too."""
    model.eval()
    total = torch.zeros((), device=model.device)
    for _, forest in distributed.portion(model, items, config.share, config.max_tokens):
        total += sft_loss(
            sequence_logps(model, forest), sum(len(item.sequences[0].completion) for item in items)
        )
    scores = (
        {}
        if config.task in ("rg", "annotate")
        else planner_scores(model, tokenizer, config, dialogues, strategies)
    )
    return {"valid/loss": float(distributed.total(total)), **scores}


def main():
    config = cli.parse(SFTConfig)
    device, folder = distributed.setup(), config.folder / "sft"
    cli.choose_dtype(config, device, checkpoint_settings(folder / "checkpoints"))
    strategies = read_strategies(config.strategies)
    splits = load_splits(config.data, config.split_file, strategies, config.seed)
    valid = splits["valid"][: config.eval_dialogues or None]
    examples, valid_examples = find_examples(config, splits, strategies)
    model, tokenizer = load(
        config.model, config.torch_dtype, device, empty=distributed.size() > 1 or config.plan > 0
    )

    def encode_all(batch: list[Example]) -> list[Item]:
        return [encode_example(tokenizer, example, config.max_length) for example in batch]

    def prepare(batch: list[Example]):
        """The whole batch, which says what to divide by, and this rank's micro-batches of it."""
        items = encode_all(batch)
        return items, distributed.portion(model, items, config.share, config.max_tokens)

    if config.show_example:
        return print(mark_loss(tokenizer, encode_all(examples[:1])[0].sequences[0]))
    torch.manual_seed(config.seed)
    add_adapter(model, "sft", config.rank, config.alpha, config.dropout)
    if config.plan:
        return print(plan(model, config, map(encode_all, all_batches(examples, config)), passes=1))
    valid_items = encode_all(valid_examples)
    run = start(model, config, examples, "turns", folder, device)
    for items, batches in ahead(prepare, run.batches[run.step :]):
        begin_step(run, config)
        model.train()
        # of the whole batch, before any backward
        tokens = sum(len(item.sequences[0].completion) for item in items)
        total, nodes = 0.0, 0
        for members, forest in batches:
            loss = sft_loss(sequence_logps(model, forest), tokens)
            # FSDP averages gradients over ranks: this makes it their sum
            (loss * distributed.size()).backward()
            total, nodes = total + loss.detach(), nodes + len(forest.ids)
            run.bar.update(len(members))
        cut = sum(item.turns_cut for item in items) / distributed.size()
        update(
            run,
            config,
            {"loss": total, "nodes": nodes, "turns_cut": cut},
            f"turns {items[0].id} … {items[-1].id}",
        )
        if due(run, config.eval_every) or run.step == len(run.batches):
            scores = validate(model, tokenizer, config, valid_items, valid, strategies)
            validated(run, model, config, scores, scores["valid/loss"])
        survive(run, config.save_every)
    finish(run, model, config)


if __name__ == "__main__":
    cli.run(main)
