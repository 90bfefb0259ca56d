"""pytest tests/test_journal.py"""

import json

import pytest
from scripts import lines

from desc import DescError
from desc.flags import Config, answer_settings
from desc.storage.journal import Journal, read_metrics, seal, work_key

A, B, C = ({"key": work_key(name), "reply": name} for name in "ABC")
SETTINGS = {"temperature": 0.7, "seed": None}


def test_a_run_goes_on_after_what_is_whole(tmp_path):
    first = Journal(tmp_path / "new", "answers", SETTINGS)
    first.append(A)
    first.append(C)
    part = tmp_path / "new" / "answers.0.jsonl"
    part.write_bytes(part.read_bytes() + b'{"key": "torn')
    other = tmp_path / "new" / "answers.1.jsonl"  # the part of another rank
    other.write_text("".join(json.dumps(record) + "\n" for record in (SETTINGS, B)))
    again = Journal(tmp_path / "new", "answers", SETTINGS)
    assert again.done == {record["key"]: record for record in (A, B, C)}
    assert again.finish([A["key"], B["key"]]) == [A, B]
    assert lines(tmp_path / "new" / "answers.jsonl") == [SETTINGS, *map(seal, (A, B, C))]
    assert not part.exists()
    assert not other.exists()
    assert Journal(tmp_path / "new", "answers", SETTINGS).done == again.done


def test_a_group_is_left_until_all_of_it_is_done(tmp_path):
    """And goes to one rank whole."""
    a, b, c = (record["key"] for record in (A, B, C))
    groups = [{a: "first"}, {b: "second", c: "third"}, {"d": "fourth"}]
    journal = Journal(tmp_path, "answers", SETTINGS)
    journal.append(A)
    journal.append(B)
    ranks = [Journal(tmp_path, "answers", SETTINGS, rank, 2) for rank in (0, 1)]
    assert [rank.left_for_me(groups) for rank in ranks] == [groups[1:2], groups[2:]]


def test_other_settings_are_refused_half_way_and_begin_anew_at_the_end(tmp_path, capsys):
    journal = Journal(tmp_path, "answers", SETTINGS)
    other = SETTINGS | {"temperature": 1.0}
    journal.append(A)
    with pytest.raises(DescError, match="begun with another temperature"):
        Journal(tmp_path, "answers", other)
    journal.finish([A["key"]])
    assert Journal(tmp_path, "answers", other).done == {}
    assert "made with other settings" in capsys.readouterr().out
    # The old file stays until the new journal is finished.
    assert lines(tmp_path / "answers.jsonl") == [SETTINGS, seal(A)]


def test_a_journal_from_before_a_flag_goes_on(tmp_path):
    """Half done and whole. It was made with what is the flag's default now."""
    settings = answer_settings(Config(), ["sp"])
    other = answer_settings(Config(history="messages"), ["sp"])
    before = {name: value for name, value in settings.items() if name != "history"}
    Journal(tmp_path, "answers", before).append({"key": "a"})
    with pytest.raises(DescError, match="begun with another history"):
        Journal(tmp_path, "answers", other)
    journal = Journal(tmp_path, "answers", settings)
    assert list(journal.done) == ["a"]
    journal.finish(["a"])
    (tmp_path / "answers.jsonl").write_text(
        "\n".join(map(json.dumps, [before, *lines(tmp_path / "answers.jsonl")[1:]]))
    )
    assert list(Journal(tmp_path, "answers", settings).done) == ["a"]
    assert list(Journal(tmp_path, "answers", other).done) == []


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"key": "1", "reply": "hfllo"',  # a flipped bit
        b'{"key": "1", "reply": ["hello"]',
        b'{"key": 1, "reply": "hello"',
        b'{"kex": "1", "reply": "hello"',
        b'{"reply": "hello"',
    ],
)
def test_a_damaged_line_is_refused_and_stays(tmp_path, damaged):
    journal = Journal(tmp_path, "answers", SETTINGS)
    journal.append({"key": "1", "reply": "hello"})
    part = tmp_path / "answers.0.jsonl"
    whole = part.read_bytes()
    part.write_bytes(whole.replace(b'{"key": "1", "reply": "hello"', damaged))
    before = part.read_bytes()
    assert before != whole
    with pytest.raises(DescError, match=r"answers.0.jsonl: line 2 is"):
        Journal(tmp_path, "answers", SETTINGS)
    assert part.read_bytes() == before


def test_damaged_settings_are_refused_while_a_run_is_under_way(tmp_path):
    part = tmp_path / "answers.0.jsonl"
    for settings in ("5", "[]", "{}"):
        part.write_text(f"{settings}\n")
        with pytest.raises(DescError, match="answers.0.jsonl"):
            Journal(tmp_path, "answers", SETTINGS)


@pytest.mark.parametrize(
    "record", ["5", "{}", '{"step": "1"}', '{"step": 1, "loss": NaN}', f'{{"step": {"9" * 400}}}']
)
def test_metrics_are_finite_numbers_of_steps(tmp_path, record):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n')
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}]
    path.write_text(f'{{"step": 1, "loss": 0.5}}\n\n{record}\n')
    with pytest.raises(DescError, match="metrics.jsonl: line 3 is no record of a step"):
        read_metrics(path)


def test_a_key_tells_pieces_of_work_apart():
    assert work_key("a", "bc") != work_key("ab", "c")
    assert work_key("a", 1) == work_key("a", "1")
    assert len(work_key("a")) == 16
