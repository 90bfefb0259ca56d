r"""Direct preference optimisation of one module, from its own SFT model:

    − log σ( β [log π(y_w|x) − log π_ref(y_w|x)] − β [log π(y_l|x) − log π_ref(y_l|x)] )

    python train_dpo.py --task sp                  on OUT/sp/pairs.jsonl, from OUT/sp/sft
    torchrun train_dpo.py --task rg --model Qwen/Qwen2.5-7B-Instruct \
        --data ESConv.json --split-file split.json

The SFT adapter is frozen and a second one, `dpo`, is trained beside it, so the reference is the
same model with `dpo` off: one copy of the weights, and a policy that equals its reference to the
bit before the first step. All answers of a dialogue are read as one prefix tree. A batch's loss is
the mean over its pairs, by their weights (1 unless a pair says otherwise). Defaults are the
paper's (β 0.5 for sp, 0.2 for rg, 1 epoch); it leaves open β for vanilla (0.2 here) and the rate
(5e-6 here). Writes OUT/TASK/dpo/: one adapter, both stacked, that fits the untouched base model.
"""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from desc import DescError, cli
from desc.encoding import Item, mark_loss
from desc.esconv import first, load_splits
from desc.flags import MANY, TrainConfig, flag, parse
from desc.forward import sequence_logps
from desc.lora import adapter_off, add_adapter, train_adapters
from desc.losses import dpo_loss
from desc.pairs import Pair, encode_pair, read_pairs
from desc.storage.adapters import adapter_digest
from desc.storage.checkpoint import checkpoint_settings
from desc.training.batches import (
    all_batches,
    encode_all,
    make_batches,
    my_micro_batches,
    prepare_ahead,
)
from desc.training.estimate import estimate
from desc.training.ranks import gather_objects, join_ranks, sum_over_ranks, world_size
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
from desc.training.validation import planned_turns, planner_logps, planner_scores
from desc.tree import Forest, send

BETA = {"sp": 0.5, "rg": 0.2, "vanilla": 0.2}
METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


@dataclass
class DPOConfig(TrainConfig):
    lr: float = flag(
        5e-6, "peak learning rate; a 135M model needs about 5e-5", at_least=0, at_most=1
    )
    epochs: int = flag(1, "passes over the pairs", at_least=1, at_most=1000)
    beta: float | None = flag(
        None,
        "strength of the pull to the reference; smaller moves further. None: sp 0.5, rg and vanilla"
        " 0.2",
        at_least=1e-6,
        at_most=100,
    )
    label_smoothing: float = flag(
        0.0, "share of pairs taken to be labelled the wrong way round", at_least=0, at_most=0.5
    )
    sft: str | None = flag(None, "folder of the SFT adapter, or base for none; None: OUT/TASK/sft")
    eval_pairs: int = flag(
        0, "validation pairs to score, the first; 0 means all", at_least=0, at_most=MANY
    )
    pairs: str | None = flag(
        None,
        "folder with pairs.jsonl and pairs.valid.jsonl, or sample for a few that are shipped; None:"
        " OUT/TASK",
    )


def find_pairs(config: DPOConfig) -> Path:
    """The folder of the pairs: --pairs, or what was mined. For the shipped sample, or if asked for,
    a few that are shipped.

    Raises DescError if nothing was mined."""
    shipped = files("desc") / "data" / config.task
    folder = Path(config.pairs) if config.pairs else config.folder
    mine_first = f"finds no pairs in {folder}: first run mine_preferences.py --task {config.task}"
    if config.pairs == "sample":
        folder = shipped
    elif not (folder / "pairs.jsonl").exists() and not config.pairs:
        if config.data != "sample":
            raise DescError(f"{mine_first}, or give --pairs FOLDER, or --pairs sample")
        print(f"{mine_first} for your own; uses a few shipped ones")
        folder = shipped
    made_with = cli.read_config(folder)
    if folder == shipped:
        made_with = {"task": config.task, "strategy_at": "turn"}
    cli.refuse_other_prompts(config, folder, made_with)
    print(f"uses the pairs in {folder}")
    return folder


