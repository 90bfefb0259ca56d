r"""Direct preference optimisation of one module, from its own SFT model:

    − log σ( β [log π(y_w|x) − log π_ref(y_w|x)] − β [log π(y_l|x) − log π_ref(y_l|x)] )

    python train_dpo.py --task sp                  on OUT/sp/pairs.jsonl, from OUT/sp/sft
    torchrun train_dpo.py --task rg --model Qwen/Qwen2.5-7B-Instruct \
        --data ESConv.json --split-file split.json

--objective takes another loss (desc/losses.py): ipo, simpo, which has no reference, or kto, which
learns from unpaired answers.

The SFT adapter is frozen and a second one, `dpo`, is trained beside it, so the reference is the
same model with `dpo` off: one copy of the weights, and a policy that equals its reference before
the first step, to the bit without --compile. All answers of a dialogue are read as one prefix tree.
A batch's loss is the mean over its pairs, by their weights (1 unless a pair says otherwise).
Defaults are the paper's (β 0.5 for sp, 0.2 for rg, 1 epoch); it leaves open β for vanilla (0.2
here) and the rate (5e-6 here). Writes OUT/TASK/dpo/: one adapter, both stacked, that fits the
untouched base model."""

from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch

from desc import DescError, cli
from desc.encoding import Item, mark_loss
from desc.esconv import first, load_splits
from desc.flags import MANY, TrainConfig, flag, parse
from desc.forward import sequence_logps
from desc.lora import adapter_off, add_adapter, train_adapters
from desc.pairs import Pair, Unpaired, encode_pair, encode_unpaired, read_pairs, read_unpaired
from desc.prompts import DEFAULT_LAYOUT
from desc.storage.adapters import adapter_digest
from desc.storage.checkpoint import checkpoint_settings
from desc.training.batches import (
    all_batches,
    drop_equal,
    encode_all,
    make_batches,
    my_micro_batches,
    prepare_ahead,
)
from desc.training.estimate import estimate
from desc.training.objectives import METRICS, sum_losses, weights_of
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
from desc.training.validation import planned_turns, score_planner
from desc.tree import Forest, send

OBJECTIVES = ("dpo", "ipo", "simpo", "kto")
BETA = {"sp": 0.5, "rg": 0.2, "vanilla": 0.2}
OTHER_BETA = {"ipo": 0.1, "simpo": 2.0, "kto": 0.1}


@dataclass
class DPOConfig(TrainConfig):
    lr: float = flag(
        5e-6, "peak learning rate; a 135M model needs about 5e-5", at_least=0, at_most=1
    )
    epochs: int = flag(1, "passes over the pairs", at_least=1, at_most=1000)
    objective: Literal[OBJECTIVES] = flag(
        "dpo", "the loss; simpo needs no reference, and kto no pairs but single answers"
    )
    beta: float | None = flag(
        None,
        "strength of the pull to the reference; smaller moves further. simpo has none, and beta"
        " scales its rewards. None: sp 0.5, rg and vanilla 0.2; ipo and kto 0.1, simpo 2",
        at_least=1e-6,
        at_most=100,
    )
    label_smoothing: float = flag(
        0.0, "for dpo: share of pairs taken to be the wrong way round", at_least=0, at_most=0.5
    )
    margin: float = flag(
        1.0, "for simpo: by how much chosen should be rewarded more", at_least=0, at_most=100
    )
    sft_weight: float = flag(
        0.0,
        "adds so much of the chosen answer's negative log-likelihood per token, which may rise"
        " otherwise; not for kto",
        at_least=0,
        at_most=1000,
    )
    sft: str | None = flag(None, "folder of the SFT adapter, or base for none; None: OUT/TASK/sft")
    eval_pairs: int = flag(
        0, "validation pairs to score, the first; 0 means all", at_least=0, at_most=MANY
    )
    pairs: str | None = flag(
        None,
        "folder with pairs.jsonl and pairs.valid.jsonl (kto: unpaired.jsonl and"
        " unpaired.valid.jsonl), or sample for a few that are shipped; None: OUT/TASK",
    )

    @property
    def has_reference(self) -> bool:
        return self.objective != "simpo"

    @property
    def unit(self) -> str:
        """What is learned from."""
        return "answers" if self.objective == "kto" else "pairs"


def check_flags(config: DPOConfig) -> None:
    """Raises DescError if a flag is given that --objective does not read."""
    unread = {
        "label-smoothing": config.label_smoothing and config.objective != "dpo",
        "margin": config.margin != DPOConfig.margin and config.objective != "simpo",
        "sft-weight": config.sft_weight and config.objective == "kto",
    }
    for name, is_unread in unread.items():
        if is_unread:
            raise DescError(f"--{name} changes nothing with --objective {config.objective}")


