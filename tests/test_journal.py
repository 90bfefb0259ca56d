"""pytest tests/test_journal.py"""

import json

import pytest
from scripts import lines

from desc import DescError
from desc.storage.journal import Journal, work_key

A, B, C = ({"key": work_key(name), "said": name} for name in "ABC")
SETTINGS = {"temperature": 0.7, "seed": None}


def test_a_run_goes_on_after_what_is_whole(tmp_path):
    first = Journal(tmp_path / "new", "answers", SETTINGS)
    first.append(A), first.append(C)
    part = tmp_path / "new" / "answers.0.jsonl"
    part.write_bytes(part.read_bytes() + b'{"key": "torn')
    other = tmp_path / "new" / "answers.1.jsonl"  # another rank's
    other.write_text("".join(json.dumps(record) + "\n" for record in (SETTINGS, B)))
    again = Journal(tmp_path / "new", "answers", SETTINGS)
    assert again.done == {record["key"]: record for record in (A, B, C)}
    assert again.finish([A["key"], B["key"]]) == [A, B]
    assert (
        lines(tmp_path / "new" / "answers.jsonl") == [SETTINGS, A, B, C]
        and not part.exists()
        and not other.exists()
    )
    assert Journal(tmp_path / "new", "answers", SETTINGS).done == again.done


def test_other_settings_are_refused_half_way_and_begin_anew_at_the_end(tmp_path, capsys):
    begun, other = Journal(tmp_path, "answers", SETTINGS), SETTINGS | {"temperature": 1.0}
    begun.append(A)
    with pytest.raises(DescError, match="begun with another temperature"):
        Journal(tmp_path, "answers", other)
    begun.finish([A["key"]])
    assert (
        Journal(tmp_path, "answers", other).done == {}
        and "made with other settings" in capsys.readouterr().out
    )
    assert lines(tmp_path / "answers.jsonl") == [SETTINGS, A]  # until then it stays


def test_a_key_tells_pieces_of_work_apart():
    assert (
        work_key("a", "bc") != work_key("ab", "c")
        and work_key("a", 1) == work_key("a", "1")
        and len(work_key("a")) == 16
    )
