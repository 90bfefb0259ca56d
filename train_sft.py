r"""Supervised fine-tuning of one module: minimise − log π(human answer | context), per completion
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

from desc import DescError, cli
from desc.domain import Domain
from desc.encoding import Item, encode_example, mark_loss
from desc.esconv import Dialogue, first, load_splits
from desc.flags import MANY, TrainConfig, flag, parse
from desc.forward import sequence_logps
from desc.judging.labels import balance, hold_out, read_labels
from desc.lora import add_adapter, train_adapters
from desc.losses import sft_loss
from desc.prompts import TASKS, Example, build_examples
from desc.storage.checkpoint import checkpoint_settings
from desc.training.batches import all_batches, encode_all, my_micro_batches, prepare_ahead
from desc.training.estimate import estimate
from desc.training.ranks import join_ranks, sum_over_ranks, world_size
from desc.training.run import (
    begin,
    clip_and_step,
    finish,
    is_due,
    keep_best,
    save_checkpoint_if_due,
    seed_dropout,
)
from desc.training.sharding import must_shard
from desc.training.validation import planned_turns, score_planner


@dataclass
class SFTConfig(TrainConfig):
    lr: float = flag(
        1e-5, "peak learning rate; a 135M model needs about 5e-4", at_least=0, at_most=1
    )
    epochs: int = flag(3, "passes over the training dialogues", at_least=1, at_most=1000)
    train_dialogues: int = flag(
        0,
        "training dialogues to use, the first of the split; 0 means all",
        at_least=0,
        at_most=MANY,
    )
    task: Literal[(*TASKS, "annotate")] = field(
        kw_only=True, metadata={"help": "planner, generator, both in one model, or annotator"}
    )
    labels: str | None = flag(
        None,
        "for annotate: labelled turns (JSON lines, or the annotations published with DecoupledESC)",
    )
    label_map: str | None = flag(None, "for annotate: JSON from the file's labels to ours")
    held_out: float = flag(
        0.2,
        "for annotate: the share of labelled dialogues, the last, that are kept for"
        " mine_preferences --agreement",
        at_least=0,
        at_most=1,
    )


def find_examples(
    config: SFTConfig, splits: dict[str, list[Dialogue]], domain: Domain
) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and those to validate on."""
    if config.task != "annotate":
        if config.labels or config.label_map:
            raise DescError("--labels and --label-map are for --task annotate")
        train = first(splits["train"], config.train_dialogues)
        valid = first(splits["valid"], config.eval_dialogues)
        return tuple(
            build_examples(config.task, part, domain, config.layout) for part in (train, valid)
        )
    if not config.labels:
        raise DescError("--task annotate learns from labelled turns: give --labels FILE")
    if config.train_dialogues:
        raise DescError("--task annotate learns from all labelled turns: no --train-dialogues")
    labelled = read_labels(config.labels, splits["test"], domain, config.label_map)
    rest, _ = hold_out(labelled, config.held_out)
    train, valid = hold_out(balance(rest), 0.1)
    if not train or not valid:
        raise DescError(
            f"{config.labels}: too few dialogues to train and to validate on; label more, or lower"
            " --held-out"
        )
    return [turn.example(domain) for turn in train], [turn.example(domain) for turn in valid]


def count_tokens(items: list[Item]) -> int:
    """Completion tokens, which the loss is divided by."""
    return sum(len(item.sequences[0].completion) for item in items)


@torch.no_grad()
def validate(model, config: SFTConfig, items: list[Item]) -> dict[str, float]:
    """The loss per token on validation turns."""
    model.eval()
    total, tokens = torch.zeros((), device=model.device), count_tokens(items)
    for _, forest in my_micro_batches(items, config.share, config.max_tokens, model.device):
        total += sft_loss(sequence_logps(model, forest), tokens)
    return {"valid/loss": float(sum_over_ranks(total))}


def main():
    config = parse(SFTConfig)
    device, folder = join_ranks(), config.folder / "sft"
    cli.resolve_auto(config, device, checkpoint_settings(folder / "checkpoints"))
    domain = config.read_domain()
    splits = load_splits(config.data, config.split_file, domain.strategies, config.seed)
    examples, valid_examples = find_examples(config, splits, domain)
    empty = config.estimate > 0 or must_shard(config, device)
    model, tokenizer = cli.load_model(config, device, empty)

    def encode(example: Example) -> Item:
        return encode_example(tokenizer, example, config.max_length, domain.speakers)

    def prepare(batch: list[Item]):
        """The whole batch, which says what to divide by, and this rank's trees of it."""
        return batch, my_micro_batches(batch, config.share, config.max_tokens, device)

    if config.show_example:
        print(mark_loss(tokenizer, encode(examples[0]).sequences[0]))
        return
    items = encode_all(encode, examples, "turns")
    valid_items = encode_all(encode, valid_examples, "validation turns")
    turns = planned_turns(tokenizer, config, splits, domain)
    torch.manual_seed(config.seed)
    add_adapter(model, "sft", config.rank, config.alpha, config.dropout, config.targets)
    if config.estimate:
        print(estimate(model, config, all_batches(items, config), passes=1))
        return
    run = begin(model, config, items, "turns", folder, device)

    for batch, micro_batches in prepare_ahead(prepare, run.batches[run.step :]):
        seed_dropout(run, config)
        train_adapters(model)
        tokens = count_tokens(batch)  # of the whole global batch, before any backward
        total, nodes = 0.0, 0
        for members, forest in micro_batches:  # this rank's trees
            loss = sft_loss(sequence_logps(model, forest), tokens)
            # gradients are averaged over ranks; this makes the average their sum
            (loss * world_size()).backward()
            total, nodes = total + loss.detach(), nodes + forest.nodes
            run.bar.update(len(members))
        turns_cut = sum(item.turns_cut for item in batch) / world_size()
        sums = {"loss": total, "nodes": nodes, "turns_cut": turns_cut}
        clip_and_step(run, config, sums, f"turns {batch[0].id} … {batch[-1].id}")
        if is_due(run, config.eval_every) or run.step == len(run.batches):
            scores = validate(model, config, valid_items)
            planner_scores, planned = score_planner(model, config, turns)
            scores |= planner_scores
            keep_best(run, model, config, scores, scores["valid/loss"], planned)
        save_checkpoint_if_due(run, config.save_every)
    finish(run, model, config)


if __name__ == "__main__":
    cli.run(main)
