"""The systems that are compared: which there are, the strategies they plan and the replies they
write."""

from collections.abc import Container
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from desc import DescError, cli
from desc.calibration import Calibration, read_calibration
from desc.domain import Domain, Strategies
from desc.esconv import Dialogue, gold_strategies
from desc.evaluation.scores import FREQUENCIES
from desc.judging.judge import Judge, contest, rate
from desc.lora import adapter_only
from desc.mining import Annotator, Case
from desc.sampling import draw_strategies, score_strategies, write_dialogues
from desc.storage.adapters import adapter_digest

BASE = "base"  # instead of an adapter's folder: the model without an adapter
GOLD = "gold"  # instead of the planner's folder: the human strategies
CALIBRATED = " calibrated"  # how the name of a calibrated system ends

# The tasks that a system may have, the planner's first; and which of them writes the replies.
GENERATOR_OF = {("sp",): None, ("sp", "rg"): "rg", ("vanilla",): "vanilla"}


@dataclass(frozen=True)
class System:
    """A planner alone, a planner and a generator, or one model for both (vanilla).

    An adapter is the path of its folder or "base". The planner sp may have "gold" instead: then it
    is no model, and the human strategies are taken."""

    name: str
    planner: str  # its task, "sp" or "vanilla"
    planner_adapter: str
    generator: str | None = None  # its task, "rg" or "vanilla"; None if replies are not written
    generator_adapter: str | None = None
    calibrated: bool = False  # whether its planner is, as --calibrate says

    @property
    def plans_as_human(self) -> bool:
        return self.planner == "sp" and self.planner_adapter == GOLD

    def adapters(self) -> dict[str, str]:
        """{task: adapter}, the planner's first; a single one if one model does both."""
        adapters = {self.planner: self.planner_adapter}
        if self.generator:
            adapters[self.generator] = self.generator_adapter
        return adapters

    def digests(self) -> dict[str, str]:
        """{task: digest of the adapter's weights}; "base" and "gold" stand for themselves."""
        adapters = self.adapters()
        return {
            task: adapter_digest(Path(adapter)) or adapter for task, adapter in adapters.items()
        }


def find_systems(config) -> list[System]:
    """The systems that --systems names or, without that flag, those whose adapters OUT holds.

    `config` is evaluate.py's. Raises DescError if a system cannot be understood, if two have the
    same name, or if there is none."""
    if config.systems:
        systems = [parse_system(text) for text in config.systems]
    else:
        systems = systems_in_out(config)
    if not systems:
        raise DescError(
            f"no system to evaluate in {config.out}: run train_sft.py and train_dpo.py first, or"
            " give --systems"
        )
    if config.calibrate != "none":
        systems = add_calibrated(systems)
    names = {system.name for system in systems}
    if len(names) < len(systems) or FREQUENCIES in names:
        raise DescError(f"--systems: two have the same name, or one that of {FREQUENCIES!r}")
    return systems


def add_calibrated(systems: list[System]) -> list[System]:
    """After each system whose planner has an adapter, the same one calibrated."""
    both = []
    for system in systems:
        both.append(system)
        if system.planner_adapter not in (BASE, GOLD):
            both.append(replace(system, name=system.name + CALIBRATED, calibrated=True))
    return both


def parse_system(text: str) -> System:
    """The system of "NAME=TASK:ADAPTER,…". Raises DescError if a part is missing, unknown or given
    twice."""
    name, _, rest = text.partition("=")
    parts = rest.split(",")
    adapters = {}
    for part in parts:
        task, _, adapter = part.partition(":")
        adapters[task] = adapter
    given_twice = len(adapters) < len(parts)
    complete = bool(name) and all(adapters.values())
    tasks = tuple(sorted(adapters, reverse=True))  # sp before rg
    if given_twice or not complete or tasks not in GENERATOR_OF:
        raise DescError(
            f"--systems {text}: should be NAME=sp:ADAPTER,rg:ADAPTER, NAME=sp:ADAPTER or"
            " NAME=vanilla:ADAPTER"
        )
    return make_system(name, tasks, adapters)


def systems_in_out(config) -> list[System]:
    """The systems whose adapters lie in OUT: after SFT and after DPO, vanilla's last.

    A generator is only needed if replies are to be written."""
    decoupled = ("sp",) if config.reply_dialogues < 0 else ("sp", "rg")
    systems = []
    for prefix, tasks in (("", decoupled), ("vanilla ", ("vanilla",))):
        for stage in ("sft", "dpo"):
            adapters = {task: str(Path(config.out) / task / stage) for task in tasks}
            if all(adapter_digest(Path(adapter)) for adapter in adapters.values()):
                systems.append(make_system(prefix + stage, tasks, adapters))
    return systems


