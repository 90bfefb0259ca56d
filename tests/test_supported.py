"""pytest tests/test_supported.py

Which architectures run, exactly, and which are refused in one line: the tables EXACT and REFUSED of
tests/architectures.py, which docs/models.md shows. Tiny random models of each are loaded from a
folder, like a user's."""

import re
from copy import deepcopy

import pytest
import torch
from architectures import EXACT, REFUSED, build, configure_type
from scripts import ROOT
from test_tree import flat, one_by_one, random_items

from desc import DescError, attention, exactness
from desc.encoding import TokenSequence
from desc.forward import decoder_blocks, sequence_logps
from desc.lora import (
    adapter_off,
    add_adapter,
    linear_layers,
    load_adapter,
    lora_layers,
    save_adapter,
    train_adapters,
)
from desc.modeling import load
from desc.training.speed import recompute_activations
from desc.tree import grow

SEQUENCES = flat(random_items(0, dialogues=2, turns=3, vocabulary=50))


@pytest.fixture
def saved(toy, tmp_path):
    """A function that writes a stock model and the toy's tokenizer, and gives (model, folder)."""

    def save(config):
        stock = build(config)
        stock.save_pretrained(tmp_path)
        toy[1].save_pretrained(tmp_path)
        return stock, str(tmp_path)

    return save


def gradients(model, logps) -> list[torch.Tensor]:
    """The gradients of a weighted sum of `logps` by the adapters' B."""
    trained = [p for name, p in model.named_parameters() if name.endswith(".B")]
    return torch.autograd.grad((torch.linspace(-1, 1, len(logps)) * logps).sum(), trained)


# --- architectures --------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", EXACT)
def test_log_probabilities_are_the_stock_models(model_type, saved):
    """In fp32 to rounding. In bf16 the tree is no farther from the stock model in fp32 than three
    times as far as the stock model in bf16 is: in the median, because in a mixture of experts
    rounding may send a token to another expert."""
    stock, folder = saved(configure_type(model_type))
    with torch.no_grad():
        exact = one_by_one(stock, SEQUENCES)
        ours = sequence_logps(load(folder, torch.float32)[0], grow(SEQUENCES))
        torch.testing.assert_close(ours, exact, atol=2e-4, rtol=1e-5)
        narrow = sequence_logps(load(folder, torch.bfloat16)[0], grow(SEQUENCES))
        rounded = one_by_one(stock.bfloat16(), SEQUENCES)
    ours, theirs = (float((logps - exact).abs().median()) for logps in (narrow, rounded))
    assert 0 < ours < 3 * theirs


@pytest.mark.parametrize("model_type", EXACT)
def test_adapters_attach_and_learn_whatever_layers_are_called(model_type, saved):
    """By default they are on all linear layers of the decoder's blocks. A fresh policy equals its
    reference to the bit, in training mode too: the base drops nothing. Gradients are those of one
    sequence at a time, also with activations that are computed again."""
    _, folder = saved(configure_type(model_type))
    model = load(folder, torch.float32)[0]
    blocks = set(decoder_blocks(model).modules())
    linears = {name for name, module in linear_layers(model).items() if module in blocks}
    reference = sequence_logps(model, grow(SEQUENCES))
    add_adapter(model, "sft", rank=4, alpha=4, dropout=0.1)
    assert set(lora_layers(model)) == linears
    assert {name.rpartition(".")[2] for name in linears} == set(EXACT[model_type][1].split())

    expected = gradients(model, one_by_one(model, SEQUENCES))
    ours = gradients(model, sequence_logps(model, grow(SEQUENCES)))
    for grad, oracle in zip(ours, expected):
        torch.testing.assert_close(grad, oracle, atol=2e-3, rtol=1e-3)
    assert sum(grad.abs().max() > 1e-2 for grad in ours) > 0.9 * len(ours)

    train_adapters(model)
    assert torch.equal(sequence_logps(model, grow(SEQUENCES)), reference)
    with adapter_off(model, "sft"):
        assert torch.equal(sequence_logps(model, grow(SEQUENCES)), reference)
    model.eval()
    recompute_activations(model)
    again = gradients(model, sequence_logps(model, grow(SEQUENCES)))
    assert all(map(torch.equal, again, ours))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", REFUSED)
