"""The flags of the scripts: one dataclass for each kind of script, and how a command line becomes
one."""

import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from transformers import HfArgumentParser

from desc import DescError
from desc.calibration import WAYS
from desc.domain import Domain, read_domain
from desc.prompts import HISTORIES, STRATEGY_PLACES, TASKS, Layout
from desc.templates import digest_template, read_template
from desc.tree import SHARING

MANY = 1_000_000  # dialogues, tokens or steps: no run has more, so a larger number is a slip


def flag(default, text: str, at_least: float | None = None, at_most: float | None = None):
    """A field of a configuration: its default, what it does, and the range of a number, or of each
    number of a list.

    Every number has both ends, because nan and inf are then out of range."""
    metadata = {"help": text, "range": (at_least, at_most)}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


read_domain_once = cache(read_domain)
read_template_once = cache(read_template)


@dataclass
class Config:
    """Flags of every script."""

    model: str = flag("smollm2", "smollm2, toy, a Hub id or a folder")
    domain: str | None = flag(
        None,
        "JSON with another kind of dialogue than ESConv's (README): its strategies, prompts, …",
    )
    out: str = flag("out", "the folder under which every artefact lies")
    seed: int = flag(
        0,
        "seeds the split, the adapters' start, the order of batches and all sampling",
        at_least=0,
        at_most=2**32 - 1,
    )
    dtype: Literal["auto", "bfloat16", "float32"] = flag(
        "auto",
        "of the frozen base model; auto is bfloat16 if this processor multiplies it natively, else"
        " float32; adapters are float32",
    )
    max_length: int = flag(
        2048,
        "tokens of prompt and completion; a longer dialogue loses its oldest exchanges",
        at_least=1,
        at_most=MANY,
    )

    strategy_at: Literal[STRATEGY_PLACES] = flag(
        "turn",
        "where rg is told its strategy: at the end of the last message, so that all strategies of a"
        " turn share what comes before, or in the system message, as in the paper's release",
    )
    history: Literal[HISTORIES] = flag(
        "text",
        "how sp reads what was said: as one text, as in the paper's release, or as the chat's own"
        " messages, each answer after its strategy",
    )
    date: str = flag(
        "auto",
        "what the model's chat template takes for today if it tells the date; auto is the day on"
        " which a run begins",
    )
    chat_template: str | None = flag(
        None,
        "a Jinja file to use instead of the model's own chat template, as vLLM's flag; a base model"
        " has none",
    )

    @property
    def layout(self) -> Layout:
        return Layout(self.strategy_at, self.history)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def read_domain(self) -> Domain:
        """The domain in --domain, else ESConv's. A file is read once, so a run has one domain."""
        return read_domain_once(self.domain)

    def read_chat_template(self) -> str | None:
        """The text of --chat-template; None if the model's own is used. Read once, as a domain."""
        return None if self.chat_template is None else read_template_once(self.chat_template)

    def template_digest(self) -> str | None:
        """A digest of the text of --chat-template; None if the model's own is used."""
        template = self.read_chat_template()
        return template and digest_template(template)


@dataclass
class DataConfig(Config):
    """Flags of the scripts that read a data set."""

    data: str = flag(
        "sample", "sample (shipped), esconv (fetched from the Hub), or a file in ESConv's schema"
    )
    split_file: str | None = flag(
        None, "JSON with the indices of train, valid and test; without it a seeded 8:1:1"
    )
    eval_dialogues: int = flag(
        0,
        "held-out dialogues to use, the first of their split; 0 means all",
        at_least=0,
        at_most=MANY,
    )
    max_tokens: int = flag(
        1024,
        "tree nodes in one forward pass, or twice the longest sequence where that is more; mining"
        " and evaluation answer dialogues of so many tokens of text at once; less needs less"
        " memory",
        at_least=1,
        at_most=MANY,
    )


