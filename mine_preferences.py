"""Inferential Preference Mining: what a fine-tuned module gets wrong on its own training dialogues becomes its DPO pairs.

    python mine_preferences.py --task sp           with the adapter in OUT/sp/sft, on the sample dialogues
    python mine_preferences.py --task rg --data ESConv.json --split-file split.json

The module answers every supporter turn of the training and validation dialogues on the human history (T 0.7, top_p 0.95, one sample,
as the paper does). sp: the strategy, drawn from the exact distribution over all names; a pair wherever it is not the human's. rg: the
reply, under the human strategy. vanilla: both. Writes OUT/TASK/pairs.jsonl and pairs.valid.jsonl; killed and run again it goes on where
it was. Mining on test dialogues would leak, so they are never mined.
"""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from desc import DescError, cli, distributed
from desc.esconv import load_splits
from desc.files import append_line, read_lines, write_bytes, write_lines
from desc.lora import WEIGHTS, load_adapter
from desc.mining import mine_dialogue
from desc.modeling import load
from desc.strategies import read_strategies
from desc.training import take


@dataclass
class MineConfig(cli.SampleConfig, cli.TaskConfig):
    train_dialogues: int = cli.flag(0, "training dialogues to mine, the first of the split; 0 takes all")


def begun(path: Path, settings: dict) -> list[dict]:
    """What an earlier run with the same settings mined: one record a dialogue. Begins the file where there is none.

    A last line cut off by a kill is dropped. Raises DescError naming the settings that differ."""
    if path.exists():
        whole = path.read_bytes().rpartition(b"\n")[0]
        write_bytes(path, whole + b"\n" if whole else b"")
    if not path.exists() or not path.stat().st_size:
        path.parent.mkdir(parents=True, exist_ok=True)
        append_line(path, settings)
    before, *done = read_lines(path)
    if differing := [key for key in settings if before.get(key) != settings[key]]:
        raise DescError(f"{path} was begun with another {', '.join(differing)}: run with the same, or delete the file to start anew")
    return done


def main():
    config = cli.parse(MineConfig)
    device = distributed.setup()
    strategies = read_strategies(config.strategies)
    splits = load_splits(config.data, config.split_file, strategies, config.seed)
    work = [("train", d) for d in take(splits["train"], config.train_dialogues)]
    work += [("valid", d) for d in take(splits["valid"], config.eval_dialogues)]

    model, tokenizer = load(config.model, config.torch_dtype, device)
    settings = json.loads(json.dumps(asdict(config))) | {"adapter": None}
    sft = cli.find_adapter(config.folder / "sft", f"mines the base model; first run train_sft.py --task {config.task}")
    if sft:
        load_adapter(model, sft, "sft")
        settings["adapter"] = hashlib.sha256((sft / WEIGHTS).read_bytes()).hexdigest()

    journal = config.folder / "mining.jsonl"
    done = begun(journal, settings)
    seen = {(record["split"], record["dialogue"]) for record in done}
    for split, dialogue in tqdm(work, desc=f"mine {config.task}", dynamic_ncols=True):
        if (split, dialogue.id) in seen:
            continue
        pairs = [pair.record() for pair in mine_dialogue(model, tokenizer, config, dialogue, strategies)]
        done.append({"split": split, "dialogue": dialogue.id, "turns": len(dialogue), "pairs": pairs})
        append_line(journal, done[-1])

    for split, name in (("train", "pairs.jsonl"), ("valid", "pairs.valid.jsonl")):
        records = [record for record in done if record["split"] == split]
        pairs = [pair for record in records for pair in record["pairs"]]
        write_lines(config.folder / name, pairs)
        errors = Counter(pair["error"] for pair in pairs)
        print(f"{config.folder / name}: {len(pairs)} pairs of {sum(r['turns'] for r in records)} turns {dict(errors)}")
    cli.save_config(config, config.folder)
    journal.unlink()


if __name__ == "__main__":
    cli.run(main)