def test_what_is_not_exact_is_refused_in_one_line(model_type, dtype, saved):
    _, folder = saved(configure_type(model_type))
    with pytest.raises(DescError) as error:
        add_adapter(load(folder, dtype)[0], "sft")
    assert REFUSED[model_type][1] in str(error.value)
    assert "\n" not in str(error.value)


def test_the_documentation_lists_the_same_architectures():
    exact, refused = (ROOT / "docs" / "models.md").read_text("utf-8").split("\n## What is refused")
    listed = [re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE)[1:] for part in (exact, refused)]
    assert listed == [list(EXACT), list(REFUSED)]
    for model_type, (_, layers) in EXACT.items():
        (row,) = re.findall(rf"^\| `{model_type}` \|.*$", exact, re.MULTILINE)
        shown = re.search(r"\| `([\w ]+)` \|$", row)[1].split()
        assert shown == layers.split(), model_type


def test_layers_that_read_images_get_no_adapter(saved):
    """The vision tower comes first in the model, and has as many layers as the decoder."""
    model = load(saved(configure_type("gemma3"))[1], torch.float32)[0]
    add_adapter(model, "sft")
    assert lora_layers(model) and not any("vision" in name for name in lora_layers(model))


def test_peft_adapts_the_layers_that_we_did(saved, tmp_path):
    """The vision tower's layers are also called q_proj, so the decoder's are named as a whole."""
    peft = pytest.importorskip("peft")
    stock, folder = saved(configure_type("gemma3"))
    model = load(folder, torch.float32)[0]
    add_adapter(model, "sft", rank=4, alpha=6)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.adapters["sft"].B, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(stock, tmp_path / "adapter")
    again = load(folder, torch.float32)[0]
    load_adapter(again, tmp_path / "adapter", "sft")
    with torch.no_grad():
        ours = sequence_logps(model, grow(SEQUENCES))
        assert torch.equal(sequence_logps(again, grow(SEQUENCES)), ours)
        expected = one_by_one(theirs, SEQUENCES)
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-5)


def test_a_router_that_is_more_than_a_linear_layer_gets_no_adapter():
    """Llama 4's gives two values. It is a subclass of nn.Linear."""
    model = build(configure_type("llama4_text"))
    assert isinstance(model.model.layers[1].feed_forward.router, torch.nn.Linear)
    add_adapter(model, "sft")
    assert not any(name.endswith("router") for name in lora_layers(model))


# --- positions ------------------------------------------------------------------------------------

ROPE = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": 4 * [1.0],
        "long_factor": 4 * [4.0],
        "original_max_position_embeddings": 64,
    },
}


