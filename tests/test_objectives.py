"""pytest tests/test_objectives.py

train_dpo.py --objective: what each trains on, where it starts, and that it goes on to the bit.
tests/test_losses.py checks the losses themselves.

KTO's metrics by hand: three answers weigh 1, 1 and 2, of which the first is desirable. Beta is 0.5
and the drift 0.

    log π   log π_ref   r    loss                     in all: weights 1, 1, 2
    -10     -12          1   1 − σ(1) = 0.268941      loss (0.268941 + 0.268941 + 2 · 0.5) / 4
    -20     -18         -1   1 − σ(1) = 0.268941      rejected: r (−1 + 2 · 0) / 3 = −1/3
     -6      -6          0   1 − σ(0) = 0.5           and log π (−20 − 12) / 3 = −32/3

Two of the three rewards have the right sign, which weigh 2 of 4."""

import math
from dataclasses import asdict, replace
from importlib.resources import files
from types import SimpleNamespace

import pytest
import torch
from scripts import lines, run

import train_dpo
from desc import DescError
from desc.encoding import Item, TokenSequence
from desc.flags import training_settings
from desc.pairs import Unpaired, read_pairs
from desc.storage.checkpoint import read_checkpoint, write_checkpoint
from desc.storage.files import write_lines
from desc.training import objectives

SHIPPED = files("desc") / "data" / "sp" / "pairs.jsonl"
COMMON = ("--task", "sp", "--model", "toy", "--sft", "base", "--dtype", "float32")
COMMON += ("--eval-dialogues", 1, "--eval-every", 0, "--lr", 3e-3, "--batch-size", 3)


def own_pairs(count=8):
    return read_pairs(SHIPPED, "sp")[:count]


def unpair(pairs):
    """Both answers of each pair on their own."""
    answers = []
    for pair in pairs:
        for number, text in enumerate((pair.chosen, pair.rejected)):
            facts = (f"{pair.id}/{number}", "sp", pair.dialogue, pair.turn, "", "")
            answers.append(Unpaired(*facts, pair.prompt, text, label=number == 0))
    return answers


class Died(Exception):
    pass


@pytest.fixture
def train(tmp_path, monkeypatch):
    """A function that runs train_dpo.py on the shipped pairs, or for kto on their answers, in this
    process, with the toy as its own reference. It returns the lines of metrics.jsonl without their
    times. With die_at=n the run dies before its n-th step."""
    monkeypatch.setattr("desc.training.run.claim_folders", lambda *folders: None)
    step = train_dpo.clip_and_step
    for name in ("pairs.jsonl", "pairs.valid.jsonl"):
        write_lines(tmp_path / "own" / name, [pair.record() for pair in own_pairs()])
    for name in ("unpaired.jsonl", "unpaired.valid.jsonl"):
        records = [answer.record() for answer in unpair(own_pairs())]
        write_lines(tmp_path / "own" / name, records)

    def run_with(*flags, out="out", die_at=0):
        given = [*COMMON, "--pairs", tmp_path / "own", "--out", tmp_path / out, *flags]
        monkeypatch.setattr("sys.argv", ["train_dpo.py", *map(str, given)])

        def step_or_die(run, *others):
            if run.step == die_at - 1:
                raise Died
            step(run, *others)

        monkeypatch.setattr(train_dpo, "clip_and_step", step_or_die)
        if die_at:
            with pytest.raises(Died):
                train_dpo.main()
            return None
        train_dpo.main()
        return untimed(tmp_path / out / "sp" / "dpo" / "metrics.jsonl")

    return run_with


def untimed(path) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "time"} for line in lines(path)]


# --- where each starts, and where it goes ---------------------------------------------------------


@pytest.mark.parametrize(
    "objective, at_start",
    # ipo's aim is 1 / (2 · 0.1) = 5, and h is 0. kto's reward is 0, and 1 − σ(0) = 0.5.
    [("dpo", math.log(2)), ("ipo", 25.0), ("kto", 0.5), ("simpo", None)],
)
def test_each_objective_starts_at_its_reference_and_learns(objective, at_start, train):
    first, *_, last = train("--objective", objective, "--epochs", 2)
    if at_start:
        assert first["valid/loss"] == pytest.approx(at_start, abs=1e-5)
        assert first["valid/rewards/chosen"] == first["valid/rewards/rejected"] == 0
    assert last["valid/loss"] < 0.99 * first["valid/loss"]
    assert last["valid/rewards/margins"] > first["valid/rewards/margins"]
    assert last["valid/rewards/accuracies"] > 0.5
    assert ("valid/drift" in last) is (objective == "kto")
    assert first.get("valid/drift", 0) == 0 != last.get("valid/drift", 1)


def test_simpo_never_reads_a_reference(train, monkeypatch, capsys):
    def read_reference(*_):
        raise AssertionError("the reference is read")

    monkeypatch.setattr(train_dpo, "reference_logps", read_reference)
    train("--objective", "simpo", "--epochs", 2)
    printed = capsys.readouterr().out
    assert "simpo has no reference; --sft says where training starts" in printed
    assert "training starts from the base model" in printed and "the reference is" not in printed


