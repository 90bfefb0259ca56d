r"""How the cost of DPO grows with the turns of a dialogue, and what more processes bring.

    python benchmarks/scaling.py --task sp          SmolLM2, sample dialogues
    python benchmarks/scaling.py --task rg --data ESConv.json --split-file split.json \
        --plot docs/scaling-rg.png

Dialogues of 5 to 60 supporter turns are made by laying training dialogues end to end. Shared by
dialogue all of their pairs are read; by pair and not at all a pair costs the same without the
others, so some, evenly spaced, stand for all. Processes share this machine's cores, or have a GPU
each: `torchrun train_dpo.py` on the same pairs, and the seconds between its steps. --plot (extra
`report`) draws both tables."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from contest import CUDA, DEVICE, machine, now, training_dialogues
from dpo_step import encode_pairs, loss_of, make_pairs

from desc import cli
from desc.esconv import Dialogue
from desc.flags import MANY, TaskConfig, flag, parse
from desc.lora import add_adapter
from desc.storage.files import write_lines
from desc.tree import SHARING, pack

SAMPLED = 6  # pairs that stand for a dialogue's where they are read one by one
STEPS = 6  # with each number of processes, about; the first two are not counted
SCRIPT = Path(__file__).parents[1] / "train_dpo.py"


@dataclass
class Config(TaskConfig):
    turns: list[int] = flag(
        [5, 10, 20, 40, 60], "supporter turns of the dialogues", at_least=1, at_most=10_000
    )
    processes: list[int] = flag([1, 2], "numbers of processes", at_least=1, at_most=1000)
    plot: str | None = flag(None, "a file for the figure")
    max_length: int = flag(8192, "tokens of prompt and completion", at_least=1, at_most=MANY)


def lay_end_to_end(dialogues: list[Dialogue], turns: int) -> Dialogue:
    return Dialogue(
        str(turns), tuple(turn for dialogue in dialogues for turn in dialogue.turns)[: 2 * turns]
    )


def cost_of_dialogue(model, tokenizer, config, dialogue: Dialogue, share: str) -> tuple[float, int]:
    """(seconds, tokens) of reference, policy and backward over all of its pairs."""
    pairs = make_pairs(config, [dialogue])
    some = pairs if share == "dialogue" else pairs[:: max(1, len(pairs) // SAMPLED)]
    items = encode_pairs(config, tokenizer, some)
    forests = [forest.to(DEVICE) for _, forest in pack(items, share, config.max_tokens)]
    begin = now()
    for forest in forests:
        loss_of(model, forest, items).backward()
    weight = len(pairs) / len(some)
    return weight * (now() - begin), round(weight * sum(len(forest.ids) for forest in forests))


def lengthen(config) -> dict[str, list[tuple[float, int]]]:
    """What each length costs, by way of sharing."""
    model, tokenizer = cli.load_model(config, DEVICE)
    add_adapter(model, "dpo")
    dialogues = [lay_end_to_end(training_dialogues(config), turns) for turns in config.turns]
    # the first reading is slow
    cost_of_dialogue(model, tokenizer, config, dialogues[0], "dialogue")
    return {
        share: [cost_of_dialogue(model, tokenizer, config, d, share) for d in dialogues]
        for share in SHARING
    }


def seconds_a_step(config, processes: int) -> float:
    """Of train_dpo.py, the median."""
    pairs = [pair.record() for pair in make_pairs(config, training_dialogues(config))[: 32 * STEPS]]
    with tempfile.TemporaryDirectory() as folder:
        write_lines(Path(folder) / "pairs.jsonl", pairs)
        write_lines(Path(folder) / "pairs.valid.jsonl", pairs[:1])
        command = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            processes,
            SCRIPT,
            "--task",
            config.task,
        ]
        command += ["--pairs", folder, "--out", folder, "--eval-dialogues", 1, "--dropout", 0]
        command += [
            "--model",
            config.model,
            "--dtype",
            config.dtype,
            "--max-length",
            config.max_length,
            "--max-tokens",
            config.max_tokens,
        ]
        threads = {} if CUDA else {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // processes))}
        subprocess.run(
            [sys.executable, *map(str, command)],
            check=True,
            env=os.environ | threads,
            stdout=subprocess.DEVNULL,
        )
        records = [
            json.loads(line)
            for line in (Path(folder) / config.task / "dpo" / "metrics.jsonl").open()
        ]
    # the last waits for a validation
    times = [record["time"] for record in records if "loss" in record][:-1]
    return statistics.median(later - earlier for earlier, later in zip(times, times[1:]))


def draw(config, costs: dict[str, list[tuple[float, int]]], steps: list[float]) -> None:
    from matplotlib import pyplot

    _, (left, right) = pyplot.subplots(
        1, 2, figsize=(9, 3.5), width_ratios=(2, 1), layout="constrained"
    )
    for share, points in costs.items():
        left.plot(config.turns, [seconds for seconds, _ in points], "o-", label=f"--share {share}")
    left.set(
        xlabel="supporter turns of the dialogue",
        ylabel="seconds a dialogue",
        yscale="log",
        title=f"DPO, {config.task}",
    )
    left.legend(frameon=False)
    right.bar(list(map(str, config.processes)), steps, color="tab:blue")
    right.set(xlabel="processes on one machine", ylabel="seconds a step", title="train_dpo.py")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    pyplot.savefig(config.plot, dpi=130)


def main():
    config = parse(Config)
    cli.resolve_auto(config, DEVICE)
    print(machine(config))
    costs = lengthen(config)
    lines = [
        [
            "turns",
            *(f"{share}, {what}" for share in SHARING for what in ("tokens", "s")),
            "none / dialogue",
        ]
    ]
    for i, turns in enumerate(config.turns):
        cells = [
            text
            for share in SHARING
            for text in (f"{costs[share][i][1]:,}", f"{costs[share][i][0]:.1f}")
        ]
        lines.append([str(turns), *cells, f"{costs['none'][i][0] / costs['dialogue'][i][0]:.1f}"])
    print(cli.markdown(lines), flush=True)
    steps = [seconds_a_step(config, processes) for processes in config.processes]
    print()
    print(
        cli.markdown(
            [
                ["processes", *map(str, config.processes)],
                ["s a step", *(f"{seconds:.2f}" for seconds in steps)],
            ]
        )
    )
    if config.plot:
        draw(config, costs, steps)


if __name__ == "__main__":
    cli.run(main)
