"""pytest tests/test_exact.py

Mining that draws no strategy, but keeps a planner's whole distribution (--exact)."""

import itertools
import json
from contextlib import nullcontext
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from scripts import lines

import mine_preferences
import train_dpo
from desc import DescError, sampling
from desc.calibration import Calibration
from desc.domain import ESCONV
from desc.esconv import Dialogue, Turn
from desc.evaluation.tables import mining_table
from desc.losses import dpo_loss
from desc.mining import Answer, account, answer_dialogues, route, weigh_strategies
from desc.sampling import LocalSampler

NAMES = ESCONV.strategies
QUESTION, RESTATEMENT, FEELINGS = NAMES[:3]


def dialogue_of(*strategies):
    turns = []
    for strategy in strategies:
        turns += [Turn("seeker", "Hi"), Turn("supporter", "Hello", strategy)]
    return Dialogue("7", tuple(turns))


@pytest.fixture
def planner(monkeypatch):
    """A function that makes a sampler whose planner has these probabilities, a row per turn."""
    monkeypatch.setattr(sampling, "strategy_items", lambda *_: [])
    monkeypatch.setattr(sampling, "adapter_only", lambda *_: nullcontext())

    def make(probabilities, temperature=1.0, top_p=1.0, calibration=None, seed=0):
        rows = torch.tensor(probabilities, dtype=torch.float32)
        monkeypatch.setattr(sampling, "score", lambda *_: (rows / rows.sum(-1, keepdim=True)).log())
        flags = {"temperature": temperature, "top_p": top_p, "seed": seed}
        config = SimpleNamespace(**flags, max_length=0, max_tokens=0)
        return LocalSampler(None, None, config, ESCONV, calibration)

    return make


HALVES = [8, 4, 2, 1, 1, 0, 0, 0]


def test_weights_by_hand(planner):
    """Probabilities ∝ 8, 4, 2, 1, 1 are squared by temperature 0.5: 64, 16, 4, 1, 1 of 86. The
    first two hold 0.93 of the mass, more than top_p, so they alone are drawn: 64 and 16 of 80."""
    sampler = planner([HALVES, HALVES], 0.5, 0.9)
    dialogue = dialogue_of(QUESTION, FEELINGS)
    answers = weigh_strategies(sampler, dialogue)
    assert [(answer.turn, answer.strategy, answer.reply) for answer in answers] == [
        (0, QUESTION, ""),
        (0, RESTATEMENT, ""),
        (1, QUESTION, ""),
        (1, RESTATEMENT, ""),
    ]
    assert [answer.weight for answer in answers] == pytest.approx([0.8, 0.2, 0.8, 0.2])
    pairs = route("sp", "released", [(dialogue, answers)], ESCONV).pairs
    assert [(pair.id, pair.chosen, pair.rejected) for pair in pairs] == [
        (f"sp/7/0/{RESTATEMENT}", QUESTION, RESTATEMENT),
        (f"sp/7/1/{QUESTION}", FEELINGS, QUESTION),
        (f"sp/7/1/{RESTATEMENT}", FEELINGS, RESTATEMENT),
    ]
    assert [pair.weight for pair in pairs] == pytest.approx([0.2, 0.8, 0.2])
    assert {pair.error for pair in pairs} == {"strategy mismatch"}


def test_a_calibrated_planner_is_weighed_as_it_is_drawn(planner):
    """An offset of log 4 makes ∝ 8, 4 into ∝ 8, 16."""
    offsets = torch.tensor([0, 4, 1, 1, 1, 1, 1, 1]).double().clamp(min=1).log()
    sampler = planner([[8, 4, 0, 0, 0, 0, 0, 0]], calibration=Calibration(1.0, offsets))
    answers = weigh_strategies(sampler, dialogue_of(QUESTION))
    assert [answer.weight for answer in answers] == pytest.approx([1 / 3, 2 / 3])


def test_at_temperature_0_the_pairs_are_those_that_are_drawn(planner):
    sampler = planner([HALVES, HALVES], 0)
    dialogue = dialogue_of(QUESTION, FEELINGS)
    (drawn,) = answer_dialogues(sampler, "sp", "released", [dialogue], 1)
    routed = [
        route("sp", "released", [(dialogue, answers)], ESCONV)
        for answers in (drawn, weigh_strategies(sampler, dialogue))
    ]
    assert routed[0].pairs == routed[1].pairs
    assert json.dumps(account("sp", routed[0], ESCONV)) == json.dumps(
        account("sp", routed[1], ESCONV)
    )


