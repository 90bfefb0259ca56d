"""pytest tests/test_device.py; and with --cuda

What a training step does on a GPU: it leaves no tensor behind on the CPU, never waits, and compiles
few kernels. Without a GPU the meta device stands in for one: tensors there have no values, so
everything takes the way that is not the CPU's."""

import shutil
import signal
import sys
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from architectures import build, configure
from scripts import lines
from test_tree import assert_near, first_nodes, flat, plain_attention, random_items
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import train_dpo
from desc import attention, forward
from desc.forward import sequence_logps
from desc.lora import add_adapter, train_adapters
from desc.losses import dpo_loss, sft_loss
from desc.training import objectives
from desc.training.run import Run, clip_and_step, seed_dropout
from desc.training.speed import compile_layers
from desc.tree import PADDING, dense_mask, grow, pad

CONFIG = SimpleNamespace(warmup=0.1, lr=1e-3, max_grad_norm=1.0)


def begin(model, folder, fused):
    """A run that trains the newest adapter of a model."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, fused=fused)
    (folder / "checkpoints").mkdir()
    return Run([[]] * 10, trained, optimizer, folder, {}, tqdm(disable=True))


def sft_step(model, forest, run):
    train_adapters(model)
    loss = sft_loss(sequence_logps(model, forest), len(forest.targets))
    loss.backward()
    record = {"loss": loss.detach(), "nodes": len(forest.ids)}
    clip_and_step(run, CONFIG, record, "turns")


def dpo_step(model, forest, run):
    reference = train_dpo.reference_logps(model, forest)
    train_adapters(model)
    policy = train_dpo.pair_logps(model, forest)
    losses, chosen, rejected = dpo_loss(*policy.unbind(1), *reference.unbind(1), beta=0.5)
    losses.mean().backward()
    sums = objectives.sum_metrics(losses, chosen, rejected, policy, torch.ones_like(losses))
    record = dict(zip(objectives.METRICS, sums)) | {"nodes": len(forest.ids)}
    clip_and_step(run, CONFIG, record, "pairs")


def with_adapters(model):
    model = deepcopy(model)
    add_adapter(model, "sft", rank=4)
    add_adapter(model, "dpo", rank=4, dropout=0.1)
    return model


def dense_flex(query, key, value, block_mask, scale):
    """What FlexAttention computes, by SDPA."""
    assert isinstance(block_mask, BlockMask)
    node = torch.arange(query.shape[-2], device=query.device)
    visible = block_mask.mask_mod(None, None, node[:, None], node)
    return F.scaled_dot_product_attention(query, key, value, visible, scale=scale, enable_gqa=True)


# --- the meta device in a GPU's place -------------------------------------------------------------


class MetaAsGPU(TorchDispatchMode):
    """Within this context the meta device is as strict as a GPU: an operation that reads tensors of
    both devices raises, unless one of them is a CPU's scalar. What is copied to the CPU is zero."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        copies = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if function in copies and not kwargs.get("device", args[0].device) == args[-1].device:
            source = args[-1]
            return torch.zeros(source.shape, dtype=source.dtype, device=kwargs["device"])
        if len({x.device for x in tensors if x.dim() > 0}) > 1:
            raise RuntimeError(f"{function} reads tensors on the CPU and on the GPU")
        return function(*args, **kwargs)


@pytest.fixture
def meta(toy, monkeypatch):
    """The toy with two adapters, on the meta device. FlexAttention refuses it, so what calls it is
    given tensors of the right shape."""

    monkeypatch.setattr(attention, "flex", dense_flex)
    model = with_adapters(toy[0]).to("meta")
    with MetaAsGPU():
        yield model


