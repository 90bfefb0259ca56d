"""Dialogues: the rules of the paper's preprocessing, all formats, bad input, the splits and the
shipped sample.

    DESC_ESCONV=/path/to/ESConv.json pytest tests/test_esconv.py -q

Without DESC_ESCONV the tests that need ESConv itself are skipped. They check its counts, and that
the sample copies nothing from it."""

import json
import random
from collections import Counter
from copy import deepcopy
from importlib.resources import files

import pytest
from scripts import ROOT

from desc import DescError
from desc.domain import ESCONV, Strategies
from desc.esconv import Dialogue, Turn, alternate, load_dialogues, load_splits, split

SAMPLE = files("desc") / "data" / "sample.json"


def seeker(text):
    return Turn("seeker", text)


def supporter(text, strategy="Question"):
    return Turn("supporter", text, strategy)


# --- preprocessing --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "utterances, expected",
    [
        ([seeker("a"), supporter("x")], [seeker("a"), supporter("x")]),
        # Seeker utterances in a row are joined by a line break.
        (
            [seeker("a"), seeker("b"), seeker("c"), supporter("x")],
            [seeker("a\nb\nc"), supporter("x")],
        ),
        # Supporter utterances in a row are not joined. A seeker turn of one space separates them.
        (
            [seeker("a"), supporter("x", "Question"), supporter("y", "Others")],
            [seeker("a"), supporter("x", "Question"), seeker(" "), supporter("y", "Others")],
        ),
        # If the supporter speaks first, a seeker turn "Hi" is put before it.
        (
            [supporter("x"), seeker("a"), supporter("y")],
            [seeker("Hi"), supporter("x"), seeker("a"), supporter("y")],
        ),
        (
            [supporter("x"), supporter("y")],
            [seeker("Hi"), supporter("x"), seeker(" "), supporter("y")],
        ),
        # Seeker utterances after the last supporter utterance are dropped.
        ([seeker("a"), supporter("x"), seeker("b"), seeker("c")], [seeker("a"), supporter("x")]),
        ([seeker("a"), seeker("b")], []),
        ([], []),
    ],
)
def test_alternate(utterances, expected):
    assert alternate(utterances) == tuple(expected)


def test_alternate_keeps_every_supporter_utterance_and_every_word():
    """In random dialogues the speakers alternate. Supporter turns stay as they were, and the seeker
    loses only what comes after the last of them."""
    draw = random.Random(0)
    for _ in range(200):
        utterances = [
            draw.choice((seeker, supporter))(f"utterance {i}") for i in range(draw.randrange(12))
        ]
        turns = alternate(utterances)
        assert [t.speaker for t in turns] == ["seeker", "supporter"] * (len(turns) // 2)
        assert [t for t in turns if t.speaker == "supporter"] == [
            t for t in utterances if t.speaker == "supporter"
        ]
        last = max((i for i, t in enumerate(utterances) if t.speaker == "supporter"), default=-1)
        words = [
            line
            for t in turns
            if t.speaker == "seeker" and t.text not in ("Hi", " ")
            for line in t.text.split("\n")
        ]
        assert words == [t.text for t in utterances[: last + 1] if t.speaker == "seeker"]


def test_supporter_turns_are_counted_and_found():
    dialogue = Dialogue("0", (seeker("a"), supporter("x"), seeker(" "), supporter("y")))
    assert len(dialogue) == 2
    assert [dialogue.supporter(turn).text for turn in range(2)] == ["x", "y"]


# --- ESConv itself --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def esconv(esconv_path):
    return load_dialogues(esconv_path)


def test_supporter_turns_of_the_decoupledesc_split(esconv, esconv_path):
    parts = split(esconv, esconv_path.with_name("split.json"))
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 1040,
        "valid": 130,
        "test": 130,
    }
    assert {name: sum(map(len, part)) for name, part in parts.items()} == {
        "train": 14763,
        "valid": 1821,
        "test": 1792,
    }