def loss_of(pairs) -> dict[str, float]:
    """A DPO loss of each pair, by what distinguishes it, from log-probabilities by its turn and its
    rejected strategy."""
    losses = {}
    for pair in pairs:
        place = torch.Generator().manual_seed(10 * pair.turn + NAMES.index(pair.rejected))
        logps = torch.randn(4, 1, generator=place, dtype=torch.float64)
        losses[pair.turn, pair.rejected] = float(dpo_loss(*logps, beta=0.5)[0])
    return losses


def test_the_loss_is_what_drawn_pairs_have_on_average(planner):
    """Two turns with eight strategies make 64 draws. Over these, by their probability, the mean of
    the summed losses divided by the mean number of pairs is the exact loss. So it is over 4,000
    minings with other seeds, but for luck."""
    dialogue = dialogue_of(FEELINGS, QUESTION)
    rows = [[3, 5, 4, 2, 2, 2, 1, 1], [9, 1, 2, 3, 1, 1, 2, 1]]
    sampler = planner(rows)
    exact = route("sp", "released", [(dialogue, weigh_strategies(sampler, dialogue))], ESCONV).pairs
    assert len(exact) == 14
    losses, total = loss_of(exact), sum(pair.weight for pair in exact)
    loss = sum(pair.weight * losses[pair.turn, pair.rejected] for pair in exact) / total

    def summed(strategies) -> tuple[float, int]:
        """The summed losses and the number of pairs of one draw."""
        answers = [Answer(turn, strategy, "") for turn, strategy in enumerate(strategies)]
        pairs = route("sp", "released", [(dialogue, answers)], ESCONV).pairs
        assert {pair.weight for pair in pairs} <= {1}
        return sum(losses[pair.turn, pair.rejected] for pair in pairs), len(pairs)

    mean_sum = mean_count = 0.0
    for first, second in itertools.product(range(8), repeat=2):
        probability = rows[0][first] / 20 * rows[1][second] / 20
        one_sum, count = summed((NAMES[first], NAMES[second]))
        mean_sum += probability * one_sum
        mean_count += probability * count
    assert total == pytest.approx(mean_count, abs=1e-6)
    assert total == pytest.approx(16 / 20 + 11 / 20, abs=1e-6)  # all but the human strategies
    assert loss == pytest.approx(mean_sum / mean_count, abs=1e-6)

    drawn = [summed(planner(rows, seed=seed).plan(dialogue, [0, 1])) for seed in range(4000)]
    sums, counts = zip(*drawn)
    assert sum(counts) / 4000 == pytest.approx(mean_count, abs=0.05)
    assert sum(sums) / sum(counts) == pytest.approx(loss, abs=0.03)


def test_the_account_counts_by_weight(planner):
    """Of three turns' mass 0.5 is on the human strategy in each of the first two, and 1/8 in the
    last: 1.125 makes no pair, and 1.875 does."""
    dialogue = dialogue_of(QUESTION, QUESTION, FEELINGS)
    answers = weigh_strategies(planner([HALVES] * 3), dialogue)
    counts = account("sp", route("sp", "released", [(dialogue, answers)], ESCONV), ESCONV)
    assert counts["answers"] == 3
    assert counts["pairs"] == 12
    assert counts["weight of pairs"] == 1.88
    assert counts["kept"] == {"strategy mismatch": 1.88}
    assert counts["dropped"] == {"the human answer": 1.12}  # 1.125, to the even digit
    assert (
        counts["chosen strategies"] | {QUESTION: 1, FEELINGS: 0.88} == counts["chosen strategies"]
    )
    # 0.5 of the last turn; 1/4 of each; 1/8 of the first two; 1/16 of each
    mass = dict(zip(NAMES, [0.5, 0.75, 0.25, 0.19, 0.19, 0, 0, 0]))
    assert counts["rejected strategies"] == mass
    table = mining_table(counts)
    assert table.startswith(
        "3 answers, 12 pairs that weigh 1.88 together; all counts are by weight"
    )
    assert "kept: strategy mismatch 1.88 (62.7 %)" in table


