"""Inferential Preference Mining: what fine-tuned modules get wrong on their own training dialogues
becomes their DPO pairs.

    python mine_preferences.py --task sp        with the adapter in OUT/sp/sft, on the sample
    python mine_preferences.py --task rg --routing paper --annotator endpoint \
        --endpoint http://127.0.0.1:8000/v1 --endpoint-model M

The modules answer every supporter turn of the training and validation dialogues on the human
history (T 0.7, top_p 0.95, one sample, as the paper does). --routing says what makes a pair
(desc/mining.py: find_error): released, each module is asked for its own part, and sp needs no
annotator; paper, they answer together, and what the annotator finds decides whose fault it is;
all-to-rg, the ablation. Writes OUT/TASK/pairs.jsonl, pairs.valid.jsonl and mining.json, and keeps
every answer with its judgement in answers.jsonl (in OUT/mined where modules answer together).
Killed and run again it goes on where it was. Test dialogues are never mined: that would leak.

--review N writes N judged answers to OUT/review.csv for people to label; --agreement FILE holds
such labels, or other labelled turns, against the annotator."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from desc import DescError, cli
from desc.esconv import load_splits
from desc.evaluation.tables import mining_table
from desc.judging import agreement
from desc.judging.annotator import make_annotator
from desc.judging.endpoint import Endpoint, EndpointSampler
from desc.mining import ROUTINGS, Answer, account, answer_dialogue, judge, route
from desc.modeling import load
from desc.sampling import LocalSampler
from desc.storage.adapters import adapter_digest
from desc.storage.files import write_json, write_lines
from desc.storage.journal import Journal, journal_settings, work_key
from desc.strategies import read_strategies
from desc.training import ranks


@dataclass
class MineConfig(cli.SampleConfig, cli.AskConfig, cli.TaskConfig):
    train_dialogues: int = cli.flag(
        0, "training dialogues to mine, the first of the split; 0 takes all", at_least=0
    )
    routing: Literal[ROUTINGS] = cli.flag("released", "what makes a pair, and for which module")
    sampler: Literal["local", "endpoint"] = cli.flag(
        "local", "who answers: --model with the adapters in OUT, or --endpoint"
    )
    samples: int = cli.flag(1, "answers a turn; equal ones make one pair", at_least=1)
    min_confidence: float = cli.flag(
        0.0, "judgements that are less sure make no pair", at_least=0, at_most=1
    )
    review: int = cli.flag(0, "judged answers to write to OUT/review.csv", at_least=0)
    agreement: str | None = cli.flag(
        None, "a file with labels to hold against an annotator, instead of mining"
    )
    label_map: str | None = cli.flag(None, "for --agreement: JSON from the file's labels to ours")
    held_out: float = cli.flag(
        0.2,
        "for --agreement: the share of labelled dialogues, the last, that are used, as in"
        " train_sft.py",
        at_least=0,
        at_most=1,
    )


def main():
    config = cli.parse(MineConfig)
    device = ranks.join()
    together = config.routing != "released" and config.task != "vanilla"
    if config.routing != "released" and config.annotator == "none":
        raise DescError(
            f"--routing {config.routing} goes by what an annotator says: give --annotator local or"
            " endpoint"
        )
    if config.routing == "all-to-rg" and config.task != "rg":
        raise DescError("--routing all-to-rg makes pairs for --task rg alone")
    if config.review and (
        config.annotator == "none" or (config.routing, config.task) == ("released", "sp")
    ):
        raise DescError(
            "--review needs judged answers: give --annotator, and for sp another --routing than"
            " released"
        )
    review = Path(config.out) / "review.csv"
    if config.review:
        agreement.refuse_labelled(review)
    endpoint = Endpoint.of(config) if "endpoint" in (config.annotator, config.sampler) else None
    folder = Path(config.out) / "mined" if together else config.folder
    cli.choose_dtype(config, device, journal_settings(folder, "answers"))
    strategies = read_strategies(config.strategies)
    splits = load_splits(config.data, config.split_file, strategies, config.seed)
    work = [("train", d) for d in splits["train"][: config.train_dialogues or None]]
    work += [("valid", d) for d in splits["valid"][: config.eval_dialogues or None]]

    local = config.annotator == "local" or (config.sampler == "local" and not config.agreement)
    model, tokenizer = load(config.model, config.torch_dtype, device) if local else (None, None)
    annotator = make_annotator(config, model, tokenizer, endpoint)
    if config.agreement:
        return ranks.rank() or print(
            agreement.measure(config, splits["test"], strategies, annotator)
        )
    modules = ("sp", "rg") if together else (config.task,)
    if config.sampler == "local":
        for module in modules:
            otherwise = f"mines the base model; first run train_sft.py --task {module}"
            cli.use_adapter(model, Path(config.out) / module / "sft", module, otherwise)
        sampler = LocalSampler(model, tokenizer, config, strategies)
    else:
        sampler = EndpointSampler(endpoint, config, strategies)

    settings = cli.answer_settings(
        config, "train_dialogues", "agreement", "min_confidence", "review", "label_map", "held_out"
    )
    if together:
        # all-to-rg routes the same answers otherwise
        settings |= {"task": "sp and rg", "routing": "paper"}
    used = (*modules * (config.sampler == "local"), *["annotate"] * (config.annotator == "local"))
    settings["adapters"] = [adapter_digest(Path(config.out) / module / "sft") for module in used]
    journal = Journal(folder, "answers", settings, ranks.rank(), ranks.wait_for_all)
    keys = [work_key(split, dialogue, strategies) for split, dialogue in work]
    left = [(k, *one) for k, one in zip(keys, work) if k not in journal.done]
    if len(left) < len(work):
        print(
            f"{len(work) - len(left)} of {len(work)} dialogues are answered already in"
            f" {journal.whole.parent}"
        )
    mine = left[ranks.rank() :: ranks.world_size()]
    bar = cli.progress(model, len(mine), f"mine {config.task}", "dialogues")
    for k, split, dialogue in mine:
        answers = answer_dialogue(sampler, config.task, config.routing, dialogue, config.samples)
        if annotator and (together or config.task != "sp"):
            answers = judge(annotator, config.routing, dialogue, answers)
        journal.append(
            {
                "key": k,
                "split": split,
                "dialogue": dialogue.id,
                "answers": [asdict(answer) for answer in answers],
            }
        )
        bar.update()
    bar.close()

    ranks.wait_for_all()
    if ranks.rank():
        return
    records = journal.finish(keys)
    answers = [[Answer.read(answer) for answer in record["answers"]] for record in records]
    for split, name in (("train", "pairs.jsonl"), ("valid", "pairs.valid.jsonl")):
        routed = [
            (
                said,
                *route(
                    config.task, config.routing, dialogue, said, strategies, config.min_confidence
                ),
            )
            for (which, dialogue), said in zip(work, answers)
            if which == split
        ]
        write_lines(
            config.folder / name, [pair.record() for _, pairs, *_ in routed for pair in pairs]
        )
        found = account(config.task, routed, strategies)
        if split == "train":
            write_json(config.folder / "mining.json", found)
        print(f"\n{config.folder / name}\n{mining_table(found)}")
    cli.save_config(config, config.folder)
    if config.review:
        reviewed = [
            (dialogue, answer) for (_, dialogue), said in zip(work, answers) for answer in said
        ]
        agreement.write_review(review, reviewed, config.review, config.seed)


if __name__ == "__main__":
    cli.run(main)
