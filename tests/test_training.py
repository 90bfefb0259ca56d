"""pytest tests/test_training.py"""

import math
import time
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from scripts import lines
from tqdm import tqdm

from desc import DescError
from desc.encoding import encode
from desc.lora import adapter_off, add_adapter, lora_layers
from desc.losses import dpo_loss, sft_loss
from desc.modeling import load, sequence_logps
from desc.prompts import build_examples
from desc.training.batches import make_batches, prepare_ahead
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


def test_batches_are_whole_dialogues_when_sharing_by_dialogue():
    """Groups of 5 with a batch size of 12: after two (10) a third would make 15, which is further
    from 12. Every example comes once."""
    things = [SimpleNamespace(dialogue=str(i // 5), turn=i % 5) for i in range(35)]
    batches = make_batches(things, 12, "dialogue", seed=0, epoch=0)
    assert [len(batch) for batch in batches] == [10, 10, 10, 5]
    assert sorted(map(id, sum(batches, []))) == sorted(map(id, things))
    assert all(len({t.dialogue for t in batch}) * 5 == len(batch) for batch in batches)
    assert (
        make_batches(things, 12, "dialogue", 0, 1)
        != batches
        == make_batches(things, 12, "dialogue", 0, 0)
    )
    assert [len(batch) for batch in make_batches(things, 2, "dialogue", 0, 0)] == [5] * 7


def test_batches_are_exact_otherwise():
    things = [SimpleNamespace(dialogue=str(i // 5)) for i in range(35)]
    batches = make_batches(things, 12, "pair", seed=0, epoch=0)
    assert [len(batch) for batch in batches] == [12, 12, 11]
    assert (
        sorted(map(id, sum(batches, []))) == sorted(map(id, things)) and sum(batches, []) != things
    )


def test_learning_rate_by_hand():
    """10 steps, warm-up 0.2: rising over 2 steps (1/2, 1), then ½(1 + cos(π i / 8)) for i = 0 … 7;
    all times the peak, 2."""
    rates = [learning_rate(step, 10, 0.2, 2.0) for step in range(10)]
    assert rates == pytest.approx([1.0, 2.0] + [1 + math.cos(math.pi * i / 8) for i in range(8)])


def make_run(tmp_path, weight):
    optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0)
    bar = tqdm(disable=True)
    return Run([[]] * 10, {"w": weight}, optimizer, tmp_path, tmp_path, tmp_path, {}, bar)


def test_a_step_by_hand(tmp_path):
    """A gradient (3, 4) of norm 5 is cut to norm 1; AdamW's first step then moves each weight by
    the rate against the gradient's sign. The numbers are written one step later."""
    weight, config = (
        torch.nn.Parameter(torch.ones(2)),
        SimpleNamespace(warmup=0.1, lr=0.5, max_grad_norm=1.0),
    )
    run = make_run(tmp_path, weight)
    weight.grad = torch.tensor([3.0, -4.0])
    clip_and_step(run, config, {"loss": torch.tensor(7.0), "nodes": 11}, "turns 1 … 2")
    assert (
        weight.tolist() == pytest.approx([0.5, 1.5], abs=1e-5)
        and weight.grad is None
        and run.step == 1
    )
    assert not (tmp_path / "metrics.jsonl").exists()
    write_pending(run)
    (record,) = lines(tmp_path / "metrics.jsonl")
    del record["time"]
    assert record == pytest.approx(
        {"step": 1, "loss": 7.0, "nodes": 11.0, "grad_norm": 5.0, "lr": 0.5}
    )


def test_a_gradient_that_is_not_finite_stops_before_anything_is_saved(tmp_path):
    weight, config = (
        torch.nn.Parameter(torch.ones(2)),
        SimpleNamespace(warmup=0.1, lr=0.5, max_grad_norm=1.0),
    )
    run = make_run(tmp_path, weight)
    weight.grad = torch.tensor([1.0, float("nan")])
    clip_and_step(run, config, {"loss": torch.tensor(1.0)}, "pairs 3 … 4")
    with pytest.raises(
        DescError, match="step 1: the loss or the gradient of pairs 3 … 4 is not finite"
    ):
        save_checkpoint_if_due(run, 1)
    assert not list(tmp_path.iterdir())


def test_the_next_batch_is_prepared_while_the_caller_works():
    prepared = []
    seen = []
    for ready in prepare_ahead(lambda batch: prepared.append(batch) or batch * 10, [1, 2, 3]):
        time.sleep(0.05)
        seen.append((ready, list(prepared)))
    assert (
        seen == [(10, [1, 2]), (20, [1, 2, 3]), (30, [1, 2, 3])]
        and list(prepare_ahead(str, [])) == []
    )


def batch_gradient(share, max_tokens, loss_of, items):
    """The loss and gradient of a whole batch, cut into micro-batches as `share` and `max_tokens`
    say, and their number."""
    model, _ = load("toy", torch.float32)
    torch.manual_seed(0)
    add_adapter(model, "a", rank=4)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.adapters["a"].B, std=0.05)
    batches = pack(items, share, max_tokens)
    total = 0.0
    for _, forest in batches:
        loss = loss_of(sequence_logps(model, forest))
        loss.backward()
        total += float(loss.detach())
    return (
        len(batches),
        total,
        torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]),
    )


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_any_cut_of_a_batch_gives_the_same_step(toy, sample, kind):
    _, tokenizer = toy
    examples = build_examples("sp", sample[10:11])[:5]
    answers = [[e.completion, "Others"] if kind == "dpo" else [e.completion] for e in examples]
    items = [
        encode(tokenizer, f"{e.dialogue}/{e.turn}", e.dialogue, e.messages, a, 2048)
        for e, a in zip(examples, answers)
    ]
    tokens = sum(len(s.completion) for item in items for s in item.sequences)

    def sft(logps):
        return sft_loss(logps, tokens)

    def dpo(logps):
        return dpo_loss(
            logps[0::2], logps[1::2], logps[0::2].detach() + 1, logps[1::2].detach(), 0.5
        )[0].sum() / len(items)

    cuts = [(share, max_tokens) for share in SHARING for max_tokens in (1, 2000)]
    results = [batch_gradient(*cut, sft if kind == "sft" else dpo, items) for cut in cuts]
    assert len({count for count, _, _ in results}) > 2
    for _, loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][1], abs=1e-5)
        torch.testing.assert_close(gradient, results[0][2], atol=1e-5, rtol=1e-3)


