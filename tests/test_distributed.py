"""pytest tests/test_distributed.py

Several gloo processes do what one does, up to the order of floating-point sums."""

import json

import pytest
import torch
from safetensors.torch import load_file
from scripts import ROOT, lines, run

from desc.encoding import Item, TokenSequence
from desc.training.batches import deal
from desc.tree import pack

FLAGS = ("--model", "toy", "--dtype", "float32", "--eval-dialogues", 2, "--dropout", 0)


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
    """Nodes 40, 30, 20, 10 on two ranks: 40 + 10 and 30 + 20."""
    hands = deal(pack([item(i, 10 * i) for i in (1, 2, 3, 4)], "dialogue", 1), 2)
    assert [[len(forest.ids) for _, forest in hand] for hand in hands] == [[40, 10], [30, 20]]


def test_trees_are_not_laid_together_where_ranks_would_idle():
    items = [item(i, 20) for i in range(4)]
    assert (
        len(pack(items, "dialogue", 100)) == 1
        and len(pack(items, "dialogue", 100, parts=2)) == 2
        and len(pack(items, "dialogue", 100, 4)) == 4
    )


def same_adapter(one, other, atol):
    a, b = (
        load_file(one / "adapter_model.safetensors"),
        load_file(other / "adapter_model.safetensors"),
    )
    assert a.keys() == b.keys() and max(float(t.abs().max()) for t in a.values()) > 0.01
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=1e-3)
    assert json.loads((one / "adapter_config.json").read_text()) == json.loads(
        (other / "adapter_config.json").read_text()
    )


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """What one process makes: SFT, mining and DPO of the planner, evaluation."""
    return pipeline(tmp_path_factory.mktemp("single"), 1)


def pipeline(out, ranks, *more):
    flags = ("--task", "sp", *FLAGS, "--out", out)
    run(
        "train_sft.py",
        *flags,
        *more,
        "--train-dialogues",
        5,
        "--lr",
        3e-3,
        "--epochs",
        1,
        "--batch-size",
        14,
        ranks=ranks,
    )
    mine = [flag for flag in flags if flag not in ("--dropout", 0)]
    run("mine_preferences.py", *mine, "--train-dialogues", 5, ranks=ranks)
    run(
        "train_dpo.py",
        *flags,
        *more,
        "--lr",
        3e-3,
        "--batch-size",
        14,
        "--eval-every",
        2,
        ranks=ranks,
    )
    run("evaluate.py", *mine[2:], "--reply-dialogues", -1, ranks=ranks)
    return out


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "ranks, more",
    [(2, ()), pytest.param(3, (), marks=SLOW), pytest.param(2, ("--recompute",), marks=SLOW)],
)
def test_ranks_do_what_one_process_does(single, tmp_path, ranks, more):
    """Batches of one or two dialogues, the last one smaller: some rank often has nothing to do,
    with three always."""
    out = pipeline(tmp_path, ranks, *more)
    same_adapter(single / "sp" / "sft", out / "sp" / "sft", 2e-5)
    for name in ("pairs.jsonl", "pairs.valid.jsonl"):
        assert (out / "sp" / name).read_bytes() == (single / "sp" / name).read_bytes()
    same_adapter(single / "sp" / "dpo", out / "sp" / "dpo", 1e-4)
    for ours, theirs in zip(
        lines(out / "sp" / "dpo" / "metrics.jsonl"),
        lines(single / "sp" / "dpo" / "metrics.jsonl"),
        strict=True,
    ):
        del ours["time"], theirs["time"]
        ours.pop("nodes", None), theirs.pop("nodes", None)  # the empty forests of idle ranks count
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
