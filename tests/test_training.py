"""pytest tests/test_training.py"""

import math
import time
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from scripts import lines
from test_tree import assert_near
from tqdm import tqdm

from desc import DescError
from desc.domain import ESCONV
from desc.encoding import Item, TokenSequence, encode, encode_example
from desc.forward import sequence_logps
from desc.lora import adapter_off, add_adapter, lora_layers
from desc.losses import dpo_loss, sft_loss
from desc.modeling import load
from desc.prompts import build_examples
from desc.training.artefacts import serving_advice
from desc.training.batches import deal, encode_all, make_batches, prepare_ahead
from desc.training.estimate import estimate, memory
from desc.training.run import (
    Run,
    clip_and_step,
    learning_rate,
    save_checkpoint_if_due,
    write_pending,
)
from desc.training.speed import compile_layers, recompute_activations
from desc.tree import SHARING, pack


def test_all_that_cannot_be_encoded_is_counted_and_the_first_named():
    def encode(number):
        if number % 3 == 0:
            raise DescError(f"{number} is too long")
        return str(number)

    assert encode_all(encode, [1, 2, 4], "numbers") == ["1", "2", "4"]
    with pytest.raises(DescError) as error:
        encode_all(encode, list(range(1, 11)), "numbers")
    assert str(error.value) == "3 of 10 numbers cannot be encoded; the first: 3 is too long"


