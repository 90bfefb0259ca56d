"""ESConv with each supporter utterance's strategy written before its words: "[Question] Why?".

    python examples/tag_turns.py ESConv.json tagged.json
    python train_sft.py --task sp --data tagged.json --split-file split.json

A planner that reads one text (--history text) sees no strategies in it, and vanilla does. On the
copy it sees them, too: what is left of the difference is not theirs (docs/results.md)."""

import sys
from pathlib import Path

from desc.storage.files import read_records, write_json


def tag(dialogue: dict) -> dict:
    """A dialogue in ESConv's official schema, as it is but for what supporters say."""
    utterances = []
    for utterance in dialogue["dialog"]:
        if strategy := utterance["annotation"].get("strategy"):
            utterance = utterance | {"content": f"[{strategy}] {utterance['content'].strip()}"}
        utterances.append(utterance)
    return dialogue | {"dialog": utterances}


def main(source: str, target: str) -> None:
    dialogues = read_records(source)
    write_json(Path(target), [tag(dialogue) for dialogue in dialogues])
    print(f"{len(dialogues)} dialogues in {target}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} ESConv.json tagged.json")
    main(*sys.argv[1:])
