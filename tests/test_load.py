"""pytest tests/test_load.py

Loading a model: all its weights are there and are its own, no code from its folder runs, and
whatever is wrong with its files ends in one line. What identifies a base model, and what happens
after it was replaced."""

import json
import shutil
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scripts import ROOT, run

from desc import DescError, cli
from desc.flags import Config
from desc.lora import add_adapter, load_adapter, lora_layers, save_adapter
from desc.modeling import load
from desc.storage.adapters import CONFIG
from desc.storage.adapters import WEIGHTS as ADAPTER
from desc.storage.base import base_digest, sampled_places
from desc.storage.files import write_json
from desc.storage.zoo import locate

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the toy's files."""
    return Path(shutil.copytree(locate("toy"), tmp_path / "model"))


def edit_json(path: Path, **changes) -> None:
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(value | changes))


def edit_weights(folder: Path, edit) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(edit(tensors), folder / WEIGHTS, {"format": "pt"})


def split_weights(folder: Path) -> None:
    """The weights in two files and an index, as those of large models."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = {
        name: f"model-0000{1 + i % 2}-of-00002.safetensors"
        for i, name in enumerate(sorted(tensors))
    }
    for file in sorted(set(names.values())):
        part = {name: tensors[name] for name in tensors if names[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def refusal(folder: Path, **options) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(DescError) as error:
        load(str(folder), torch.float32, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


# --- weights --------------------------------------------------------------------------------------


def renamed(old: str, new: str):
    return lambda tensors: {name.replace(old, new): t for name, t in tensors.items()}


def without(name: str):
    return lambda tensors: {key: t for key, t in tensors.items() if key != name}


@pytest.mark.parametrize(
    "edit, clue",
    [
        (without("model.norm.weight"), "its files lack model.norm.weight; get"),
        (
            renamed("model.layers.1.", "model.layers.7."),
            "lack model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight,"
            " model.layers.1.mlp.gate_proj.weight and 6 more"
            " (they hold model.layers.7.input_layernorm.weight instead)",
        ),
        (renamed("model.", "module."), "(they hold module.embed_tokens.weight instead)"),
        (
            lambda tensors: tensors | {"model.norm.weight": torch.ones(7)},
            "its files hold model.norm.weight of shape (7,), but its config.json means (64,)",
        ),
    ],
    ids=["a tensor", "a layer", "a prefix", "a shape"],
)
def test_weights_that_are_not_in_the_files_are_not_made_up(folder, edit, clue):
    """Transformers would draw them, and others each time."""
    edit_weights(folder, edit)
    assert clue in refusal(folder)


def test_an_untied_head_must_be_in_the_files(folder):
    edit_json(folder / "config.json", tie_word_embeddings=False)
    assert "its files lack lm_head.weight" in refusal(folder)


def test_what_the_index_names_is_read_and_nothing_else(folder, toy):
    """A file that an earlier version left there is neither read nor part of the digest."""
    split_weights(folder)
    digest = base_digest(str(folder))
    stale = {name: torch.zeros_like(t) for name, t in toy[0].state_dict().items()}
    save_file({"model.norm.weight": stale["model.norm.weight"]}, folder / "model-old.safetensors")
    assert base_digest(str(folder)) == digest
    assert torch.equal(
        load(str(folder), torch.float32)[0].model.norm.weight, toy[0].model.norm.weight
    )


def test_a_file_that_the_index_names_must_be_there(folder):
    split_weights(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "lacks model-00002-of-00002.safetensors, which its index names" in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 1}'])
def test_an_index_that_names_nothing_is_refused(folder, text):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(text)
    assert "names no weights, or is cut off" in refusal(folder)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json", INDEX]
)
def test_pointers_of_git_lfs_are_named(folder, name):
    (folder / WEIGHTS if name == INDEX else folder / name).unlink()
    (folder / name).write_text(POINTER)
    assert f"{folder / name} is a pointer of Git LFS; run `git lfs pull`" in refusal(folder)
    if name != WEIGHTS:  # which is read later if there are several ranks
        assert f"{folder / name} is a pointer of Git LFS" in refusal(folder, empty=True)


@pytest.mark.parametrize("keep", [0, 5, 100, 5000, -1])
def test_cut_weights_are_noticed(folder, keep):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    assert f"{folder / WEIGHTS} is cut off, or no safetensors file" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_broken_json_is_refused(folder, name):
    """Transformers would leave out a generation_config.json that it cannot read."""
    (folder / name).write_text('{"a":')
    assert f"model {folder}: " in refusal(folder)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8"])
def test_quantised_bases_are_not_read(folder, method):
    settings = {"quant_method": method, "bits": 4, "load_in_4bit": method == "bitsandbytes"}
    edit_json(folder / "config.json", quantization_config=settings)
    assert "its weights are quantised; bases in 4 or 8 bits are not read" in refusal(folder)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(folder):
    edit_json(folder / "config.json", vocab_size=803)
    edit_weights(
        folder, lambda t: t | {"model.embed_tokens.weight": t["model.embed_tokens.weight"][:803]}
    )
    assert "tokens up to 803, but it has embeddings for 803 alone" in refusal(folder)


def test_only_safetensors_are_read(folder):
    """A .bin holds pickled Python, which may run anything."""
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert "holds no model.safetensors; only safetensors are read" in refusal(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    assert f"model {tmp_path / 'nothing'}: cannot be loaded: it is no folder" in refusal(
        tmp_path / "nothing"
    )


def test_an_adapters_folder_is_no_base(folder, toy):
    """Transformers would load the adapter with the model, without a word."""
    model = deepcopy(toy[0])
    add_adapter(model, "sft")
    save_adapter(model, folder)
    assert f"{folder} holds an adapter (adapter_config.json); give its base" in refusal(folder)


@pytest.mark.parametrize("architecture", ["bert", "vit"])
def test_what_is_no_decoder_is_refused(folder, architecture):
    edit_json(folder / "config.json", model_type=architecture)
    assert refusal(folder).startswith(f"model {folder}: ")


def test_no_code_from_the_models_folder_runs(folder, tmp_path):
    """Not even if the answer to Transformers' question is yes."""
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')\n"
    for name in ("config", "model", "tokens"):
        (folder / f"{name}.py").write_text(code)
    maps = {"AutoConfig": "config.C", "AutoModelForCausalLM": "model.M"}
    edit_json(folder / "config.json", model_type="unheard-of", auto_map=maps)
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="Own",
        auto_map={"AutoTokenizer": ["tokens.T", None]},
    )
    program = tmp_path / "program.py"
    program.write_text(
        f"from desc import cli, modeling\ncli.run(lambda: modeling.load({str(folder)!r}))\n"
    )
    printed = run(program, fails=True, stdin="y\ny\ny\n")
    assert printed.startswith(f"error: model {folder}: cannot be loaded")
    assert not marker.exists()