@pytest.mark.parametrize("step", [sft_step, dpo_step])
def test_a_step_leaves_no_tensor_on_the_cpu(step, meta, tmp_path):
    run = begin(meta, tmp_path, fused=False)
    forest = grow(flat(random_items(0))).to(meta.device)
    assert len(forest.ids) == 512
    for _ in range(2):  # the second logs the first
        step(meta, forest, run)
    assert all(state["exp_avg"].is_meta for state in run.optimizer.state.values())
    (record,) = lines(run.work / "metrics.jsonl")
    assert record["step"] == 1 and {"loss", "nodes", "grad_norm"} < record.keys()


@pytest.mark.parametrize("name", ["depth", "end", "rows", "targets", "owner"])
def test_a_tensor_that_is_left_on_the_cpu_is_noticed(name, meta, tmp_path):
    run = begin(meta, tmp_path, fused=False)
    forest = grow(flat(random_items(0))).to(meta.device)
    left = torch.zeros(getattr(forest, name).shape, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="on the CPU and on the GPU"):
        sft_step(meta, replace(forest, **{name: left}), run)


# --- no waiting -----------------------------------------------------------------------------------


@pytest.fixture
def no_waiting(device):
    """A function that makes whatever would wait for the GPU raise, until the end of the test."""
    if device.type == "cpu":
        pytest.skip("needs CUDA")
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("step", [sft_step, dpo_step])
def test_a_step_never_waits_for_the_gpu(step, toy_on_device, no_waiting, tmp_path):
    """After the first step, in which kernels are compiled. The step is in bf16, and its forest goes
    to the GPU meanwhile."""
    model = with_adapters(deepcopy(toy_on_device[0]).bfloat16())
    run = begin(model, tmp_path, fused=True)
    forest = grow(flat(random_items(0)))
    step(model, forest.to(model.device), run)
    no_waiting()
    with pytest.raises(RuntimeError):
        torch.ones(1, device=model.device).item()
    step(model, forest.to(model.device), run)
    assert run.step == 2


