"""Direct preference optimisation of one module, from its own SFT model:

    − log σ( β [log π(y_w|x) − log π_ref(y_w|x)] − β [log π(y_l|x) − log π_ref(y_l|x)] )

    python train_dpo.py --task sp                  on OUT/sp/pairs.jsonl, from OUT/sp/sft
    torchrun train_dpo.py --task rg --model Qwen/Qwen2.5-7B-Instruct \
        --data ESConv.json --split-file split.json

The SFT adapter is frozen and a second one, `dpo`, is trained beside it, so the reference is the
same model with `dpo` off: one copy of the weights, and a policy that equals its reference to the
bit before the first step. All answers of a dialogue are read as one prefix tree. Defaults are the
paper's (β 0.5 for sp, 0.2 for rg, 1 epoch); it leaves open β for vanilla (0.2 here) and the rate
(5e-6 here). Writes OUT/TASK/dpo/: one adapter, both stacked, that fits the untouched base model.
"""

from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
from pathlib import Path

import torch

from desc import cli, distributed
from desc.checkpoint import checkpoint_settings
from desc.encoding import Item, mark_loss
from desc.esconv import Dialogue, load_splits
from desc.lora import adapter_off, add_adapter, digest
from desc.losses import dpo_loss
from desc.mining import Pair, encode_pair, read_pairs
from desc.modeling import load, sequence_logps
from desc.plan import plan
from desc.strategies import Strategies, read_strategies
from desc.training import (
    ahead,
    all_batches,
    begin_step,
    due,
    finish,
    make_batches,
    planner_scores,
    start,
    survive,
    update,
    validated,
)
from desc.tree import Forest

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
class DPOConfig(cli.TrainConfig):
    lr: float = cli.flag(5e-6, "peak learning rate; a 135M model wants about 5e-5")
    epochs: int = cli.flag(1, "passes over the pairs")
    beta: float | None = cli.flag(
        None,
        "how dearly leaving the reference is paid; smaller moves further. None: sp 0.5, rg and"
        " vanilla 0.2",
    )
    label_smoothing: float = cli.flag(
        0.0, "share of pairs taken to be labelled the wrong way round"
    )
    sft: str | None = cli.flag(None, "folder of the SFT adapter; None: OUT/TASK/sft")
    eval_pairs: int = cli.flag(0, "validation pairs to score, the first; 0 takes all")
    pairs: str | None = cli.flag(
        None, "folder with pairs.jsonl and pairs.valid.jsonl; None: OUT/TASK"
    )


def find_pairs(config: DPOConfig) -> Path:
    folder = Path(config.pairs) if config.pairs else config.folder
    if not (folder / "pairs.jsonl").exists() and not config.pairs:
        print(
            f"finds no pairs in {folder}: uses a few shipped ones; for your own run"
            f" mine_preferences.py --task {config.task}"
        )
        folder = files("desc") / "data" / config.task
    print(f"uses the pairs in {folder}")
    return folder


@torch.no_grad()
def reference_logps(model, forest: Forest) -> torch.Tensor:
    """(2B,): the same weights and code as the policy's, with `dpo` off, in eval mode, before the
    policy's forward."""
    model.eval()
    with adapter_off(model, "dpo"):
        return sequence_logps(model, forest)


def score_reference(model, batches) -> dict[str, list[float]]:
    """The reference's log-probabilities of the chosen and the rejected answer, by pair id, on every
    rank."""
    scored = [
        zip((item.id for item in members), reference_logps(model, forest).view(-1, 2).tolist())
        for members, forest in batches
    ]
    return dict(chain(*distributed.collect(list(chain(*scored)))))


