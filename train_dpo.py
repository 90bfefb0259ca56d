"""Direct preference optimisation of one module, from its own SFT model:

    − log σ( β [log π(y_w|x) − log π_ref(y_w|x)] − β [log π(y_l|x) − log π_ref(y_l|x)] )

    python train_dpo.py --task sp                  on OUT/sp/pairs.jsonl, from OUT/sp/sft
    torchrun train_dpo.py --task rg --model Qwen/Qwen2.5-7B-Instruct --data ESConv.json --split-file split.json

The SFT adapter is frozen and a second one, `dpo`, is trained beside it, so the reference is the same model with `dpo` off: one copy of
the weights, and a policy that equals its reference to the bit before the first step. All answers of a dialogue are read as one prefix
tree. Defaults are the paper's (β 0.5 for sp, 0.2 for rg, 1 epoch); it leaves open β for vanilla (0.2 here) and the rate (5e-6 here).
Writes OUT/TASK/dpo/: one adapter, both stacked, that fits the untouched base model.
"""

from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
from pathlib import Path

import torch

from desc import cli, distributed
from desc.encoding import Item, encode, mark_loss
from desc.esconv import Dialogue, load_splits
from desc.lora import adapter_off, add_adapter, load_adapter
from desc.losses import dpo_loss
from desc.mining import Pair, read_pairs
from desc.modeling import load, sequence_logps
from desc.strategies import Strategies, read_strategies
from desc.training import finish, log, planner_scores, start, take, update, validated
from desc.tree import Forest, pack

BETA = {"sp": 0.5, "rg": 0.2, "vanilla": 0.2}
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")


@dataclass
class DPOConfig(cli.TrainConfig):
    lr: float = cli.flag(5e-6, "peak learning rate; a 135M model wants about 5e-5")
    epochs: int = cli.flag(1, "passes over the pairs")
    beta: float | None = cli.flag(None, "how dearly leaving the reference is paid; smaller moves further. None: sp 0.5, rg and vanilla 0.2")
    label_smoothing: float = cli.flag(0.0, "share of pairs taken to be labelled the wrong way round")
    sft: str | None = cli.flag(None, "folder of the SFT adapter; None: OUT/TASK/sft")
    eval_pairs: int = cli.flag(0, "validation pairs to score, the first; 0 takes all")
    pairs: str | None = cli.flag(None, "folder with pairs.jsonl and pairs.valid.jsonl; None: OUT/TASK")


def find_pairs(config: DPOConfig) -> Path:
    folder = Path(config.pairs) if config.pairs else config.folder
    if not (folder / "pairs.jsonl").exists() and not config.pairs:
        print(f"finds no pairs in {folder}: uses a few shipped ones; for your own run mine_preferences.py --task {config.task}")
        folder = files("desc") / "data" / config.task
    print(f"uses the pairs in {folder}")
    return folder


@torch.no_grad()
def reference_logps(model, items: list[Item], forest: Forest, known: dict[str, torch.Tensor], keep: bool) -> torch.Tensor:
    """(2B,): the same weights and code as the policy's, with `dpo` off, in eval mode, before the policy's forward.

    `known` holds them by pair id where a pair comes again (`keep`)."""
    if not all(item.id in known for item in items):
        model.eval()
        with adapter_off(model, "dpo"):
            logps = sequence_logps(model, forest)
        if not keep:
            return logps
        known.update(zip((item.id for item in items), logps.view(-1, 2)))
    return torch.cat([known[item.id] for item in items])


def measure(policy: torch.Tensor, reference: torch.Tensor, config: DPOConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss summed over the forest's pairs, and the sums of METRICS (7,). Chosen and rejected alternate in both (2B,)."""
    losses, chosen, rejected = dpo_loss(
        policy[0::2], policy[1::2], reference[0::2], reference[1::2], config.beta, config.label_smoothing
    )
    seen = (losses, chosen, rejected, chosen - rejected, (chosen > rejected).float(), policy[0::2], policy[1::2])
    return losses.sum(), torch.stack([values.detach().sum() for values in seen])


@torch.no_grad()
def validate(model, tokenizer, config: DPOConfig, items, known, dialogues: list[Dialogue], strategies: Strategies) -> dict:
    """METRICS on validation pairs; where the module plans, the exact scores of its strategies on validation dialogues too."""
    sums = 0
    for members, forest in pack(items, config.share, config.max_tokens):
        reference = reference_logps(model, members, forest, known, keep=True)
        model.eval()
        sums = sums + measure(sequence_logps(model, forest), reference, config)[1]
    scores = dict(zip((f"valid/{name}" for name in METRICS), (sums / len(items)).tolist()))
    return scores if config.task == "rg" else scores | planner_scores(model, tokenizer, config, dialogues, strategies)


def main():
    config = cli.parse(DPOConfig)
    device = distributed.setup()
    config.beta = BETA[config.task] if config.beta is None else config.beta
    source = find_pairs(config)
    strategies = read_strategies(config.strategies)
    valid = take(load_splits(config.data, config.split_file, strategies, config.seed)["valid"], config.eval_dialogues)
    pairs = read_pairs(source / "pairs.jsonl", config.task)
    valid_pairs = take(read_pairs(source / "pairs.valid.jsonl", config.task), config.eval_pairs)
    model, tokenizer = load(config.model, config.torch_dtype, device)

    def encode_all(batch: list[Pair]) -> list[Item]:
        return [encode(tokenizer, p.id, p.dialogue, p.prompt, [p.chosen, p.rejected], config.max_length) for p in batch]

    if config.show_example:
        return print("\n\n".join(mark_loss(tokenizer, sequence) for sequence in encode_all(pairs[:1])[0].sequences))
    sft = Path(config.sft) if config.sft else config.folder / "sft"
    if cli.find_adapter(sft, f"the reference is the base model; first run train_sft.py --task {config.task}"):
        load_adapter(model, sft, "sft")
    torch.manual_seed(config.seed)
    add_adapter(model, "dpo", config.rank, config.alpha, config.dropout)
    valid_items, known = encode_all(valid_pairs), {}
    run = start(model, config, pairs, config.folder / "dpo")

    def check() -> None:
        """A planner is judged by the likelihood of the human strategy, which over-correction harms (docs/tour.md)."""
        scores = validate(model, tokenizer, config, valid_items, known, valid, strategies)
        validated(run, model, config, scores, scores["valid/nll" if config.task == "sp" else "valid/loss"])

    check()
    for batch in chain(*run.epochs):
        items, sums, nodes = encode_all(batch), 0, 0
        for members, forest in pack(items, config.share, config.max_tokens):
            reference = reference_logps(model, members, forest, known, keep=config.epochs > 1)
            model.train()
            policy = sequence_logps(model, forest)
            assert run.bar.n or torch.equal(policy, reference), "the policy differs from its reference before the first step"
            loss, seen = measure(policy, reference, config)
            (loss / len(batch)).backward()
            sums, nodes = sums + seen, nodes + len(forest.ids)
        record = dict(zip(METRICS, (sums / len(batch)).tolist()))
        record |= update(run, config.max_grad_norm, f"pairs {items[0].id} … {items[-1].id}")
        log(run, record | {"nodes": nodes, "turns_cut": sum(item.turns_cut for item in items)})
        if run.bar.n % config.eval_every == 0 or run.bar.n == run.bar.total:
            check()
    finish(run, model, config)


if __name__ == "__main__":
    cli.run(main)
