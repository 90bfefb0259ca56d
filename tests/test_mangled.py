"""pytest tests/test_mangled.py

Damaged inputs and artefacts, drawn at random. Each use of one must succeed or end in one line that
names the place. It may neither end in a traceback, nor change what was finished, nor what people
wrote. A few cases of each kind run always, and all with --slow.

A failure names its kind and its number. DESC_MANGLED="pairs 17" runs that case alone."""

import copy
import csv
import io
import json
import math
import os
import random
import struct
import subprocess
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from scripts import ROOT, command, lines

from desc import cli
from desc.domain import ESCONV, RUBRICS, UNREADABLE, read_domain
from desc.encoding import encode_example
from desc.esconv import SPLITS, load_dialogues, load_splits
from desc.flags import Config, SampleConfig
from desc.judging import agreement
from desc.judging.annotator import EndpointAnnotator, build_annotator_messages
from desc.judging.endpoint import Endpoint
from desc.judging.judge import DIGITS, EndpointJudge, build_judge_messages
from desc.judging.labels import annotate_labelled, balance, read_labels
from desc.judging.sampler import EndpointSampler
from desc.lora import add_adapter, export_adapters, lora_layers, save_adapter
from desc.mining import Annotation, Answer, Case
from desc.modeling import load
from desc.pairs import encode_pair, encode_unpaired, read_pairs, read_unpaired
from desc.prompts import build_examples
from desc.storage import files
from desc.storage.adapters import adapter_digest
from desc.storage.base import base_digest
from desc.storage.checkpoint import checkpoint_settings, read_checkpoint, write_checkpoint
from desc.training.run import Run, resume

SEED = 15
FEW, MANY = 5, 150  # cases of each kind: always, and with --slow
RUNS = 6  # cases of each script, with --slow
PAIR_FILES = ("pairs.jsonl", "pairs.valid.jsonl")
SAMPLE = ROOT / "desc" / "data" / "sample.json"
LONGEST_LINE = 4000
LONGEST_TIME = 60  # seconds of computing that a case may take

# --- what is done to a file -----------------------------------------------------------------------

# What a JSON value is replaced by, as it is written in the file.
ODD = [
    *("null", "true", "false", "0", "-1", "7", "1.5", "1e999", "NaN", "Infinity", "-Infinity"),
    *("9" * 400, "-" + "9" * 400, "9" * 5000, "0." + "3" * 400),
    *('""', '" "', r'"\n"', '"\u3000"', r'"\u0000"', r'"\u001b[31mred\u001b[0m"', r'"\ud800"'),
    *(r'"\udc00x"', '"' + "x" * 100_000 + '"', '"' + r"\u001b" * 9000 + '"', '"7"', '"none"'),
    *('"<|end|>"', '"../../x"', '"[Question] a"', '"\u202eabc"', '"é\u0301"', '"\U0001f600"'),
    *("[]", "{}", "[null]", '{"a": 1}', "[[]]", '["a", "a"]', "[" * 900 + "]" * 900),
    *("[" * 100_000 + "]" * 100_000, '{"a":' * 30_000 + "1" + "}" * 30_000),
]
HERE = "what-is-replaced"  # stands for an odd value until the file is written


def mangle_value(root, rng) -> tuple[str, list]:
    """(what was done, [the changed value], or [] if it was deleted), of a JSON value."""
    holder = [copy.deepcopy(root)]
    parent, key, path = holder, 0, ""
    while isinstance(parent[key], (dict, list)) and parent[key] and rng.random() < 0.8:
        parent = parent[key]
        key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        path += f"[{key!r}]"
    change = rng.choice(["replace"] * 6 + ["delete", "duplicate", "rename", "wrap", "swap", "text"])
    value = parent[key]
    if change == "replace":
        parent[key] = HERE
    elif change == "delete":
        del parent[key]
    elif change == "duplicate" and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(value))
    elif change in ("duplicate", "rename") and isinstance(parent, dict):
        parent[rng.choice([key.upper(), key + " ", ""])] = value
        if change == "rename":
            parent.pop(key, None)
    elif change == "swap":
        other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[key], parent[other] = parent[other], value
    elif change == "text":
        parent[key] = json.dumps(value)
    else:
        parent[key] = [value]
    return f"{change} {path}", holder


def mangle_json(data: bytes, rng) -> tuple[str, bytes]:
    done, changed = mangle_value(json.loads(data), rng)
    odd = rng.choice(ODD)
    text = "".join(json.dumps(value, ensure_ascii=False) for value in changed)
    return f"{done} {odd[:60]}", text.replace(f'"{HERE}"', odd).encode("utf-8", "surrogatepass")


def mangle_lines(data: bytes, rng) -> tuple[str, bytes]:
    """The same for JSON lines."""
    done, changed = mangle_value([json.loads(line) for line in data.splitlines()], rng)
    odd = rng.choice(ODD)
    records = changed[0] if changed and isinstance(changed[0], list) else changed
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return f"{done} {odd[:60]}", text.replace(f'"{HERE}"', odd).encode("utf-8", "surrogatepass")


