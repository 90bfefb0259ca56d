"""Inferential Preference Mining: what a fine-tuned module gets wrong on its own training dialogues becomes its DPO pairs.

    python mine_preferences.py --task sp           with the adapter in OUT/sp/sft, on the sample dialogues
    python mine_preferences.py --task rg --data ESConv.json --split-file split.json

The module answers every supporter turn of the training and validation dialogues on the human history (T 0.7, top_p 0.95, one sample,
as the paper does). sp: the strategy, drawn from the exact distribution over all names; a pair wherever it is not the human's. rg: the
reply, under the human strategy; any that differs from the human's makes a pair, for there is no annotator yet. vanilla: both. Writes
OUT/TASK/pairs.jsonl and pairs.valid.jsonl; killed and run again it goes on where it was. Mining on test dialogues would leak, so they
are never mined.
"""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from desc import cli, distributed
from desc.checkpoint import refuse_differing
from desc.esconv import load_splits
from desc.files import append_line, mend, read_lines, write_lines
from desc.lora import digest, load_adapter
from desc.mining import mine_dialogue
from desc.modeling import load
from desc.strategies import read_strategies
from desc.training import take


@dataclass
class MineConfig(cli.SampleConfig, cli.TaskConfig):
    train_dialogues: int = cli.flag(0, "training dialogues to mine, the first of the split; 0 takes all")


def begun(folder: Path, settings: dict) -> list[dict]:
    """What an earlier run with the same settings mined, on however many ranks: one record a dialogue.

    Each rank has a journal mining.RANK.jsonl, whose first line are the settings. Raises DescError naming those that differ."""
    done = []
    for journal in sorted(folder.glob("mining.*.jsonl")):
        before, *records = read_lines(journal) or [settings]
        refuse_differing(journal, before, settings)
        done += records
    return done


def main():
    config = cli.parse(MineConfig)
    device = distributed.setup()
    strategies = read_strategies(config.strategies)
    splits = load_splits(config.data, config.split_file, strategies, config.seed)
    work = [("train", d) for d in take(splits["train"], config.train_dialogues)]
    work += [("valid", d) for d in take(splits["valid"], config.eval_dialogues)]

    model, tokenizer = load(config.model, config.torch_dtype, device)
    settings = json.loads(json.dumps(asdict(config))) | {"adapter": digest(config.folder / "sft")}
    settings["input"] = hashlib.sha256(f"{work}{strategies}".encode()).hexdigest()
    if cli.find_adapter(config.folder / "sft", f"mines the base model; first run train_sft.py --task {config.task}"):
        load_adapter(model, config.folder / "sft", "sft")

    for journal in config.folder.glob("mining.*.jsonl") if not distributed.rank() else ():
        mend(journal)
    distributed.barrier()
    done = begun(config.folder, settings)
    distributed.barrier()  # every rank has read the journals before any of them grows
    seen = {(record["split"], record["dialogue"]) for record in done}
    journal = config.folder / f"mining.{distributed.rank()}.jsonl"
    if not journal.exists() or not journal.stat().st_size:
        write_lines(journal, [settings])
    mine = [(split, dialogue) for split, dialogue in work if (split, dialogue.id) not in seen][distributed.rank() :: distributed.size()]
    for split, dialogue in tqdm(mine, desc=f"mine {config.task}", dynamic_ncols=True, disable=distributed.rank() > 0):
        pairs = [pair.record() for pair in mine_dialogue(model, tokenizer, config, dialogue, strategies)]
        append_line(journal, {"split": split, "dialogue": dialogue.id, "turns": len(dialogue), "pairs": pairs})

    distributed.barrier()
    if distributed.rank():
        return
    mined = {(record["split"], record["dialogue"]): record for record in begun(config.folder, settings)}
    for split, name in (("train", "pairs.jsonl"), ("valid", "pairs.valid.jsonl")):
        records = [mined[which, dialogue.id] for which, dialogue in work if which == split]
        pairs = [pair for record in records for pair in record["pairs"]]
        write_lines(config.folder / name, pairs)
        errors = Counter(pair["error"] for pair in pairs)
        print(f"{config.folder / name}: {len(pairs)} pairs of {sum(r['turns'] for r in records)} turns {dict(errors)}")
    cli.save_config(config, config.folder)
    for journal in config.folder.glob("mining.*.jsonl"):
        journal.unlink()


if __name__ == "__main__":
    cli.run(main)
