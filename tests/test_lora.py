"""LoRA adapters: by hand, switched off, stacked, merged and saved. PEFT is the oracle. What does
not fit is refused.

    pytest tests/test_lora.py -q

By hand: a layer of two inputs and two outputs has one adapter of rank 2 with alpha 1. So alpha / r
is 0.5.

    W = [1 2]   A = [1 -1]   B = [1 0]   x = [1]
        [3 4]       [0  2]       [2 1]       [1]

    W x = [3 7],   A x = [0 2],   B A x = [0 2],   y = W x + 0.5 B A x = [3 8]
    B A = [1 -1; 2 0],   W + 0.5 B A = [1.5 1.5; 4 4],   (W + 0.5 B A) x = [3 8] as well

Rounded once: bf16 has 8 significant bits, so above 1 its numbers are 2^-7 apart. 1 + 2^-8 is
half-way between two of them, and rounds to 1, the even one. The weight is 1. One adapter adds
0.75 · 2^-8 and the other (0.25 + 2^-10) · 2^-8, which is a little more than half-way together. So
the merged weight is 1 + 2^-7. It would stay 1 if it were rounded after each adapter. It would also
stay 1 if the sum of the adapters were rounded to bf16, which gives 2^-8, before it is added."""

import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from desc import DescError
from desc.lora import (
    LoRALinear,
    adapter_off,
    add_adapter,
    load_adapter,
    lora_layers,
    merge_adapters,
    ready_adapters,
    save_adapter,
)
from desc.storage.adapters import CONFIG, WEIGHTS
from desc.storage.zoo import locate

IDS = torch.arange(10, 40)[None]


@pytest.fixture
def model(toy_on_device):
    return deepcopy(toy_on_device[0])


def stock(device):
    model = AutoModelForCausalLM.from_pretrained(
        locate("toy"), dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.eval().to(device)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS.to(model.device)).logits


def add_random(model, name, rank=4, alpha=6.0, targets=()):
    """Add an adapter that is not 0, because B is random too."""
    add_adapter(model, name, rank, alpha, targets=targets)
    torch.manual_seed(len(name) + rank)
    for layer in lora_layers(model).values():
        if name in layer.adapters:
            nn.init.normal_(layer.adapters[name].B, std=0.1)


def distance(a, b):
    return (a - b).abs().max().item()


# --- by hand --------------------------------------------------------------------------------------


def by_hand():
    model = nn.ModuleDict({"q_proj": nn.Linear(2, 2, bias=False)})
    model["q_proj"].weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    add_adapter(model, "hand", rank=2, alpha=1, targets=("q_proj",))
    adapter = model["q_proj"].adapters["hand"]
    adapter.A.data = torch.tensor([[1.0, -1.0], [0.0, 2.0]])
    adapter.B.data = torch.tensor([[1.0, 0.0], [2.0, 1.0]])
    return model


def test_two_by_two():
    model, x = by_hand(), torch.tensor([1.0, 1.0])
    assert model["q_proj"](x).tolist() == [3, 8]
    with adapter_off(model, "hand"):
        assert model["q_proj"](x).tolist() == [3, 7]


def test_two_by_two_merged():
    model = by_hand()
    merge_adapters(model)
    assert type(model["q_proj"]) is nn.Linear
    assert model["q_proj"].weight.tolist() == [[1.5, 1.5], [4, 4]]
    assert model["q_proj"](torch.tensor([1.0, 1.0])).tolist() == [3, 8]


def test_merging_rounds_once():
    model = nn.ModuleDict({"q_proj": nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)})
    model["q_proj"].weight.data.fill_(1)
    for name, a in {"sft": 0.75, "dpo": 0.25 + 2**-10}.items():
        add_adapter(model, name, rank=1, alpha=1, targets=("q_proj",))
        model["q_proj"].adapters[name].A.data.fill_(a)
        model["q_proj"].adapters[name].B.data.fill_(2**-8)
    merge_adapters(model)
    assert model["q_proj"].weight.dtype == torch.bfloat16
    assert model["q_proj"].weight.item() == 1 + 2**-7