def drop_equal(items: list[Item], unit: str) -> list[Item]:
    """The pairs whose answers differ. Equal ones teach nothing, because their loss is ln 2 and
    their gradient 0 for any model, but a batch's loss would be divided by their number, too.

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


def attach_sft(model, config: DPOConfig) -> str:
    """Attach the SFT adapter, which is the reference. Returns its digest; "" if the reference is
    the base model, as it is if --sft base asks for it, or on the sample if there is no adapter."""
    if config.sft == "base":
        print("the reference is the base model")
        return ""
    folder = Path(config.sft) if config.sft else config.folder / "sft"
    otherwise = None
    if config.data == "sample" and not config.sft:
        otherwise = f"the reference is the base model; first run train_sft.py --task {config.task}"
    cli.use_adapter(config, model, folder, "sft", otherwise)
    return adapter_digest(folder)


def pair_logps(model, forest: Forest) -> torch.Tensor:
    """log π of the chosen and the rejected answer of each pair: (B, 2)."""
    return sequence_logps(model, forest).view(-1, 2)


@torch.no_grad()
def reference_logps(model, forest: Forest) -> torch.Tensor:
    """pair_logps of the reference: the same weights and code, with `dpo` off and in eval mode."""
    model.eval()
    with adapter_off(model, "dpo"):
        return pair_logps(model, forest)


def score_reference(model, micro_batches) -> dict[str, list[float]]:
    """The reference's two log-probabilities of each pair, by pair id, on every rank."""
    scored: dict[str, list[float]] = {}
    for members, forest in micro_batches:
        rows = reference_logps(model, forest).tolist()
        scored |= {item.id: row for item, row in zip(members, rows)}
    for part in gather_objects(scored):
        scored |= part
    return scored


def look_up(known: dict[str, list[float]], members: list[Item], device) -> torch.Tensor:
    """What score_reference found for these pairs: (B, 2)."""
    rows = torch.tensor([known[item.id] for item in members], dtype=torch.float32).view(-1, 2)
    return send(rows, device)


def weights_of(members: list[Item], device) -> torch.Tensor:
    """What these pairs count for: (B,)."""
    return send(torch.tensor([item.weight for item in members], dtype=torch.float32), device)


def sum_metrics(losses, chosen, rejected, policy, weights) -> torch.Tensor:
    """METRICS summed over a forest's pairs, by their weights: (7,). policy is (B, 2), all others
    are (B,)."""
    values = losses.detach(), chosen, rejected, chosen - rejected, (chosen > rejected).float()
    weighted = [weights * value for value in values]
    weighted += (weights[:, None] * policy.detach()).unbind(1)
    return torch.stack([value.sum() for value in weighted])


@torch.no_grad()
def validate(
    model, config: DPOConfig, micro_batches, known: dict[str, list[float]]
) -> dict[str, float]:
    """METRICS on validation pairs: their means, by the pairs' weights."""
    model.eval()
    sums, total = torch.zeros(len(METRICS), device=model.device), 0.0
    for members, forest in micro_batches:
        policy = pair_logps(model, forest)
        reference = look_up(known, members, model.device)
        losses, chosen, rejected = dpo_loss(
            *policy.unbind(1), *reference.unbind(1), config.beta, config.label_smoothing
        )
        sums += sum_metrics(losses, chosen, rejected, policy, weights_of(members, model.device))
        total += sum(item.weight for item in members)
    means = sum_over_ranks(sums).cpu() / sum_over_ranks(torch.tensor(total))
    return {f"valid/{name}": value for name, value in zip(METRICS, means.tolist())}


