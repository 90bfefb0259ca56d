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

IPO by hand: the same numbers, taken as means per token, and beta is 0.1, so the aim 1 / (2 beta)
is 5. h is 2 − (−1) = 3 and −2 − 1 = −3. The losses are (3 − 5)² = 4 and (−3 − 5)² = 64, and the
gradients by log π(y_w) are 2 (h − 5) = −4 and −16. With beta 0.25 the aim is 2. The first pair is
beyond it, so its gradient is 2 (3 − 2) = 2: the pair is pulled back, as DPO never does.

SimPO by hand: means per token, beta 2, margin 1.

    log π of    r = 2 log π    r_w − r_l − 1    loss                       by log π(y_w)
    y_w   y_l   r_w   r_l
    -0.5  -1.5  -1    -3        1               ln(1 + e^-1) = 0.313262    -2 σ(-1) = -0.537883
    -1.0  -0.5  -2    -1       -2               ln(1 + e^2)  = 2.126928    -2 σ(2)  = -1.761594

KTO by hand: log(π/π_ref) is 2 and −2, and beta is 0.5, so r is 1 and −1. If the drift is −3, z is
0. Then the loss is 1 − σ(1) = 0.268941, both for the first answer if it is desirable and for the
second if it is not. Labelled the other way round it is 1 − σ(−1) = 0.731059 for both. If the drift
is 4, z is 2: a desirable first answer costs 1 − σ(1 − 2) = 0.731059, and a second that is not
desirable 1 − σ(2 + 1) = 0.047426. The gradients are − beta σ'(−1) = −0.5 · 0.196612 = −0.098306 and
beta σ'(3) = 0.5 · 0.045177 = 0.022588.

SFT by hand: sequences of 2 and 3 tokens have the log-probabilities −3 and −7. The loss per token is
(3 + 7) / 5 = 2."""

import math
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from desc.domain import ESCONV
from desc.encoding import encode, encode_example
from desc.forward import sequence_logps
from desc.lora import adapter_off, add_adapter, lora_layers, save_adapter
from desc.losses import dpo_loss, ipo_loss, kto_loss, self_mined_optimum, sft_loss, simpo_loss
from desc.prompts import build_examples
from desc.storage.zoo import locate
from desc.training import objectives
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


# --- what DPO of self-mined pairs aims at ---------------------------------------------------------


def train_table(people, reference, beta, temperature, miner):
    """A table of answers' log-probabilities, trained to convergence on all ordered pairs (a, b): a
    is chosen as often as people's p says, b rejected as often as the miner is drawn."""
    drawn = (miner.log() / temperature).softmax(-1)
    weights = people[:, None] * drawn[None, :]
    logits = reference.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        policy, before = logits.log_softmax(-1), reference.log()
        pairs = (policy[:, None], policy[None, :], before[:, None], before[None, :])
        loss = (weights * dpo_loss(*pairs, beta)[0]).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(-1)


def random_tables(number):
    return torch.randn(number, 8, dtype=torch.float64).softmax(-1)


@pytest.mark.parametrize("beta", [0.2, 0.5, 1, 2])
@pytest.mark.parametrize("temperature", [0.7, 1, 1.4])
def test_dpo_of_self_mined_pairs_ends_at_the_optimum(beta, temperature):
    people, reference = random_tables(2)
    trained = train_table(people, reference, beta, temperature, miner=reference)
    expected = self_mined_optimum(people, reference, beta, temperature)
    assert (expected - reference).abs().max() > 0.05
    torch.testing.assert_close(trained, expected, atol=1e-3, rtol=0)


def test_pairs_that_another_model_mined_aim_elsewhere():
    """At beta = T = 1, where a model's own pairs aim at people, another's do not."""
    people, reference, miner = random_tables(3)
    trained = train_table(people, reference, 1, 1, miner)
    expected = self_mined_optimum(people, reference, 1, 1, miner)
    assert (expected - people).abs().max() > 0.05
    torch.testing.assert_close(trained, expected, atol=1e-3, rtol=0)


