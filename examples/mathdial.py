r"""MathDial's tutoring dialogues in the schema that desc reads.

    python examples/mathdial.py test.jsonl mathdial.json split.json
    python train_sft.py --task sp --data mathdial.json --split-file split.json \
        --domain examples/mathdial.domain.json

MathDial (Macina et al. 2023, https://github.com/eth-nlped/mathdial, CC BY-SA 4.0) is not part of
this repository. A teacher helps a student who has solved a problem wrongly, and each turn of the
teacher's is labelled with one of four moves: "Teacher: (focus)Which number …".

The student's first turn is the problem and the wrong solution, because the teacher of the data saw
both before saying anything. It is an utterance, so that planner and tutor read it like all others.
Student and teacher then stand where ESConv has seeker and supporter, and a move is a strategy. A
turn without words is left out (13 of the test file's).

Several dialogues are about the same problem: 599 in the test file, about 394. So the split (8:1:1,
with seed 0) keeps a problem's dialogues together. Another would test on what was trained on."""

import json
import random
import re
import sys
from pathlib import Path

from desc.storage.files import write_json

TEACHER = re.compile(r"\s*Teacher: \((\w+)\)(.*)", re.DOTALL)


def to_dialogue(row: dict) -> dict:
    """A row of MathDial as a dialogue in ESConv's schema."""
    problem, solution = row["question"].strip(), row["student_incorrect_solution"].strip()
    opening = f"The problem: {problem}\nMy solution: {solution}"
    dialog = [{"speaker": "usr", "text": opening}]
    for turn in row["conversation"].split("|EOM|"):
        if teacher := TEACHER.fullmatch(turn):
            said = {"speaker": "sys", "text": teacher[2].strip(), "strategy": teacher[1]}
        else:  # "Student: …", or by the student's name
            said = {"speaker": "usr", "text": turn.partition(": ")[2].strip()}
        if said["text"]:
            dialog.append(said)
    return {"dialog": dialog}


def split_by_problem(rows: list[dict]) -> dict[str, list[int]]:
    """Indices of rows: whole problems in random order, until a tenth is for testing and a tenth for
    validation."""
    problems: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        problems.setdefault(row["question"], []).append(i)
    split = {"train": [], "valid": [], "test": []}
    groups = list(problems.values())
    random.Random(0).shuffle(groups)
    for indices in groups:
        unfilled = [part for part in ("test", "valid") if len(split[part]) < len(rows) // 10]
        split[unfilled[0] if unfilled else "train"] += indices
    return split


def main(source: str, target: str, split: str) -> None:
    with open(source, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    for path, value in ((target, list(map(to_dialogue, rows))), (split, split_by_problem(rows))):
        write_json(Path(path), value)
    print(f"{len(rows)} dialogues in {target}, divided by problem in {split}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(f"usage: {sys.argv[0]} test.jsonl mathdial.json split.json")
    main(*sys.argv[1:])