def look_up(
    known: dict[str, list[float]], members: list[Item], device: torch.device
) -> torch.Tensor:
    values = [logp for item in members for logp in known[item.id]]
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def measure(
    policy: torch.Tensor, reference: torch.Tensor, config: DPOConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss summed over the forest's pairs, and the sums of METRICS (7,). Chosen and rejected
    alternate in both (2B,)."""
    losses, chosen, rejected = dpo_loss(
        policy[0::2],
        policy[1::2],
        reference[0::2],
        reference[1::2],
        config.beta,
        config.label_smoothing,
    )
    seen = (
        losses,
        chosen,
        rejected,
        chosen - rejected,
        (chosen > rejected).float(),
        policy[0::2],
        policy[1::2],
    )
    return losses.sum(), torch.stack([values.detach().sum() for values in seen])


@torch.no_grad()
def validate(
    model,
    tokenizer,
    config: DPOConfig,
    batches,
    known,
    dialogues: list[Dialogue],
    strategies: Strategies,
) -> dict:
    """METRICS on validation pairs; where the module plans, the exact scores of its strategies on
    validation dialogues too."""
    model.eval()
    sums = sum(
        measure(sequence_logps(model, f), look_up(known, members, model.device), config)[1]
        for members, f in batches
    )
    count = distributed.total(torch.tensor(sum(len(members) for members, _ in batches)))
    scores = dict(
        zip((f"valid/{name}" for name in METRICS), (distributed.total(sums).cpu() / count).tolist())
    )
    return (
        scores
        if config.task == "rg"
        else scores | planner_scores(model, tokenizer, config, dialogues, strategies)
    )


def main():
    config = cli.parse(DPOConfig)
    device, folder = distributed.setup(), config.folder / "dpo"
    cli.choose_dtype(config, device, checkpoint_settings(folder / "checkpoints"))
    config.beta = BETA[config.task] if config.beta is None else config.beta
    source = find_pairs(config)
    strategies = read_strategies(config.strategies)
    valid = load_splits(config.data, config.split_file, strategies, config.seed)["valid"][
        : config.eval_dialogues or None
    ]
    pairs = read_pairs(source / "pairs.jsonl", config.task)
    valid_pairs = read_pairs(source / "pairs.valid.jsonl", config.task)[: config.eval_pairs or None]
    model, tokenizer = load(
        config.model, config.torch_dtype, device, empty=distributed.size() > 1 or config.plan > 0
    )

    def encode_all(batch: list[Pair]) -> list[Item]:
        return [encode_pair(tokenizer, pair, config.max_length) for pair in batch]

    def prepare(batch: list[Pair]):
        """The whole batch and this rank's micro-batches of it."""
        items = encode_all(batch)
        return items, distributed.portion(model, items, config.share, config.max_tokens)

    if config.show_example:
        return print(
            "\n\n".join(
                mark_loss(tokenizer, sequence) for sequence in encode_all(pairs[:1])[0].sequences
            )
        )
    sft = Path(config.sft) if config.sft else config.folder / "sft"
    otherwise = (
        None
        if config.sft
        else f"the reference is the base model; first run train_sft.py --task {config.task}"
    )
    cli.use_adapter(model, sft, "sft", otherwise)
    torch.manual_seed(config.seed)
    add_adapter(model, "dpo", config.rank, config.alpha, config.dropout)
    if config.plan:
        return print(plan(model, config, map(encode_all, all_batches(pairs, config)), passes=2))
    run = start(model, config, pairs, "pairs", folder, device, digest(sft))
    _, valid_batches = prepare(valid_pairs)
    known = score_reference(model, valid_batches)
    if config.epochs > 1:  # pairs that come again are scored once
        for batch in make_batches(pairs, config.batch_size, config.share, config.seed, epoch=0):
            known |= score_reference(model, prepare(batch)[1])

    def check() -> None:
        """A planner is judged by the likelihood of the human strategy, which over-correction harms
        (docs/tour.md)."""
        scores = validate(model, tokenizer, config, valid_batches, known, valid, strategies)
        validated(
            run, model, config, scores, scores["valid/nll" if config.task == "sp" else "valid/loss"]
        )

    if not run.step:
        check()
    for items, batches in ahead(prepare, run.batches[run.step :]):
        begin_step(run, config)
        sums, nodes = 0, 0
        for members, forest in batches:
            reference = (
                look_up(known, members, device)
                if config.epochs > 1
                else reference_logps(model, forest)
            )
            model.train()
            policy = sequence_logps(model, forest)
            same = run.step or torch.equal(policy.nan_to_num(), reference.nan_to_num())
            assert same, "the policy differs from its reference before the first step"
            loss, seen = measure(policy, reference, config)
            # FSDP averages gradients over ranks: this makes it their sum
            (loss / len(items) * distributed.size()).backward()
            sums, nodes = sums + seen, nodes + len(forest.ids)
            run.bar.update(len(members))
        cut = sum(item.turns_cut for item in items) / distributed.size()
        record = dict(zip(METRICS, sums / len(items))) | {"nodes": nodes, "turns_cut": cut}
        update(run, config, record, f"pairs {items[0].id} … {items[-1].id}")
        if due(run, config.eval_every) or run.step == len(run.batches):
            check()
        survive(run, config.save_every)
    finish(run, model, config)


if __name__ == "__main__":
    cli.run(main)