def test_the_optimum_by_hand():
    """People ask in 30 % of the turns, the model in 60 %. With beta 0.5 the odds are 0.3²/0.6 :
    0.7²/0.4 = 0.15 : 1.225."""
    people, reference = torch.tensor([0.3, 0.7]), torch.tensor([0.6, 0.4])
    close(self_mined_optimum(people, reference, 0.5), [0.15 / 1.375, 1.225 / 1.375])


def test_the_reference_cancels_if_beta_times_temperature_is_1():
    people, reference = random_tables(2)
    for beta, temperature in ((1, 1), (0.5, 2), (2, 0.5)):
        optimum = self_mined_optimum(people, reference, beta, temperature)
        torch.testing.assert_close(optimum, (people.log() / beta).softmax(-1))
    torch.testing.assert_close(self_mined_optimum(people, reference, 1), people)


# --- the other objectives -------------------------------------------------------------------------


def test_ipo_by_hand():
    losses, chosen, rejected = ipo_loss(*POLICY, *REFERENCE, beta=0.1)
    close(losses, [4.0, 64.0])
    close(chosen, [0.2, -0.2])
    close(rejected, [-0.1, 0.1])


@pytest.mark.parametrize("beta, gradient", [(0.1, [-4.0, -16.0]), (0.25, [2.0, -10.0])])
def test_ipo_pulls_a_pair_to_its_aim_from_either_side(beta, gradient):
    chosen_logps, rejected_logps = (x.clone().requires_grad_() for x in POLICY)
    losses, chosen, rejected = ipo_loss(chosen_logps, rejected_logps, *REFERENCE, beta=beta)
    assert not chosen.requires_grad and not rejected.requires_grad
    losses.sum().backward()
    close(chosen_logps.grad, gradient)
    close(rejected_logps.grad, [-value for value in gradient])


def test_simpo_by_hand():
    chosen_logps = torch.tensor([-0.5, -1.0], requires_grad=True)
    rejected_logps = torch.tensor([-1.5, -0.5], requires_grad=True)
    losses, chosen, rejected = simpo_loss(chosen_logps, rejected_logps, beta=2, margin=1)
    close(losses.detach(), [0.313262, 2.126928])
    assert not chosen.requires_grad and not rejected.requires_grad
    close(chosen, [-1.0, -2.0])
    close(rejected, [-3.0, -1.0])
    losses.sum().backward()
    close(chosen_logps.grad, [-0.537883, -1.761594])
    close(rejected_logps.grad, [0.537883, 1.761594])


@pytest.mark.parametrize(
    "drift, labels, expected",
    [
        (-3.0, [True, False], [0.268941, 0.268941]),
        (-3.0, [False, True], [0.731059, 0.731059]),
        (0.0, [True, False], [0.268941, 0.268941]),
        (4.0, [True, False], [0.731059, 0.047426]),
    ],
)
def test_kto_by_hand(drift, labels, expected):
    answers = POLICY[0], REFERENCE[0], torch.tensor(labels), torch.tensor(drift)
    losses, rewards = kto_loss(*answers, beta=0.5)
    close(losses, expected)
    close(rewards, [1.0, -1.0])


def test_kto_pushes_desirable_answers_up_and_the_others_down():
    """The drift carries no gradient."""
    logps, drift = POLICY[0].clone().requires_grad_(), torch.tensor(4.0, requires_grad=True)
    losses, rewards = kto_loss(logps, REFERENCE[0], torch.tensor([True, False]), drift, beta=0.5)
    assert not rewards.requires_grad
    losses.sum().backward()
    close(logps.grad, [-0.098306, 0.022588])
    assert drift.grad is None


# --- TRL ------------------------------------------------------------------------------------------