def test_strategy_counts_of_esconv(esconv):
    """The expected counts are those of the official README, in the order of ESCONV."""
    counts = Counter(t.strategy for d in esconv for t in d.turns if t.strategy)
    assert [counts[name] for name in ESCONV.strategies] == [
        3801,
        1089,
        1436,
        1713,
        2827,
        2954,
        1215,
        3341,
    ]


def read_texts(path):
    """The texts of all utterances in a file, in lower case and with single spaces."""
    content = json.loads(path.read_text(encoding="utf-8"))
    records = content["dialogues"] if isinstance(content, dict) else content
    return {
        " ".join(u["content"].casefold().split()) for record in records for u in record["dialog"]
    }


def test_the_sample_copies_nothing_from_esconv(esconv_path):
    assert len(read_texts(SAMPLE)) > 300
    assert not read_texts(SAMPLE) & read_texts(esconv_path)


# --- the shipped sample ---------------------------------------------------------------------------


def test_the_sample_is_large_and_varied_enough():
    raw = json.loads(SAMPLE.read_text(encoding="utf-8"))["dialogues"]
    assert len(raw) >= 24
    assert all(8 <= len(dialogue["dialog"]) <= 20 for dialogue in raw)
    counts = Counter(
        u["annotation"]["strategy"] for d in raw for u in d["dialog"] if u["speaker"] == "supporter"
    )
    assert set(counts) == set(ESCONV.strategies)
    assert min(counts.values()) >= 0.08 * sum(counts.values())


# --- formats --------------------------------------------------------------------------------------

OFFICIAL = [
    {
        "situation": "kept in the file, not read",
        "dialog": [
            {"speaker": "seeker", "annotation": {}, "content": " I feel low. "},
            {
                "speaker": "supporter",
                "annotation": {"strategy": "Question"},
                "content": "Since when?\n",
            },
        ],
    },
    {
        "dialog": [
            {"speaker": "supporter", "annotation": {"strategy": "Others"}, "content": "Hello ✓"}
        ]
    },
]
HUB = [
    {
        "dialog": [
            {"speaker": "usr", "text": "I feel low."},
            {"speaker": "sys", "text": "Since when?", "strategy": "Question"},
        ]
    },
    {"dialog": [{"speaker": "sys", "text": "Hello ✓", "strategy": "Others"}]},
]
EXPECTED = [
    Dialogue("0", (seeker("I feel low."), supporter("Since when?"))),
    Dialogue("1", (seeker("Hi"), supporter("Hello ✓", "Others"))),
]


def json_lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@pytest.mark.parametrize(
    "text, expected",
    [
        (json.dumps(OFFICIAL), EXPECTED),
        (json.dumps(OFFICIAL, indent=4, ensure_ascii=False), EXPECTED),
        ("\ufeff" + json.dumps(OFFICIAL, ensure_ascii=False), EXPECTED),  # a byte-order mark
        (json.dumps({"about": "…", "dialogues": OFFICIAL}, indent=1), EXPECTED),
        (json.dumps(OFFICIAL[0]), EXPECTED[:1]),
        (json_lines(HUB), EXPECTED),
        (json_lines(HUB).replace("\n", "\r\n\r\n"), EXPECTED),  # from Windows, with blank lines
        (json_lines(HUB[:1]), EXPECTED[:1]),
    ],
    ids=[
        "official",
        "indented",
        "bom",
        "sample object",
        "one object",
        "hub lines",
        "hub lines crlf",
        "one hub line",
    ],
)
def test_formats(tmp_path, text, expected):
    path = tmp_path / "dialogues.json"
    path.write_bytes(text.encode())
    assert load_dialogues(path) == expected


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_unicode_line_separators_do_not_cut_json_lines(tmp_path, separator):
    """JSON allows them raw in a string; only "\\n" ends a line of JSON lines."""
    hub = deepcopy(HUB)
    hub[0]["dialog"][0]["text"] = f"low{separator}and tired"
    path = tmp_path / "train.txt"
    path.write_text(json_lines(hub), encoding="utf-8")
    assert load_dialogues(path)[0].turns[0].text == f"low{separator}and tired"