def test_biases_stay():
    model = nn.ModuleDict({"q_proj": nn.Linear(2, 3)})
    x = torch.randn(5, 2)
    plain = model["q_proj"](x)
    add_adapter(model, "a", targets=("q_proj",))
    assert torch.equal(model["q_proj"](x), plain)
    merge_adapters(model)
    assert torch.equal(model["q_proj"](x), plain)


# --- beside the model -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing(model, dtype):
    model.to(dtype)
    before = logits(model)
    add_adapter(model, "sft", rank=3, alpha=5)
    assert len(lora_layers(model)) == 2 * 7  # two layers
    assert torch.equal(logits(model), before)
    assert {p.dtype for n, p in model.named_parameters() if "adapters" in n} == {torch.float32}


@pytest.mark.parametrize("shape", [(6,), (1, 0, 6), (2, 3, 6)])
def test_inputs_may_have_any_shape(shape):
    """As those of nn.Linear: y = W x + b + (alpha / r) B A x."""
    layer = nn.Sequential(nn.Linear(6, 4))
    add_adapter(layer, "a", rank=2, alpha=3)
    adapter = layer[0].adapters["a"]
    nn.init.normal_(adapter.B)
    x = torch.randn(shape)
    weight = layer[0].weight + 1.5 * adapter.B @ adapter.A
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer[0].bias))


@pytest.mark.parametrize("trained", [True, False])
def test_an_adapter_that_is_off_changes_nothing(model, trained):
    base = logits(model)
    add_random(model, "sft")
    with_sft = logits(model)
    add_random(model, "dpo", rank=3, alpha=2)
    model.requires_grad_(trained)
    both = logits(model)
    assert distance(base, with_sft) > 0.01 and distance(with_sft, both) > 0.01
    with adapter_off(model, "dpo"):
        assert torch.equal(logits(model), with_sft)
        with adapter_off(model, "sft"):
            assert torch.equal(logits(model), base)
        with adapter_off(model, "dpo"):  # It was off before, so it stays off.
            pass
        assert torch.equal(logits(model), with_sft)
    assert torch.equal(logits(model), both)
    with adapter_off(model, "sft", "dpo"):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), both)


def test_an_adapter_is_on_again_after_an_exception(model):
    add_random(model, "sft")
    before = logits(model)
    with pytest.raises(KeyboardInterrupt), adapter_off(model, "sft"):
        raise KeyboardInterrupt
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ready_adapters_give_the_same_to_the_bit(model, dtype):
    """What they were made of is not read again, until the context ends."""
    model.to(dtype)
    add_random(model, "sft")
    add_random(model, "dpo", rank=3, alpha=2, targets=("q_proj", "up_proj"))
    with adapter_off(model, "dpo"):
        one = logits(model)
    both = logits(model)
    model.requires_grad_(False)
    for off, expected in (((), both), (("dpo",), one)):
        with adapter_off(model, *off), ready_adapters(model):
            assert torch.equal(logits(model), expected)
    with pytest.raises(KeyboardInterrupt), ready_adapters(model):
        for layer in lora_layers(model).values():
            layer.adapters["sft"].B.data.zero_()
        assert torch.equal(logits(model), both)
        raise KeyboardInterrupt
    assert distance(logits(model), both) > 0.01


def test_only_the_newest_adapter_is_trained(model):
    base = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for newest in ("sft", "dpo"):
        add_random(model, newest)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {
            f"{layer}.adapters.{newest}.{half}" for layer in lora_layers(model) for half in "AB"
        }
    model(input_ids=IDS.to(model.device)).logits.sum().backward()
    assert all((p.grad is not None) == ("dpo" in n) for n, p in model.named_parameters())
    assert all(
        torch.equal(dict(model.named_parameters())[name], value) for name, value in base.items()
    )


def test_the_names_of_the_models_own_weights_stay(model):
    before = list(model.state_dict())
    add_adapter(model, "sft")
    after = list(model.state_dict())
    assert [key for key in after if ".adapters." not in key] == before
    assert len(after) == len(before) + 2 * len(lora_layers(model))