def configure_rope(kind: str):
    """A model for 64 tokens. Longrope is Phi-3's."""
    longest = 64 if kind == "dynamic" else 256
    changes = {"rope_parameters": ROPE[kind] | {"rope_theta": 1e4}}
    changes |= {"max_position_embeddings": longest}
    if kind == "longrope":
        return configure_type("phi3", original_max_position_embeddings=64, **changes)
    return configure_type("llama", **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_sequence_are_refused_beyond(kind, dtype, saved):
    folder = saved(configure_rope(kind))[1]
    load(folder, dtype, max_length=64)
    with pytest.raises(DescError, match="more than 64 tokens .* lower max_length to 64$"):
        load(folder, dtype, max_length=80)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@torch.no_grad()
def test_up_to_the_original_length_such_positions_are_exact(kind, saved):
    stock, folder = saved(configure_rope(kind))
    model = load(folder, torch.float32, max_length=64)[0]
    sequences = random_branches(64)
    ours = sequence_logps(model, grow(sequences))
    torch.testing.assert_close(ours, one_by_one(stock, sequences), atol=2e-4, rtol=1e-5)
    longer = random_branches(80)  # if this were exact, too, nothing would have to be refused
    far = sequence_logps(model, grow(longer)) - one_by_one(stock, longer)
    assert far.abs().max() > 0.1


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
@torch.no_grad()
def test_other_scaled_positions_are_exact_at_any_length(kind, saved):
    stock, folder = saved(configure_rope(kind))
    model = load(folder, torch.float32, max_length=256)[0]
    sequences = random_branches(200)
    ours = sequence_logps(model, grow(sequences))
    torch.testing.assert_close(ours, one_by_one(stock, sequences), atol=2e-4, rtol=1e-5)


def random_branches(longest: int):
    """Three sequences with a common beginning: one of `longest` tokens, two of about 20."""
    tokens = torch.randint(5, 800, (longest + 40,)).tolist()
    branches = [tokens[10:longest], tokens[longest : longest + 9], tokens[longest + 9 :][:12]]
    return [TokenSequence(tokens[:10] + b[:-3], b[-3:]) for b in branches]


@pytest.mark.parametrize("model_type", ["opt", "gptj"])
def test_learned_positions_end_somewhere(model_type, saved):
    folder = saved(configure_type(model_type, max_position_embeddings=64, n_positions=64))[1]
    load(folder, torch.float32, max_length=64)
    with pytest.raises(DescError, match="reads at most 64 tokens; lower max_length to that"):
        load(folder, torch.float32, max_length=66)


# --- the check ------------------------------------------------------------------------------------


def test_windows_are_small_while_they_are_tried_out_and_then_as_before(saved, monkeypatch):
    """The real window, of 4096 tokens, is longer than what is tried out. A tree that did not heed
    it would be noticed, and the error leaves no small window behind."""
    model = load(saved(configure_type("mistral", sliding_window=4096))[1], torch.float32)[0]
    assert model.config.sliding_window == 4096
    dense_mask = exactness.dense_mask
    monkeypatch.setattr(exactness, "dense_mask", lambda forest, window: dense_mask(forest))
    with pytest.raises(DescError, match="a prefix tree is not exact on its layers"):
        exactness.check_tree(model, 2048)
    assert model.config.sliding_window == 4096


def test_the_check_leaves_a_model_as_it_was(toy):
    """In bf16, whose weights are widened in between; also if a layer fails midway."""
    model = deepcopy(toy[0]).bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def assert_as_before():
        assert model.config._attn_implementation == attention.NAME
        after = model.state_dict()
        assert after.keys() == before.keys()
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor)

    exactness.check_tree(model, 2048)
    assert_as_before()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    assert not any(hooks)

    def fail(*_):
        raise RuntimeError("no such kernel\non this device")

    model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(DescError, match=r"RuntimeError: no such kernel\)"):
        exactness.check_tree(model, 2048)
    assert_as_before()


def test_memory_that_is_out_is_no_fault_of_the_model(toy):
    model = deepcopy(toy[0])

    def fail(*_):
        raise torch.OutOfMemoryError("8 GiB more")

    model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        exactness.check_tree(model, 2048)


def test_no_second_copy_of_the_weights_is_made(toy):
    """At any time one layer is in fp32, or what lies outside the layers, but never both."""
    model = deepcopy(toy[0]).bfloat16()
    widened = set()

    def count(*_):
        wide = [p.numel() for p in model.parameters() if p.dtype == torch.float32]
        widened.add(sum(wide))

    embeddings = model.get_input_embeddings().weight.numel()
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    with exactness.in_fp32(model):
        for module in model.modules():
            module.register_forward_pre_hook(count)
        exactness.read_alone(model, [TokenSequence([5, 6], [7])])
    assert widened - {model.model.norm.weight.numel()} == {0, layer, embeddings}


def test_adapters_are_no_part_of_the_proof(toy):
    """A sharded model is tried out when it has its adapters. They are 0 then."""
    model = deepcopy(toy[0])
    add_adapter(model, "sft", dropout=0.1)
    exactness.check_tree(model, 2048)
