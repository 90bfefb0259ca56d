"""pytest tests/test_scale.py

Models larger than a machine, without their weights: what `--estimate` says of them is compared with
FSDP2 on ranks that only this process pretends to have, and with what autograd keeps.

Neither Llama-3.1-70B nor Qwen2.5-72B is at hand. Their configurations are typed in."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from desc import attention
from desc.encoding import Item, TokenSequence
from desc.flags import TrainConfig
from desc.forward import decoder_blocks, sequence_logps
from desc.lora import add_adapter
from desc.modeling import empty_model
from desc.training import sharding
from desc.training.estimate import activation_bytes, estimate, memory
from desc.training.speed import recompute_activations
from desc.tree import grow

RANKS = 8
LARGE = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64}
LARGE |= {"num_key_value_heads": 8, "tie_word_embeddings": False}
LLAMA = LARGE | {
    "vocab_size": 128_256,
    "intermediate_size": 28_672,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
QWEN = LARGE | {
    "vocab_size": 152_064,
    "intermediate_size": 29_568,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}
SHAPES = [
    pytest.param(LlamaConfig, LLAMA, 70_553_706_496, id="Llama-3.1-70B"),
    pytest.param(Qwen2Config, QWEN, 72_706_203_648, id="Qwen2.5-72B"),
]


@pytest.fixture
def ranks(monkeypatch):
    """This process is the first of eight, and what the others send it has no values. The mesh is
    made at once, because it cannot be made where tensors have no values."""
    monkeypatch.setenv("WORLD_SIZE", str(RANKS))
    monkeypatch.setenv("RANK", "0")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    monkeypatch.setattr(sharding, "init_device_mesh", lambda *_: mesh)
    yield
    dist.destroy_process_group()


@pytest.fixture
def undrawn(monkeypatch):
    """Adapters start with any values, because drawing 200 million takes seconds."""
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda tensor, a: tensor)


def flags(**given):
    settings = {"estimate": RANKS, "torch_dtype": torch.bfloat16, "dropout": 0.0, "shard": "always"}
    return SimpleNamespace(**(settings | {"recompute": False} | given))


def build(make, kind, shape, dtype=torch.bfloat16, dropout=0.0):
    kernel = {"dtype": dtype, "attn_implementation": attention.register()}
    model = make(kind(**shape), kernel)
    add_adapter(model, "a", rank=16, dropout=dropout)
    return model.train()


def with_weights(config, kernel):
    return AutoModelForCausalLM.from_config(config, **kernel)


def chain(nodes: int, targets: int = 1):
    """A forest of one sequence."""
    return grow([TokenSequence([1] * (nodes - targets + 1), [1] * targets)])


def size_of(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("kind, shape, parameters", SHAPES)
def test_each_rank_holds_what_the_estimate_says(kind, shape, parameters, ranks, undrawn):
    model = build(empty_model, kind, shape)
    base = [p for p in model.parameters() if p.is_meta]
    assert sum(p.numel() for p in base) == parameters
    planned = memory(model, flags(), [chain(8)])
    sharding.shard(model, torch.device("cpu"))
    local = [p.to_local() for p in model.parameters()]
    assert size_of(p for p in local if p.is_meta) == planned["weights"]
    assert size_of(p for p in local if not p.is_meta) == planned["adapters"]
    trained = sum(p.to_local().numel() for p in model.parameters() if p.requires_grad)
    assert 12 * trained == planned["gradients, optimizer"]


@pytest.mark.parametrize("kind, shape", [(LlamaConfig, LLAMA), (Qwen2Config, QWEN)])
def test_what_is_gathered_is_what_the_estimate_says(kind, shape, ranks, undrawn):
    """Both ends, and more for a moment: the ends again, or two layers."""
    shape = shape | {"num_hidden_layers": 1}
    planned = memory(build(empty_model, kind, shape), flags(), [chain(8)])
    with FakeTensorMode():
        model = build(with_weights, kind, shape)
        sharding.shard(model, torch.device("cpu"))
        layer, embeddings = decoder_blocks(model)[0], model.get_input_embeddings()
        layer.unshard()
        embeddings.unshard()  # and with them the last norm and the head
        layer_bytes = size_of(layer.parameters())
        ends = size_of(model.parameters()) - layer_bytes
    assert planned["weights gathered"] == ends + max(ends, 2 * layer_bytes)


class Kernel(torch.autograd.Function):
    """FlexAttention without its values: what it keeps."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output

    @staticmethod
    def backward(ctx, doutput):
        query, key, value, _, _ = ctx.saved_tensors
        return tuple(map(torch.empty_like, (query, key, value)))


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Attention keeps what FlexAttention would, and dropout's mask has a byte for each number. The
    one on the CPU is as wide as the numbers."""

    def attend(query, key, value, mask, scaling):
        return attention.flex(query, key, value).transpose(1, 2).contiguous()

    def drop(x, p, training, inplace):
        return torch.native_dropout(x, p, training)[0]

    monkeypatch.setattr(attention, "compiled_flex", lambda: Kernel.apply)
    monkeypatch.setattr(attention, "BlockAttention", SimpleNamespace(apply=attend))
    monkeypatch.setattr(nn.functional, "dropout", drop)


class Peak(TorchDispatchMode):
    """The most bytes that the tensors met so far have held together."""

    def __init__(self, model):
        self.bytes, self.storages = 0, {}
        self.meet([p.to_local() for p in model.parameters()])
        super().__init__()

    def meet(self, values) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.meet((args, result))
        self.storages = {key: ref for key, ref in self.storages.items() if not ref.expired()}
        living = map(torch.UntypedStorage._new_with_weak_ptr, self.storages)
        self.bytes = max(self.bytes, sum(storage.nbytes() for storage in living if storage))
        return result


@pytest.mark.parametrize("kind, shape", [(LlamaConfig, LLAMA), (Qwen2Config, QWEN)])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_steps_peak_is_near_the_estimate(kind, shape, recompute, ranks, undrawn, like_a_gpu):
    """A step of three of the layers, forward and backward, on tensors without values. The estimate
    is no less than the peak, and not much more."""
    shape = shape | {"num_hidden_layers": 3}
    settings = flags(recompute=recompute, dropout=0.05)
    planned = memory(build(empty_model, kind, shape, dropout=0.05), settings, [chain(16_384, 512)])
    with FakeTensorMode():
        model = build(with_weights, kind, shape, dropout=0.05)
        if recompute:
            recompute_activations(model)
        sharding.shard(model, torch.device("cpu"))
        with Peak(model) as peak:
            sequence_logps(model, chain(16_384, 512)).sum().backward()
    assert peak.bytes < sum(planned.values()) < 1.1 * peak.bytes


def kept_bytes(model, forest) -> int:
    """What autograd keeps of a forward pass, beside parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps = sequence_logps(model, forest)
    total = sum(storage.nbytes() for at, storage in kept.items() if at not in parameters)
    assert logps.requires_grad
    return total


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_what_autograd_keeps(kind, dtype, dropout, recompute, like_a_gpu):
    """So much more is kept if there is one more layer. Attention's mask and the head are the same
    for all."""
    shape = {"hidden_size": 256, "intermediate_size": 896, "vocab_size": 10}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 2}
    settings = flags(recompute=recompute, dropout=dropout)
    kept, planned = [], []
    for layers in (2, 3):
        model = build(with_weights, kind, shape | {"num_hidden_layers": layers}, dtype, dropout)
        planned.append(activation_bytes(model, 200, dtype, settings))
        if recompute:
            recompute_activations(model)
        kept.append(kept_bytes(model, chain(200)))
    assert kept[1] - kept[0] == pytest.approx(planned[1] - planned[0], rel=0.03)


