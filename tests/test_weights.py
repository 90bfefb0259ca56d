"""pytest tests/test_weights.py

Pairs that weigh, in files, in batches and in the loss."""

import json
from dataclasses import replace
from importlib.resources import files
from types import SimpleNamespace

import pytest
import torch
from scripts import lines, run

import train_dpo
from desc import DescError
from desc.pairs import Pair, encode_pair, read_pairs
from desc.storage.files import write_lines
from desc.training.batches import make_batches

PROMPT = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
PAIR = Pair("sp/7/0", "sp", "7", 0, "Question", "strategy mismatch", PROMPT, "Question", "Others")
SHIPPED = files("desc") / "data" / "sp" / "pairs.jsonl"


def test_a_weight_is_written_unless_it_is_1(tmp_path):
    pairs = [PAIR, replace(PAIR, id="half", weight=0.5)]
    write_lines(tmp_path / "pairs.jsonl", [pair.record() for pair in pairs])
    first, second = lines(tmp_path / "pairs.jsonl")
    assert "weight" not in first and second["weight"] == 0.5
    assert read_pairs(tmp_path / "pairs.jsonl", "sp") == pairs
    null = replace(PAIR, id="null")
    write_lines(tmp_path / "pairs.jsonl", [null.record() | {"weight": None}])
    assert read_pairs(tmp_path / "pairs.jsonl", "sp") == [null]


@pytest.mark.parametrize(
    "written, named",
    [
        ("0", "0"),
        ("-1", "-1"),
        ("NaN", "nan"),
        ("Infinity", "inf"),
        ("1e999", "inf"),
        ("1e-999", "0.0"),
        ('"x"', "a string"),
        ("true", "True"),
        ("[1]", "a list"),
    ],
)
def test_a_weight_that_is_no_positive_number_is_refused(tmp_path, written, named):
    record = json.dumps(PAIR.record())[:-1] + f', "weight": {written}}}'
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n" + record)
    with pytest.raises(DescError) as error:
        read_pairs(path, "sp")
    told = "field 'weight' should be a positive, finite number, not"
    assert str(error.value) == f"{path}: line 2: {told} {named}"


def test_an_item_has_its_pairs_weight_and_tells_it(toy):
    """The repr is digested to tell whether a run under way has the same input."""
    item = encode_pair(toy[1], replace(PAIR, weight=0.25), 2048, ("seeker", "supporter"))
    assert item.weight == 0.25
    assert "weight=0.25, desirable=True" in repr(item)


