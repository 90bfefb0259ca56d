"""Direct preference optimisation of one module, from its own SFT model:

    − log σ( β [log π(y_w|x) − log π_ref(y_w|x)] − β [log π(y_l|x) − log π_ref(y_l|x)] )

    python train_dpo.py --task sp                  on OUT/sp/pairs.jsonl, from OUT/sp/sft
    torchrun train_dpo.py --task rg --model Qwen/Qwen2.5-7B-Instruct --data ESConv.json --split-file split.json

The SFT adapter is frozen and a second one, `dpo`, is trained beside it, so the reference is the same model with `dpo` off: one copy of
the weights, and a policy that equals its reference to the bit before the first step. All answers of a dialogue are read as one prefix
tree. Defaults are the paper's (β 0.5 for sp, 0.2 for rg, 1 epoch); it leaves open β for vanilla (0.2 here) and the rate (5e-6 here).
Writes OUT/TASK/dpo/: one adapter, both stacked, that fits the untouched base model.
"""

import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from tqdm import tqdm

from desc import DescError, cli, distributed
from desc.encoding import encode, mark_loss
from desc.esconv import load_splits
from desc.lora import add_adapter, adapter_off, load_adapter, save_adapter
from desc.losses import dpo_loss
from desc.mining import read_pairs
from desc.modeling import load, sequence_logps
from desc.strategies import read_strategies
from desc.training import fresh_log, log, make_batches, make_optimizer, make_schedule, planner_scores, take, update
from desc.tree import pack

BETA = {"sp": 0.5, "rg": 0.2, "vanilla": 0.2}
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")


@dataclass
class DPOConfig(cli.TrainConfig):
    lr: float = cli.flag(5e-6, "peak learning rate; a 135M model wants about 5e-5")
    epochs: int = cli.flag(1, "passes over the pairs")
    beta: float | None = cli.flag(None, "how dearly leaving the reference is paid; smaller moves further. None: sp 0.5, rg and vanilla 0.2")
    label_smoothing: float = cli.flag(0.0, "share of pairs taken to be labelled the wrong way round")
    sft: str | None = cli.flag(None, "folder of the SFT adapter; None: OUT/TASK/sft")
    pairs: str | None = cli.flag(None, "folder with pairs.jsonl and pairs.valid.jsonl; None: OUT/TASK")


def find_pairs(config: DPOConfig) -> Path:
    folder = Path(config.pairs) if config.pairs else config.folder
    if not (folder / "pairs.jsonl").exists() and not config.pairs:
        print(f"finds no pairs in {folder}: uses a few shipped ones; for better ones run mine_preferences.py --task {config.task}")
        folder = files("desc") / "data" / config.task
    print(f"uses the pairs in {folder}")
    return folder


