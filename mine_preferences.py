r"""Inferential Preference Mining: what fine-tuned modules get wrong on their own training dialogues
becomes their DPO pairs.

    python mine_preferences.py --task sp        with the adapter in OUT/sp/sft, on the sample
    python mine_preferences.py --task rg --routing paper --annotator endpoint \
        --endpoint http://127.0.0.1:8000/v1 --endpoint-model M

The modules answer every supporter turn of the training and validation dialogues, on the human
history (T 0.7, top_p 0.95, one sample, as the paper does). --routing says what makes a pair
(desc/mining.py: find_error):

    released    each module is asked for its own part; sp needs no annotator
    paper       both answer together, and what the annotator finds decides whose fault it is
    all-to-rg   the ablation: every error is the generator's

With --exact a planner's strategies are not drawn. Every wrong one makes a pair, which weighs as
much as it is likely, so DPO's loss is what it would be over all draws on average.

Writes OUT/TASK/pairs.jsonl, pairs.valid.jsonl and mining.json, and for train_dpo.py --objective kto
unpaired.jsonl and unpaired.valid.jsonl. Keeps every answer with its annotation in answers.jsonl (in
OUT/mined if the modules answer together). Killed and run again, it goes on where it was. Test
dialogues are never mined, because that would leak.

--review N writes N judged answers to OUT/review.csv, for people to label. --agreement FILE compares
such labels, or other labelled turns, with the annotator."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from desc import DescError, cli
from desc.calibration import planned_digest, read_calibration
from desc.domain import Domain
from desc.esconv import first, load_splits
from desc.evaluation.tables import mining_table
from desc.flags import MANY, AskConfig, SampleConfig, TaskConfig, answer_settings, flag, parse
from desc.judging import agreement
from desc.judging.annotator import make_annotator
from desc.judging.endpoint import Endpoint
from desc.judging.forms import refuse_edited
from desc.judging.sampler import EndpointSampler
from desc.mining import (
    ROUTINGS,
    Answer,
    account,
    annotate,
    answer_dialogues,
    label,
    route,
    weigh_strategies,
)
from desc.sampling import LocalSampler, group_dialogues
from desc.storage.adapters import adapter_digest
from desc.storage.base import base_digest
from desc.storage.files import write_json, write_lines
from desc.storage.journal import Journal, journal_settings, work_key
from desc.training import ranks


@dataclass
class MineConfig(SampleConfig, AskConfig, TaskConfig):
    train_dialogues: int = flag(
        0,
        "training dialogues to mine, the first of the split; 0 means all",
        at_least=0,
        at_most=MANY,
    )
    routing: Literal[ROUTINGS] = flag("released", "what makes a pair, and for which module")
    sampler: Literal["local", "endpoint"] = flag(
        "local", "who answers: --model with the adapters in OUT, or --endpoint"
    )
    sft: Literal["adapter", "base"] = flag(
        "adapter",
        "whose errors are mined: the SFT adapter's in OUT/TASK/sft, or the base model's; the"
        " shipped sample does without an adapter",
    )
    samples: int = flag(1, "answers per turn; equal ones make one pair", at_least=1, at_most=1000)
    exact: bool = flag(
        False,
        "for --task sp: draw no strategy, but make a pair of each wrong one, weighted by how often"
        " it would be drawn",
    )
    min_confidence: float = flag(
        0.0, "annotations that are less sure make no pair", at_least=0, at_most=1
    )
    review: int = flag(0, "judged answers to write to OUT/review.csv", at_least=0, at_most=MANY)
    agreement: str | None = flag(
        None, "a file with labels to hold against an annotator, instead of mining"
    )
    label_map: str | None = flag(None, "for --agreement: JSON from the file's labels to ours")
    held_out: float = flag(
        0.2,
        "for --agreement: the share of labelled dialogues, the last, that are used, as in"
        " train_sft.py",
        at_least=0,
        at_most=1,
    )

    @property
    def together(self) -> bool:
        """Whether planner and generator answer together, as they will be used."""
        return self.routing != "released" and self.task != "vanilla"

    @property
    def writes_replies(self) -> bool:
        """Whether answers have replies, or name strategies alone."""
        return self.together or self.task != "sp"

    @property
    def loads_model(self) -> bool:
        """Whether anything is computed here, or an endpoint does it all."""
        mines_here = self.sampler == "local" and not self.agreement
        return mines_here or self.annotator == "local"

    @property
    def review_file(self) -> Path:
        return Path(self.out) / "review.csv"


def check_flags(config: MineConfig) -> None:
    """Raises DescError if flags do not go together."""
    if config.routing != "released" and config.annotator == "none":
        raise DescError(
            f"--routing {config.routing} goes by what an annotator says: give --annotator local or"
            " endpoint"
        )
    if config.routing == "all-to-rg" and config.task != "rg":
        raise DescError("--routing all-to-rg makes pairs for --task rg alone")
    unjudged = (config.routing, config.task) == ("released", "sp")
    if config.review and (config.annotator == "none" or unjudged):
        raise DescError(
            "--review needs judged answers: give --annotator, and for sp another --routing than"
            " released"
        )
    local_planner = config.sampler == "local" and (config.together or config.task != "rg")
    if config.calibrate != "none" and not local_planner:
        raise DescError("--calibrate needs a planner that answers here, with --sampler local")
    if config.calibrate != "none" and config.sft == "base":
        raise DescError("--calibrate is fitted for the SFT planner, so it needs --sft adapter")
    needed = {"task": "sp", "routing": "released", "sampler": "local", "samples": 1}
    for name, value in (needed | {"annotator": "none"}).items():
        if config.exact and getattr(config, name) != value:
            raise DescError(
                f"--exact makes pairs of a planner's whole distribution, so it needs --{name}"
                f" {value}, not {getattr(config, name)}"
            )
    if config.review:
        refuse_edited(config.review_file)


def adapter_folder(config: MineConfig, module: str) -> Path:
    return Path(config.out) / module / "sft"


def make_sampler(config: MineConfig, model, tokenizer, endpoint, modules, domain: Domain):
    """Who answers, as --sampler says."""
    if config.sampler == "endpoint":
        return EndpointSampler(endpoint, config, domain)
    for module in modules:
        otherwise = f"mines the base model; first run train_sft.py --task {module}"
        if config.sft == "base":
            print(f"mines the base model as {module}")
        elif config.data == "sample":
            cli.use_adapter(config, model, adapter_folder(config, module), module, otherwise)
        else:  # one's own data: a step that failed should not go unnoticed
            cli.use_adapter(config, model, adapter_folder(config, module), module)
    planner_folder = adapter_folder(config, modules[0])
    calibration = read_calibration(planner_folder, config, domain.strategies)
    return LocalSampler(model, tokenizer, config, domain, calibration)


def journal_settings_of(config: MineConfig, modules: tuple[str, ...]) -> dict:
    """What the answers depend on; answers that were made with anything else are not reused."""
    reading = modules if config.annotator == "none" else (*modules, "annotate")
    irrelevant = ("train_dialogues", "agreement", "min_confidence", "review", "label_map")
    settings = answer_settings(config, reading, *irrelevant, "held_out")
    if config.together:  # all-to-rg routes the same answers in another way
        settings |= {"task": "sp and rg", "routing": "paper"}
    adapters = list(modules) if config.sampler == "local" else []
    if config.annotator == "local":
        adapters.append("annotate")
    digests = [adapter_digest(adapter_folder(config, module)) for module in adapters]
    base = base_digest(config.model) if config.loads_model else ""
    if config.calibrate != "none":
        settings["fitted on"] = planned_digest(adapter_folder(config, modules[0]))
    return settings | {"adapters": digests, "base": base}


def write_preferences(config: MineConfig, ending: str, answered, domain: Domain) -> None:
    """Write the pairs and the unpaired answers that the answers of one split make, (dialogue,
    answers) each, and say what came of them. `ending` is that of the files' names."""
    settings = (domain, config.min_confidence, config.layout)
    routed = route(config.task, config.routing, answered, *settings)
    unpaired = label(config.task, config.routing, answered, *settings)
    files = config.folder / f"pairs{ending}", config.folder / f"unpaired{ending}"
    for file, preferences in zip(files, (routed.pairs, unpaired)):
        write_lines(file, (preference.record() for preference in preferences))
    counts = account(config.task, routed, domain)
    if ending == ".jsonl":
        write_json(config.folder / "mining.json", counts)
    print(f"\n{files[0]}\n{mining_table(counts)}")
    desirable = sum(answer.label for answer in unpaired)
    print(f"\n{files[1]}\n{len(unpaired)} answers, {desirable} desirable, for --objective kto")


