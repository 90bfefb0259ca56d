"""Systems: a planner and a generator, or one model for both, each with its adapter, and what they
answer."""

from dataclasses import asdict, replace
from pathlib import Path

from desc import DescError, cli
from desc.esconv import Dialogue
from desc.evaluation.scores import FREQUENCIES
from desc.judging.judge import Judge, contest, rate
from desc.lora import adapter_only
from desc.mining import Annotator, Case
from desc.sampling import draw_strategies, score_strategies, write_dialogue
from desc.storage.adapters import adapter_digest
from desc.strategies import Strategies


def find_systems(config) -> dict[str, dict[str, str]]:
    """{system: {module: adapter}}, as --systems says or OUT holds; `config` is evaluate.py's.

    Raises DescError where one cannot be understood, and where there is none."""
    systems = {}
    for text in config.systems:
        name, _, rest = text.partition("=")
        # sp before rg
        modules = dict(sorted((part.partition(":")[::2] for part in rest.split(",")), reverse=True))
        systems[name] = modules
        right = tuple(modules) in (("sp",), ("sp", "rg"), ("vanilla",)) and all(
            (name, *modules.values())
        )
        if not right or rest.count(",") + 1 > len(modules):
            raise DescError(
                f"--systems {text}: should be NAME=sp:ADAPTER,rg:ADAPTER, NAME=sp:ADAPTER or"
                " NAME=vanilla:ADAPTER"
            )
    if len(systems) < len(config.systems) or FREQUENCIES in systems:
        raise DescError(f"--systems: two have the same name, or one that of {FREQUENCIES!r}")
    for kind in (("sp",) if config.reply_dialogues < 0 else ("sp", "rg"), ("vanilla",)):
        for stage in ("sft", "dpo") if not config.systems else ():
            found = {module: str(Path(config.out) / module / stage) for module in kind}
            if all(adapter_digest(Path(folder)) for folder in found.values()):
                systems[stage if kind[0] == "sp" else f"vanilla {stage}"] = found
    if not systems:
        raise DescError(
            f"no system to evaluate in {config.out}: run train_sft.py and train_dpo.py first, or"
            " give --systems"
        )
    return systems


def load_systems(model, systems: dict[str, dict[str, str]]) -> dict[str, dict[str, str | None]]:
    """Attach every adapter once: {system: {module: the adapter's name in the model, "" for base,
    None for gold}}."""
    attached = {"base": ""}
    for modules in systems.values():
        for module, folder in modules.items():
            if folder not in attached and (module, folder) != ("sp", "gold"):
                cli.use_adapter(
                    model, Path(folder), attached.setdefault(folder, f"adapter{len(attached)}")
                )
    return {
        name: {module: attached.get(folder) for module, folder in modules.items()}
        for name, modules in systems.items()
    }


def plan(
    model,
    tokenizer,
    config,
    module: str,
    adapter: str | None,
    dialogue: Dialogue,
    strategies: Strategies,
):
    """(log-probabilities (T, K) or [], strategies by seed, what was written by the first seed);
    None where none could be parsed."""
    if adapter is None:
        return [], [[turn.strategy for turn in dialogue.turns[1::2]]] * config.seeds, []
    configs = [replace(config, seed=config.seed + i) for i in range(config.seeds)]
    with adapter_only(model, adapter):
        if config.decode == "scored":
            logps = score_strategies(
                model,
                tokenizer,
                module,
                [dialogue],
                strategies,
                config.max_length,
                config.max_tokens,
            )
            return (
                logps.tolist(),
                [draw_strategies(logps, c, dialogue, strategies) for c in configs],
                [],
            )
        unplanned = [(turn, None) for turn in range(len(dialogue))]
        written = [
            write_dialogue(model, tokenizer, c, module, dialogue, unplanned, strategies)
            for c in configs
        ]
    read = strategies.parse if module == "sp" else lambda text: strategies.split_tag(text)[0]
    return [], [[read(text) for text in texts] for texts in written], written[0]


def answer(
    model, tokenizer, config, modules: dict, dialogue: Dialogue, strategies: Strategies, reply: bool
) -> dict:
    """What one system says at every turn of a dialogue."""
    (planner, adapter), (generator, voice) = list(modules.items())[0], list(modules.items())[-1]
    logps, predicted, written = plan(
        model, tokenizer, config, planner, adapter, dialogue, strategies
    )
    # a generator must be told something
    replies, followed = [], [name or strategies[-1] for name in predicted[0]]
    if reply and generator == "vanilla" and written:
        replies, followed = (
            [strategies.split_tag(text)[1] for text in written],
            [name or "none" for name in predicted[0]],
        )
    elif reply and generator != "sp":
        with adapter_only(model, voice):
            replies = write_dialogue(
                model, tokenizer, config, generator, dialogue, list(enumerate(followed)), strategies
            )
    human = dialogue.turns[1::2]
    said = {
        "dialogue": dialogue.id,
        "gold": [turn.strategy for turn in human],
        "predicted": predicted,
        "logps": logps,
    }
    return said | {"human": [turn.text for turn in human], "replies": replies, "followed": followed}


def criticise(
    annotator: Annotator | None, judge: Judge | None, dialogue: Dialogue, said: dict[str, dict]
) -> list[dict]:
    """Add to each system's record what annotator and judge say of its replies; returns the judge's
    transcript."""
    transcript, first = [], next(iter(said))
    for name, record in said.items():
        replies = record["replies"]
        if annotator and replies:
            cases = [
                Case(dialogue.history(turn), record["followed"][turn], reply)
                for turn, reply in enumerate(replies)
            ]
            record["judged"] = [asdict(judged) for judged in annotator(cases)]
        if judge and replies:
            record["ratings"], lines = rate(judge, dialogue, replies)
            transcript += [{"system": name, **line} for line in lines]
            if name != first and said[first]["replies"]:
                record["verdicts"], lines = contest(
                    judge, dialogue, replies, said[first]["replies"]
                )
                transcript += [{"system": name, "against": first, **line} for line in lines]
    return transcript
