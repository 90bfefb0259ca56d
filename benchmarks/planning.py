"""The planner's exact distribution at every test turn, a dialogue at a time on its tree, against
writing the strategy turn by turn.

    python benchmarks/planning.py --data ESConv.json --split-file split.json --out out/esconv

Uses OUT/sp/sft where it is there. Turn by turn is Transformers' generate, greedy, on `--turns`
turns, evenly spaced. Prints seconds, turns a second and their ratio, and for how many of these
turns the likeliest strategy is the one that was written."""

from dataclasses import dataclass
from pathlib import Path

import torch
from contest import DEVICE, machine, now
from tqdm import tqdm

from desc import cli
from desc.encoding import encode_prompt
from desc.esconv import load_splits
from desc.flags import MANY, DataConfig, flag, parse
from desc.prompts import build_messages
from desc.sampling import score_strategies


@dataclass
class Config(DataConfig):
    turns: int = flag(60, "turns to write strategies for", at_least=1, at_most=MANY)


def main():
    config = parse(Config)
    cli.resolve_auto(config, DEVICE)
    print(machine(config))
    domain = config.read_domain()
    strategies = domain.strategies
    test = load_splits(config.data, config.split_file, strategies, config.seed)["test"][
        : config.eval_dialogues or None
    ]
    model, tokenizer = cli.load_model(config, DEVICE)
    cli.use_adapter(config, model, Path(config.out) / "sp" / "sft", "sp", "the base model plans")

    # warm
    score_strategies(model, tokenizer, "sp", test[:1], domain, config)
    begin = now()
    rows = [score_strategies(model, tokenizer, "sp", [d], domain, config) for d in tqdm(test)]
    exact = now() - begin
    likeliest = [strategies[i] for i in torch.cat(rows).argmax(-1).tolist()]

    places = [(dialogue, turn) for dialogue in test for turn in range(len(dialogue))]
    some = range(0, len(places), max(1, len(places) // config.turns))
    begin, same = now(), 0
    for i in tqdm(some):
        messages = build_messages("sp", *places[i], None, domain, config.layout)
        prompt = torch.tensor([encode_prompt(tokenizer, messages)], device=model.device)
        with torch.no_grad():
            written = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=16
            )[0, prompt.shape[1] :]
        same += (
            strategies.parse(tokenizer.decode(written, skip_special_tokens=True)) == likeliest[i]
        )
    each = (now() - begin) / len(some)
    print(
        f"exact distribution  {exact:7.1f} s for {len(places)} turns, {len(places) / exact:.1f}"
        " turns/s"
    )
    print(
        f"turn by turn        {each * len(some):7.1f} s for {len(some)} turns, {1 / each:.1f}"
        " turns/s"
    )
    print(
        f"all {len(places)} would take {each * len(places):.0f} s, {each * len(places) / exact:.1f}"
        f" times as long; {same} of {len(some)} written strategies are the likeliest"
    )


if __name__ == "__main__":
    cli.run(main)