@pytest.mark.parametrize("objective", ["dpo", "ipo", "simpo", "kto"])
def test_a_run_that_died_goes_on_to_the_bit(objective, train, tmp_path):
    """It dies before its third step. Adapters drop inputs."""
    flags = ("--objective", objective, "--save-every", 1, "--share", "pair")
    whole = train(*flags, out="whole")
    assert whole[-1]["step"] > 2
    train(*flags, die_at=3)
    other = "kto" if objective == "dpo" else "dpo"
    with pytest.raises(DescError, match="was begun with another objective, beta"):
        train(*flags, "--objective", other, "--beta", 0.3)
    assert train(*flags) == whole
    adapters = [
        (tmp_path / out / "sp/dpo/last/adapter_model.safetensors").read_bytes()
        for out in ("out", "whole")
    ]
    assert adapters[0] == adapters[1]


def test_other_labels_are_another_input(train, tmp_path):
    flags = ("--objective", "kto", "--save-every", 1, "--share", "pair")
    train(*flags, die_at=3)
    answers = unpair(own_pairs())
    turned = [replace(answer, label=not answer.label) for answer in answers]
    write_lines(tmp_path / "own" / "unpaired.jsonl", [answer.record() for answer in turned])
    with pytest.raises(DescError, match="was begun with another input"):
        train(*flags)


@pytest.mark.parametrize(
    "objective, epochs, passes",
    [
        ("dpo", 1, 2),
        ("ipo", 1, 2),
        ("simpo", 1, 1),
        ("kto", 1, 3),
        ("dpo", 2, 1.5),
        ("kto", 2, 2.5),
    ],
)
def test_the_estimate_counts_each_forward(objective, epochs, passes, train, capsys):
    """kto also reads the policy to measure its drift. The reference is read once for all epochs."""
    with pytest.raises(FileNotFoundError):  # it trains nothing
        train("--objective", objective, "--epochs", epochs, "--estimate", 1)
    printed = capsys.readouterr().out
    words = [line.split() for line in printed.splitlines()]
    run_of = next(int(line[4].replace(",", "")) for line in words if line[:2] == ["tokens", "of"])
    read = next(int(line[2].replace(",", "")) for line in words if line[:2] == ["tokens", "read"])
    assert read == passes * run_of


# --- numbers by hand ------------------------------------------------------------------------------


def make_config(objective, beta, **others):
    defaults = {"margin": 1.0, "label_smoothing": 0.0, "sft_weight": 0.0}
    return SimpleNamespace(objective=objective, beta=beta, **defaults | others)


def make_item(desirable, weight=1.0):
    sequence = TokenSequence([1], [2])
    return Item("", "", [sequence, sequence], weight=weight, desirable=desirable)


@pytest.mark.parametrize("parts", [[[0, 1, 2]], [[2], [], [0, 1]]])
def test_ktos_metrics_by_hand(parts):
    """In one forest, or in three of which one is empty, as an idle rank's is."""
    batch = [make_item(True), make_item(False), make_item(False, weight=2.0)]
    policy = torch.tensor([[-10.0, -1.0], [-20.0, -1.0], [-6.0, -1.0]])
    reference = torch.tensor([[-12.0, -1.0], [-18.0, -1.0], [-6.0, -1.0]])
    totals = []
    for part in parts:
        members = [batch[i] for i in part]
        rows = policy[part], reference[part]
        loss, sums = objectives.sum_losses(
            make_config("kto", 0.5), batch, members, *rows, torch.tensor(0.0)
        )
        totals.append(torch.cat([loss[None], sums]))
    means = (sum(totals) / 4).tolist()
    assert means[0] == pytest.approx((0.268941 + 0.268941 + 1) / 4, abs=1e-6)
    expected = [means[0], 1, -1 / 3, 4 / 3, 2 / 4, -10, -32 / 3]
    assert means[1:] == pytest.approx(expected, abs=1e-5)


def test_kto_with_answers_of_one_kind_gives_no_nan():
    batch = [make_item(True), make_item(True)]
    rows = torch.full((2, 2), -3.0), torch.full((2, 2), -3.0)
    _, sums = objectives.sum_losses(make_config("kto", 0.5), batch, batch, *rows, torch.tensor(0.0))
    assert (sums / 2).tolist() == [0.5, 0, 0, 0, 0, -3, 0]