def main():
    config = parse(DPOConfig)
    device, folder = join_ranks(), config.folder / "dpo"
    cli.resolve_auto(config, device, checkpoint_settings(folder / "checkpoints"))
    config.beta = BETA[config.task] if config.beta is None else config.beta
    source = find_pairs(config)
    domain = config.read_domain()
    splits = load_splits(config.data, config.split_file, domain.strategies, config.seed)
    pairs = read_pairs(source / "pairs.jsonl", config.task)
    valid_pairs = first(read_pairs(source / "pairs.valid.jsonl", config.task), config.eval_pairs)
    empty = config.estimate > 0 or must_shard(config, device)
    model, tokenizer = cli.load_model(config, device, empty)

    def encode(pair: Pair) -> Item:
        return encode_pair(tokenizer, pair, config.max_length, domain.speakers)

    def prepare(batch: list[Item]):
        """The whole batch, and this rank's trees of it."""
        return batch, my_micro_batches(batch, config.share, config.max_tokens, device)

    if config.show_example:
        shown = encode(pairs[0])
        print("\n\n".join(mark_loss(tokenizer, sequence) for sequence in shown.sequences))
        return
    sft = attach_sft(model, config)
    items = drop_equal(encode_all(encode, pairs, "pairs"), "pairs")
    valid_items = drop_equal(
        encode_all(encode, valid_pairs, "validation pairs"), "validation pairs"
    )
    turns = planned_turns(tokenizer, config, splits, domain)
    torch.manual_seed(config.seed)
    add_adapter(model, "dpo", config.rank, config.alpha, config.dropout, config.targets)
    if config.estimate:
        print(estimate(model, config, all_batches(items, config), passes=2))
        return
    run = begin(model, config, items, "pairs", folder, device, sft)
    _, valid_micro_batches = prepare(valid_items)
    # Both files may call a pair the same, so each has a dictionary of its own.
    valid_known, known = score_reference(model, valid_micro_batches), {}
    if config.epochs > 1:  # pairs that come again are scored once
        for batch in make_batches(items, config.batch_size, config.share, config.seed, epoch=0):
            known |= score_reference(model, prepare(batch)[1])

    def check() -> None:
        """Validate, and keep the best. A planner is judged by the likelihood of the human strategy,
        which over-correction harms (docs/tour.md)."""
        scores, planned = validate(model, config, valid_micro_batches, valid_known), []
        if turns:
            logps = planner_logps(model, config, turns)
            scores |= planner_scores(logps, turns)
            planned = turns.records(logps)
        score = scores["valid/nll" if config.task == "sp" else "valid/loss"]
        keep_best(run, model, config, scores, score, planned)

    if run.step == 0:
        check()
    for batch, micro_batches in prepare_ahead(prepare, run.batches[run.step :]):
        seed_dropout(run, config)
        total = sum(item.weight for item in batch)  # of the whole global batch
        sums, nodes = 0, 0
        for members, forest in micro_batches:  # this rank's trees
            if config.epochs > 1:
                reference = look_up(known, members, device)
            else:
                reference = reference_logps(model, forest)  # (B, 2)
            train_adapters(model)
            policy = pair_logps(model, forest)  # (B, 2): chosen, rejected
            if run.step == 0:
                same = torch.equal(policy.nan_to_num(), reference.nan_to_num())
                assert same, "the policy differs from its reference before the first step"
            losses, chosen, rejected = dpo_loss(
                *policy.unbind(1), *reference.unbind(1), config.beta, config.label_smoothing
            )
            weights = weights_of(members, device)
            # gradients are averaged over ranks; this makes the average their sum
            ((weights * losses).sum() / total * world_size()).backward()
            sums = sums + sum_metrics(losses, chosen, rejected, policy, weights)
            nodes += forest.nodes
            run.bar.update(len(members))
        turns_cut = sum(item.turns_cut for item in batch) / world_size()
        means = dict(zip(METRICS, sums / total))  # this rank's part of the whole batch's means
        record = means | {"nodes": nodes, "turns_cut": turns_cut}
        clip_and_step(run, config, record, f"pairs {batch[0].id} … {batch[-1].id}")
        if is_due(run, config.eval_every) or run.step == len(run.batches):
            check()
        save_checkpoint_if_due(run, config.save_every)
    finish(run, model, config)


if __name__ == "__main__":
    cli.run(main)