def test_activations_computed_again_give_the_same_gradients(toy, sample):
    examples = build_examples("sp", sample[10:11])[:3]
    items = [
        encode(toy[1], str(e.turn), e.dialogue, e.messages, [e.completion], 2048) for e in examples
    ]
    ((_, forest),) = pack(items, "dialogue", 2000)
    gradients = []
    for again in (False, True):
        model = deepcopy(toy[0])
        torch.manual_seed(0)
        add_adapter(model, "a", rank=4)
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.adapters["a"].B, std=0.05)
        if again:
            recompute_activations(model)
        calls = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        sequence_logps(model.train(), forest).sum().backward()
        assert len(calls) == 1 + again
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        )
    assert torch.equal(*gradients) and gradients[0].abs().max() > 1e-3


def test_plan_by_hand(sample):
    """The toy: 4 bytes a weight of the base and of the adapters, 12 more for what is trained,
    halved on two ranks; three turns read as one tree."""
    model, tokenizer = load("toy", torch.float32, empty=True)
    assert (
        all(p.is_meta for p in model.parameters()) and not model.model.rotary_emb.inv_freq.is_meta
    )
    base = sum(p.numel() for p in model.parameters())
    add_adapter(model, "a", rank=4)
    adapter = sum(
        4 * (layer.in_features + layer.out_features) for layer in lora_layers(model).values()
    )
    examples = build_examples("sp", sample[10:11])[:3]
    items = [
        encode(tokenizer, str(e.turn), e.dialogue, e.messages, [e.completion], 2048)
        for e in examples
    ]
    batches = pack(items, "dialogue", 2000, parts=2)
    config = SimpleNamespace(
        estimate=2,
        torch_dtype=torch.float32,
        dropout=0.0,
        recompute=False,
        share="dialogue",
        max_tokens=2000,
    )
    sizes = memory(model, config, [forest for _, forest in batches])
    assert (
        sizes["weights"] == 2 * base
        and sizes["adapters"] == 2 * adapter
        and sizes["gradients, optimizer"] == 6 * adapter
    )
    printed = estimate(model, config, [items], passes=2)
    nodes, alone = (
        len(batches[0][1].ids),
        sum(len(s.prompt) + len(s.completion) - 1 for item in items for s in item.sequences),
    )
    assert (
        f"{nodes:9,}   ({alone / nodes:.1f} times" in printed
        and f"{2 * nodes:9,}   forwards" in printed
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="--compile is for GPUs")
def test_compiled_layers_keep_the_policy_equal_to_its_reference(sample):
    """To the bit, in bf16, where fused operations could round otherwise; and log-probabilities and
    gradients are those of eager mode."""
    seen = {}
    for compiled in (False, True):
        model, tokenizer = load("toy", torch.bfloat16, "cuda")
        torch.manual_seed(0)
        add_adapter(model, "sft", rank=4)
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.adapters["sft"].B, std=0.05)
        add_adapter(model, "dpo", rank=4)
        if compiled:
            compile_layers(model, torch.device("cuda"))
        examples = build_examples("sp", sample[10:11])[:5]
        items = [
            encode(tokenizer, str(e.turn), e.dialogue, e.messages, [e.completion, "Others"], 2048)
            for e in examples
        ]
        ((_, forest),) = pack(items, "dialogue", 2000)
        with torch.no_grad(), adapter_off(model, "dpo"):
            reference = sequence_logps(model, forest)
        policy = sequence_logps(model, forest)
        assert torch.equal(policy, reference)
        policy.sum().backward()
        seen[compiled] = (
            policy.detach(),
            torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]),
        )
    for eager, fused in zip(seen[False], seen[True]):
        torch.testing.assert_close(fused, eager, rtol=0.02, atol=0.05)


def test_compiling_on_a_cpu_ends_in_one_line(toy):
    with pytest.raises(DescError, match="--compile is for GPUs"):
        compile_layers(toy[0], torch.device("cpu"))
