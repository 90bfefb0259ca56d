"""pytest tests/test_distributed.py

Several gloo processes do what a single process does, up to the order of floating-point sums."""

import json
from types import SimpleNamespace

import pytest
import torch
from architectures import build, configure_type
from safetensors.torch import load_file, save_file
from scripts import ROOT, lines, run

from desc import DescError
from desc.encoding import Item, TokenSequence
from desc.training import sharding
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
    [
        (2, ("--shard", "always")),
        (2, ("--shard", "auto")),  # the toy fits, so it is copied
        pytest.param(3, ("--shard", "always"), marks=SLOW),
        pytest.param(3, ("--shard", "never"), marks=SLOW),
        pytest.param(2, ("--shard", "always", "--recompute"), marks=SLOW),
    ],
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
        assert ours == pytest.approx(theirs, abs=2e-3, rel=1e-3)
    predicted = [
        [r["systems"]["dpo"]["predicted"] for r in lines(folder / "eval" / "answers.jsonl")[1:]]
        for folder in (single, out)
    ]
    assert predicted[0] == predicted[1]


@pytest.mark.parametrize(
    "shard, ranks, memory, expected",
    [
        ("auto", 2, 2.0, False),
        ("auto", 2, 1.99, True),
        ("auto", 1, 1.0, False),
        ("never", 2, 0.5, False),
        ("always", 1, 9.0, True),
    ],
)
def test_a_model_is_sharded_if_a_copy_takes_more_than_half_of_a_ranks_memory(
    shard, ranks, memory, expected, toy, monkeypatch
):
    """`memory` is in units of the weights' bytes."""
    config = SimpleNamespace(shard=shard, model="toy", torch_dtype=torch.float32)
    weights = sum(p.nbytes for p in toy[0].parameters())
    monkeypatch.setattr(sharding, "memory_of_rank", lambda device: memory * weights)
    monkeypatch.setattr(sharding, "world_size", lambda: ranks)
    monkeypatch.setattr(sharding, "on_any_rank", bool)  # the others find the same
    monkeypatch.setattr(sharding.dist, "is_initialized", lambda: True)
    assert sharding.must_shard(config, torch.device("cpu")) is expected


def test_sharding_without_torchrun_ends_in_one_line():
    config = SimpleNamespace(shard="always")
    with pytest.raises(DescError, match="^--shard always is for torchrun: torchrun --nproc"):
        sharding.must_shard(config, torch.device("cpu"))


def test_a_parameter_without_gradient_is_left_out(monkeypatch):
    """Two ranks, of which the other has the same gradient: the sum is twice it, the mean is it."""
    monkeypatch.setattr(sharding, "world_size", lambda: 2)
    monkeypatch.setattr(sharding.dist, "all_reduce", lambda gradients: gradients.mul_(2))
    used, unused = (torch.nn.Parameter(torch.ones(2, 1)) for _ in range(2))
    used.grad = torch.tensor([[3.0], [4.0]])
    sharding.average_gradients([unused, used])
    assert used.grad.tolist() == [[3], [4]] and unused.grad is None


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


SHARDED = """
import sys
import torch
from desc import DescError, cli
from desc.encoding import TokenSequence
from desc.exactness import check_tree
from desc.forward import sequence_logps
from desc.lora import add_adapter
from desc.modeling import load
from desc.training import ranks
from desc.training.sharding import read_weights, shard, whole
from desc.tree import grow

def main():
    device = ranks.join_ranks()
    forest = grow([TokenSequence([5, 6, 7], [8, 9]), TokenSequence([5, 6], [9])])
    for folder in sys.argv[1:]:
        dtype = torch.bfloat16 if "bfloat16" in folder else torch.float32
        model = load(folder, dtype, device, empty=True)[0]
        torch.manual_seed(0)
        add_adapter(model, "sft", 4)
        shard(model, device)
        try:
            read_weights(model)
        except DescError as error:
            print(error)
            continue
        check_tree(model, 2048)
        alone = load(folder, dtype)[0]
        torch.manual_seed(0)
        add_adapter(alone, "sft", 4)
        expected = alone.state_dict() | dict(alone.named_buffers())
        tensors = model.state_dict() | dict(model.named_buffers())
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert torch.equal(whole(tensor), expected[name]), name
        with torch.no_grad():
            ours, theirs = sequence_logps(model, forest), sequence_logps(alone, forest)
        assert torch.equal(ours, theirs), (ours, theirs)
        print("the same:", folder)

cli.run(main)
"""


def test_ranks_read_what_one_process_reads(toy, tmp_path):
    """Weights, buffers that are saved (Gemma 4's layer scalars) and those that are computed,
    whatever the architecture calls its modules; from the files that the index names.

    What is missing is named, such as the fused experts of a mixture, whose files hold them one by
    one."""
    kinds = ("gemma4_text", "gemma4_text bfloat16", "phi", "opt", "cohere2", "mixtral")
    folders = [tmp_path / kind for kind in (*kinds, "lacks a scalar", "another shape")]
    for folder in folders:
        model_type = folder.name.split()[0]
        stock = build(configure_type(model_type if model_type in kinds else "gemma4_text"))
        for name, buffer in stock.named_buffers():
            if name in stock.state_dict():
                torch.nn.init.uniform_(buffer, 0.5, 2)
        stock.save_pretrained(folder, max_shard_size="40KB")
        toy[1].save_pretrained(folder)
        stale = {name: torch.zeros_like(t) for name, t in stock.state_dict().items()}
        save_file({"model.norm.weight": torch.zeros(3)} | stale, folder / "model-old.safetensors")
    scalar = "model.layers.1.layer_scalar"
    edit_tensor(folders[-2], scalar, lambda tensors: tensors.pop(scalar))
    edit_tensor(folders[-1], scalar, lambda tensors: tensors.update({scalar: torch.ones(2)}))
    program = tmp_path / "program.py"
    program.write_text(SHARDED)
    printed = run(program, *folders, ranks=2).splitlines()
    assert printed[:-3] == [f"the same: {folder}" for folder in folders[:-3]]
    assert (
        ".mlp.experts.gate_up_proj, model" in printed[-3] and "; try --shard never" in printed[-3]
    )
    assert printed[-2].startswith(
        f"{folders[-2]}: its safetensors files have no {scalar} …; try --shard never"
    )
    assert printed[-1].endswith(f"holds {scalar} of shape [2], not [1]")


def edit_tensor(folder, name, edit) -> None:
    """Edit the tensors of the file that holds `name`."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][name]
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})
