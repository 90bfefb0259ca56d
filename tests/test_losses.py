"""The losses: checked against numbers worked by hand, F.cross_entropy and TRL.

    pytest tests/test_losses.py -q

DPO by hand: there are two pairs, and beta is 0.5. σ(1.5) = 0.817574 and σ(-1.5) = 0.182426.

    log π of    log π_ref of  r = 0.5 (log π − log π_ref)        margin     loss
    y_w   y_l   y_w   y_l     r_w             r_l                r_w − r_l  − log σ(margin)
    -10   -14   -12   -13     0.5 ·  2 =  1   0.5 · -1 = -0.5     1.5       ln(1 + e^-1.5) = 0.20141
    -20   -15   -18   -16     0.5 · -2 = -1   0.5 ·  1 =  0.5    -1.5       ln(1 + e^1.5)  = 1.70141

The gradient of the sum by log π(y_w) is − beta σ(−margin), so it is −0.5 · 0.182426 = −0.091213 and
−0.5 · 0.817574 = −0.408787. By log π(y_l) it is the opposite. The pair with the lower margin has
the larger gradient.

With label smoothing 0.1 the losses are 0.9 · 0.201413 + 0.1 · 1.701413 = 0.351413 and 0.9 ·
1.701413 + 0.1 · 0.201413 = 1.551413.

SFT by hand: sequences of 2 and 3 tokens have the log-probabilities −3 and −7. The loss per token is
(3 + 7) / 5 = 2."""

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from desc.domain import ESCONV
from desc.encoding import encode, encode_example
from desc.forward import sequence_logps
from desc.lora import adapter_off, add_adapter, lora_layers, save_adapter
from desc.losses import dpo_loss, sft_loss
from desc.prompts import build_examples
from desc.storage.zoo import locate
from desc.tree import pack, plant

POLICY = torch.tensor([-10.0, -20.0]), torch.tensor([-14.0, -15.0])
REFERENCE = torch.tensor([-12.0, -18.0]), torch.tensor([-13.0, -16.0])


def close(tensor, expected, **tolerance):
    torch.testing.assert_close(
        tensor, torch.tensor(expected), **tolerance or {"atol": 1e-6, "rtol": 0}
    )


# --- SFT ------------------------------------------------------------------------------------------


def test_sft_by_hand():
    close(sft_loss(torch.tensor([-3.0, -7.0]), tokens=5), 2.0)


def sft_items(tokenizer, dialogues):
    examples = build_examples("rg", dialogues)
    return [encode_example(tokenizer, example, 2048, ESCONV.speakers) for example in examples]


@torch.no_grad()
def test_sft_is_the_cross_entropy_of_all_completion_tokens(toy_on_device, sample, device):
    """It is a mean over tokens and not over sequences, so longer completions count for more."""
    model, tokenizer = toy_on_device
    items = sft_items(tokenizer, sample[:2])
    logits, targets = [], []
    for ((prompt, completion),) in (item.sequences for item in items):
        ids = torch.tensor([prompt + completion], device=device)
        logits.append(model(input_ids=ids).logits[0, len(prompt) - 1 : -1])
        targets += completion
    forest = plant(items, "dialogue")
    loss = sft_loss(sequence_logps(model, forest), len(forest.targets))
    expected = F.cross_entropy(torch.cat(logits), torch.tensor(targets, device=device))
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_micro_batches_add_up_to_the_batch(toy_on_device, sample):
    model, tokenizer = toy_on_device
    items = sft_items(tokenizer, sample[:2])
    whole = plant(items, "none")
    tokens = len(whole.targets)
    batches = pack(items, "dialogue", 300)
    parts = [sft_loss(sequence_logps(model, forest), tokens) for _, forest in batches]
    # The sizes differ, so a mean of means would be wrong.
    assert len({len(forest.targets) for _, forest in batches}) > 1
    torch.testing.assert_close(
        sum(parts), sft_loss(sequence_logps(model, whole), tokens), atol=1e-5, rtol=0
    )


# --- DPO ------------------------------------------------------------------------------------------


def test_dpo_by_hand():
    losses, chosen, rejected = dpo_loss(*POLICY, *REFERENCE, beta=0.5)
    close(losses, [0.201413, 1.701413])
    close(chosen, [1.0, -1.0])
    close(rejected, [-0.5, 0.5])