def test_dropout_follows_the_model(model):
    """load() gives a model in eval mode. An adapter that is added to it must not use dropout
    either."""
    add_adapter(model, "sft", dropout=0.5)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.adapters["sft"].B, std=0.1)
    assert not model.training and torch.equal(logits(model), logits(model))
    model.train()
    assert distance(logits(model), logits(model)) > 0.01
    model.eval()
    assert torch.equal(logits(model), logits(model))


def test_unknown_targets_are_refused(model):
    with pytest.raises(
        DescError, match="no linear layer of the decoder is called c_attn; this model has .*q_proj"
    ):
        add_adapter(model, "sft", targets=("q_proj", "c_attn"))
    assert not lora_layers(model)
    add_adapter(model, "sft")
    with pytest.raises(ValueError, match="'sft' already"):
        add_adapter(model, "sft")


# --- on disk --------------------------------------------------------------------------------------


def test_saved_and_loaded_to_the_bit(model, toy_on_device, tmp_path):
    add_random(model, "sft")
    save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    again = deepcopy(toy_on_device[0])
    base = logits(again)
    load_adapter(again, tmp_path, "other name")
    assert torch.equal(logits(again), logits(model))
    assert distance(logits(again), base) > 0.01
    assert not any(p.requires_grad for p in again.parameters())
    for name, layer in lora_layers(again).items():
        ours, theirs = layer.adapters["other name"], lora_layers(model)[name].adapters["sft"]
        assert torch.equal(ours.A, theirs.A)
        assert torch.equal(ours.B, theirs.B)
        assert ours.scale == theirs.scale == 1.5


def test_loaded_to_train_on(model, toy_on_device, tmp_path):
    add_random(model, "sft", targets=("q_proj", "down_proj"))
    save_adapter(model, tmp_path)
    again = deepcopy(toy_on_device[0])
    load_adapter(again, tmp_path, "sft", trainable=True)
    trained = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trained == {n for n in again.state_dict() if ".adapters." in n}
    assert len(trained) == 2 * 2 * 2


def test_two_adapters_are_exported_as_one(model, toy_on_device, tmp_path):
    """sft has rank 4 and scale 6/4, and dpo has rank 3 and scale 2/3. The export has rank 7."""
    add_random(model, "sft", rank=4, alpha=6)
    add_random(model, "dpo", rank=3, alpha=2)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["r"] == 7
    again = deepcopy(toy_on_device[0])
    load_adapter(again, tmp_path, "both")
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=0)
    merge_adapters(model)
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=0)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_two_adapters_on_different_layers_are_exported_as_one(model, toy_on_device, tmp_path):
    """This happens after DPO on an adapter that PEFT trained on q_proj and v_proj alone."""
    add_random(model, "sft", rank=4, alpha=6, targets=("q_proj", "v_proj"))
    add_random(model, "dpo", rank=3, alpha=2)
    save_adapter(model, tmp_path)
    again = deepcopy(toy_on_device[0])
    load_adapter(again, tmp_path, "both")
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=0)