def make_trainer(objective, settings, adapter, tokenizer, rows, folder):
    """TRL's trainer on the toy with the adapter in a folder. The reference is the base model."""
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    from datasets import Dataset

    models = [
        AutoModelForCausalLM.from_pretrained(
            locate("toy"), dtype=torch.float32, attn_implementation="sdpa"
        )
        for _ in range(2)
    ]
    models[0] = peft.PeftModel.from_pretrained(models[0], adapter, is_trainable=True)
    if objective == "simpo":
        from trl.experimental import cpo

        Config, Trainer = cpo.CPOConfig, cpo.CPOTrainer
        models.pop()  # it has no reference
    elif objective == "kto":
        Config, Trainer = trl.KTOConfig, trl.KTOTrainer
    else:
        Config, Trainer = trl.DPOConfig, trl.DPOTrainer
    tokenizer = deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    common = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    common |= {"per_device_train_batch_size": len(rows), "gradient_checkpointing": False}
    return Trainer(
        *models,
        args=Config(folder, max_length=4096, **common, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


@pytest.mark.filterwarnings("ignore")  # trl.experimental warns that it is experimental
@pytest.mark.parametrize(
    "objective, settings, seed",
    [
        ("dpo", {"beta": 0.5}, 0),
        ("ipo", {"beta": 0.1, "loss_type": "ipo"}, 0),
        ("simpo", {"beta": 2.0, "loss_type": "simpo", "simpo_gamma": 1.0, "cpo_alpha": 0.0}, 0),
        ("kto", {"beta": 2.0}, 0),  # the drift is negative
        ("kto", {"beta": 2.0}, 1),  # the drift is positive
    ],
)
def test_each_objective_equals_trl(objective, settings, seed, toy, sample, tmp_path):
    """TRL goes from messages to loss and gradients by its tokenisation, padded batch and loss. We
    do so by our encoding, tree and loss.

    Both have the same adapter, the base as reference and all pairs in one batch. For KTO every
    answer meets the one before it as its mismatched one, as TRL rotates a batch."""
    model, tokenizer = deepcopy(toy[0]), toy[1]
    torch.manual_seed(seed)
    add_adapter(model, "dpo", rank=4, alpha=6)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.adapters["dpo"].B, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    examples = build_examples("rg", sample[:1])[:8]
    answers = [
        [example.completion, f"Oh. {other.completion}"]
        for example, other in zip(examples, examples[1:])
    ]
    columns, labels = ("chosen", "rejected"), [True] * len(answers)
    if objective == "kto":
        columns, labels = ("completion",), [i % 3 > 0 for i in range(len(answers))]
        own = [two[0] if label else two[1] for two, label in zip(answers, labels)]
        answers = [[one, before] for one, before in zip(own, own[-1:] + own)]
    rows = []
    for example, texts, label in zip(examples, answers, labels):
        row = {"prompt": example.messages}
        if objective == "kto":
            row["label"] = label
        for column, text in zip(columns, texts):
            row[column] = [{"role": "assistant", "content": text}]
        rows.append(row)
    trainer = make_trainer(
        objective, settings, tmp_path / "adapter", tokenizer, rows, tmp_path / "trl"
    )
    (batch,) = trainer.get_train_dataloader()
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()

    items = [
        encode(tokenizer, f"0/{e.turn}", "0", e.messages, texts, 4096, ESCONV.speakers)
        for e, texts in zip(examples, answers)
    ]
    items = [replace(item, desirable=label) for item, label in zip(items, labels)]
    forest = plant(items, "dialogue")
    with torch.no_grad(), adapter_off(model, "dpo"):
        before = sequence_logps(model, forest).view(-1, 2)
    after = sequence_logps(model, forest).view(-1, 2)
    drift = (after - before)[:, 1].mean()
    config = SimpleNamespace(
        objective=objective, beta=settings["beta"], margin=1.0, label_smoothing=0.0, sft_weight=0.0
    )
    loss, _ = objectives.sum_losses(config, items, items, after, before, drift)
    loss = loss / len(items)
    loss.backward()

    if objective == "kto":
        assert drift > 0.1 if seed == 1 else drift < -0.1
    at_start = {"dpo": math.log(2), "ipo": 25, "kto": 0.5}
    assert abs(theirs.item() - at_start.get(objective, 0)) > 0.01
    torch.testing.assert_close(loss, theirs, atol=1e-4, rtol=1e-5)
    gradients = dict(trainer.model.named_parameters())
    for name, layer in lora_layers(model).items():
        for half in "AB":
            oracle = gradients[f"base_model.model.{name}.lora_{half}.default.weight"].grad
            scale = float(oracle.abs().max())
            assert scale > 1e-4
            ours = getattr(layer.adapters["dpo"], half).grad
            torch.testing.assert_close(ours, oracle, atol=1e-3 * scale, rtol=1e-4)