def test_dpo_with_label_smoothing_by_hand():
    losses, chosen, rejected = dpo_loss(*POLICY, *REFERENCE, beta=0.5, label_smoothing=0.1)
    close(losses, [0.351413, 1.551413])
    close(chosen, [1.0, -1.0])
    close(rejected, [-0.5, 0.5])


def test_dpo_is_ln_2_where_the_policy_is_the_reference():
    losses, chosen, rejected = dpo_loss(*POLICY, *POLICY, beta=0.5)
    close(losses, [math.log(2), math.log(2)])
    assert chosen.tolist() == rejected.tolist() == [0, 0]


def test_dpo_pushes_chosen_up_and_rejected_down():
    chosen_logps, rejected_logps = (x.clone().requires_grad_() for x in POLICY)
    losses, chosen, rejected = dpo_loss(chosen_logps, rejected_logps, *REFERENCE, beta=0.5)
    assert not chosen.requires_grad and not rejected.requires_grad
    losses.sum().backward()
    close(chosen_logps.grad, [-0.091213, -0.408787])
    close(rejected_logps.grad, [0.091213, 0.408787])


def test_dpo_stays_finite_where_the_margin_is_huge():
    """− log σ(±1000 · 0.5) is 0 and 500. log of a σ that is rounded to 0 would be infinite."""
    far = torch.tensor([1000.0, -1000.0], requires_grad=True)
    losses, *_ = dpo_loss(far, *torch.zeros(3, 2), beta=0.5)
    losses.sum().backward()
    close(losses.detach(), [0.0, 500.0])
    close(far.grad, [0.0, -0.5])


# --- TRL ------------------------------------------------------------------------------------------


def test_dpo_equals_trl(toy, sample, tmp_path):
    """TRL goes from messages to loss and gradients by its tokenisation, padded batch and loss. We
    do so by our encoding, tree and loss.

    Both have the same adapter, the base as reference and all pairs in one batch."""
    trl = pytest.importorskip("trl")
    peft = pytest.importorskip("peft")
    from datasets import Dataset

    model, tokenizer = deepcopy(toy[0]), toy[1]
    add_adapter(model, "dpo", rank=4, alpha=6)
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.adapters["dpo"].B, std=0.3)
    save_adapter(model, tmp_path / "adapter")
    examples = build_examples("rg", sample[:1])[:8]
    answers = [
        (example.completion, f"Oh. {other.completion}")
        for example, other in zip(examples, examples[1:])
    ]

    rows = [
        {
            "prompt": example.messages,
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for example, (chosen, rejected) in zip(examples, answers)
    ]
    base, reference = (
        AutoModelForCausalLM.from_pretrained(
            locate("toy"), dtype=torch.float32, attn_implementation="sdpa"
        )
        for _ in range(2)
    )
    settings = {
        "beta": 0.5,
        "max_length": None,
        "per_device_train_batch_size": 8,
        "report_to": "none",
        "disable_tqdm": True,
    }
    trainer = trl.DPOTrainer(
        peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True),
        reference,
        args=trl.DPOConfig(
            tmp_path / "trl", use_cpu=True, bf16=False, gradient_checkpointing=False, **settings
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=deepcopy(tokenizer),
    )
    (batch,) = trainer.get_train_dataloader()
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()

    items = [
        encode(tokenizer, f"0/{e.turn}", "0", e.messages, list(pair), 4096, ESCONV.speakers)
        for e, pair in zip(examples, answers)
    ]
    forest = plant(items, "dialogue")
    assert len(forest.targets) == batch["completion_mask"].sum()
    with torch.no_grad(), adapter_off(model, "dpo"):
        before = sequence_logps(model, forest).view(-1, 2)
    after = sequence_logps(model, forest).view(-1, 2)
    losses, *_ = dpo_loss(after[:, 0], after[:, 1], before[:, 0], before[:, 1], beta=0.5)
    losses.mean().backward()

    assert abs(theirs.item() - math.log(2)) > 0.01
    torch.testing.assert_close(losses.mean(), theirs, atol=1e-4, rtol=0)
    gradients = dict(trainer.model.named_parameters())
    for name, layer in lora_layers(model).items():
        for half in "AB":
            oracle = gradients[f"base_model.model.{name}.lora_{half}.default.weight"].grad
            assert oracle.abs().max() > 1e-3
            torch.testing.assert_close(
                getattr(layer.adapters["dpo"], half).grad, oracle, atol=1e-4, rtol=1e-4
            )