def test_peft_loads_what_we_write(model, tmp_path):
    peft = pytest.importorskip("peft")
    add_random(model, "sft", rank=4, alpha=6)
    add_random(model, "dpo", rank=3, alpha=2)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(stock(model.device), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(theirs.merge_and_unload()), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "which",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]},
        {"target_modules": r".*\.[qv]_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
    ],
    ids=lambda which: " ".join(which),
)
def test_we_load_what_peft_writes(model, tmp_path, which):
    """The settings are all the ways in which PEFT can name layers."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.1, "init_lora_weights": False, **which}
    settings = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    theirs = peft.get_peft_model(stock(model.device), settings).eval()
    theirs.save_pretrained(tmp_path)
    base = logits(model)
    load_adapter(model, tmp_path, "sft")
    assert distance(logits(model), base) > 0.001
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=0)


# --- refused --------------------------------------------------------------------------------------

Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
Q1 = Q0.replace("layers.0", "layers.1")


def without(mapping, *keys):
    return {key: value for key, value in mapping.items() if key not in keys}


def renamed(tensors, old, new):
    return {key.replace(old, new): value for key, value in tensors.items()}


def edit_config(**changes):
    return lambda config, tensors: (config | changes, tensors)


REFUSED = {
    "rslora": (edit_config(use_rslora=True), "use_rslora"),
    "dora": (edit_config(use_dora=True), "use_dora"),
    "rank_pattern": (edit_config(rank_pattern={"q_proj": 8}), "rank_pattern"),
    "alpha_pattern": (edit_config(alpha_pattern={"q_proj": 8}), "alpha_pattern"),
    "trained biases": (edit_config(bias="lora_only"), "bias"),
    "modules_to_save": (edit_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "pissa, which changes the base": (edit_config(init_lora_weights="pissa"), "init_lora_weights"),
    "active only after some token": (
        edit_config(alora_invocation_tokens=[5]),
        "alora_invocation_tokens",
    ),
    "replicated layers": (edit_config(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    "not LoRA": (edit_config(peft_type="LOHA"), "LOHA"),
    "another rank": (edit_config(r=8), "shapes"),
    "no rank": (lambda c, t: (without(c, "r"), t), "'r'"),
    "rank a string": (edit_config(r="4"), "'r'"),
    "no alpha": (lambda c, t: (without(c, "lora_alpha"), t), "lora_alpha"),
    "alpha of 400 digits": (edit_config(lora_alpha=10**400), "lora_alpha"),
    "alpha not finite": (edit_config(lora_alpha=float("nan")), "lora_alpha"),
    "alpha zero": (edit_config(lora_alpha=0), "lora_alpha"),
    "rank zero": (edit_config(r=0), "'r'"),
    "no targets": (lambda c, t: (without(c, "target_modules"), t), "target_modules"),
    "config a list": (lambda c, t: ([c], t), CONFIG),
    "another model's width": (
        lambda c, t: (c, t | {Q0 + "A.weight": torch.zeros(4, 48)}),
        "shapes",
    ),
    "another model's names": (
        lambda c, t: (c, renamed(t, "model.layers", "transformer.h")),
        "transformer.h",
    ),
    "a layer too many": (lambda c, t: (c, renamed(t, "layers.1", "layers.2")), "layers.2"),
    "another kind of layer": (
        lambda c, t: (c, renamed(t, "self_attn.q_proj", "input_layernorm")),
        "input_layernorm",
    ),
    "half an adapter": (lambda c, t: (c, without(t, Q1 + "B.weight")), "layers.1.self_attn.q_proj"),
    "a layer too few": (lambda c, t: (c, without(t, Q1 + "A.weight", Q1 + "B.weight")), "q_proj"),
    "a target too few": (
        lambda c, t: (c, {k: v for k, v in t.items() if "q_proj" not in k}),
        "q_proj",
    ),
    "no weights": (lambda c, t: (c, {}), "no weights"),
    "another weight": (
        lambda c, t: (c, t | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}),
        "lm_head",
    ),
}


@pytest.mark.parametrize("edit, clue", REFUSED.values(), ids=REFUSED)
def test_adapters_that_do_not_fit_are_refused(toy, tmp_path, edit, clue):
    """The message is one line that names the folder, and the model does not change."""
    model = deepcopy(toy[0])
    add_random(model, "sft")
    save_adapter(model, tmp_path)
    config, tensors = edit(
        json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    )
    (tmp_path / CONFIG).write_text(json.dumps(config))
    save_file(tensors, tmp_path / WEIGHTS)
    assert_refused(toy, tmp_path, clue)


def assert_refused(toy, folder, clue=""):
    again = deepcopy(toy[0])
    with pytest.raises(DescError) as error:
        load_adapter(again, folder, "sft")
    message = str(error.value)
    assert str(folder) in message
    assert clue in message
    assert "\n" not in message
    assert not lora_layers(again)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut off", "zeros", "directory"])
def test_broken_files_are_refused(toy, tmp_path, name, damage):
    model = deepcopy(toy[0])
    add_random(model, "sft")
    save_adapter(model, tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if damage == "directory":
        (tmp_path / name).mkdir()
    elif damage != "missing":
        broken = {"empty": b"", "cut off": data[: len(data) // 2], "zeros": bytes(len(data))}
        (tmp_path / name).write_bytes(broken[damage])
    assert_refused(toy, tmp_path)