def main():
    config = cli.parse(DPOConfig)
    device = distributed.setup()
    folder, beta = config.folder / "dpo", BETA[config.task] if config.beta is None else config.beta
    source = find_pairs(config)
    pairs, valid_pairs = read_pairs(source / "pairs.jsonl", config.task), read_pairs(source / "pairs.valid.jsonl", config.task)
    if not pairs or not valid_pairs:
        raise DescError(f"{source}: pairs.jsonl and pairs.valid.jsonl must hold at least one pair each")
    strategies = read_strategies(config.strategies)
    valid = take(load_splits(config.data, config.split_file, strategies, config.seed)["valid"], config.eval_dialogues)

    model, tokenizer = load(config.model, config.torch_dtype, device)

    def encode_all(batch):
        return [encode(tokenizer, p.id, p.dialogue, p.prompt, [p.chosen, p.rejected], config.max_length) for p in batch]

    if config.show_example:
        return print("\n\n".join(mark_loss(tokenizer, sequence) for sequence in encode_all(pairs[:1])[0].sequences))
    sft = Path(config.sft) if config.sft else config.folder / "sft"
    if cli.find_adapter(sft, f"the reference is the base model; first run train_sft.py --task {config.task}"):
        load_adapter(model, sft, "sft")
    torch.manual_seed(config.seed)
    add_adapter(model, "dpo", config.rank, config.alpha, config.dropout)
    epochs = [make_batches(pairs, config.batch_size, config.share, config.seed, epoch) for epoch in range(config.epochs)]
    steps = sum(map(len, epochs))
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    schedule = make_schedule(optimizer, steps, config.warmup)
    metrics = fresh_log(folder)
    best_at, last_at = (folder, folder / "last") if config.keep == "best" else (folder / "best", folder)
    print(f"DPO of {config.task}: {config.model}, {len(pairs)} pairs, beta {beta}, {steps} steps, into {folder}")
    known: dict[str, torch.Tensor] = {}  # reference log-probabilities by pair id, kept where a pair comes again

    @torch.no_grad()
    def reference_logps(items, forest, keep: bool) -> torch.Tensor:
        """(2B,): the same model and code with `dpo` off, in eval mode, before the policy's forward."""
        if not all(item.id in known for item in items):
            model.eval()
            with adapter_off(model, "dpo"):
                logps = sequence_logps(model, forest)
            if not keep:
                return logps
            known.update(zip((item.id for item in items), logps.view(-1, 2)))
        return torch.cat([known[item.id] for item in items])

    def measure(policy, reference) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss summed over the forest's pairs, and the sums of METRICS (7,). Chosen and rejected alternate in both (2B,)."""
        losses, chosen, rejected = dpo_loss(policy[0::2], policy[1::2], reference[0::2], reference[1::2], beta, config.label_smoothing)
        seen = (losses, chosen, rejected, chosen - rejected, (chosen > rejected).float(), policy[0::2], policy[1::2])
        return losses.sum(), torch.stack([values.detach().sum() for values in seen])

    @torch.no_grad()
    def validate() -> dict:
        """METRICS on validation pairs; where the module plans, the exact scores of its strategies on validation dialogues too."""
        sums = torch.zeros(len(METRICS), device=device)
        for items, forest in pack(valid_items, config.share, config.max_tokens):
            reference = reference_logps(items, forest, keep=True)
            model.eval()
            sums += measure(sequence_logps(model, forest), reference)[1]
        scores = dict(zip((f"valid/{name}" for name in METRICS), (sums / len(valid_items)).tolist()))
        return scores if config.task == "rg" else scores | planner_scores(model, tokenizer, config, valid, strategies)

    def evaluate(step: int, best: float) -> float:
        """Log validation scores; keep the adapter where it is the best so far. A planner is judged by the likelihood of the human
        strategy, which over-correction harms (docs/tour.md), others by the loss."""
        scores = validate()
        log(metrics, {"step": step, **scores}, bar)
        score = scores.get("valid/nll", scores["valid/loss"])
        if score < best:
            save_adapter(model, best_at)
            cli.save_config(config, best_at)
        return min(score, best)

    kept = {d.id for d in valid}
    valid_items = encode_all([pair for pair in valid_pairs if pair.dialogue in kept] or valid_pairs)
    bar = tqdm(total=steps, desc=f"dpo {config.task}", dynamic_ncols=True)
    step, best = 0, evaluate(0, math.inf)
    for epoch in epochs:
        for batch in epoch:
            items, sums, nodes = encode_all(batch), torch.zeros(len(METRICS), device=device), 0
            for members, forest in pack(items, config.share, config.max_tokens):
                reference = reference_logps(members, forest, keep=config.epochs > 1)
                model.train()
                policy = sequence_logps(model, forest)
                assert step or torch.equal(policy, reference), "the policy differs from its reference before the first step"
                loss, seen = measure(policy, reference)
                (loss / len(batch)).backward()
                sums, nodes = sums + seen, nodes + len(forest.ids)
            rate = schedule.get_last_lr()[0]
            norm = update(optimizer, schedule, config.max_grad_norm, f"step {step + 1}, pairs {items[0].id} … {items[-1].id}")
            step += 1
            bar.update()
            record = {"step": step, **dict(zip(METRICS, (sums / len(batch)).tolist())), "lr": rate, "grad_norm": norm, "nodes": nodes}
            log(metrics, record | {"turns_cut": sum(item.turns_cut for item in items)}, bar)
            if step % config.eval_every == 0 or step == steps:
                best = evaluate(step, best)
    bar.close()
    save_adapter(model, last_at)
    cli.save_config(config, last_at)
    print(f"best validation score {best:.4f}; the adapter that later steps use ({config.keep}) is in {folder}")


if __name__ == "__main__":
    cli.run(main)