@pytest.mark.parametrize(
    "objective, beta, plain",
    # ipo: h = 2/4 − (−1)/2 = 1, and (1 − 5)². simpo: − log σ(−10/4 · 2 + 14/2 · 2 − 1).
    [("dpo", 0.5, 0.201413), ("ipo", 0.1, 16.0), ("simpo", 2.0, math.log(1 + math.exp(-8)))],
)
def test_sft_weight_adds_the_chosen_answers_loss_per_token(objective, beta, plain):
    """The first pair of tests/test_losses.py; its answers have 4 and 2 tokens, so 0.3 · 10/4 = 0.75
    is added."""
    policy, reference = torch.tensor([[-10.0, -14.0]]), torch.tensor([[-12.0, -13.0]])
    lengths = torch.tensor([[4, 2]])
    for weight, added in ((0.0, 0), (0.3, 0.75)):
        config = make_config(objective, beta, sft_weight=weight)
        losses, *_ = objectives.preference_loss(config, policy, reference, lengths)
        assert losses.tolist() == pytest.approx([plain + added], abs=1e-5)


# --- kto's data -----------------------------------------------------------------------------------


def test_micro_batches_change_nothing_for_kto(train):
    """Its drift is the whole batch's."""
    flags = ("--objective", "kto", "--dropout", 0, "--beta", 2, "--share", "pair")
    whole = train(*flags, out="whole")
    parts = train(*flags, "--max-tokens", 1, out="parts")
    assert max(step.get("drift", 0) for step in whole) > 0.01
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_two_ranks_train_kto_as_one_does(train, tmp_path):
    flags = ("--objective", "kto", "--dropout", 0, "--beta", 2, "--max-tokens", 700)
    single = train(*flags)
    out = tmp_path / "ranks"
    given = (*COMMON, *flags, "--pairs", tmp_path / "own", "--out", out)
    run("train_dpo.py", *given, ranks=2)
    for ours, theirs in zip(untimed(out / "sp/dpo/metrics.jsonl"), single, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_kto_learns_from_mined_answers_and_from_answers_in_trls_format(tmp_path):
    common = ("--task", "rg", "--model", "toy", "--out", tmp_path, "--eval-dialogues", 1)
    mined = run("mine_preferences.py", *common, "--train-dialogues", 1, "--max-new-tokens", 6)
    answers = lines(tmp_path / "rg" / "unpaired.jsonl")
    desirable = sum(answer["label"] for answer in answers)
    assert f"{len(answers)} answers, {desirable} desirable" in mined
    pairs = lines(tmp_path / "rg" / "pairs.jsonl")
    rejected = [pair["rejected"] for pair in pairs]
    assert [answer["completion"] for answer in answers if not answer["label"]] == rejected
    printed = run("train_dpo.py", *common, "--objective", "kto", "--batch-size", 4)
    assert f"uses the answers in {tmp_path}/rg" in printed
    assert f"{len(answers)} answers in " in printed

    texts = [("Hi", "Good morning.", True), ("I feel low", "Next!", False), ("Oh", "Yes?", True)]
    records = [dict(zip(("prompt", "completion", "label"), three)) for three in texts]
    for name in ("unpaired.jsonl", "unpaired.valid.jsonl"):
        write_lines(tmp_path / "own" / name, records)
    flags = ("--objective", "kto", "--pairs", tmp_path / "own", "--show-example")
    printed = run("train_dpo.py", *common, *flags)
    assert "»Good morning.<|end|>«" in printed and "»Next!<|end|>«" in printed


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--objective ipo --label-smoothing 0.1", "--label-smoothing changes nothing with --obj"),
        ("--objective kto --label-smoothing 0.1", "--label-smoothing changes nothing with --obj"),
        ("--margin 2", "--margin changes nothing with --objective dpo"),
        ("--objective kto --sft-weight 1", "--sft-weight changes nothing with --objective kto"),
        ("--objective kto", "sp: first run mine_preferences.py --task sp, or give --pairs FOLDER"),
        ("--objective kto --pairs sample", "shipped pairs are not for kto: first run mine_prefer"),
        ("--objective kto --pairs nowhere", "nowhere/unpaired.jsonl: cannot be read"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message, tmp_path, monkeypatch):
    given = ["--task", "sp", "--model", "toy", "--out", str(tmp_path), *flags.split()]
    monkeypatch.setattr("sys.argv", ["train_dpo.py", *given])
    with pytest.raises(DescError) as error:
        train_dpo.main()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_checkpoint_from_before_there_were_objectives_goes_on(tmp_path):
    config = train_dpo.DPOConfig(task="sp", dtype="float32")
    newer = {"objective", "margin", "sft_weight", "history"}
    begun = {name: value for name, value in asdict(config).items() if name not in newer}
    facts = {"step": 5, "best": 2.5, "settings": begun}
    write_checkpoint(tmp_path, facts, {"A": torch.zeros(1)})
    assert read_checkpoint(tmp_path, training_settings(config))[0]["step"] == 5
    for name, value in (("objective", "ipo"), ("margin", 2.0), ("sft_weight", 1.0)):
        other = training_settings(replace(config, **{name: value}))
        with pytest.raises(DescError, match=f"was begun with another {name}: run with the same"):
            read_checkpoint(tmp_path, other)