# --- what a model brings along --------------------------------------------------------------------


def test_its_own_end_tokens_end_a_reply(folder, toy):
    """They follow the token with which the chat template ends a turn, each once."""
    (end,) = load(str(folder), torch.float32)[0].generation_config.eos_token_id[:1]
    edit_json(folder / "generation_config.json", eos_token_id=[7, end, 9], top_k=3)
    kept = load(str(folder), torch.float32)[0].generation_config
    assert kept.eos_token_id == [end, 7, 9]
    assert kept.top_k != 3
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", eos_token_id=5)
    assert load(str(folder), torch.float32)[0].generation_config.eos_token_id == [end, 5]


def test_a_7b_without_its_weights_is_made_at_once(folder):
    """Qwen2.5-7B's shapes: 7.6 billion weights on the meta device, in less than two seconds."""
    (folder / WEIGHTS).unlink()
    shape = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    shape |= {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
    shape |= {"head_dim": 128, "tie_word_embeddings": False}
    edit_json(folder / "config.json", **shape)
    begun = time.process_time()
    model = load(str(folder), torch.bfloat16, empty=True)[0]
    assert time.process_time() - begun < 2
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(7.6e9, rel=0.01)
    assert all(p.is_meta for p in model.parameters())


# --- adapters -------------------------------------------------------------------------------------


@pytest.fixture
def adapter(toy, tmp_path) -> Path:
    model = deepcopy(toy[0])
    add_adapter(model, "sft", rank=4)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(float("nan")),
        torch.tensor(float("inf")),
        torch.tensor(float("nan")).to(torch.float8_e4m3fn),
        torch.tensor(1, dtype=torch.int8),
    ],
    ids=["nan", "inf", "fp8", "integers"],
)
def test_an_adapter_holds_finite_numbers(adapter, toy, value):
    tensors = load_file(adapter / ADAPTER)
    name = sorted(tensors)[0]
    tensors[name] = value.expand(tensors[name].shape).contiguous()
    save_file(tensors, adapter / ADAPTER)
    model = deepcopy(toy[0])
    with pytest.raises(DescError, match=f"{name} holds values that are no finite numbers"):
        load_adapter(model, adapter, "sft")
    assert not lora_layers(model)


@pytest.mark.parametrize("pattern", ["*proj", "(q_proj", "a{99999999999999999999}"])
def test_a_pattern_that_is_none_is_refused(adapter, toy, pattern):
    edit_json(adapter / CONFIG, target_modules=pattern)
    with pytest.raises(DescError, match="is no regular expression"):
        load_adapter(deepcopy(toy[0]), adapter, "sft")


def test_names_of_layers_are_text(adapter, toy):
    edit_json(adapter / CONFIG, target_modules=["q_proj", 3])
    with pytest.raises(DescError, match="has no valid 'target_modules'"):
        load_adapter(deepcopy(toy[0]), adapter, "sft")


# --- which base -----------------------------------------------------------------------------------


def test_a_copy_has_the_same_digest(folder):
    """Also one that another version of Transformers has written, and one with people's notes."""
    (folder / "notes.txt").write_text("good at names")
    (folder / "scores.json").write_text("{}")
    assert base_digest(str(folder)) == base_digest("toy")
    for name in ("config.json", "generation_config.json"):
        text = (folder / name).read_text()
        version = json.loads(text)["transformers_version"]
        (folder / name).write_text(text.replace(version, "5.0.0"))
    assert base_digest(str(folder)) == base_digest("toy")