@dataclass
class SampleConfig(Config):
    """Flags of the scripts that let a model answer. The defaults are the paper's, but for the
    length, which it leaves open."""

    temperature: float = flag(0.7, "of sampling; 0 takes the most likely", at_least=0, at_most=10)
    top_p: float = flag(
        0.95,
        "of sampling: only the likeliest tokens, or strategies, that hold this mass",
        at_least=1e-6,
        at_most=1,
    )
    max_new_tokens: int = flag(128, "the longest reply", at_least=1, at_most=65_536)
    calibrate: Literal[("none", *WAYS)] = flag(
        "none",
        "shift a planner's log-probabilities by what is fitted on the validation turns beside its"
        " adapter: until it is sampled as often as people use each strategy (frequencies),"
        " until people's are likeliest (likelihood), or by how frequent each one is (prior)",
    )


@dataclass
class AskConfig(DataConfig):
    """Flags of the scripts that may ask a server, or a local annotator."""

    annotator: Literal["none", "local", "endpoint"] = flag(
        "none", "who names errors: nobody, --model with OUT/annotate/sft, --endpoint"
    )
    endpoint: str | None = flag(
        None,
        "URL of a server that speaks OpenAI's protocol; a key is read from $DESC_API_KEY alone",
    )
    endpoint_model: str = flag(
        "", "the model's name there; {task} in it stands for sp, rg, vanilla, annotate or judge"
    )
    template_options: str | None = flag(
        None,
        "a JSON object for the endpoint's chat template, such as '{\"enable_thinking\": false}'",
    )
    annotator_tokens: int = flag(
        1024,
        "the most that an annotator behind the endpoint may write, thoughts included; an answer"
        " that was cut off gets four times as much room, once",
        at_least=16,
        at_most=65_536,
    )
    concurrency: int = flag(8, "calls to the endpoint at a time", at_least=1, at_most=1000)
    timeout: float = flag(
        120, "seconds that a call to the endpoint may take", at_least=1, at_most=86_400
    )
    max_calls: int = flag(
        0,
        "calls to the endpoint that this run may make on all ranks, retries counted; 0 sets no"
        " limit",
        at_least=0,
        at_most=1000 * MANY,
    )


@dataclass
class TaskConfig(DataConfig):
    """Flags of the scripts that work on one module."""

    task: Literal[TASKS] = field(
        kw_only=True, metadata={"help": "planner, generator, or both in one model"}
    )

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.task


@dataclass
class TrainConfig(TaskConfig):
    """Flags of both training scripts."""

    batch_size: int = flag(
        32,
        "examples (SFT), or pairs by their weights (DPO), in a step; with --share dialogue whole"
        " dialogues, as near to it as they come",
        at_least=1,
        at_most=MANY,
    )
    targets: list[str] = flag(
        [], "last names of the linear layers with adapters; none: all layers of the decoder"
    )
    share: Literal[SHARING] = flag(
        "dialogue", "which equal prefixes are read once; the loss of given examples is the same"
    )
    rank: int = flag(16, "LoRA's r", at_least=1, at_most=4096)
    alpha: float = flag(
        16, "LoRA's alpha; the update is scaled by alpha / rank", at_least=1e-6, at_most=10_000
    )
    dropout: float = flag(
        0.05, "on the input of the adapters that are trained", at_least=0, at_most=0.99
    )
    warmup: float = flag(
        0.1,
        "share of the steps in which the rate rises; afterwards it falls to zero along a cosine",
        at_least=0,
        at_most=1,
    )
    weight_decay: float = flag(0.0, "AdamW's, on the adapters", at_least=0, at_most=100)
    max_grad_norm: float = flag(
        1.0,
        "gradients of a larger norm are scaled down to it; 0 means no clipping",
        at_least=0,
        at_most=MANY,
    )
    eval_every: int = flag(
        50,
        "steps between scores on validation dialogues; 0 means after the last step alone",
        at_least=0,
        at_most=MANY,
    )
    save_every: int = flag(
        50,
        "steps between checkpoints; a run that was killed goes on from the last when it is started"
        " again; 0 means on SIGTERM alone",
        at_least=0,
        at_most=MANY,
    )
    recompute: bool = flag(
        False,
        "compute activations again in the backward pass instead of keeping them: less memory,"
        " slower",
    )
    shard: Literal["auto", "always", "never"] = flag(
        "auto",
        "whether several ranks hold a part of the base model each (FSDP2) or a copy each; auto"
        " copies it if it takes at most half of a rank's memory",
    )
    keep: Literal["best", "last"] = flag(
        "best", "the adapter that later steps find; the other one lies in a folder beside it"
    )
    compile: bool = flag(
        False,
        "on a GPU: let PyTorch fuse the layers' element-wise work, after half a minute's compiling",
    )
    estimate: int = flag(
        0,
        "print what the run costs on that many ranks (bytes per rank, steps, tokens), without"
        " loading weights, and stop",
        at_least=0,
        at_most=10_000,
    )
    show_example: bool = flag(
        False, "print the first example, what carries loss between » and «, and stop"
    )


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the description as it is."""


class Parser(HfArgumentParser):
    """Makes flags of a dataclass's fields; their ranges are checked after parsing."""

    def add_argument(self, *names, range=None, **settings):  # noqa: A002
        return super().add_argument(*names, **settings)