def test_generation_makes_no_plan_for_each_length(toy_on_device):
    """As cuDNN would, in bf16 on a GPU (desc/attention.py: register)."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# --- few kernels ----------------------------------------------------------------------------------


compiles = pytest.mark.filterwarnings("ignore")  # PyTorch's compiler warns of PyTorch's own code


def graphs():
    """How many graphs TorchDynamo has compiled in this process."""
    return counters["stats"]["unique_graphs"]


@compiles
def test_flex_attention_is_compiled_once_for_all_lengths(device, request, monkeypatch):
    """But once for each way to look: the whole path or a window of it. On a GPU, where it has a
    backward pass, once more with gradients. On the CPU the kernel itself is made with --slow alone,
    because that needs g++ and half a minute; otherwise Python computes what the graph says."""
    compiler_runs = request.config.getoption("--slow") and shutil.which("g++")
    if device.type == "cpu" and not compiler_runs:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(attention, "compiled_flex", cache(attention.compiled_flex.__wrapped__))
    torch._dynamo.reset()
    before, modes = graphs(), (False, True) if device.type == "cuda" else (False,)
    for nodes in (600, 100, 1030):  # 8 blocks first: 4 would be taken for the number of heads
        forest = pad(first_nodes(nodes), PADDING).to(device)
        for window in (None, 4):
            mask, visible = attention.flex_mask(forest, window), dense_mask(forest, window)
            inputs = [torch.randn(1, h, len(visible), 16, device=device) for h in (4, 2, 2)]
            for mode in modes:
                inputs = [x.requires_grad_(mode) for x in inputs]
                output, _ = attention.tree_attention(None, *inputs, mask, 0.25)
                assert_near(output, plain_attention(*inputs, visible, 0.25), 1e-5)
    assert graphs() - before == 2 * len(modes)


@pytest.fixture(params=[32, 512])
def layered(device, request):
    """Three layers, two of them with a window, and two adapters. Their width may be the number of
    nodes in the first forest, which must not be taken for it."""
    changes = {"head_dim": 16, "hidden_size": request.param}
    model = build(configure("gemma3_text with windows", **changes)).to(device)
    model.set_attn_implementation(attention.register())
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield with_adapters(model)


def forests():
    """Forests of 512, 1024 and 1536 nodes."""
    for turns in (4, 40, 60):
        yield pad(grow(flat(random_items(0, turns=turns))), PADDING)


# With windows and without, a layer is compiled for reference, policy and validation.
# And for the policy in its first layer, because its input has no gradient.
GRAPHS = 2 + 2 + 2 + 1


def train_and_validate(model, run, device):
    for forest in forests():
        dpo_step(model, forest.to(device), run)
        model.eval()
        with torch.no_grad():
            train_dpo.pair_logps(model, forest.to(device))


@compiles
def test_layers_are_compiled_once_for_all_layers_and_lengths(layered, tmp_path, monkeypatch):
    """What the graphs compute is left to Python here, and SDPA stands in for FlexAttention, which
    has no backward on the CPU."""
    taken = []

    def eager(graph, inputs):
        taken.extend(inputs)
        return graph.forward

    compiler = partial(torch.compile, backend=eager)
    monkeypatch.setattr(torch, "compile", lambda f, dynamic, options: compiler(f, dynamic=dynamic))
    monkeypatch.setattr(attention, "flex_attention", dense_flex)
    monkeypatch.setattr(forward, "tree_mask", attention.flex_mask)
    run = begin(layered, tmp_path, fused=False)
    compile_layers(layered, torch.device("cuda"))
    before = graphs()
    train_and_validate(layered, run, layered.device)
    assert graphs() - before == GRAPHS
    # A number that is not a constant would be a tensor in fp64, on the CPU.
    dtypes = {x.dtype for x in taken if isinstance(x, torch.Tensor)}
    assert torch.float32 in dtypes and torch.float64 not in dtypes


@compiles
def test_steps_on_a_gpu_compile_no_more_graphs(layered, device, tmp_path):
    """FlexAttention among them."""
    if device.type == "cpu":
        pytest.skip("needs CUDA: FlexAttention has no backward on the CPU")
    run = begin(layered, tmp_path, fused=True)
    compile_layers(layered, device)
    before = graphs()
    train_and_validate(layered, run, device)
    assert graphs() - before == GRAPHS


# --- a run that is stopped ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dpo_that_is_stopped_goes_on_to_the_bit(dtype, device, tmp_path, monkeypatch):
    """It is stopped in its second step of five. Adapters drop inputs."""
    # A process holds its folder until it ends, and here one process does what three would.
    monkeypatch.setattr("desc.training.run.claim_folders", lambda *_: None)
    flags = ("--task", "sp", "--model", "toy", "--pairs", "sample", "--dtype", dtype)
    flags += ("--batch-size", "8", "--lr", "1e-2", "--eval-dialogues", "1", "--eval-pairs", "4")

    def train(out):
        monkeypatch.setattr(sys, "argv", ["train_dpo.py", *flags, "--out", str(out)])
        train_dpo.main()

    def stop(run, config):
        if run.step == 1:
            signal.raise_signal(signal.SIGTERM)
        seed_dropout(run, config)

    handler = signal.getsignal(signal.SIGTERM)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    try:
        train(whole)
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(train_dpo, "seed_dropout", stop)
            train(parts)
        assert (parts / "sp" / "dpo" / "checkpoints" / "00000002.safetensors").exists()
        train(parts)
    finally:
        signal.signal(signal.SIGTERM, handler)
    names = ("adapter_model.safetensors", "last/adapter_model.safetensors")
    for name in names:
        first, second = (out / "sp" / "dpo" / name for out in (whole, parts))
        assert first.read_bytes() == second.read_bytes()
    logged = [lines(out / "sp" / "dpo" / "metrics.jsonl") for out in (whole, parts)]
    losses = [[record["loss"] for record in records if "loss" in record] for records in logged]
    assert losses[0] == losses[1] and len(set(losses[0])) > 2