def make_system(name: str, tasks: tuple[str, ...], adapters: dict[str, str]) -> System:
    """A system of one of the kinds in GENERATOR_OF; `adapters` {task: adapter}."""
    planner = tasks[0]
    generator = GENERATOR_OF[tasks]
    return System(name, planner, adapters[planner], generator, adapters.get(generator))


@dataclass(frozen=True)
class LoadedModel:
    """The model with the adapters of all systems attached."""

    model: torch.nn.Module
    tokenizer: object
    adapter_names: dict[tuple[str, str], str]  # {(task, adapter): its name in the model}
    # {(task, adapter): evaluate.py's configuration, with prompts as the adapter was trained on}
    configs: dict
    calibrations: dict[str, Calibration]  # {a calibrated planner's adapter: how}
    scored: dict  # what plan_scored computed last

    def with_adapter(self, task: str, adapter: str):
        """A context in which the model has this adapter alone."""
        return adapter_only(self.model, self.adapter_names[task, adapter])

    def layouts_of(self, system: System) -> dict[str, dict]:
        """{task: how its prompts are laid out} of a system's models."""
        return {
            task: asdict(self.configs[task, adapter].layout)
            for task, adapter in system.adapters().items()
            if (task, adapter) in self.configs  # sp:gold is no model
        }


def load_systems(
    config, model, tokenizer, systems: list[System], strategies: Strategies
) -> LoadedModel:
    """Attach the adapter of every system, each once, and fit the calibrations of planners.

    Each adapter is asked as it was trained, whatever --history and --strategy-at say, so that one
    evaluation can compare layouts of prompts. Raises DescError if a folder holds no adapter, one of
    another task, or nothing to fit on."""
    names = {(task, BASE): "" for tasks in GENERATOR_OF for task in tasks}
    configs = dict.fromkeys(names, config)
    for system in systems:
        for task, adapter in system.adapters().items():
            is_human = task == system.planner and system.plans_as_human
            if is_human or (task, adapter) in names:
                continue
            name, folder = f"adapter{len(names)}", Path(adapter)
            layout = cli.layout_of(folder, cli.read_config(folder), config.layout)
            configs[task, adapter] = replace(config, **asdict(layout))
            cli.use_adapter(configs[task, adapter], model, folder, task, name=name)
            names[task, adapter] = name
    calibrations = {}
    for system in systems:
        if system.calibrated:
            adapter = system.planner_adapter
            calibrations[adapter] = read_calibration(adapter, config, strategies)
    return LoadedModel(model, tokenizer, names, configs, calibrations, {})


@dataclass(frozen=True)
class Plan:
    """What a planner plans for the T supporter turns of a dialogue."""

    predicted: list[list[str | None]]  # [seed][turn]; None if what was written is no strategy
    logps: list[list[float]]  # (T, K) in nats; [] unless all K strategies were scored
    written: list[str]  # the first seed's texts (T); [] unless strategies were written freely


def plan_strategies(
    system: System, loaded: LoadedModel, config, dialogues: list[Dialogue], domain: Domain
) -> list[Plan]:
    """What the planner of a system plans for each dialogue, on the human history, with config.seeds
    seeds.

    `config` is evaluate.py's; its `decode` says how the planner is asked."""
    if system.plans_as_human:
        golds = [gold_strategies([dialogue]) for dialogue in dialogues]
        return [Plan([gold] * config.seeds, [], []) for gold in golds]
    asked = loaded.configs[system.planner, system.planner_adapter]
    configs = [replace(asked, seed=config.seed + i) for i in range(config.seeds)]
    with loaded.with_adapter(system.planner, system.planner_adapter):
        if config.decode == "scored":
            return plan_scored(system, loaded, configs, dialogues, domain)
        return plan_freely(system.planner, loaded, configs, dialogues, domain)


def plan_scored(
    system: System, loaded: LoadedModel, configs: list, dialogues: list[Dialogue], domain: Domain
) -> list[Plan]:
    """Strategies drawn from the exact distribution over all names, once by each of `configs`. The
    next system may have the same planner, so what was computed last is kept."""
    key = system.planner, system.planner_adapter, tuple(dialogue.id for dialogue in dialogues)
    if key not in loaded.scored:
        loaded.scored.clear()
        loaded.scored[key] = score_strategies(
            loaded.model, loaded.tokenizer, system.planner, dialogues, domain, configs[0]
        )
    plans = []
    for dialogue, logps in zip(dialogues, loaded.scored[key].split(list(map(len, dialogues)))):
        if system.calibrated:
            logps = loaded.calibrations[system.planner_adapter].apply(logps)
        drawn = [draw_strategies(logps, config, dialogue, domain.strategies) for config in configs]
        plans.append(Plan(drawn, logps.tolist(), []))
    return plans


