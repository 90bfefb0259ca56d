"""pytest tests/test_distributed.py

Several gloo processes do what a single process does, up to the order of floating-point sums."""

import json

import pytest
import torch
from safetensors.torch import load_file
from scripts import ROOT, lines, run

from desc.encoding import Item, TokenSequence
from desc.training.batches import deal
from desc.tree import pack

FLAGS = ("--model", "toy", "--dtype", "float32", "--eval-dialogues", 2)


def item(number: int, length: int) -> Item:
    return Item(str(number), str(number), [TokenSequence([number] * length, [1])], 0)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_deal_gives_each_batch_once_and_each_rank_as_many_forwards(ranks):
    batches = pack([item(i, 10 + 7 * i) for i in range(4)], "dialogue", 1)
    hands = deal(batches, ranks)
    assert len({len(hand) for hand in hands}) == 1
    assert sorted(m.id for hand in hands for members, _ in hand for m in members) == [
        "0",
        "1",
        "2",
        "3",
    ]
    assert all(forest.size == len(members) for hand in hands for members, forest in hand)


def test_deal_balances_nodes():
    """Trees of 40, 30, 20 and 10 nodes are dealt to two ranks as 40 + 10 and 30 + 20."""
    hands = deal(pack([item(i, 10 * i) for i in (1, 2, 3, 4)], "dialogue", 1), 2)
    assert [[len(forest.ids) for _, forest in hand] for hand in hands] == [[40, 10], [30, 20]]


def test_trees_are_not_joined_if_ranks_would_idle():
    items = [item(i, 20) for i in range(4)]
    assert len(pack(items, "dialogue", 100)) == 1
    assert len(pack(items, "dialogue", 100, parts=2)) == 2
    assert len(pack(items, "dialogue", 100, parts=4)) == 4


def assert_same_adapter(first, second, atol):
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert a.keys() == b.keys()
    assert max(float(t.abs().max()) for t in a.values()) > 0.01
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=1e-3)
    a, b = (json.loads((folder / "adapter_config.json").read_text()) for folder in (first, second))
    assert a == b


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The folder that a single process makes by SFT, mining and DPO of the planner, and
    evaluation."""
    return pipeline(tmp_path_factory.mktemp("single"), 1)


def pipeline(out, ranks, *train_flags):
    task = ("--task", "sp")
    common = (*FLAGS, "--out", out)
    train = ("--dropout", 0, "--lr", 3e-3, "--batch-size", 14, *train_flags)
    data = ("--train-dialogues", 5)
    run("train_sft.py", *task, *common, *train, *data, "--epochs", 1, ranks=ranks)
    run("mine_preferences.py", *task, *common, *data, ranks=ranks)
    run("train_dpo.py", *task, *common, *train, "--eval-every", 2, ranks=ranks)
    run("evaluate.py", *common, "--reply-dialogues", -1, ranks=ranks)
    return out


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "ranks, train_flags",
    [(2, ()), pytest.param(3, (), marks=SLOW), pytest.param(2, ("--recompute",), marks=SLOW)],
)
def test_ranks_do_what_one_process_does(single, tmp_path, ranks, train_flags):
    """A batch is one or two dialogues, and the last batch is smaller. So a rank often has nothing
    to do. Of three ranks, at least one is idle in every step."""
    out = pipeline(tmp_path, ranks, *train_flags)
    assert_same_adapter(single / "sp" / "sft", out / "sp" / "sft", 2e-5)
    for name in ("pairs.jsonl", "pairs.valid.jsonl"):
        assert (out / "sp" / name).read_bytes() == (single / "sp" / name).read_bytes()
    assert_same_adapter(single / "sp" / "dpo", out / "sp" / "dpo", 1e-4)
    for ours, theirs in zip(
        lines(out / "sp" / "dpo" / "metrics.jsonl"),
        lines(single / "sp" / "dpo" / "metrics.jsonl"),
        strict=True,
    ):
        for record in (ours, theirs):
            del record["time"]
            record.pop(
                "nodes", None
            )  # This differs, because the empty forests of idle ranks count.
        assert ours == pytest.approx(theirs, abs=2e-3, rel=1e-3)
    predicted = [
        [r["systems"]["dpo"]["predicted"] for r in lines(folder / "eval" / "answers.jsonl")[1:]]
        for folder in (single, out)
    ]
    assert predicted[0] == predicted[1]


def test_an_error_on_one_rank_ends_all(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from desc import DescError, cli\n"
        "from desc.training import ranks\n"
        "def main():\n"
        "    ranks.join_ranks()\n"
        "    if ranks.rank() == 1:\n"
        "        raise DescError('the second has no disk')\n"
        "    ranks.wait_for_all()\n"
        "cli.run(main)\n"
    )
    assert "error: rank 1: the second has no disk" in run(program, ranks=2, fails=True, cwd=ROOT)