def main():
    config = parse(MineConfig)
    device = ranks.join_ranks()
    check_flags(config)
    uses_endpoint = "endpoint" in (config.annotator, config.sampler)
    endpoint = Endpoint.of(config) if uses_endpoint else None
    folder = Path(config.out) / "mined" if config.together else config.folder
    modules = ("sp", "rg") if config.together else (config.task,)
    wanted = journal_settings_of(config, modules)
    if config.loads_model:
        cli.resolve_auto(config, device, journal_settings(folder, "answers", wanted))
    domain = config.read_domain()
    splits = load_splits(config.data, config.split_file, domain.strategies, config.seed)

    model, tokenizer = None, None
    if config.loads_model:
        model, tokenizer = cli.load_model(config, device)
    annotator = make_annotator(config, model, tokenizer, endpoint)
    if config.agreement:
        if endpoint:  # what it answers is kept until all is measured
            cli.claim_folders(Path(config.out) / "agreement")
            endpoint.keep_answers(Path(config.out) / "agreement")
        if ranks.rank() == 0:
            print(agreement.measure_agreement(config, splits["test"], domain, annotator))
        if endpoint:
            endpoint.print_unread()
            if ranks.rank() == 0:
                endpoint.kept.discard()
        return
    sampler = make_sampler(config, model, tokenizer, endpoint, modules, domain)

    split_of, work = {}, {}  # by key: the split of a dialogue, and the dialogue
    for split, count in (("train", config.train_dialogues), ("valid", config.eval_dialogues)):
        for dialogue in first(splits[split], count):
            key = work_key(split, dialogue, domain.strategies)
            split_of[key], work[key] = split, dialogue
    settings = journal_settings_of(config, modules)
    cli.claim_folders(folder, config.folder)
    if endpoint:
        endpoint.keep_answers(folder)
    processes = ranks.rank(), ranks.world_size(), ranks.wait_for_all
    journal = Journal(folder, "answers", settings, *processes)
    done = sum(key in journal.done for key in work)
    if done:
        print(f"{done} of {len(work)} dialogues are answered already in {folder}")
    groups = [{key: dialogue} for key, dialogue in work.items()]
    if config.sampler == "local" and config.writes_replies:  # samples are so many more branches
        groups = group_dialogues(work, tokenizer, config.max_tokens // config.samples)
    mine = journal.left_for_me(groups)
    left = sum(key not in journal.done for group in mine for key in group)
    bar = cli.progress(model, left, f"mine {config.task}", "dialogues")
    for group in mine:
        dialogues = list(group.values())
        if config.exact:
            answered = [weigh_strategies(sampler, dialogue) for dialogue in dialogues]
        else:
            answered = answer_dialogues(
                sampler, config.task, config.routing, dialogues, config.samples
            )
        for key, dialogue, answers in zip(group, dialogues, answered):
            if key in journal.done:  # a kill cut the group in two
                continue
            if annotator and config.writes_replies:
                answers = annotate(annotator, config.routing, dialogue, answers)
            record = {"key": key, "split": split_of[key], "dialogue": dialogue.id}
            journal.append(record | {"answers": [asdict(answer) for answer in answers]})
            bar.update()
    bar.close()

    ranks.wait_for_all()
    if endpoint:
        endpoint.print_unread()
    if ranks.rank() > 0:
        return
    answers_of = {}  # by key
    finished = journal.finish(list(work))
    if endpoint:
        endpoint.kept.discard()
    for record in finished:
        answers_of[record["key"]] = [Answer.read(answer) for answer in record["answers"]]
    for split, ending in (("train", ".jsonl"), ("valid", ".valid.jsonl")):
        answered = [(work[key], answers_of[key]) for key in work if split_of[key] == split]
        write_preferences(config, ending, answered, domain)
    cli.save_config(config, config.folder, settings["base"])
    if config.review:
        judged = [(work[key], answer) for key in work for answer in answers_of[key]]
        agreement.write_review(
            config.review_file, judged, config.review, config.seed, domain.speakers
        )


if __name__ == "__main__":
    cli.run(main)