def test_what_ranks_read_in_a_row_by_hand(toy):
    """Three dialogues of 8, 5 and 3 nodes. Two ranks have two forwards each: 8 beside 5, and 3
    beside nothing. So 11 of 16 nodes are read one after another."""
    items = [Item(str(n), str(n), [TokenSequence([n] * n, [1])]) for n in (8, 5, 3)]
    settings = flags(estimate=2, share="dialogue", max_tokens=4)
    printed = estimate(toy[0], settings, [items], passes=1)
    assert "read in a row                11 " in printed
    assert "1.5 of 2 ranks have work" in printed


def test_the_estimate_says_what_a_copy_would_take():
    """On 4 ranks a copy takes 3/4 of all weights, adapters and optimizer more than a part, but
    nothing is gathered."""
    shape = LLAMA | {"hidden_size": 1024, "num_hidden_layers": 2, "intermediate_size": 2048}
    model = build(empty_model, LlamaConfig, shape | {"head_dim": 16})
    items = [Item("a", "a", [TokenSequence([1] * 8, [1])])]
    config = TrainConfig(task="sp", estimate=4, dtype="bfloat16", dropout=0.0)
    printed = estimate(model, config, [items], passes=1)
    parts = memory(model, config, [chain(8)])
    more = 3 * sum(parts[name] for name in ("weights", "adapters", "gradients, optimizer"))
    copied = sum(parts.values()) + more - parts["weights gathered"]
    assert f"if each has a copy    {copied / 1e9:9.2f} GB" in printed