def mangle_table(data: bytes, rng) -> tuple[str, bytes]:
    """The same for the cells of a CSV, which may also get other separators."""
    done, changed = mangle_value(list(csv.reader(io.StringIO(data.decode("utf-8-sig")))), rng)
    odd = rng.choice(ODD).strip('"').replace(r"\u001b", "\x1b").replace(r"\n", "\n")
    text = io.StringIO()
    writer = csv.writer(text, delimiter=rng.choice(",,,;\t"))
    for row in changed[0] if changed and isinstance(changed[0], list) else changed:
        cells = row if isinstance(row, list) else [row]
        writer.writerow([odd if cell == HERE else cell for cell in cells])
    return f"{done} {odd[:60]}", text.getvalue().encode("utf-8", "surrogatepass")


def mangle_tensors(data: bytes, rng) -> tuple[str, bytes]:
    """The header of a safetensors file, or a number in it, or the tensors as a whole."""
    length = int.from_bytes(data[:8], "little")
    change = rng.choice(["header", "number", "dtype", "names", "shapes", "facts"])
    if change == "facts":
        header = json.loads(data[8 : 8 + length])
        facts = header["__metadata__"].get("desc", "{}")
        done, changed = mangle_json(facts.encode(), rng)
        header["__metadata__"]["desc"] = changed.decode("utf-8", "replace")
        header = json.dumps(header).encode()
        return f"facts {done}", len(header).to_bytes(8, "little") + header + data[8 + length :]
    if change == "header":
        done, header = mangle_json(data[8 : 8 + length], rng)
        return f"header {done}", len(header).to_bytes(8, "little") + header + data[8 + length :]
    if change == "number":
        place = 8 + length + 4 * rng.randrange((len(data) - 8 - length) // 4)
        number = rng.choice([math.nan, math.inf, -math.inf, 3e38, 1e-45])
        return f"{number} at {place}", data[:place] + struct.pack("<f", number) + data[place + 4 :]
    tensors = load_tensors(data)
    name = rng.choice(sorted(tensors))
    if change == "names":
        tensors[rng.choice(["x", "", name.upper(), f"{name}.weight"])] = tensors.pop(name)
    elif change == "dtype":
        kind = rng.choice([torch.int8, torch.bool, torch.float16, torch.bfloat16, torch.float64])
        tensors[name] = tensors[name].to(kind)
    else:
        shapes = [tensors[name][:0], tensors[name].flatten(), tensors[name][None], torch.zeros(0)]
        tensors[name] = rng.choice(shapes).contiguous()
    return f"{change} of {name}", save_tensors(tensors, {"format": "pt"})


def mangle_bytes(data: bytes, rng) -> tuple[str, bytes]:
    """What disks, editors and transfers do to any file."""
    text = data.decode("utf-8", "replace")
    place, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    odd = rng.choice([b"\0", b"\x1b[2J", b"\xff", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\x85", b'"'])
    flipped = data[place : place + 1].translate(
        bytes(i ^ 1 << rng.randrange(8) for i in range(256))
    )
    changes = {
        "cut off": data[:place],
        "begun late": data[place:],
        "flip": data[:place] + flipped + data[place + 1 :],
        "hole": data[:place] + data[end:],
        "zeros": data[:place] + b"\0" * (end - place) + data[end:],
        "insert": data[:place] + odd + data[place:],
        "twice": data + data,
        "empty": b"",
        "blank": b" \n\n ",
        "BOM": b"\xef\xbb\xbf" + data,
        "two BOMs": b"\xef\xbb\xbf" * 2 + data,
        "UTF-16": text.encode("utf-16"),
        "UTF-32": text.encode("utf-32"),
        "Latin-1": text.encode("latin-1", "replace"),
        "CRLF": text.replace("\n", "\r\n").encode(),
        "CR": text.replace("\n", "\r").encode(),
        "no last line break": data.rstrip(b"\n"),
        "long": data + b"x" * 100_000,
        "other case": text.swapcase().encode(),
    }
    change = rng.choice([*changes, "flip", "flip", "cut off", "hole"])
    return f"{change} {place} {end} {odd}", changes[change]


FORMATS = {
    ".json": mangle_json,
    ".jsonl": mangle_lines,
    ".csv": mangle_table,
    ".safetensors": mangle_tensors,
    ".jinja": mangle_bytes,
    ".txt": mangle_bytes,
}


def mangle_place(path: Path, others: list[Path], rng) -> str:
    """Put something else in a file's place."""
    change = rng.choice(["folder", "full folder", "missing", "loop", "dangling", "swap", "closed"])
    if change == "swap":
        other = rng.choice(others)
        ours, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(ours)
        return f"swap with {other.name}"
    if change == "closed" and os.getuid() > 0:  # root may read all the same
        path.chmod(0)
        return change
    path.unlink()
    if "folder" in change:
        path.mkdir()
    if change == "full folder":
        (path / "x").write_text("x")
    if change in ("loop", "dangling"):
        path.symlink_to(path.name if change == "loop" else "nowhere")
    return change


def mangle(folder: Path, names: list[str], rng) -> str:
    """Damage one of the files `names` in a folder. Returns what was done."""
    name = rng.choice(sorted(names))
    path = folder / name
    chance = rng.random()
    if chance < 0.1:
        return f"{name}: {mangle_place(path, [folder / other for other in names], rng)}"
    change = FORMATS[path.suffix] if chance < 0.7 else mangle_bytes
    done, data = change(path.read_bytes(), rng)
    path.write_bytes(data)
    return f"{name}: {done}"


# --- how a use of it may end ----------------------------------------------------------------------


class Refusal(Exception):
    """The one line with which a script would end."""


def end_of(call, monkeypatch) -> str | None:
    """The line with which a script that does this would end; None if it succeeds. What is no such
    line is raised."""

    def fail(problem):
        raise Refusal(cli.printable(problem))

    monkeypatch.setattr(cli, "fail", fail)
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            cli.run(call)
        line = None
    except Refusal as refusal:
        line = str(refusal)
    finally:
        close_locks()
    check_words(printed.getvalue())
    return line


def close_locks() -> None:
    """What the end of a process does."""
    while files.held_locks:
        files.held_locks.pop().close()


def check_words(text: str) -> None:
    shown = [line for line in text.split("\n") if "\x1b" in line or len(line) > LONGEST_LINE]
    assert not shown, f"prints {shown[0][:300]!r}"


def check_line(line: str, places: list[str]) -> None:
    """A refusal is one line of bounded length, without control characters, that names the place."""
    assert "\n" not in line and "Traceback" not in line, f"more than a line: {line[:1000]}"
    assert len(line) <= LONGEST_LINE and line.isprintable(), f"no line to show: {line[:300]!r}"
    assert any(place in line for place in places), f"names no place: {line[:300]}"


def snapshot(folder: Path) -> dict[str, bytes]:
    """The files in a folder that can be read, by name."""
    paths = [path for path in folder.rglob("*") if path.is_file() and os.access(path, os.R_OK)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# --- the kinds of files, and what uses them -------------------------------------------------------


@dataclass
class Kind:
    """Files that belong together, and what a program does with them."""

    data: dict[str, bytes]  # what lies in a folder, by name
    use: Callable[[Path], None]  # uses the folder, and checks what is accepted
    grows: tuple[str, ...] = ()  # files of a run under way, which a use may change though it fails
    made: dict[str, bytes] = field(default_factory=dict)  # what may replace a file: a whole run's
    beside: dict[str, bytes] = field(default_factory=dict)  # files that are not damaged


def is_text(value) -> bool:
    """Whether a value is a text that a file in UTF-8 can hold, and more than blanks, or the blank
    between two turns of a supporter's."""
    return isinstance(value, str) and bool(value.encode()) and (bool(value.strip()) or value == " ")


def short_dialogues(count: int, turns: int) -> list[dict]:
    """The first dialogues of the sample, cut after that many utterances."""
    dialogues = json.loads(SAMPLE.read_text(encoding="utf-8"))["dialogues"][:count]
    return [dialogue | {"dialog": dialogue["dialog"][:turns]} for dialogue in dialogues]


def to_hub(dialogue: dict) -> dict:
    """A dialogue in the schema of the Hub."""
    utterances = []
    for utterance in dialogue["dialog"]:
        if utterance["speaker"] == "seeker":
            utterances.append({"speaker": "usr", "text": utterance["content"]})
        else:
            strategy = utterance["annotation"]["strategy"]
            utterances.append(
                {"speaker": "sys", "text": utterance["content"], "strategy": strategy}
            )
    return {"situation": "x", "dialog": utterances}


def as_json(value) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()


def as_lines(records: list) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def check_dialogues(dialogues, domain, tokenizer) -> None:
    assert dialogues
    for dialogue in dialogues:
        speakers = [turn.speaker for turn in dialogue.turns]
        assert speakers and speakers == ["seeker", "supporter"] * len(dialogue), speakers
        assert all(is_text(turn.text) for turn in dialogue.turns)
        assert all(turn.strategy in domain.strategies for turn in dialogue.supporter_turns())
    for task in ("sp", "rg", "vanilla"):
        for example in build_examples(task, dialogues[:1], domain)[:1]:
            if len(example.completion) < 10_000:
                assert encode_example(tokenizer, example, 1_000_000, domain.speakers).sequences


def dialogue_files(tools):
    dialogues = short_dialogues(3, 6)
    data = {
        "sample.json": as_json({"about": "x", "dialogues": dialogues}),
        "ESConv.json": as_json(dialogues),
        "hub.jsonl": as_lines([to_hub(dialogue) for dialogue in dialogues]),
    }

    def use(folder):
        for name in data:
            check_dialogues(load_dialogues(folder / name), ESCONV, tools.toy[1])

    return Kind(data, use)


def split_files(tools):
    data = {
        "split.json": as_json({"train": [0, 1, 2], "valid": [3], "test": [4]}),
        "domain.json": (ROOT / "desc" / "data" / "esconv.json").read_bytes(),
    }

    def use(folder):
        domain = read_domain(folder / "domain.json")
        assert len(domain.strategies) >= 2 and all(is_text(name) for name in domain.strategies)
        assert len(domain.speakers) == 2 and all(is_text(name) for name in domain.speakers)
        assert domain.errors and all(is_text(label) for label in domain.labels)
        data, split_file = str(folder / "data.json"), str(folder / "split.json")
        splits = load_splits(data, split_file, domain.strategies, seed=0)
        ids = [dialogue.id for name in SPLITS for dialogue in splits[name]]
        assert len(set(ids)) == len(ids) <= 5 and all(splits[name] for name in SPLITS)
        dialogue = splits["train"][0]
        check_dialogues(splits["train"], domain, tools.toy[1])
        case = Case(dialogue.history(0), domain.strategies[0], "Why?")
        asked = [build_annotator_messages(case, domain)]
        for rubric in RUBRICS:
            asked.append(build_judge_messages(rubric, dialogue, 0, {"reply": "Why?"}, domain))
        for messages in asked:
            assert all(is_text(message["content"]) for message in messages)

    return Kind(data, use, beside={"data.json": as_json(short_dialogues(5, 4))})


def pair_files(tools):
    shipped = (ROOT / "desc" / "data" / "sp" / "pairs.jsonl").read_text(encoding="utf-8")
    ours = [json.loads(line) for line in shipped.splitlines()[:3]]
    theirs = [{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in ours]
    theirs[1] = {"prompt": "hello?", "chosen": "Question", "rejected": "Others"}
    whole = {name: theirs[2]["prompt"] + theirs[2][name] for name in ("chosen", "rejected")}
    data = {"pairs.jsonl": as_lines(ours), "trl.jsonl": as_lines([*theirs[:2], whole])}

    def use(folder):
        for name in data:
            pairs = read_pairs(folder / name, "sp")
            assert len({pair.id for pair in pairs}) == len(pairs) > 0
            for pair in pairs:
                assert type(pair.turn) is int and is_text(pair.chosen) and is_text(pair.rejected)
                facts = (pair.id, pair.dialogue, pair.strategy, pair.error)
                assert all(isinstance(fact, str) and len(fact.encode()) < 1000 for fact in facts)
                for message in pair.prompt:
                    assert list(message) == ["role", "content"] and is_text(message["content"])
                if len(str(pair.record())) < 30_000:
                    assert encode_pair(tools.toy[1], pair, 1_000_000, ESCONV.speakers).sequences

    return Kind(data, use)


def unpaired_files(tools):
    pairs = [json.loads(line) for line in pair_files(tools).data["pairs.jsonl"].splitlines()]
    both = [(pair, name) for pair in pairs for name in ("chosen", "rejected")]
    ours = [
        {"id": f"{pair['id']}/{name}", "task": "sp", "dialogue": "0", "turn": pair["turn"]}
        | {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for pair, name in both
    ]
    theirs = [{"prompt": "hello?", "completion": "Question", "label": True}, ours[1]]
    data = {"unpaired.jsonl": as_lines(ours), "trl.jsonl": as_lines(theirs)}

    def use(folder):
        for name in data:
            answers = read_unpaired(folder / name, "sp")
            assert len({answer.id for answer in answers}) == len(answers) > 0
            for answer in answers:
                assert type(answer.label) is bool and type(answer.turn) is int
                assert is_text(answer.completion) and is_text(answer.mismatched)
                if len(str(answer.record())) < 30_000:
                    item = encode_unpaired(tools.toy[1], answer, 1_000_000, ESCONV.speakers)
                    assert item.desirable is answer.label and len(item.sequences) == 2

    return Kind(data, use)


def label_files(tools):
    dialogues = load_dialogues(SAMPLE)[:6]
    ours, published = [], []
    for dialogue in dialogues:
        for turn, label in enumerate(["Fine", "none", "template response"]):
            said, supporter = dialogue.history(turn), dialogue.supporter(turn)
            context = [{"speaker": each.speaker, "text": each.text} for each in said]
            facts = {"strategy": supporter.strategy, "response": supporter.text}
            row = {"dialogue": dialogue.id, "turn": turn, "context": context}
            ours.append(row | facts | {"label": label})
            published.append({"user_input": said[-1].text} | facts | {"Error Type": label})
    data = {
        "labels.jsonl": as_lines(ours),
        "published.json": as_json(published),
        "map.json": as_json({"Fine": "none", "Odd": None}),
    }

    def annotator(cases):
        return [Annotation("none", 1.0) for _ in cases]

    def use(folder):
        for name in ("labels.jsonl", "published.json"):
            labelled = read_labels(folder / name, dialogues, ESCONV, str(folder / "map.json"))
            for turn in balance(labelled):
                assert (
                    turn.label in ESCONV.labels
                    and turn.turn >= 0
                    and isinstance(turn.dialogue, str)
                )
                assert is_text(turn.case.reply) and turn.case.strategy in ESCONV.strategies
                assert turn.case.history and all(is_text(each.text) for each in turn.case.history)
            annotate_labelled(annotator, labelled)
            if sum(len(str(turn)) for turn in labelled) < 30_000:
                example = labelled[0].example(ESCONV)
                encode_example(tools.toy[1], example, 1_000_000, ESCONV.speakers)
            config = SimpleNamespace(
                agreement=str(folder / name),
                label_map=str(folder / "map.json"),
                held_out=0.5,
                seed=0,
            )
            assert "κ" in agreement.measure_agreement(config, dialogues, ESCONV, annotator)

    return Kind(data, use)


def judged_answers() -> list:
    answers = []
    for dialogue in load_dialogues(SAMPLE)[:3]:
        for turn in range(3):
            human = dialogue.supporter(turn)
            judged = Annotation(ESCONV.labels[turn], 0.5, "Fits.")
            answers.append((dialogue, Answer(turn, human.strategy, human.text, judged)))
    return answers


def fill_in(path: Path, values: dict[str, list[str]]) -> None:
    """Write what people say into columns of a table."""
    head, *rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig")))
    for column, cells in values.items():
        for row, cell in zip(rows, cells):
            row[head.index(column)] = cell
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([head, *rows])


def review_files(tools):
    path = tools.folder / "review.csv"
    agreement.write_review(path, judged_answers(), 20, 0, ESCONV.speakers)
    fill_in(path, {"label": ["none", "template response", "", *ESCONV.labels[:4]]})
    data = {name: (tools.folder / name).read_bytes() for name in ("review.csv", "review.key.json")}

    def use(folder):
        path = folder / "review.csv"
        if path.exists():  # what people wrote
            with pytest.raises(cli.DescError):
                agreement.write_review(path, judged_answers(), 20, 0, ESCONV.speakers)
        people, annotator, dialogues = agreement.read_review(path, ESCONV.labels)
        assert len(people) == len(annotator) == len(dialogues) <= 9 and all(dialogues)
        assert set(people) <= set(ESCONV.labels) and set(annotator) <= {*ESCONV.labels, UNREADABLE}
        config = SimpleNamespace(agreement=str(path), seed=0)
        check_words(agreement.measure_agreement(config, [], ESCONV, None))

    return Kind(data, use)


def rating_files(tools):
    path = tools.folder / "ratings.csv"
    dialogues = load_dialogues(SAMPLE)[:3]
    rating = dict(zip(agreement.RUBRICS, (1.25, 3, 4, None)))
    records = [{"replies": ["a", "=b"], "ratings": [rating, rating | {"empathy": 2}]}] * 3
    about = {"dialogues": dialogues, "answers": {"sft": records}, "speakers": ESCONV.speakers}
    write = partial(agreement.write_ratings, **about)
    write(path)
    fill_in(path, {"empathy human": list("123451"), "fluency human": ["1", "", "2,5", "3.0", "4"]})
    own = "empathy judge;empathy human;dialogue\n3;4;0\n2,5;1;0\n1;1;1\n"
    data = {
        name: (tools.folder / name).read_bytes() for name in ("ratings.csv", "ratings.key.json")
    }
    data["own.csv"] = own.encode()

    def use(folder):
        path = folder / "ratings.csv"
        if path.exists():
            with pytest.raises(cli.DescError):
                write(path)
        for name in ("own.csv", "ratings.csv"):
            check_words(agreement.correlate_ratings(folder / name))

    return Kind(data, use)


def adapted(toy, name: str):
    """A copy of the toy with an adapter that is not zero."""
    model = copy.deepcopy(toy[0])
    torch.manual_seed(0)
    add_adapter(model, name, rank=2, targets=["q_proj", "down_proj"])
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.adapters[name].B, std=0.1)
    return model


def adapter_files(tools):
    save_adapter(adapted(tools.toy, "sft"), tools.folder)
    made_with = {"desc": "1", "base": base_digest(tools.toy[0].name_or_path)}
    (tools.folder / "config.json").write_bytes(as_json(made_with))
    data = {path.name: path.read_bytes() for path in tools.folder.iterdir() if path.is_file()}

    def use(folder):
        adapter_digest(folder)
        model = copy.deepcopy(tools.toy[0])
        cli.use_adapter(Config(), model, folder, "sft")
        layers = lora_layers(model).values()
        assert layers
        for layer in layers:
            adapter = layer.adapters["sft"]
            assert adapter.A.isfinite().all() and adapter.B.isfinite().all()
            assert math.isfinite(adapter.scale) and adapter.scale > 0
        _, halves = export_adapters(model)
        assert all(half.isfinite().all() for half in halves.values())

    return Kind(data, use)


def model_files(tools):
    whole = Path(tools.toy[0].name_or_path)
    data = {path.name: path.read_bytes() for path in whole.iterdir()}

    def use(folder):
        model, tokenizer = load(str(folder), torch.float32, max_length=64)
        ids = torch.tensor([tokenizer("hello", add_special_tokens=False).input_ids])
        with torch.no_grad():
            assert model(input_ids=ids).logits.isfinite().all()
        assert base_digest(str(folder))

    return Kind(data, use)


def checkpoint_files(tools):
    model = adapted(tools.toy, "sft")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors = {}
    for name, p in trained.items():
        tensors |= {name: p.detach(), f"exp_avg.{name}": p.detach() / 2}
        tensors[f"exp_avg_sq.{name}"] = p.detach() ** 2
    settings = {"lr": 0.1, "seed": 0}
    work = tools.folder / "checkpoints"
    for step in (2, 4):
        write_checkpoint(work, {"step": step, "best": 0.5, "settings": settings}, tensors)
    metrics = [{"time": 0.0, "step": step, "loss": 1.0} for step in range(1, 6)]
    (work / "metrics.jsonl").write_bytes(as_lines(metrics))
    data = {f"checkpoints/{path.name}": path.read_bytes() for path in work.iterdir()}

    def use(folder):
        optimizer = torch.optim.AdamW(trained.values())
        run = Run([], trained, optimizer, folder, settings)
        assert isinstance(checkpoint_settings(run.work), dict)
        resume(run)
        if run.step:  # else no checkpoint is left, and the run begins anew
            assert run.step in (2, 4) and run.best == 0.5
            read = read_checkpoint(run.work, settings)[1]
            assert all(torch.equal(read[name], tensors[name]) for name in tensors)
        kept = lines(run.work / "metrics.jsonl")
        assert all(record["step"] <= run.step for record in kept)

    return Kind(data, use, grows=("checkpoints/metrics.jsonl",))


def said(text: str) -> dict:
    """A chat completion."""
    message = {"role": "assistant", "content": text, "reasoning_content": None}
    choice = {"index": 0, "finish_reason": "stop", "message": message, "logprobs": None}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return {"id": "1", "created": 0, "model": "m", "choices": [choice], "usage": usage}


def ask_server(tools, folder: Path, body: bytes | int) -> None:
    """Ask a server that says this as annotator, as judge and as sampler, and check what they
    take."""
    tools.server.script[:] = [body]
    (dialogue,) = load_dialogues(SAMPLE)[:1]
    endpoint = Endpoint(tools.server.url, "m", concurrency=1, tries=2)
    endpoint.keep_answers(folder / "kept")
    case = Case(dialogue.history(0), "Question", "Why?")
    for _ in range(2):  # the second time from what was kept
        (annotation,) = EndpointAnnotator(endpoint, ESCONV)([case])
        assert annotation.error in (*ESCONV.labels, UNREADABLE) and 0 <= annotation.confidence <= 1
        assert isinstance(annotation.explanation, str)
        conversation = build_judge_messages("empathy", dialogue, 0, {"reply": "Why?"}, ESCONV)
        (opinion,) = EndpointJudge(endpoint, ESCONV, 8)([conversation], DIGITS)
        assert set(opinion.shares) <= set(DIGITS) and isinstance(opinion.text, str)
        config = SampleConfig(max_new_tokens=8)
        sampler = EndpointSampler(endpoint, config, ESCONV)
        (planned,), (((strategy, reply),),) = (
            sampler.plan(dialogue, [0]),
            sampler.whole([(dialogue, [0])]),
        )
        assert (
            isinstance(planned, str)
            and strategy in (*ESCONV.strategies, None)
            and isinstance(reply, str)
        )
        again = Endpoint(tools.server.url, "m", concurrency=1, tries=2)
        again.keep_answers(folder / "kept")
        assert len(again.kept.done) == 4, "an answer that was paid for is not kept"
        for text in (annotation.explanation, opinion.text, planned, reply):
            text.encode()
        endpoint = again
        tools.server.script[:] = [500]
    endpoint.print_unread()


def server_bodies(tools):
    annotation = {"error": "none", "explanation": "It fits.", "confidence": 0.9}
    data = {"body.json": as_json(said(json.dumps(annotation)))}

    def use(folder):
        path = folder / "body.json"
        ask_server(tools, folder, path.read_bytes() if path.is_file() else 503)

    return Kind(data, use)


def server_contents(tools):
    annotation = {"error": "none", "explanation": "It fits.", "confidence": 0.9}
    data = {"content.json": as_json(annotation), "tag.txt": b"[Question] What happened?"}

    def use(folder):
        for name in data:
            path = folder / name
            text = path.read_bytes().decode("utf-8", "surrogateescape") if path.is_file() else ""
            (folder / "kept").mkdir(exist_ok=True)
            ask_server(tools, folder / name.partition(".")[0], as_json_ascii(said(text)))

    return Kind(data, use)


def as_json_ascii(value) -> bytes:
    """JSON that can hold halves of surrogate pairs, too."""
    return json.dumps(value).encode()


def run_main(tools, script: str, *flags) -> None:
    """A script's main(), in this process."""
    tools.monkeypatch.syspath_prepend(str(ROOT))
    tools.monkeypatch.setattr("sys.argv", [f"{script}.py", *map(str, flags)])
    tools.monkeypatch.setattr(
        cli, "load_model", lambda *_: (copy.deepcopy(tools.toy[0]), tools.toy[1])
    )
    __import__(script).main()


def plan_by_length(body: dict) -> str:
    """What a server answers that always says the same to the same."""
    names = ESCONV.strategies
    return names[len(body["messages"][-1]["content"]) % len(names)]


def mine(tools, folder: Path, *more) -> None:
    tools.monkeypatch.chdir(folder)
    tools.server.script[:] = [plan_by_length]
    Path("data.json").write_bytes(as_json(short_dialogues(5, 6)))
    flags = ["--task", "sp", "--sampler", "endpoint", "--endpoint", tools.server.url]
    flags += ["--endpoint-model", "m", "--data", "data.json", "--out", "out"]
    run_main(tools, "mine_preferences", *flags, "--concurrency", 1, *more)


def mining_journals(tools):
    """A run under way of two ranks, beside one that is finished."""
    mine(tools, tools.folder)
    close_locks()
    made = {name: data for name, data in snapshot(tools.folder).items() if "out/sp/" in name}
    settings, *records = made["out/sp/answers.jsonl"].splitlines(keepends=True)
    begun = tools.folder / "begun"
    begun.mkdir()
    line = end_of(lambda: mine(tools, begun, "--max-calls", 4), tools.monkeypatch)
    assert "4 are spent" in line  # after one dialogue, and a turn of the next
    parts = {name: data for name, data in snapshot(begun).items() if ".0.jsonl" in name}
    assert len(parts) == 2
    parts["out/sp/answers.1.jsonl"] = settings + records[2]

    def use(folder):
        mine(tools, folder)
        for name in PAIR_FILES:
            name = f"out/sp/{name}"
            assert (folder / name).read_bytes() == made[name], "other pairs than a whole run's"

    data = made | {"out/sp/answers.jsonl": settings + records[3]} | parts
    return Kind(data, use, tuple(parts), made)


def evaluate(tools, folder: Path) -> None:
    tools.monkeypatch.chdir(folder)
    Path("data.json").write_bytes(as_json(short_dialogues(10, 4)))
    flags = ["--model", "toy", "--dtype", "float32", "--data", "data.json", "--out", "out"]
    flags += ["--systems", "dpo=sp:out/sp/dpo", "--report", "report.html"]
    run_main(tools, "evaluate", *flags)


def evaluation_journals(tools):
    dpo = Path("out/sp/dpo")
    save_adapter(adapted(tools.toy, "sft"), tools.folder / dpo)
    names = ("loss", "valid/loss", "valid/nll", "rewards/margins")
    curves = [{"time": 0.0, "step": step} | dict.fromkeys(names, 0.5) for step in range(3)]
    (tools.folder / dpo / "metrics.jsonl").write_bytes(as_lines(curves))
    evaluate(tools, tools.folder)
    close_locks()
    made = {name: data for name, data in snapshot(tools.folder).items() if "out/" in name}
    made = {name: data for name, data in made.items() if Path(name).suffix in FORMATS}
    digest = adapter_digest(tools.folder / dpo)

    def use(folder):
        evaluate(tools, folder)
        if adapter_digest(folder / dpo) == digest:  # else it is another adapter
            name = "out/eval/results.json"
            assert (folder / name).read_bytes() == made[name], "other results than a whole run's"

    return Kind(made, use, made=made)


def run_script(folder: Path, script: str, *flags) -> None:
    """A script in a process of its own, in that folder. Raises Refusal if it ends in an error."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    streams = {"capture_output": True, "text": True, "errors": "replace", "env": environment}
    done = subprocess.run(command(script, *flags), cwd=folder, **streams)
    check_words(done.stdout)
    if done.returncode == 0:
        return
    line = done.stderr.rstrip("\n").rpartition("\n")[2]
    is_one = line.startswith("error: ") and "Traceback" not in done.stderr
    assert done.returncode == 1 and is_one, f"ends with {done.returncode}: {done.stderr[-1500:]}"
    raise Refusal(line)


LEARN = "--model toy --dtype float32 --epochs 1 --batch-size 100 --rank 2 --targets q_proj".split()


def finished_adapter(tools, folder: str) -> dict[str, bytes]:
    """The files of an adapter in that folder, by name."""
    save_adapter(adapted(tools.toy, "sft"), tools.folder / folder)
    (tools.folder / folder / "metrics.jsonl").write_bytes(as_lines([{"step": 1, "loss": 0.5}]))
    return {name: data for name, data in snapshot(tools.folder).items() if folder in name}


def script_train_sft(tools):
    flags = ["--task", "sp", "--data", "sample.json", *LEARN]
    data = {"sample.json": as_json({"dialogues": short_dialogues(4, 6)})}
    beside = finished_adapter(tools, "out/sp/sft")
    return Kind(data, lambda folder: run_script(folder, "train_sft.py", *flags), beside=beside)


def script_train_annotator(tools):
    flags = ["--task", "annotate", "--labels", "labels.jsonl", "--label-map", "map.json", *LEARN]
    flags += ["--held-out", "0"]
    data = label_files(tools).data
    data.pop("published.json")
    beside = finished_adapter(tools, "out/annotate/sft")
    return Kind(data, lambda folder: run_script(folder, "train_sft.py", *flags), beside=beside)


def script_train_dpo(tools):
    flags = ["--task", "sp", "--pairs", "pairs", *LEARN]
    data = {f"pairs/{name}": pair_files(tools).data["pairs.jsonl"] for name in PAIR_FILES}
    data |= finished_adapter(tools, "out/sp/sft")
    beside = finished_adapter(tools, "out/sp/dpo")
    return Kind(data, lambda folder: run_script(folder, "train_dpo.py", *flags), beside=beside)


def script_review(tools):
    flags = ["--task", "rg", "--agreement", "review.csv"]
    data = review_files(tools).data
    return Kind(data, lambda folder: run_script(folder, "mine_preferences.py", *flags))


def script_ratings(tools):
    data = rating_files(tools).data
    flags = ["--correlate", "ratings.csv"]
    return Kind(data, lambda folder: run_script(folder, "evaluate.py", *flags))


def script_evaluate(tools):
    data = evaluation_journals(tools).data
    flags = ["--model", "toy", "--systems", "dpo=sp:out/sp/dpo", "--report", "report.html"]
    beside = {"data.json": as_json(short_dialogues(10, 4))}
    flags += ["--data", "data.json", "--dtype", "float32"]
    return Kind(data, lambda folder: run_script(folder, "evaluate.py", *flags), beside=beside)


KINDS = {
    "dialogues": dialogue_files,
    "splits": split_files,
    "pairs": pair_files,
    "unpaired": unpaired_files,
    "labels": label_files,
    "reviews": review_files,
    "ratings": rating_files,
    "adapters": adapter_files,
    "models": model_files,
    "checkpoints": checkpoint_files,
    "bodies": server_bodies,
    "contents": server_contents,
    "mining": mining_journals,
    "evaluation": evaluation_journals,
}
SCRIPTS = {
    "train_sft.py": script_train_sft,
    "train_sft.py annotate": script_train_annotator,
    "train_dpo.py": script_train_dpo,
    "mine_preferences.py": script_review,
    "evaluate.py correlate": script_ratings,
    "evaluate.py": script_evaluate,
}


def lay_out(made: Kind, folder: Path) -> Path:
    """Write the files into a folder, and return it."""
    for name, content in (made.data | made.beside).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def try_case(kind: str, number: int, made: Kind, tools) -> str | None:
    """The line with which a damaged file is refused; None if it is accepted. Raises AssertionError
    that says what was damaged if the case fails."""
    rng = random.Random(f"{SEED} {kind} {number}")
    folder = lay_out(made, tools.folder / f"{kind}-{number}")
    case = f"DESC_MANGLED='{kind} {number}' (seed {SEED}): {mangle(folder, list(made.data), rng)}"
    before, begun = snapshot(folder), time.process_time()
    try:
        line = end_of(lambda: made.use(folder), tools.monkeypatch)
        assert time.process_time() - begun < LONGEST_TIME, "takes too long"
        if line is not None:
            parents = {str(Path(name).parent) for name in made.data} - {"."}
            check_line(line, ["127.0.0.1", str(folder), *made.data, *parents])
            after = snapshot(folder)
            harmed = [
                name
                for name, content in before.items()
                if after.get(name) not in (content, made.made.get(name)) and name not in made.grows
            ]
            assert not harmed, f"refused ({line[:200]}), but changed {harmed}"
    except Exception as error:
        raise AssertionError(f"{case}\n    {type(error).__name__}: {str(error)[:1500]}") from error
    return line


def try_cases(kind: str, numbers, tools) -> str:
    """The counts, in a line. Raises AssertionError with all cases that fail, or if the undamaged
    files are refused."""
    chosen, _, alone = os.environ.get("DESC_MANGLED", f"{kind} ").rpartition(" ")
    if chosen != kind:
        pytest.skip("another case alone")
    made = (KINDS | SCRIPTS)[kind](tools)
    undamaged = lay_out(made, tools.folder / f"{kind}-undamaged")
    assert end_of(lambda: made.use(undamaged), tools.monkeypatch) is None
    failures, refused = [], 0
    for number in [int(alone)] if alone else numbers:
        try:
            refused += try_case(kind, number, made, tools) is not None
        except AssertionError as failure:
            if alone:
                raise
            failures.append(str(failure))
    accepted = len(numbers) - refused - len(failures)
    counts = f"{kind}: {len(numbers)} cases, {accepted} accepted, {refused} refused"
    assert not failures, f"{counts}, {len(failures)} failures\n" + "\n".join(failures)
    return counts


@pytest.fixture
def tools(toy, server, monkeypatch, tmp_path):
    return SimpleNamespace(toy=toy, server=server, monkeypatch=monkeypatch, folder=tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_used_rightly_or_refused_in_one_line(kind, tools):
    try_cases(kind, range(FEW), tools)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files_are_used_rightly_or_refused_in_one_line(kind, tools, capsys):
    counts = try_cases(kind, range(FEW, MANY), tools)
    with capsys.disabled():
        print(f"\n{counts}")


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_uses_a_damaged_file_rightly_or_ends_in_one_line(script, tools, capsys):
    counts = try_cases(script, range(RUNS), tools)
    with capsys.disabled():
        print(f"\n{counts}")