def parse(kind):
    """A configuration from the command line. An unknown flag ends the program with a usage message.

    Raises DescError if a number is out of its flag's range."""
    description = sys.modules["__main__"].__doc__
    parser = Parser(kind, description=description, formatter_class=HelpFormatter)
    given = vars(parser.parse_args())
    for name, value in given.items():
        if isinstance(value, str) and value.startswith("~"):
            given[name] = os.path.expanduser(value)  # the shell leaves --out=~/x as it is
    config = kind(**given)
    for flagged in fields(config):
        low, high = flagged.metadata.get("range", (None, None))
        value = getattr(config, flagged.name)
        if low is None or value is None:  # no number, or none given
            continue
        for number in value if isinstance(value, list) else [value]:
            if not low <= number <= high:
                name = flagged.name.replace("_", "-")
                raise DescError(f"--{name} {number}: should be from {low} to {high}")
    return config


def training_settings(config: TrainConfig) -> dict:
    """The flags that must be those of the checkpoint from which a run goes on. The others change no
    step of it, up to rounding and the draws of dropout."""
    # Where things lie. The content of --sft is compared by its digest.
    free = {"out", "sft"}
    # In what pieces a batch is computed, and how. Other pieces round and drop in other ways.
    free |= {"max_tokens", "recompute", "compile", "shard"}
    # When the run is scored and saved. With another --eval-every the best adapter is chosen among
    # other steps. --keep is not free, because the best adapter already lies where it says.
    free |= {"eval_every", "save_every"}
    settings = {name: value for name, value in asdict(config).items() if name not in free}
    settings = without_new_defaults(settings)
    # What the module reads of a domain, by its digest, instead of the file's place. No entry, as in
    # the checkpoints before --domain, is ESConv's.
    settings |= {"domain": config.domain and config.read_domain().digest(config.task)}
    return settings | {"chat_template": config.template_digest()}


def without_new_defaults(settings: dict) -> dict:
    """The settings with None for the defaults of flags that old checkpoints and journals have no
    entry for, because there were no such flags."""
    newer = {"objective": "dpo", "margin": 1.0, "sft_weight": 0.0, "history": "text"}
    newer |= {"exact": False}
    return settings | {name: None for name, value in newer.items() if settings.get(name) == value}


def answer_settings(config, modules: Iterable[str], *irrelevant: str) -> dict:
    """The flags that change what a model says of a dialogue: all but those that never do, and those
    that are `irrelevant` to this script's answers. Of the domain, what the `modules` read of it."""
    never = {"data", "split_file", "out", "max_tokens", "eval_dialogues"}
    never |= {"endpoint", "concurrency", "timeout", "max_calls", *irrelevant}
    settings = {name: value for name, value in asdict(config).items() if name not in never}
    digests = {module: config.read_domain().digest(module) for module in modules}
    settings |= {"domain": config.domain and digests}
    settings |= {"chat_template": config.template_digest()}
    return without_new_defaults(settings)
