"""What the benchmarks share: the model, the clock, the machine's peak, and one process for each
contender."""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
)

from desc import attention, cli
from desc.encoding import Item
from desc.esconv import Dialogue, load_splits
from desc.flags import MANY, TaskConfig, flag, parse
from desc.lora import add_adapter, load_adapter, lora_layers, save_adapter
from desc.storage import zoo
from desc.training.speed import compile_layers
from desc.tree import pack

SHAPES = {  # random weights, SmolLM2's tokenizer
    "qwen2.5-7b": (
        {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944}
        | {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
        | {"vocab_size": 152064, "rope_theta": 1e6, "tie_word_embeddings": False}
    ),
    "qwen2.5-0.5b": (
        {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864}
        | {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
        | {"vocab_size": 151936, "rope_theta": 1e6, "tie_word_embeddings": True}
    ),
}
CHECKED = 4  # examples whose fp32 losses are compared
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
WARM_UP = int(CUDA)  # passes that are not counted: a GPU's first one compiles its kernels


@dataclass
class Config(TaskConfig):
    dialogues: int = flag(
        2, "training dialogues whose turns are read, of typical lengths", at_least=1, at_most=MANY
    )
    contenders: str = flag(
        "compiled,dialogue,pair,none,trl" if CUDA else "dialogue,pair,none,trl",
        "which to run; compiled is dialogue with --compile, on a GPU",
    )
    repeats: int = flag(
        3,
        "times that ours reads all of it when sharing by dialogue; the median counts",
        at_least=1,
        at_most=1000,
    )
    tries: list[int] = flag(
        [1, 2, 4, 8],
        "TRL's batch sizes to try, all on the same few examples",
        at_least=1,
        at_most=MANY,
    )
    trl_batch_size: int = flag(0, "TRL's batch size; 0 tries some", at_least=0, at_most=MANY)
    some: int = flag(0, "examples to use, evenly spaced; 0 takes all", at_least=0, at_most=MANY)
    contender: str | None = flag(
        None, "run this one alone and print JSON (what the others are started with)"
    )
    adapter: str | None = flag(None, "folder of the adapter that all start from")


def make_tokenizer(config):
    tokenizer = AutoTokenizer.from_pretrained(
        zoo.locate("smollm2" if config.model in SHAPES else config.model)
    )
    tokenizer.chat_template = config.read_chat_template() or tokenizer.chat_template
    return tokenizer


def shape_of(config):
    """The model's configuration, as Transformers has it."""
    if config.model in SHAPES:
        return AutoConfig.for_model(**SHAPES[config.model])
    return AutoConfig.from_pretrained(zoo.locate(config.model))


def random_model(config, dtype, kernel: str, device: torch.device):
    """A model of that shape with random weights."""
    with device:
        return AutoModelForCausalLM.from_config(
            shape_of(config), dtype=dtype, attn_implementation=kernel
        )


def product_weights(model) -> int:
    """The weights of the decoder's linear layers."""
    layers = model.model.layers.named_modules()
    return sum(m.weight.numel() for _, m in layers if isinstance(m, nn.Linear))


def make_model(config, dtype, kernel: str):
    """Weights that are the same in every process."""
    if config.model in SHAPES:
        torch.manual_seed(0)
        return random_model(config, dtype, kernel, DEVICE)
    return AutoModelForCausalLM.from_pretrained(
        zoo.locate(config.model), dtype=dtype, attn_implementation=kernel
    ).to(DEVICE)


def our_model(config, dtype):
    """With the adapter that all start from as "dpo"."""
    model = make_model(config, dtype, attention.register())
    load_adapter(model, config.adapter, "dpo", trainable=True)
    if config.contender == "compiled":
        compile_layers(model, DEVICE)
    return model


def training_dialogues(config) -> list[Dialogue]:
    return load_splits(
        config.data, config.split_file, config.read_domain().strategies, config.seed
    )["train"]


def typical(things: list, count: int, length: Callable = len) -> list:
    """So many, evenly spaced in the order of length: of two, the ones longer than a quarter and
    than three quarters of all."""
    ordered = sorted(things, key=length)
    return [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def memory() -> int:
    """The most bytes that this process has held."""
    if CUDA:
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows does not count it
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine(config) -> str:
    """What a figure was measured on."""
    if CUDA:
        name = torch.cuda.get_device_name()
    else:
        model = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
        level = torch.backends.cpu.get_cpu_capability()
        name = f"{model} ({level}), {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, {config.dtype}"


def matrix_peak(dtype: torch.dtype) -> float:
    """FLOP/s of products of two large square matrices: the best of five stretches, of ten products
    each on a GPU."""
    size, products = (8192, 10) if CUDA else (4096, 1)
    a, b = torch.randn(2, size, size, device=DEVICE).to(dtype)
    times = []
    for _ in range(6):  # the first warms up
        begin = now()
        for _ in range(products):
            a @ b
        times.append(now() - begin)
    return 2 * products * size**3 / min(times[1:])


def read_ours(config, items: list[Item], loss_of) -> dict:
    """Ours over all items, in config.dtype; and the loss of the first few in fp32.

    loss_of(model, forest, items) is a part of theirs."""
    model, share = (
        our_model(config, config.torch_dtype),
        ("dialogue" if config.contender == "compiled" else config.contender),
    )
    batches = [
        (members, forest.to(DEVICE)) for members, forest in pack(items, share, config.max_tokens)
    ]
    seconds = []
    # without sharing one must do, it takes long
    repeats = config.repeats if share == "dialogue" else 1
    for _ in range(WARM_UP + repeats):
        begin = now()
        for _, forest in batches:
            loss_of(model, forest, items).backward()
        seconds.append(now() - begin)
    del seconds[:WARM_UP]
    result = {
        "seconds": statistics.median(seconds),
        "memory": memory(),
        "tokens": sum(forest.nodes for _, forest in batches),
    }
    ((_, forest),) = pack(items[:CHECKED], "dialogue", 10**9)
    with torch.no_grad():
        return result | {
            "loss": float(loss_of(our_model(config, torch.float32), forest, items[:CHECKED]))
        }


class Clock(TrainerCallback):
    """The seconds of a trainer's last epoch."""

    def on_epoch_begin(self, *_, **__):
        self.begin = now()

    def on_train_end(self, *_, **__):
        self.seconds = now() - self.begin


def make_trainer(config, classes, rows: list[dict], batch_size: int, model, *models, **more):
    """TRL's trainer of one optimizer step over all rows. `classes` are the trainer's and its
    settings'; `more` are settings, among them the output_dir."""
    from datasets import Dataset

    trainer_class, settings_class = classes
    settings = settings_class(
        use_cpu=not CUDA,
        bf16=model.dtype == torch.bfloat16,
        gradient_checkpointing=False,
        max_length=None,
        per_device_train_batch_size=batch_size,
        # one optimizer step, which read_ours leaves out
        gradient_accumulation_steps=-(-len(rows) // batch_size),
        learning_rate=1e-9,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **({"num_train_epochs": 1} | more),
    )
    return trainer_class(
        model,
        *models,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(config),
    )


def seconds_of_training(trainer) -> float:
    clock = Clock()
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.seconds


def train_trl(
    config, trainer_class, settings_class, rows: list[dict], items: list[Item], models=tuple, **more
) -> dict:
    """TRL over all rows, which are `items` to us, in config.dtype; and the loss of the first few in
    fp32, where the trainer gets models(), too."""
    import peft

    def make(rows, batch_size, dtype, *models):
        model = peft.PeftModel.from_pretrained(
            make_model(config, dtype, "sdpa"), config.adapter, is_trainable=True
        )
        classes = (trainer_class, settings_class)
        settings = more | {"output_dir": folder, "num_train_epochs": WARM_UP + 1}
        return make_trainer(config, classes, rows, batch_size, model, *models, **settings)

    with tempfile.TemporaryDirectory() as folder:
        seconds = seconds_of_training(make(rows, config.trl_batch_size, config.torch_dtype))
        tokens = sum(len(s.prompt) + len(s.completion) for item in items for s in item.sequences)
        result = {"seconds": seconds, "memory": memory(), "tokens": tokens}
        trainer = make(rows[:CHECKED], CHECKED, torch.float32, *models())
        (batch,) = trainer.get_train_dataloader()
        with torch.no_grad():
            return result | {"loss": float(trainer.compute_loss(trainer.model, batch))}


def compete(make, ours, trl, passes: int, unit: str) -> None:
    """The main program: every contender in a process of its own, one after another, then the table.

    make(config, dialogues) gives the examples or pairs; ours and trl take (config, those). `passes`
    counts how often the products with the weights are done for a token that is read: forwards, and
    the input's gradient."""
    config = parse(Config)
    cli.resolve_auto(config, DEVICE)
    if config.contender:
        things, peak = (
            make(config, typical(training_dialogues(config), config.dialogues)),
            matrix_peak(config.torch_dtype),
        )
        if config.some:
            things = things[:: len(things) // config.some][: config.some]
        result = trl(config, things) if config.contender == "trl" else ours(config, things)
        return print(json.dumps(result | {"count": len(things), "peak": peak}))

    def start(*flags) -> dict:
        command = [sys.executable, *sys.argv, "--dtype", config.dtype, "--adapter", folder]
        command += map(str, flags)
        return json.loads(
            subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True
            ).stdout.splitlines()[-1]
        )

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(config, config.torch_dtype, "sdpa")
        products = product_weights(model)
        add_adapter(model, "dpo")
        for layer in lora_layers(model).values():
            # so that policy and reference differ
            nn.init.normal_(layer.adapters["dpo"].B, std=0.01)
        save_adapter(model, folder)
        del model
        torch.cuda.empty_cache()
        for name in config.contenders.split(","):
            flags = ["--contender", name]
            if name == "trl" and not config.trl_batch_size:
                most = max(config.tries)
                tried = {
                    size: start(*flags, "--trl-batch-size", size, "--some", most)["seconds"] / most
                    for size in config.tries
                }
                print(
                    f"TRL's seconds a {unit} by batch size: "
                    + ", ".join(f"{size}: {s:.2f}" for size, s in tried.items())
                )
                flags += ["--trl-batch-size", min(tried, key=tried.get)]
            results[name] = start(*flags)
    rate = {name: r["count"] / r["seconds"] for name, r in results.items()}
    lines = [["", f"{unit}s/s", "ratio", "peak memory", "tokens", "of matrix peak", "fp32 loss"]]
    for name, r in results.items():
        ratio = f"{rate[name] / rate['trl']:.1f}" if "trl" in rate else ""
        share = f"{100 * 2 * products * passes * r['tokens'] / r['seconds'] / r['peak']:.0f} %"
        title = "TRL + PEFT" if name == "trl" else f"ours, {name}"
        lines.append(
            [
                title,
                f"{rate[name]:.3g}",
                ratio,
                f"{r['memory'] / 1e9:.2f} GB",
                f"{r['tokens']:,}",
                share,
                f"{r['loss']:.6f}",
            ]
        )
    count = max(r["count"] for r in results.values())
    print(
        f"{config.model}, {config.task}, {count} {unit}s of {config.dialogues} dialogues of"
        f" {config.data}\n{machine(config)}\n"
    )
    print(cli.markdown(lines))