def plan_freely(
    task: str, loaded: LoadedModel, configs: list, dialogues: list[Dialogue], domain: Domain
) -> list[Plan]:
    """Strategies written freely and parsed, as the paper does; once by each of `configs`."""
    unplanned = [
        (dialogue, [(turn, None) for turn in range(len(dialogue))]) for dialogue in dialogues
    ]
    texts_by_seed = [
        write_dialogues(loaded.model, loaded.tokenizer, config, task, unplanned, domain)
        for config in configs
    ]
    plans = []
    for by_seed in zip(*texts_by_seed):  # of one dialogue
        predicted = [
            [parse_strategy(task, text, domain.strategies) for text in texts] for texts in by_seed
        ]
        plans.append(Plan(predicted, [], by_seed[0]))
    return plans


def parse_strategy(task: str, text: str, strategies: Strategies) -> str | None:
    """The strategy in what a planner wrote, None if there is none. sp writes its name alone;
    vanilla writes it as the tag that opens its reply."""
    if task == "vanilla":
        return strategies.split_tag(text)[0]
    return strategies.parse(text)


def answer_dialogues_as(
    system: System,
    loaded: LoadedModel,
    config,
    dialogues: list[Dialogue],
    domain: Domain,
    replied: Container[str],
) -> list[dict]:
    """The record of what a system answers at the T supporter turns of each dialogue, on the human
    history.

    "predicted" and "logps" are those of a Plan. "replies" (T) follow the first seed's strategies,
    and "followed" (T) names these; without a generator, or if the dialogue's id is not in
    `replied`, "replies" is []. "gold" and "human" (T) are the strategies and texts of the human
    supporter. `config` is evaluate.py's."""
    plans = plan_strategies(system, loaded, config, dialogues, domain)
    records, waiting, planned = [], [], []  # those that wait for replies, under what is planned
    for dialogue, plan in zip(dialogues, plans):
        human = dialogue.supporter_turns()
        record = {
            "dialogue": dialogue.id,
            "gold": [turn.strategy for turn in human],
            "predicted": plan.predicted,
            "logps": plan.logps,
            "human": [turn.text for turn in human],
            "replies": [],
            # A generator needs a strategy, even if the planner wrote none.
            "followed": [name or domain.strategies[-1] for name in plan.predicted[0]],
        }
        records.append(record)
        if dialogue.id not in replied or not system.generator:
            continue
        if system.generator == "vanilla" and plan.written:
            # Free decoding has written the replies already, each behind its strategy.
            record["followed"] = [name or "none" for name in plan.predicted[0]]
            record["replies"] = [domain.strategies.split_tag(text)[1] for text in plan.written]
        else:
            waiting.append(record)
            planned.append((dialogue, list(enumerate(record["followed"]))))
    if waiting:
        task, adapter = system.generator, system.generator_adapter
        asked, model, tokenizer = loaded.configs[task, adapter], loaded.model, loaded.tokenizer
        with loaded.with_adapter(task, adapter):
            written = write_dialogues(model, tokenizer, asked, task, planned, domain)
        for record, replies in zip(waiting, written):
            record["replies"] = replies
    return records


def annotate_and_judge(
    annotator: Annotator | None, judge: Judge | None, dialogue: Dialogue, answers: dict[str, dict]
) -> list[dict]:
    """Add to the record of each system what is said of its replies. `answers` is {system: record}.

    The annotator's annotations become "judged". The judge's ratings become "ratings", and its
    verdicts against the first system "verdicts". Returns the judge's transcript."""
    transcript = []
    first = next(iter(answers))
    first_replies = answers[first]["replies"]
    for name, record in answers.items():
        replies = record["replies"]
        if not replies:
            continue
        if annotator:
            record["judged"] = annotate(annotator, dialogue, record)
        if judge:
            record["ratings"], lines = rate(judge, dialogue, replies)
            transcript += [{"system": name, **line} for line in lines]
        if judge and name != first and first_replies:
            record["verdicts"], lines = contest(judge, dialogue, replies, first_replies)
            transcript += [{"system": name, "against": first, **line} for line in lines]
    return transcript


def annotate(annotator: Annotator, dialogue: Dialogue, record: dict) -> list[dict]:
    """The annotator's annotations on the replies of a record, as dictionaries."""
    cases = []
    for turn, reply in enumerate(record["replies"]):
        cases.append(Case(dialogue.history(turn), record["followed"][turn], reply))
    return [asdict(annotation) for annotation in annotator(cases)]