def change_one_weight(folder):
    def edit(tensors):
        tensors["model.norm.weight"][-1] += 1
        return tensors

    edit_weights(folder, edit)


def change_template(folder):
    (path,) = folder.glob("chat_template*")
    path.write_text(path.read_text() + " ")


@pytest.mark.parametrize(
    "edit",
    [
        change_one_weight,
        change_template,
        lambda folder: edit_json(folder / "tokenizer.json", truncation=None, added=1),
        lambda folder: edit_json(folder / "config.json", rope_theta=5.0),
        lambda folder: edit_json(folder / "generation_config.json", eos_token_id=5),
    ],
    ids=["weights", "template", "tokenizer", "configuration", "end tokens"],
)
def test_another_base_in_the_same_folder_has_another_digest(folder, edit):
    """The weights' file keeps its size."""
    size = (folder / WEIGHTS).stat().st_size
    edit(folder)
    assert (folder / WEIGHTS).stat().st_size == size
    assert base_digest(str(folder)) != base_digest("toy")


def test_what_is_no_part_of_a_model_does_not_change_its_digest(folder):
    for name in ("README.md", "notes.py", "pytorch_model.bin", "other.safetensors"):
        (folder / name).write_text("x")
    (folder / "runs").mkdir()
    (folder / "runs" / "config.json").write_text("{}")
    assert base_digest(str(folder)) == base_digest("toy")


def test_of_a_large_tensor_parts_from_end_to_end_are_hashed():
    assert sampled_places(1 << 20) == [range(1 << 20)]
    places = sampled_places(10**9)
    assert [place.start for place in places] == [0, 333331968, 666663936, 999995904]
    assert {len(place) for place in places} == {4096} and places[-1].stop == 10**9


def test_an_adapter_of_another_base_is_refused_until_told(adapter, folder, toy, capsys):
    """Beside an adapter of ours stands its base's digest. The line names the way out."""
    write_json(adapter / "config.json", {"base": base_digest("toy")})
    model = deepcopy(toy[0])
    assert cli.use_adapter(Config(), model, adapter, "sft")
    change_one_weight(folder)
    other = load(str(folder), torch.float32)[0]
    with pytest.raises(DescError) as error:
        cli.use_adapter(Config(), other, adapter, "sft")
    assert str(error.value) == (
        f"{adapter}: was trained on another base than {folder}; give its --model, or delete"
        ' "base" from its config.json if you know that the weights are the same'
    )
    assert not lora_layers(other)
    write_json(adapter / "config.json", {})
    capsys.readouterr()
    assert cli.use_adapter(Config(), other, adapter, "sft")
    made_for = model.name_or_path
    assert capsys.readouterr().out == (
        f"{adapter}: was trained on {made_for}; {folder} should be the same model\n"
        f"uses the adapter {adapter}\n"
    )


@pytest.mark.parametrize("name", [CONFIG, "config.json"])
@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_broken_settings_beside_an_adapter_end_in_one_line(adapter, toy, name, text):
    (adapter / name).write_bytes(text.encode("latin-1"))
    model = deepcopy(toy[0])
    if (name, text) == ("config.json", "[]"):  # not ours, so it says nothing
        assert cli.use_adapter(Config(), model, adapter, "sft")
        return
    with pytest.raises(DescError, match=str(adapter)):
        cli.use_adapter(Config(), model, adapter, "sft")
    assert not lora_layers(model)


def stop_after_one_step(program: Path) -> None:
    """A train_sft.py that is asked to stop in its first step, as by a cluster."""
    program.write_text(
        "import os, runpy, signal\n"
        "from desc.training import run\n"
        "clip_and_step = run.clip_and_step\n"
        "def once(*args):\n"
        "    clip_and_step(*args)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "run.clip_and_step = once\n"
        f"runpy.run_path({str(ROOT / 'train_sft.py')!r}, run_name='__main__')\n"
    )


def test_a_run_does_not_resume_on_another_base(folder, tmp_path):
    options = ("--task", "sp", "--model", folder, "--out", tmp_path / "out", "--batch-size", 8)
    options += ("--train-dialogues", 3, "--eval-dialogues", 1, "--dtype", "float32")
    stop_after_one_step(tmp_path / "program.py")
    run(tmp_path / "program.py", *options, fails=True)
    change_one_weight(folder)
    refused = run("train_sft.py", *options, fails=True)
    assert "checkpoints was begun with another base: run with the same, or delete it" in refused


def test_answers_of_another_base_are_not_reused(folder, tmp_path):
    options = ("--task", "sp", "--model", folder, "--out", tmp_path / "out", "--dtype", "float32")
    options += ("--train-dialogues", 1, "--eval-dialogues", 1)
    run("mine_preferences.py", *options)
    begun = (tmp_path / "out" / "sp" / "answers.jsonl").read_text()
    change_one_weight(folder)
    assert "answered already" not in run("mine_preferences.py", *options)
    assert (tmp_path / "out" / "sp" / "answers.jsonl").read_text() != begun