def test_the_account_warns_by_weight(planner):
    """40 turns with 0.5 of the mass on one strategy, 0.25 on the next: all chosen strategies are
    one, and 8 of 12 parts of what is rejected are one."""
    dialogue = dialogue_of(*[RESTATEMENT] * 40)
    answers = weigh_strategies(planner([HALVES] * 40), dialogue)
    counts = account("sp", route("sp", "released", [(dialogue, answers)], ESCONV), ESCONV)
    assert counts["warnings"] == [
        f"{RESTATEMENT} makes 100 % of the chosen strategies: DPO would learn little else",
        f"{QUESTION} makes 67 % of the rejected strategies: DPO would learn little else",
    ]


def test_a_weighted_answer_comes_back_from_its_record():
    answer = Answer(0, "Others", "", weight=0.1)
    assert Answer.read(json.loads(json.dumps(asdict(answer)))) == answer


@pytest.mark.parametrize(
    "given, needed",
    [
        ("--task rg", "--task sp, not rg"),
        ("--task vanilla", "--task sp, not vanilla"),
        ("--task sp --routing paper --annotator local", "--routing released, not paper"),
        ("--task sp --sampler endpoint", "--sampler local, not endpoint"),
        ("--task sp --samples 2", "--samples 1, not 2"),
        ("--task sp --annotator local", "--annotator none, not local"),
    ],
)
def test_exact_is_for_a_planner_alone(given, needed, monkeypatch):
    monkeypatch.setattr("sys.argv", ["mine_preferences.py", "--exact", *given.split()])
    with pytest.raises(DescError) as error:
        mine_preferences.main()
    told = "--exact makes pairs of a planner's whole distribution, so it needs "
    assert str(error.value) == told + needed


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A function that mines the toy in this process, and returns the folder of the pairs."""
    monkeypatch.setattr("desc.cli.claim_folders", lambda *folders: None)
    monkeypatch.setattr("desc.training.run.claim_folders", lambda *folders: None)

    def call(*flags):
        given = ("--task", "sp", "--model", "toy", "--dtype", "float32", "--sft", "base")
        given += ("--train-dialogues", 4, "--eval-dialogues", 1, "--out", tmp_path, *flags)
        monkeypatch.setattr("sys.argv", ["mine_preferences.py", *map(str, given)])
        mine_preferences.main()
        return tmp_path / "sp"

    return call


def test_exact_mining_goes_on_where_it_was_and_is_not_mixed_with_draws(mine, capsys):
    folder = mine("--exact")
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    settings, first, *_ = made["answers.jsonl"].splitlines(keepends=True)
    assert json.loads(settings)["exact"] is True

    (folder / "answers.jsonl").unlink()
    (folder / "answers.0.jsonl").write_bytes(settings + first + b'{"key": "cut o')
    with pytest.raises(DescError, match="begun with another exact"):
        mine()
    capsys.readouterr()
    mine("--exact")
    assert "1 of 5 dialogues are answered already" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == made

    mine()
    assert "was made with other settings; it is replaced" in capsys.readouterr().out
    assert not any("weight" in pair for pair in lines(folder / "pairs.jsonl"))


def test_exact_pairs_train_in_as_many_steps_as_drawn_ones(mine, monkeypatch, tmp_path, capsys):
    """At temperature 10 all of the toy's strategies are drawn now and then, so each of the 7 wrong
    ones makes a pair. With what the human strategy weighs they weigh 1 a turn."""
    drawn = len(lines(mine("--temperature", 10, "--top-p", 1) / "pairs.jsonl"))
    folder = mine("--exact", "--temperature", 10, "--top-p", 1)
    pairs = lines(folder / "pairs.jsonl")
    counts = json.loads((folder / "mining.json").read_text())
    turns = {(pair["dialogue"], pair["turn"]) for pair in pairs}
    assert counts["answers"] == len(turns)
    assert len(pairs) == counts["pairs"] == 7 * len(turns)
    weight = sum(pair["weight"] for pair in pairs)
    assert counts["weight of pairs"] == pytest.approx(weight, abs=0.01)
    assert weight == pytest.approx(drawn, rel=0.2)
    assert weight + counts["dropped"]["the human answer"] == pytest.approx(len(turns), abs=0.01)

    flags = "--task sp --model toy --sft base --batch-size 8 --lr 3e-3 --eval-dialogues 1"
    monkeypatch.setattr("sys.argv", ["train_dpo.py", *flags.split(), "--out", str(tmp_path)])
    capsys.readouterr()
    train_dpo.main()
    start, *_, end = lines(folder / "dpo" / "metrics.jsonl")
    assert 2 < end["step"] <= len(turns) / 8 + 1
    assert start["valid/loss"] == pytest.approx(0.693147, abs=1e-6)
    assert end["valid/loss"] < 0.69