def find_pairs(config: DPOConfig) -> tuple[Path, Path]:
    """The files of the pairs, or for kto of the answers, to train and to validate on: in --pairs,
    or what was mined. For the shipped sample, or if asked for, a few pairs that are shipped.

    Raises DescError if nothing was mined."""
    shipped = files("desc") / "data" / config.task
    folder = Path(config.pairs) if config.pairs else config.folder
    name = "unpaired" if config.objective == "kto" else "pairs"
    mine_first = f"first run mine_preferences.py --task {config.task}"
    finds_none = f"finds no {config.unit} in {folder}: {mine_first}"
    if config.pairs == "sample":
        folder = shipped
    elif not (folder / f"{name}.jsonl").exists() and not config.pairs:
        if config.objective == "kto":
            raise DescError(f"{finds_none}, or give --pairs FOLDER")
        if config.data != "sample":
            raise DescError(f"{finds_none}, or give --pairs FOLDER, or --pairs sample")
        print(f"{finds_none} for your own; uses a few shipped ones")
        folder = shipped
    made_with = cli.read_config(folder)
    if folder == shipped:
        made_with = {"task": config.task} | asdict(DEFAULT_LAYOUT)
        if config.objective == "kto":
            raise DescError(f"the shipped pairs are not for kto: {mine_first}")
    cli.refuse_other_prompts(config, folder, made_with)
    print(f"uses the {config.unit} in {folder}")
    return folder / f"{name}.jsonl", folder / f"{name}.valid.jsonl"


def attach_sft(model, config: DPOConfig) -> str:
    """Attach the SFT adapter, where training starts, and which is the reference if the objective
    has one. Returns its digest; "" if that is the base model, as it is if --sft base asks for it,
    or on the sample if there is no adapter."""
    on_base = "the reference is the base model"
    if not config.has_reference:
        on_base = "training starts from the base model"
        print(f"{config.objective} has no reference; --sft says where training starts")
    if config.sft == "base":
        print(on_base)
        return ""
    folder = Path(config.sft) if config.sft else config.folder / "sft"
    otherwise = None
    if config.data == "sample" and not config.sft:
        otherwise = f"{on_base}; first run train_sft.py --task {config.task}"
    cli.use_adapter(config, model, folder, config.task, otherwise, "sft")
    return adapter_digest(folder)


def pair_logps(model, forest: Forest) -> torch.Tensor:
    """log π of the chosen and the rejected answer of each pair, or for kto of each answer and of
    one to another prompt: (B, 2)."""
    return sequence_logps(model, forest).view(-1, 2)


@torch.no_grad()
def reference_logps(model, forest: Forest) -> torch.Tensor:
    """pair_logps of the reference: the same weights and code, with `dpo` off and in eval mode."""
    model.eval()
    with adapter_off(model, "dpo"):
        return pair_logps(model, forest)


def score_reference(model, config: DPOConfig, micro_batches) -> dict[str, list[float]]:
    """The reference's two log-probabilities of each pair, by pair id, on every rank; {} if the
    objective has no reference."""
    if not config.has_reference:
        return {}
    scored: dict[str, list[float]] = {}
    for members, forest in micro_batches:
        rows = reference_logps(model, forest).tolist()
        scored |= {item.id: row for item, row in zip(members, rows)}
    for part in gather_objects(scored):
        scored |= part
    return scored


def look_up(known: dict[str, list[float]], members: list[Item], device) -> torch.Tensor | None:
    """What score_reference found for these pairs: (B, 2); None if it found nothing."""
    if not known:
        return None
    rows = torch.tensor([known[item.id] for item in members], dtype=torch.float32).view(-1, 2)
    return send(rows, device)


@torch.no_grad()
def measure_drift(
    model, config: DPOConfig, batch: list[Item], micro_batches, known: dict[str, list[float]]
) -> torch.Tensor | None:
    """The drift that kto_loss needs, on every rank: the mean of log(π/π_ref) of a batch's answers
    to other prompts, by their weights. It is that of the whole batch, so micro-batches and ranks
    change nothing. None if the objective needs none."""
    if config.objective != "kto":
        return None
    model.eval()
    total = torch.zeros((), device=model.device)
    for members, forest in micro_batches:
        ratios = pair_logps(model, forest) - look_up(known, members, model.device)  # (B, 2)
        total += (weights_of(members, model.device) * ratios[:, 1]).sum()
    return sum_over_ranks(total) / sum(item.weight for item in batch)


@torch.no_grad()
def validate(
    model, config: DPOConfig, items: list[Item], micro_batches, known: dict[str, list[float]]
) -> dict[str, float]:
    """METRICS on validation pairs: their means, by the pairs' weights. And kto's drift."""
    model.eval()
    drift = measure_drift(model, config, items, micro_batches, known)
    sums = torch.zeros(len(METRICS), device=model.device)
    for members, forest in micro_batches:
        policy, reference = pair_logps(model, forest), look_up(known, members, model.device)
        sums += sum_losses(config, items, members, policy, reference, drift)[1]
    means = sum_over_ranks(sums).cpu() / sum(item.weight for item in items)
    scores = {f"valid/{name}": value for name, value in zip(METRICS, means.tolist())}
    return scores if drift is None else scores | {"valid/drift": float(drift)}