def test_batches_are_whole_dialogues_when_sharing_by_dialogue():
    """Dialogues have 5 examples each, and the batch size is 12. Two dialogues make 10. A third
    would make 15, which is further from 12. Every example comes once."""
    examples = [SimpleNamespace(dialogue=str(i // 5), turn=i % 5, weight=1) for i in range(35)]
    batches = make_batches(examples, 12, "dialogue", seed=0, epoch=0)
    assert [len(batch) for batch in batches] == [10, 10, 10, 5]
    assert sorted(map(id, sum(batches, []))) == sorted(map(id, examples))
    assert all(len({e.dialogue for e in batch}) * 5 == len(batch) for batch in batches)
    assert make_batches(examples, 12, "dialogue", 0, 0) == batches
    assert make_batches(examples, 12, "dialogue", 0, 1) != batches
    assert [len(batch) for batch in make_batches(examples, 2, "dialogue", 0, 0)] == [5] * 7


def test_batches_are_exact_otherwise():
    examples = [SimpleNamespace(dialogue=str(i // 5), weight=1) for i in range(35)]
    batches = make_batches(examples, 12, "pair", seed=0, epoch=0)
    assert [len(batch) for batch in batches] == [12, 12, 11]
    assert sorted(map(id, sum(batches, []))) == sorted(map(id, examples))
    assert sum(batches, []) != examples


def test_learning_rate_by_hand():
    """Of 10 steps, 0.2 are warm-up, so the rate rises over 2 steps: 1/2, 1. Then it is
    ½(1 + cos(π i / 8)), with i from 0 to 7. All of these are multiplied by the peak, 2."""
    rates = [learning_rate(step, 10, 0.2, 2.0) for step in range(10)]
    assert rates == pytest.approx([1.0, 2.0] + [1 + math.cos(math.pi * i / 8) for i in range(8)])


def make_run(tmp_path, weight):
    optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0)
    bar = tqdm(disable=True)
    (tmp_path / "checkpoints").mkdir()
    return Run([[]] * 10, {"w": weight}, optimizer, tmp_path, {}, bar)


def test_a_step_by_hand(tmp_path):
    """The gradient (3, -4) has norm 5 and is clipped to norm 1. AdamW's first step then moves each
    weight by the learning rate, against the gradient's sign. The numbers are written one step
    later."""
    weight = torch.nn.Parameter(torch.ones(2))
    config = SimpleNamespace(warmup=0.1, lr=0.5, max_grad_norm=1.0)
    run = make_run(tmp_path, weight)
    weight.grad = torch.tensor([3.0, -4.0])
    clip_and_step(run, config, {"loss": torch.tensor(7.0), "nodes": 11}, "turns 1 … 2")
    assert weight.tolist() == pytest.approx([0.5, 1.5], abs=1e-5)
    assert weight.grad is None
    assert run.step == 1
    assert not (tmp_path / "checkpoints" / "metrics.jsonl").exists()
    write_pending(run)
    (record,) = lines(tmp_path / "checkpoints" / "metrics.jsonl")
    del record["time"]
    assert record == pytest.approx(
        {"step": 1, "loss": 7.0, "nodes": 11.0, "grad_norm": 5.0, "lr": 0.5}
    )


def test_a_gradient_that_is_not_finite_stops_before_anything_is_saved(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2))
    config = SimpleNamespace(warmup=0.1, lr=0.5, max_grad_norm=1.0)
    run = make_run(tmp_path, weight)
    weight.grad = torch.tensor([1.0, float("nan")])
    clip_and_step(run, config, {"loss": torch.tensor(1.0)}, "pairs 3 … 4")
    with pytest.raises(
        DescError, match="step 1: the loss or the gradient of pairs 3 … 4 is not finite"
    ):
        save_checkpoint_if_due(run, 1)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_without_clipping_the_gradient_stays_as_it_is(tmp_path):
    """AdamW's first moment is 0.1 times the gradient (3, -4). Clipped to norm 1 it would be a fifth
    of that. The norm, 5, is logged all the same."""
    weight = torch.nn.Parameter(torch.ones(2))
    config = SimpleNamespace(warmup=0.1, lr=0.5, max_grad_norm=0.0)
    run = make_run(tmp_path, weight)
    weight.grad = torch.tensor([3.0, -4.0])
    clip_and_step(run, config, {"loss": torch.tensor(7.0)}, "turns 1 … 2")
    assert run.optimizer.state[weight]["exp_avg"].tolist() == pytest.approx([0.3, -0.4])
    assert weight.tolist() == pytest.approx([0.5, 1.5], abs=1e-5)
    write_pending(run)
    assert lines(tmp_path / "checkpoints" / "metrics.jsonl")[0]["grad_norm"] == pytest.approx(5.0)


@pytest.mark.parametrize(
    "adapter_rank, advice",
    [
        (32, ""),
        (512, ""),
        (1, "the adapter's rank is 1: vLLM serves it with --max-lora-rank 8"),
        (24, "the adapter's rank is 24: vLLM serves it with --max-lora-rank 32"),
        (257, "the adapter's rank is 257: vLLM serves it with --max-lora-rank 320"),
        (
            528,
            "the adapter's rank is 528, but vLLM serves at most 512: merge it into the base model"
            " (README), or train with a lower --rank; those of SFT and DPO add up",
        ),
    ],
)
def test_advice_on_ranks_that_vllm_does_not_take_by_name(adapter_rank, advice):
    assert serving_advice(adapter_rank) == advice


def test_the_next_batch_is_prepared_while_the_caller_works():
    prepared = []

    def prepare(batch):
        prepared.append(batch)
        return batch * 10

    progress = []
    for result in prepare_ahead(prepare, [1, 2, 3]):
        time.sleep(0.05)
        progress.append((result, list(prepared)))
    assert progress == [(10, [1, 2]), (20, [1, 2, 3]), (30, [1, 2, 3])]
    assert list(prepare_ahead(str, [])) == []


def random_adapter(model, name):
    """Add an adapter that is not 0, because B is random too."""
    torch.manual_seed(0)
    add_adapter(model, name, rank=4)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.adapters[name].B, std=0.05)


def trained_gradient(model):
    """The gradients of all trained weights, as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def batch_gradient(toy_model, share, max_tokens, loss_of, items):
    """The number of micro-batches, and the loss and gradient of the whole batch. `share` and
    `max_tokens` determine how the batch is cut into micro-batches."""
    model = deepcopy(toy_model)
    random_adapter(model, "a")
    batches = pack(items, share, max_tokens)
    total = 0.0
    for _, forest in batches:
        loss = loss_of(sequence_logps(model, forest))
        loss.backward()
        total += float(loss.detach())
    return len(batches), total, trained_gradient(model)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_any_cut_of_a_batch_gives_the_same_step(toy_on_device, sample, kind):
    model, tokenizer = toy_on_device
    examples = build_examples("sp", sample[10:11])[:5]
    answers = [[e.completion, "Others"] if kind == "dpo" else [e.completion] for e in examples]
    items = [
        encode(tokenizer, str(e.turn), e.dialogue, e.messages, texts, 2048, ESCONV.speakers)
        for e, texts in zip(examples, answers)
    ]
    tokens = sum(len(s.completion) for item in items for s in item.sequences)

    def sft(logps):
        return sft_loss(logps, tokens)

    def dpo(logps):
        chosen, rejected = logps[0::2], logps[1::2]
        losses, *_ = dpo_loss(chosen, rejected, chosen.detach() + 1, rejected.detach(), 0.5)
        return losses.sum() / len(items)

    cuts = [(share, max_tokens) for share in SHARING for max_tokens in (1, 2000)]
    results = [batch_gradient(model, *cut, sft if kind == "sft" else dpo, items) for cut in cuts]
    assert len({count for count, _, _ in results}) > 2
    for _, loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][1], abs=1e-5)
        assert_near(gradient, results[0][2], 1e-4)


def test_activations_computed_again_give_the_same_gradients(toy_on_device, sample):
    examples = build_examples("sp", sample[10:11])[:3]
    items = [
        encode_example(toy_on_device[1], example, 2048, ESCONV.speakers) for example in examples
    ]
    ((_, forest),) = pack(items, "dialogue", 2000)
    gradients = []
    for recompute in (False, True):
        model = deepcopy(toy_on_device[0])
        random_adapter(model, "a")
        if recompute:
            recompute_activations(model)
        calls = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        sequence_logps(model.train(), forest).sum().backward()
        assert len(calls) == (2 if recompute else 1)
        gradients.append(trained_gradient(model))
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 1e-3


def test_plan_by_hand(sample):
    """Each weight of the toy and of its adapters needs 4 bytes. Each trained weight needs 12 more.
    Two ranks halve these numbers. Three turns are read as one tree."""
    model, tokenizer = load("toy", torch.float32, empty=True)
    assert all(p.is_meta for p in model.parameters())
    assert not model.model.rotary_emb.inv_freq.is_meta
    base = sum(p.numel() for p in model.parameters())
    add_adapter(model, "a", rank=4)
    adapter = sum(
        4 * (layer.in_features + layer.out_features) for layer in lora_layers(model).values()
    )
    examples = build_examples("sp", sample[10:11])[:3]
    items = [encode_example(tokenizer, example, 2048, ESCONV.speakers) for example in examples]
    batches = pack(items, "dialogue", 2000, parts=2)
    config = SimpleNamespace(
        estimate=2,
        torch_dtype=torch.float32,
        dropout=0.0,
        recompute=False,
        share="dialogue",
        shard="always",
        max_tokens=2000,
    )
    sizes = memory(model, config, [forest for _, forest in batches])
    assert sizes["weights"] == 2 * base
    assert sizes["adapters"] == 2 * adapter
    assert sizes["gradients, optimizer"] == 6 * adapter
    printed = estimate(model, config, [items], passes=2)
    nodes = len(batches[0][1].ids)
    unshared = sum(len(s.prompt) + len(s.completion) - 1 for item in items for s in item.sequences)
    assert f"{nodes:9,}   ({unshared / nodes:.1f} times" in printed
    assert f"{2 * nodes:9,}   forwards" in printed


def test_a_rank_without_work_has_a_loss_and_gradients_of_zero(toy_on_device, device):
    """Of two micro-batches' worth of ranks, the second is dealt one node and no sequence."""
    model = deepcopy(toy_on_device[0])
    random_adapter(model, "a")
    item = Item("a", "a", [TokenSequence([5, 6], [7])])
    _, [(members, blank)] = deal(pack([item], "dialogue", 100), 2)
    logps = sequence_logps(model, blank.to(device))
    assert members == [] and logps.shape == (0,) and len(blank.ids) == 1
    losses, *_ = dpo_loss(*4 * [logps], beta=0.5)
    loss = sft_loss(logps, 5) + losses.sum()
    loss.backward()
    assert loss.item() == 0
    assert trained_gradient(model).count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_policy_equals_its_reference_before_the_first_step(toy_on_device, sample, dtype):
    """They are equal to the bit, on a GPU in compiled bf16 layers too, although fused operations
    could round differently. Compiled layers give about the same numbers and gradients."""
    model, tokenizer = deepcopy(toy_on_device[0]).to(dtype), toy_on_device[1]
    random_adapter(model, "sft")
    add_adapter(model, "dpo", rank=4)
    examples = build_examples("sp", sample[10:11])[:5]
    answers = [[e.completion, "Others"] for e in examples]
    items = [
        encode(tokenizer, str(e.turn), e.dialogue, e.messages, texts, 2048, ESCONV.speakers)
        for e, texts in zip(examples, answers)
    ]
    ((_, forest),) = pack(items, "dialogue", 2000)
    results = []
    for compiled in (False, True) if model.device.type == "cuda" else (False,):
        if compiled:
            compile_layers(model, model.device)
        model.zero_grad()
        with torch.no_grad(), adapter_off(model, "dpo"):
            reference = sequence_logps(model, forest)
        policy = sequence_logps(model, forest)
        if compiled and dtype == torch.float32:  # see compile_layers
            assert_near(policy, reference, 1e-4)
        else:
            assert torch.equal(policy, reference)
        policy.sum().backward()
        results.append((policy.detach(), trained_gradient(model)))
        assert results[-1][1].count_nonzero() > 0
    for eager, fused in zip(results[0], results[-1]):
        torch.testing.assert_close(fused, eager, rtol=0.02, atol=0.05)


def test_compiling_on_a_cpu_ends_in_one_line(toy):
    with pytest.raises(DescError, match="--compile is for GPUs"):
        compile_layers(toy[0], torch.device("cpu"))