def test_hub_splits_and_being_offline(tmp_path, monkeypatch):
    import huggingface_hub

    path = tmp_path / "lines.txt"
    path.write_text(json_lines(HUB), encoding="utf-8")
    names = ["README.md", "train.txt", "valid.txt", "test.txt"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *a, **k: names)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, **k: path)
    parts = load_splits("esconv")
    assert [d.id for part in parts.values() for d in part] == [
        "train/0",
        "train/1",
        "valid/0",
        "valid/1",
        "test/0",
        "test/1",
    ]
    with pytest.raises(DescError, match="a split file"):
        load_splits("esconv", split_file="split.json")

    def offline(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", offline)
    with pytest.raises(DescError, match="download ESConv.json and name that file"):
        load_splits("esconv")


# --- bad input ------------------------------------------------------------------------------------


def assert_refused(path, read, *clues):
    """`read` raises DescError and nothing else. Its message is one line, which names the file and
    holds every clue."""
    with pytest.raises(DescError) as error:
        read()
    message = str(error.value)
    assert "\n" not in message and str(path) in message, message
    for clue in clues:
        assert clue in message, message


def changed(keys, value):
    """OFFICIAL as JSON bytes, with one entry of dialogue 0 set to `value`. If `value` is ..., the
    entry is deleted. `keys` is the path to the entry."""
    data = deepcopy(OFFICIAL)
    *parents, last = keys
    place = data[0]
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(data).encode()


SECOND = ("dialog", 1)  # the supporter's utterance
HERE = ("dialogue 0, utterance 1",)  # what the message calls it
BAD = {
    "not JSON": (b"Seeker: hello\n", "not JSON"),
    "truncated list": (json.dumps(OFFICIAL).encode()[:-40], "not JSON", "cut off"),
    "truncated object": (json.dumps({"dialogues": OFFICIAL}, indent=1).encode()[:-40], "cut off"),
    "truncated lines": (json_lines(HUB).encode()[:-30], "line 2", "cut off"),
    "empty": (b"", "not JSON"),
    "blank": (b" \n\n", "not JSON"),
    "no dialogue": (b"[]", "no dialogue"),
    "a number": (b"17", "list", "17"),
    "null": (b"null", "list", "null"),
    "latin-1": (
        json.dumps(OFFICIAL, ensure_ascii=False).replace("✓", "é").encode("latin-1"),
        "UTF-8",
    ),
    "utf-16": (json.dumps(OFFICIAL).encode("utf-16"), "UTF-8"),
    "utf-16 without a mark": (json.dumps(OFFICIAL).encode("utf-16-le"), "not JSON"),
    "dialogues is an object": (
        json.dumps({"dialogues": {"0": OFFICIAL[0]}}).encode(),
        "'dialogues'",
        "list",
        "an object",
    ),
    "a list for a dialogue": (json.dumps([OFFICIAL]).encode(), "dialogue 0", "an object", "a list"),
    "a string for a dialogue": (b'["hello"]', "dialogue 0", "an object", "a string"),
    "dialog missing": (changed(("dialog",), ...), "dialogue 0", "'dialog'", "missing"),
    "dialog misspelt": (b'[{"dialogue": []}]', "dialogue 0", "'dialog' is missing", "'dialogue'"),
    "dialog a string": (
        changed(("dialog",), "hello"),
        "dialogue 0",
        "'dialog'",
        "a list",
        "a string",
    ),
    "empty dialogue": (changed(("dialog",), []), "dialogue 0", "'dialog'", "no supporter"),
    "no supporter": (changed(SECOND, ...), "dialogue 0", "'dialog'", "no supporter"),
    "a list for an utterance": (changed(SECOND, ["supporter", "Hi"]), *HERE, "an object", "a list"),
    "speaker missing": (changed((*SECOND, "speaker"), ...), *HERE, "'speaker' is missing"),
    "speaker unknown": (
        changed((*SECOND, "speaker"), "therapist"),
        *HERE,
        "'speaker'",
        "'therapist'",
        "supporter",
    ),
    "speaker null": (changed((*SECOND, "speaker"), None), *HERE, "'speaker'", "a string", "null"),
    "content missing": (changed((*SECOND, "content"), ...), *HERE, "'content' is missing"),
    "content null": (changed((*SECOND, "content"), None), *HERE, "'content'", "a string", "null"),
    "content a number": (changed((*SECOND, "content"), 3.5), *HERE, "'content'", "a string", "3.5"),
    "content blank": (changed((*SECOND, "content"), " \n"), *HERE, "'content'", "empty"),
    "content no Unicode": (changed((*SECOND, "content"), "half a pair \ud83d"), *HERE, "'content'"),
    "annotation missing": (changed((*SECOND, "annotation"), ...), *HERE, "'annotation' is missing"),
    "annotation a list": (
        changed((*SECOND, "annotation"), ["Question"]),
        *HERE,
        "'annotation'",
        "an object",
        "a list",
    ),
    "strategy missing": (changed((*SECOND, "annotation"), {}), *HERE, "'strategy' is missing"),
    "strategy misnamed": (
        changed((*SECOND, "annotation"), {"stratgy": "Others"}),
        *HERE,
        "'strategy' is missing",
        "stratgy",
    ),
    "strategy null": (
        changed((*SECOND, "annotation", "strategy"), None),
        *HERE,
        "'strategy'",
        "a string",
        "null",
    ),
    "strategy a list": (
        changed((*SECOND, "annotation", "strategy"), ["Question"]),
        *HERE,
        "'strategy'",
        "a string",
        "a list",
    ),
    "strategy misspelt": (
        changed((*SECOND, "annotation", "strategy"), "Qestion"),
        *HERE,
        "'Qestion'",
        "mean 'Question'?",
    ),
    "strategy unknown": (
        changed((*SECOND, "annotation", "strategy"), "Hypnosis"),
        *HERE,
        "'strategy'",
        "'Hypnosis'",
    ),
    "nested too deeply": (b"[" * 100_000, "not JSON"),
    "a number too long": (b"[" + b"9" * 5000 + b"]", "not JSON"),
}


@pytest.mark.parametrize("data, clues", [(data, clues) for data, *clues in BAD.values()], ids=BAD)
def test_bad_files(tmp_path, data, clues):
    path = tmp_path / "broken.json"
    path.write_bytes(data)
    assert_refused(path, lambda: load_dialogues(path), *clues)


def test_bad_paths(tmp_path):
    assert_refused(
        tmp_path / "no.json",
        lambda: load_dialogues(tmp_path / "no.json"),
        "cannot be read",
        "No such file",
    )
    assert_refused(tmp_path, lambda: load_dialogues(tmp_path), "cannot be read", "directory")
    assert_refused("nothing.json", lambda: load_splits("nothing.json"), "cannot be read")


def test_no_suggestion_where_nothing_is_like_it():
    assert ESCONV.strategies.suggestion("self disclosure") == " (did you mean 'Self-disclosure'?)"
    assert ESCONV.strategies.suggestion("Hypnosis") == ""


# --- splits ---------------------------------------------------------------------------------------


def make_dialogues(count):
    return [Dialogue(str(i), (seeker("a"), supporter("x"))) for i in range(count)]


def ids_of(parts):
    return {name: [int(d.id) for d in part] for name, part in parts.items()}


@pytest.mark.parametrize(
    "count, sizes", [(1300, [1040, 130, 130]), (30, [24, 3, 3]), (24, [20, 2, 2]), (3, [1, 1, 1])]
)
def test_seeded_split(count, sizes):
    parts = ids_of(split(make_dialogues(count), seed=1))
    assert list(parts) == ["train", "valid", "test"]
    assert [len(part) for part in parts.values()] == sizes
    assert sorted(sum(parts.values(), [])) == list(range(count))  # disjoint and complete
    assert parts == ids_of(split(make_dialogues(count), seed=1))


def test_seeded_split_depends_on_the_seed_and_not_on_global_state():
    random.seed(5)
    first = ids_of(split(make_dialogues(100), seed=0))
    random.seed(6)
    assert (
        first
        == ids_of(split(make_dialogues(100), seed=0))
        != ids_of(split(make_dialogues(100), seed=1))
    )


def test_two_dialogues_cannot_be_split():
    with pytest.raises(DescError, match="at least 3"):
        split(make_dialogues(2))


def test_split_file(tmp_path):
    path = tmp_path / "split.json"
    path.write_text('{"train": [4, 0], "valid": [2], "test": [1]}')
    assert ids_of(split(make_dialogues(5), path)) == {"train": [4, 0], "valid": [2], "test": [1]}


BAD_SPLITS = {
    "beyond the end": ('{"train": [0, 5], "valid": [1], "test": [2]}', "train", "5"),
    "negative": ('{"train": [0], "valid": [-1], "test": [2]}', "valid", "-1"),
    "a string": ('{"train": [0], "valid": [1], "test": ["2"]}', "test", "'2'"),
    "a boolean": ('{"train": [0], "valid": [true], "test": [2]}', "valid", "True"),
    "a fraction": ('{"train": [0], "valid": [1.0], "test": [2]}', "valid", "1.0"),
    "doubled within": ('{"train": [0, 0], "valid": [1], "test": [2]}', "two places"),
    "doubled across": ('{"train": [0, 1], "valid": [1], "test": [2]}', "two places"),
    "no valid": ('{"train": [0], "dev": [1], "test": [2]}', "'valid' is missing", "'dev'"),
    "empty split": ('{"train": [], "valid": [1], "test": [2]}', "train is empty"),
    "no list": ('{"train": 0, "valid": [1], "test": [2]}', "'train'", "a list"),
    "a list": ("[0, 1, 2]", "an object"),
    "empty list": ("[]", "an object"),
    "empty file": ("", "not JSON"),
    "not JSON": ("train: 0", "not JSON"),
    "truncated": ('{"train": [0, 1', "cut off"),
}


@pytest.mark.parametrize(
    "text, clues", [(text, clues) for text, *clues in BAD_SPLITS.values()], ids=BAD_SPLITS
)
def test_bad_split_files(tmp_path, text, clues):
    path = tmp_path / "split.json"
    path.write_text(text)
    assert_refused(path, lambda: split(make_dialogues(5), path), *clues)


def test_strategies_of_ones_own(tmp_path):
    own = Strategies(("Open question", "Reflect", "Affirm"))
    data = tmp_path / "dialogues.json"
    data.write_bytes(
        changed((*SECOND, "annotation", "strategy"), "Reflect").replace(b"Others", b"Affirm")
    )
    assert [d.supporter(0).strategy for d in load_dialogues(data, own)] == ["Reflect", "Affirm"]
    assert_refused(data, lambda: load_dialogues(data), "dialogue 0, utterance 1", "'Reflect'")


# --- examples/tag_turns.py ------------------------------------------------------------------------


def test_tagged_turns_say_their_strategy_and_all_else_stays(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import tag_turns

    source, target = tmp_path / "ESConv.json", tmp_path / "tagged.json"
    dialogues = json.loads(SAMPLE.read_text(encoding="utf-8"))["dialogues"]
    source.write_text(json.dumps(dialogues), encoding="utf-8")
    tag_turns.main(str(source), str(target))
    plain, tagged = load_dialogues(source), load_dialogues(target)
    assert len(plain) == len(tagged) > 10
    for before, after in zip(plain, tagged):
        assert [turn.strategy for turn in before.turns] == [turn.strategy for turn in after.turns]
        for old, new in zip(before.turns, after.turns):
            prefix = f"[{old.strategy}] " if old.speaker == "supporter" else ""
            assert new.text == prefix + old.text