def test_a_batch_is_closed_by_what_its_pairs_weigh():
    """Dialogues have 4 pairs of 0.625, so each weighs 2.5, and the batch size is 6. Two dialogues
    weigh 5. A third would make 7.5, which is further from 6."""
    pairs = [SimpleNamespace(dialogue=str(i // 4), weight=0.625) for i in range(20)]
    batches = make_batches(pairs, 6, "dialogue", seed=0, epoch=0)
    assert [len(batch) for batch in batches] == [8, 8, 4]
    # One by one: 9 weigh 5.625; a tenth would make 6.25, which is nearer to 6.
    batches = make_batches(pairs, 6, "pair", seed=0, epoch=0)
    assert [len(batch) for batch in batches] == [10, 10]
    assert sorted(map(id, sum(batches, []))) == sorted(map(id, pairs))


@pytest.mark.parametrize("batch_size", [1, 7, 16, 32])
def test_pairs_that_share_a_weight_of_1_are_batched_as_one_pair_is(batch_size):
    """Each turn has one pair, or eight of 1/8; a dialogue has 1 to 9 turns."""
    turns = [(str(d), turn) for d in range(40) for turn in range(1 + d * 7 % 9)]
    one = [SimpleNamespace(dialogue=d, turn=turn, weight=1) for d, turn in turns]
    eight = [SimpleNamespace(dialogue=d, turn=t, weight=1 / 8) for d, t in turns for _ in range(8)]
    of_turns = [
        [[(pair.dialogue, pair.turn) for pair in batch] for batch in batches]
        for batches in (
            make_batches(one, batch_size, "dialogue", 0, 0),
            [batch[::8] for batch in make_batches(eight, batch_size, "dialogue", 0, 0)],
        )
    ]
    assert of_turns[0] == of_turns[1]


class Stopped(Exception):
    pass


@pytest.fixture
def train(tmp_path, monkeypatch):
    """A function that runs train_dpo.py on pairs, in this process, with the toy as its own
    reference. It returns the lines of metrics.jsonl. With stop_at=n the run dies before its n-th
    step, and it returns that step's gradient and what it would log."""
    monkeypatch.setattr("desc.training.run.claim_folders", lambda *folders: None)
    step = train_dpo.clip_and_step

    def run_on(pairs, *flags, out="out", stop_at=0):
        for name in ("pairs.jsonl", "pairs.valid.jsonl"):
            write_lines(tmp_path / "own" / name, [pair.record() for pair in pairs])
        given = [*COMMON, "--pairs", tmp_path / "own", "--out", tmp_path / out, *flags]
        monkeypatch.setattr("sys.argv", ["train_dpo.py", *map(str, given)])

        def watch(run, config, sums, trained_on):
            if run.step == stop_at - 1:
                gradient = torch.cat([p.grad.flatten() for p in run.trained.values()])
                raise Stopped(gradient, {name: float(value) for name, value in sums.items()})
            step(run, config, sums, trained_on)

        monkeypatch.setattr(train_dpo, "clip_and_step", watch)
        if not stop_at:
            train_dpo.main()
            return untimed(tmp_path / out / "sp" / "dpo" / "metrics.jsonl")
        with pytest.raises(Stopped) as stopped:
            train_dpo.main()
        return stopped.value.args

    return run_on


COMMON = ("--task", "sp", "--model", "toy", "--sft", "base", "--dropout", 0)
COMMON += ("--dtype", "float32", "--eval-dialogues", 1, "--eval-every", 0, "--lr", 3e-3)


def untimed(path) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "time"} for line in lines(path)]


def weigh(count, *weights):
    """The first shipped pairs, with `weights` one after another, over and over."""
    pairs = read_pairs(SHIPPED, "sp")[:count]
    return [replace(pair, weight=weights[i % len(weights)]) for i, pair in enumerate(pairs)]


@pytest.mark.parametrize("cut", [(), ("--max-tokens", 1, "--share", "none")])
def test_a_batchs_gradient_is_the_weighted_mean_of_its_pairs_gradients(train, cut):
    """Of three pairs that weigh 0.25, 1.5 and 0.75, together 2.5; in one micro-batch or in three.
    So are its metrics."""
    pairs = weigh(3, 0.25, 1.5, 0.75)
    together, metrics = train(pairs, *cut, stop_at=1)
    alone = [train([pair], stop_at=1) for pair in pairs]
    expected = sum(pair.weight / 2.5 * gradient for pair, (gradient, _) in zip(pairs, alone))
    assert len({float(gradient.norm()) for gradient, _ in alone}) == 3
    torch.testing.assert_close(together, expected, rtol=1e-3, atol=1e-6)
    for name in train_dpo.METRICS:
        mean = sum(pair.weight / 2.5 * logged[name] for pair, (_, logged) in zip(pairs, alone))
        assert metrics[name] == pytest.approx(mean, rel=1e-5), name


def test_a_pair_that_weighs_2_counts_as_two_pairs(train):
    """In training and in validation, over several steps."""
    twice, *others = weigh(12, 2, 1, 1)[::2]
    again = replace(twice, id="again", weight=1.0)
    flags = ("--batch-size", 3, "--epochs", 2)
    two = train([replace(twice, weight=1.0), again, *others], *flags, out="two")
    one = train([twice, *others], *flags, out="one")
    assert len(one) == len(two) > 4
    assert abs(one[-1]["valid/loss"] - one[0]["valid/loss"]) > 0.01
    for ours, theirs in zip(one, two):
        for sizes in (ours, theirs):
            sizes.pop("turns_cut", None)
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_a_common_factor_of_all_weights_changes_nothing_but_the_batches(train):
    light, heavy = weigh(8, 0.25, 0.5), weigh(8, 0.5, 1)
    first = train(light, "--batch-size", 1, out="light")
    second = train(heavy, "--batch-size", 2, out="heavy")
    assert len(first) > 3
    for ours, theirs in zip(first, second, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_run_goes_on_with_the_same_weights_alone(train):
    pairs, flags = weigh(12, 0.5, 1.5), ("--batch-size", 3, "--save-every", 1)
    whole = train(pairs, *flags, out="whole")
    assert len(whole) > 4
    train(pairs, *flags, stop_at=3)
    with pytest.raises(DescError, match="begun with another input"):
        train(weigh(12, 1.5, 0.5), *flags)
    assert train(pairs, *flags) == whole


def test_ranks_weigh_as_one_process_does(train, tmp_path):
    """Two processes, with small micro-batches."""
    pairs, flags = weigh(20, 0.2, 0.7, 1, 1.6), ("--batch-size", 8, "--max-tokens", 700)
    single = train(pairs, *flags)
    out = tmp_path / "ranks"
    given = (*COMMON, *flags, "--pairs", tmp_path / "own", "--out", out)
    run("train_dpo.py", *given, ranks=2)
    for ours, theirs in zip(untimed(out / "sp/dpo/metrics.jsonl"), single, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_the_estimate_counts_the_steps_that_training_takes(train, capsys):
    pairs, flags = weigh(20, 0.2, 0.7), ("--batch-size", 3, "--epochs", 2)
    steps = train(pairs, *flags)[-1]["step"]
    capsys.readouterr()
    train(pairs, *flags, "--estimate", 1)
    assert f"steps                 {steps:9,}\n" in capsys.readouterr().out
