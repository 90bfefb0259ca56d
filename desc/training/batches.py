"""Batches: examples encoded before the first step, shuffled epochs of whole dialogues, and each
rank's share of a batch as forests."""

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

from desc import DescError
from desc.encoding import Item
from desc.training.ranks import rank, world_size
from desc.tree import Forest, pack


def encode_all(encode: Callable, examples: list, unit: str) -> list[Item]:
    """encode(example) of each, before the first step, so that one that is too long ends a run at
    once. `unit` is what an error calls them: "turns". A bar appears if this takes long.

    Raises DescError with the first problem, and how many examples have one."""
    items, problems = [], []
    bar = tqdm(
        examples,
        f"encode {unit}",
        leave=False,
        dynamic_ncols=True,
        mininterval=5,
        delay=5,
        disable=rank() > 0,
    )
    for example in bar:
        try:
            items.append(encode(example))
        except DescError as problem:
            problems.append(str(problem))
    if problems:
        raise DescError(
            f"{len(problems)} of {len(examples)} {unit} cannot be encoded; the first: {problems[0]}"
        )
    return items


def drop_equal(items: list[Item], unit: str) -> list[Item]:
    """The pairs whose answers differ. Equal ones teach no preference, because their margin is 0 for
    any model, but a batch's loss would be divided by their number, too.

    Prints how many are left out. Raises DescError if none is left."""
    differing = [item for item in items if item.sequences[0] != item.sequences[1]]
    if not differing:
        raise DescError(
            f"chosen and rejected are the same in all {len(items)} {unit}; there is nothing to"
            " prefer"
        )
    if len(differing) < len(items):
        left_out = len(items) - len(differing)
        print(f"leaves out {left_out} of {len(items)} {unit}: chosen and rejected are the same")
    return differing


def make_batches(examples: list, batch_size: int, share: str, seed: int, epoch: int) -> list[list]:
    """A shuffled epoch of examples or pairs, cut into batches. Their weights are counted, so with
    weights of 1 their number.

    With share "dialogue" a batch is whole dialogues, because one that is cut in two is read twice.
    A batch is closed if one more dialogue, or example, would take it further from `batch_size`."""
    grouped: dict[object, list] = {}
    for number, example in enumerate(examples):
        group = example.dialogue if share == "dialogue" else number
        grouped.setdefault(group, []).append(example)
    groups = list(grouped.values())
    random.Random(f"{seed}/{epoch}").shuffle(groups)
    batches, size = [[]], 0
    for group in groups:
        added = sum(example.weight for example in group)
        if batches[-1] and size + added - batch_size > batch_size - size:
            batches.append([])
            size = 0
        batches[-1].extend(group)
        size += added
    return batches


def all_batches(examples: list, config) -> list[list]:
    """The batches of all epochs, one after another (config: a desc.flags.TrainConfig)."""
    batches = []
    for epoch in range(config.epochs):
        batches += make_batches(examples, config.batch_size, config.share, config.seed, epoch)
    return batches


def my_micro_batches(
    items: list[Item], share: str, max_tokens: int, device: torch.device
) -> list[tuple[list[Item], Forest]]:
    """This rank's micro-batches of a batch, on its device.

    Every rank packs all of the batch in the same way and takes its hand, so each knows the whole
    batch without communication."""
    hands = deal(pack(items, share, max_tokens, world_size()), world_size())
    return [(members, forest.to(device)) for members, forest in hands[rank()]]


def deal(
    batches: list[tuple[list[Item], Forest]], ranks: int
) -> list[list[tuple[list[Item], Forest]]]:
    """Micro-batches -> each rank's hand: about as many nodes, and exactly as many forwards, because
    ranks that share a model wait for each other, and because any other rank needs a gradient, too.

    A hand that is too small is filled up with forests of one node and no sequence, whose loss and
    gradient are zero."""
    per_rank = -(-len(batches) // ranks)
    hands, nodes = [[] for _ in range(ranks)], [0] * ranks
    # The largest first, each to the rank that has least to do.
    for batch in sorted(batches, key=lambda batch: -len(batch[1].ids)):
        with_room = [r for r in range(ranks) if len(hands[r]) < per_rank]
        rank_with_least = min(with_room, key=nodes.__getitem__)
        hands[rank_with_least].append(batch)
        nodes[rank_with_least] += len(batch[1].ids)
    empty = torch.tensor([], dtype=torch.int64)
    zero, one = torch.tensor([0]), torch.tensor([1])
    blank = Forest(zero, zero, one, empty, empty, empty, size=0, nodes=0)
    return [hand + [([], blank)] * (per_rank - len(hand)) for hand in hands]


def prepare_ahead(prepare: Callable, batches: list) -> Iterator:
    """prepare(batch) of each, made in a thread while the caller trains on the one before."""
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for batch in batches:
            ready, coming = coming, pool.submit(prepare, batch)
            if ready:
                yield ready.result()
        if coming:
            yield coming.result()
