"""Do replies follow the strategy that the generator is told?

    python benchmarks/adherence.py --data ESConv.json --split-file split.json --eval-dialogues 15 \\
        --rg out/rg/sft --vanilla out/vanilla/sft

Two answers, both exact, over the supporter turns of test dialogues:

1. What the generator makes of a strategy. p(strategy | context, people's reply) ∝ p_RG(reply |
   context, strategy), with equal weights before. A generator that does not heed its strategy gives
   each the same.
2. What another model reads in its replies. One reply is sampled under people's strategy, and one
   under another, drawn evenly. p(strategy | context, reply) ∝ p_vanilla("[strategy] reply" |
   context). People's own replies are read alike; they are what to compare with.

Each row is the share of replies whose likeliest strategy is the one they were told, the mean
probability of that strategy, and how much a reply tells of it: the mean of log p(strategy |
context, reply) − log p(strategy | context), in nats."""

from dataclasses import dataclass
from pathlib import Path

import torch
from contest import DEVICE, machine
from tqdm import tqdm

from desc import cli
from desc.encoding import Item, encode
from desc.esconv import Dialogue, gold_strategies, load_splits
from desc.flags import DataConfig, SampleConfig, flag, parse
from desc.lora import adapter_only
from desc.prompts import build_messages
from desc.sampling import score, score_strategies, seeded, write_dialogues


@dataclass
class Config(SampleConfig, DataConfig):
    rg: str = flag("out/rg/sft", "folder of the generator's adapter")
    vanilla: str = flag("out/vanilla/sft", "folder of the adapter that reads strategies in replies")


def other_strategies(config, dialogue: Dialogue, strategies) -> list[str]:
    """For each supporter turn a strategy that is not people's, drawn evenly."""
    generator = seeded(config.seed, "other", dialogue.id)
    others = []
    for gold in dialogue.supporter_turns():
        names = [name for name in strategies if name != gold.strategy]
        others.append(names[int(torch.randint(len(names), (), generator=generator))])
    return others


def generator_items(tokenizer, config, dialogue: Dialogue, domain) -> list[Item]:
    """Every supporter turn with people's reply after each strategy's prompt, K sequences each."""
    items = []
    for turn, gold in enumerate(dialogue.supporter_turns()):
        sequences = []
        for strategy in domain.strategies:
            messages = build_messages("rg", dialogue, turn, strategy, domain, config.layout)
            name = f"{dialogue.id}/{turn}"
            item = encode(
                tokenizer,
                name,
                dialogue.id,
                messages,
                [gold.text],
                config.max_length,
                speakers=domain.speakers,
            )
            sequences += item.sequences
        items.append(Item(name, dialogue.id, sequences))
    return items


def tagged_items(tokenizer, config, dialogue: Dialogue, replies: list[str], domain) -> list[Item]:
    """Every supporter turn with its reply behind each strategy's tag, K sequences each."""
    items = []
    for turn, reply in enumerate(replies):
        messages = build_messages("vanilla", dialogue, turn, None, domain, config.layout)
        tagged = [f"[{strategy}] {reply}" for strategy in domain.strategies]
        item = encode(
            tokenizer,
            f"{dialogue.id}/{turn}",
            dialogue.id,
            messages,
            tagged,
            config.max_length,
            speakers=domain.speakers,
        )
        items.append(item)
    return items


def print_row(what: str, logps: torch.Tensor, before: torch.Tensor, told: torch.Tensor) -> None:
    """A row of the table. logps and before are log p(strategy | context, reply) and log p(strategy
    | context), (T, K); told is the index of the strategy that each reply was told, (T,)."""
    of_told = logps.gather(1, told[:, None])[:, 0]
    gain = of_told - before.gather(1, told[:, None])[:, 0]
    likeliest = (logps.argmax(1) == told).float()
    error = gain.std() / len(gain) ** 0.5
    print(
        f"| {what} | {100 * likeliest.mean():.1f} % | {of_told.exp().mean():.3f} |"
        f" {gain.mean():.3f} ± {error:.3f} |",
        flush=True,
    )


def main():
    config = parse(Config)
    cli.resolve_auto(config, DEVICE)
    print(machine(config))
    domain = config.read_domain()
    strategies = domain.strategies
    test = load_splits(config.data, config.split_file, strategies, config.seed)["test"]
    test = test[: config.eval_dialogues or None]
    model, tokenizer = cli.load_model(config, DEVICE)
    cli.use_adapter(config, model, Path(config.rg), "rg")
    cli.use_adapter(config, model, Path(config.vanilla), "vanilla")

    gold = gold_strategies(test)
    drawn = [name for dialogue in test for name in other_strategies(config, dialogue, strategies)]
    told = torch.tensor([strategies.index(name) for name in gold])
    told_other = torch.tensor([strategies.index(name) for name in drawn])

    rows, even = [], torch.full((len(gold), len(strategies)), 1 / len(strategies)).log()
    with adapter_only(model, "rg"):
        for dialogue in tqdm(test, desc="people's replies under each strategy"):
            items = generator_items(tokenizer, config, dialogue, domain)
            rows.append(score(model, items, config.max_tokens))
    print(f"\n{len(gold)} turns of {len(test)} dialogues; {config.rg}, read by {config.vanilla}")
    print(
        "| reply | likeliest is the one told | its probability | nats gained |\n|---|---|---|---|"
    )
    print_row("people's, by the generator", torch.cat(rows), even, told)

    with adapter_only(model, "vanilla"):
        before = score_strategies(model, tokenizer, "vanilla", test, domain, config)
    for what, names, index in (
        ("people's, by vanilla", None, told),
        ("under people's strategy, by vanilla", gold, told),
        ("under another strategy, by vanilla", drawn, told_other),
    ):
        rows, done = [], 0
        for dialogue in tqdm(test, desc=what):
            count = len(dialogue)
            replies = [turn.text for turn in dialogue.supporter_turns()]
            if names:
                planned = list(enumerate(names[done : done + count]))
                with adapter_only(model, "rg"):
                    (replies,) = write_dialogues(
                        model, tokenizer, config, "rg", [(dialogue, planned)], domain
                    )
            done += count
            with adapter_only(model, "vanilla"):
                items = tagged_items(tokenizer, config, dialogue, replies, domain)
                rows.append(score(model, items, config.max_tokens))
        print_row(what, torch.cat(rows), before, index)


if __name__ == "__main__":
    cli.run(main)