def main():
    config = parse(DPOConfig)
    check_flags(config)
    device, folder = join_ranks(), config.folder / "dpo"
    cli.resolve_auto(config, device, checkpoint_settings(folder / "checkpoints"))
    if config.beta is None:
        config.beta = OTHER_BETA.get(config.objective, BETA[config.task])
    paths = find_pairs(config)
    domain = config.read_domain()
    splits = load_splits(config.data, config.split_file, domain.strategies, config.seed)
    read, encode_one = read_pairs, encode_pair
    if config.objective == "kto":
        read, encode_one = read_unpaired, encode_unpaired
    examples, valid_examples = (read(path, config.task) for path in paths)
    valid_examples = first(valid_examples, config.eval_pairs)
    empty = config.estimate > 0 or must_shard(config, device)
    model, tokenizer = cli.load_model(config, device, empty)

    def encode(example: Pair | Unpaired) -> Item:
        return encode_one(tokenizer, example, config.max_length, domain.speakers)

    def prepare(batch: list[Item]):
        """The whole batch, and this rank's trees of it."""
        return batch, my_micro_batches(batch, config.share, config.max_tokens, device)

    if config.show_example:
        shown = encode(examples[0])
        print("\n\n".join(mark_loss(tokenizer, sequence) for sequence in shown.sequences))
        return
    sft = attach_sft(model, config)
    items = drop_equal(encode_all(encode, examples, config.unit), config.unit)
    valid_unit = f"validation {config.unit}"
    valid_items = drop_equal(encode_all(encode, valid_examples, valid_unit), valid_unit)
    turns = planned_turns(tokenizer, config, splits, domain)
    torch.manual_seed(config.seed)
    add_adapter(model, "dpo", config.rank, config.alpha, config.dropout, config.targets)
    if config.estimate:
        # Each epoch reads the policy, kto's also to measure drift; the reference is read once.
        passes = (2 if config.objective == "kto" else 1) + config.has_reference / config.epochs
        print(estimate(model, config, all_batches(items, config), passes))
        return
    run = begin(model, config, items, config.unit, folder, device, sft)
    _, valid_micro_batches = prepare(valid_items)
    # Both files may call a pair the same, so each has a dictionary of its own.
    valid_known, known = score_reference(model, config, valid_micro_batches), {}
    if config.epochs > 1 or config.objective == "kto":  # what is needed twice is scored once
        for batch in make_batches(items, config.batch_size, config.share, config.seed, epoch=0):
            known |= score_reference(model, config, prepare(batch)[1])

    def check() -> None:
        """Validate, and keep the best. A planner is judged by the likelihood of the human strategy,
        which over-correction harms (docs/tour.md)."""
        scores = validate(model, config, valid_items, valid_micro_batches, valid_known)
        planner_scores, planned = score_planner(model, config, turns)
        scores |= planner_scores
        score = scores["valid/nll" if config.task == "sp" else "valid/loss"]
        keep_best(run, model, config, scores, score, planned)

    if run.step == 0:
        check()
    for batch, micro_batches in prepare_ahead(prepare, run.batches[run.step :]):
        seed_dropout(run, config)
        drift = measure_drift(model, config, batch, micro_batches, known)
        total = sum(item.weight for item in batch)  # of the whole global batch
        sums, nodes = 0, 0
        for members, forest in micro_batches:  # this rank's trees
            reference = look_up(known, members, device)  # (B, 2): chosen, rejected
            if reference is None and config.has_reference:
                reference = reference_logps(model, forest)
            train_adapters(model)
            policy = pair_logps(model, forest)  # (B, 2)
            if run.step == 0 and config.has_reference:
                # Compiled layers may round otherwise with gradients (desc/training/speed.py).
                rtol, atol = (0.01, 0.1) if config.compile else (0, 0)
                same = torch.allclose(policy, reference, rtol, atol, equal_nan=True)
                assert same, "the policy differs from its reference before the first step"
            loss, summed = sum_losses(config, batch, members, policy, reference, drift)
            # gradients are averaged over ranks; this makes the average their sum
            (loss / total * world_size()).backward()
            sums = sums + summed
            nodes += forest.nodes
            run.bar.update(len(members))
        turns_cut = sum(item.turns_cut for item in batch) / world_size()
        means = dict(zip(METRICS, sums / total))  # this rank's part of the whole batch's means
        record = means | {"nodes": nodes, "turns_cut": turns_cut}
        if drift is not None:
            record["drift"] = drift / world_size()
        clip_and_step(run, config, record, f"{config.unit} {batch[0].id} … {batch[-1].id}")
        if is_due(run, config.eval_every) or run.step == len(run.batches):
            check()
        save_checkpoint_if_due(run, config.save_every)
    finish(run, model, config)


if __name__ == "__main__":
    cli.run(main)
