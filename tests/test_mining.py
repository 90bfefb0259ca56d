"""pytest tests/test_mining.py"""

import json

import pytest

from desc import DescError
from desc.esconv import Turn
from desc.files import write_lines
from desc.mining import Pair, find_error, read_pairs

GOLD = Turn("supporter", "How are you?", "Question")
PROMPT = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
PAIR = Pair("sp/7/0", "sp", "7", 0, "Question", "strategy mismatch", PROMPT, "Question", "Others")


@pytest.mark.parametrize(
    "task, strategy, reply, error",
    [
        ("sp", "Question", "", None),
        ("sp", "Others", "", "strategy mismatch"),
        ("rg", "Question", "Fine.", "unjudged"),
        ("rg", "Question", "How  are\nyou?", None),
        ("rg", "Question", "", None),
        ("vanilla", "Others", "How are you?", "strategy mismatch"),
        ("vanilla", "Question", "Fine.", "unjudged"),
        ("vanilla", "Question", "How are you?", None),
    ],
)
def test_which_answers_make_a_pair(task, strategy, reply, error):
    assert find_error(task, GOLD, strategy, reply) == error


def test_pairs_are_trls_conversational_format_and_come_back(tmp_path):
    other = Pair(**vars(PAIR) | {"id": "sp/7/1", "rejected": "low\u2028tired\u0085"})  # these end a line for str.splitlines
    write_lines(tmp_path / "pairs.jsonl", [PAIR.record(), other.record()])
    record = json.loads((tmp_path / "pairs.jsonl").read_text().split("\n")[0])
    assert record["prompt"] == PROMPT
    assert record["chosen"] == [{"role": "assistant", "content": "Question"}]
    assert record["rejected"] == [{"role": "assistant", "content": "Others"}]
    assert read_pairs(tmp_path / "pairs.jsonl", "sp") == [PAIR, other]


@pytest.mark.parametrize(
    "lines, says",
    [
        ([], "no pair"),
        (['{"id": "sp/7/0"'], "line 1 is not JSON"),
        (['{"id": "sp/7/0"}'], "line 1 is no preference pair"),
        (["[]"], "line 1 is no preference pair"),
        ([json.dumps(PAIR.record() | {"chosen": []})], "line 1 is no preference pair"),
        ([json.dumps(PAIR.record() | {"surplus": 1})], "line 1 is no preference pair"),
        ([json.dumps(PAIR.record() | {"task": "rg"})], "is of task 'rg', not 'sp'"),
        ([json.dumps(PAIR.record())] * 2, "line 2 has the id 'sp/7/0' of a line before"),
    ],
)
def test_bad_pairs_end_in_one_clear_line(tmp_path, lines, says):
    (tmp_path / "pairs.jsonl").write_text("".join(line + "\n" for line in lines))
    with pytest.raises(DescError, match=says) as error:
        read_pairs(tmp_path / "pairs.jsonl", "sp")
    assert "\n" not in str(error.value)
