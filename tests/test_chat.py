"""pytest tests/test_chat.py"""

import re
import signal
import subprocess
import time
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from scripts import command, run
from tokenizers import decoders, pre_tokenizers

from desc.calibration import Calibration
from desc.chat import conversation as chat
from desc.chat.safety import CRISIS, OPENING, in_danger
from desc.domain import ESCONV, Strategies
from desc.encoding import decode
from desc.esconv import Dialogue, Turn, load_dialogues
from desc.flags import SampleConfig
from desc.lora import adapter_only, add_adapter, lora_layers, save_adapter
from desc.sampling import grow_branches, score_strategies, stream_text

BAR = r"^  (.+?) +█* +(\d+\.\d)%(?:  ← (\w+))?$"


@pytest.fixture(scope="module")
def out(toy, tmp_path_factory):
    """A folder with adapters of random numbers: a planner with SFT alone, and a generator with SFT
    and DPO."""
    out = tmp_path_factory.mktemp("out")
    for seed, folder in enumerate(("sp/sft", "rg/sft", "rg/dpo")):
        model = deepcopy(toy[0])
        torch.manual_seed(seed)
        add_adapter(model, "a")
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.adapters["a"].B, std=0.1)
        save_adapter(model, out / folder)
    return out


@pytest.fixture
def start(toy, out):
    """A function that starts a conversation with the flags it is given."""

    def start(**flags) -> chat.Chat:
        model = deepcopy(toy[0])
        config = SampleConfig(**{"max_new_tokens": 12, "out": str(out)} | flags)
        return chat.Chat(model, toy[1], config, ESCONV, chat.attach(model, config))

    return start


def test_a_calibrated_planner_shows_what_it_draws_from(start, out):
    """With one strategy 3 nats likelier than before, and the others alike among themselves."""
    plain, shifted = start(), start()
    offsets = torch.zeros(8, dtype=torch.float64)
    offsets[2] = 3
    shifted.calibration = Calibration(1.0, offsets)
    dialogue = Dialogue("", (Turn("seeker", "My dog died."),))
    shown = []
    for conversation in (plain, shifted):
        with redirect_stdout(StringIO()) as printed:
            conversation.plan(dialogue)
        shown.append([float(share) for _, share, _ in re.findall(BAR, printed.getvalue(), re.M)])
    before, after = (torch.tensor(shares) for shares in shown)
    expected = (before.log() + offsets).softmax(0) * 100
    torch.testing.assert_close(after.double(), expected, atol=0.15, rtol=0.02)
    flags = ("--model", "toy", "--out", out, "--calibrate", "prior")
    printed = run("desc.chat", *flags, stdin="", fails=True)
    assert "sp/sft/validation.jsonl is missing" in printed


def test_a_piped_conversation(out, tmp_path):
    """The input has every command and every mistake. The conversation ends with the input."""
    typed = [
        "/compare", "", "My dog di\udced.", "/compare", "/strategy Informatoin",
        "/strategy information",
        "I don’t want to live any more.", f"/save {tmp_path}", f"/save {tmp_path / 'chat.json'}",
        "/undo", "/undo", "/undo",
        "/frobnicate", "/help", "word " * 30000,
    ]  # fmt: skip
    output = run(
        "desc.chat", "--model", "toy", "--out", out, "--max-new-tokens", 12, stdin="\n".join(typed)
    )
    assert output.startswith(OPENING)
    assert "Traceback" not in output
    assert output.endswith("Goodbye, and take care.\n")
    parts = [
        f"finds no adapter in {out}/sp/dpo: train_dpo.py --task sp makes one",
        "planner: sft, generator: dpo",
        "There is no reply yet", "← drawn", "supporter [", "before DPO [", "after DPO [",
        "did you mean 'Information'?",
        "follows Information", CRISIS, "← forced", "supporter [Information]: ",
        f"/save {tmp_path}: cannot be written",
        "(Saved in ", "(Taken back: 'I don’t want", "(Taken back: 'My dog di�.'",
        "There is no reply yet",
        "/frobnicate is no command", chat.HELP,
        "your message: the latest turn alone has more than 2048 tokens",
    ]  # fmt: skip
    end = 0
    for part in parts:
        assert part in output[end:], part
        end = output.index(part, end) + len(part)
    assert output.count(CRISIS) == 1
    (saved,) = load_dialogues(tmp_path / "chat.json")
    assert [turn.text for turn in saved.turns[::2]] == [
        "My dog di�.",
        "I don’t want to live any more.",
    ]
    replies = re.findall(r"supporter \[(.+?)\]: (.*?)\n(?:before|/save)", output, re.S)
    assert [(turn.strategy, turn.text) for turn in saved.turns[1::2]] == replies
    assert replies[1][0] == "Information"
    assert not list(tmp_path.parent.rglob("*.tmp"))


def test_an_interrupt_stops_a_reply_and_at_the_prompt_the_conversation(out, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # ASCII has no blocks for bars.
    flags = ("--model", "toy", "--out", out, "--max-length", 100000, "--max-new-tokens", 50000)
    pipes = {
        "stdin": -1,
        "stdout": -1,
        "stderr": -1,
        "text": True,
        "bufsize": 0,
        "errors": "replace",
    }

    def allow_interrupts():
        """A shell's background jobs ignore SIGINT, and their child processes inherit that."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    talk = subprocess.Popen(command("desc.chat", *flags), preexec_fn=allow_interrupts, **pipes)

    def read_until(text):
        output = ""
        while not output.endswith(text):
            character = talk.stdout.read(1)
            assert character, output + talk.stderr.read()
            output += character
        return output

    talk.stdin.write("hello\n")
    assert "?" in read_until("supporter [")
    read_until("]: ")
    for _ in range(20):
        talk.stdout.read(1)
    talk.send_signal(signal.SIGINT)
    read_until("(stopped)\n")
    talk.stdin.write("/undo\n")
    read_until("(Taken back: 'hello' and its reply.)\n")
    time.sleep(1)  # until it waits for input again
    talk.send_signal(signal.SIGINT)
    assert talk.communicate(timeout=60) == ("\nGoodbye, and take care.\n", "")
    assert talk.returncode == 0


def test_bars_are_the_planners_exact_probabilities(start, capsys):
    talk = start(temperature=0)
    # The names have equal lengths, because the toy is almost certain of a shorter name.
    talk.domain = replace(ESCONV, strategies=Strategies(tuple("ABCDEFGH")))
    for message in ("I failed my exam.", "Twice!"):
        talk.take(message)
        bars = re.findall(BAR, capsys.readouterr().out, re.M)
        dialogue = Dialogue("", talk.turns)
        with adapter_only(talk.model, "sp-sft"):
            layout = talk.config.layout
            config = SimpleNamespace(layout=layout, max_length=2048, max_tokens=2048)
            parts = talk.model, talk.tokenizer, "sp", [dialogue], talk.domain, config
            logps = score_strategies(*parts)
        exact = 100 * logps[-1].exp()
        assert [name for name, _, _ in bars] == list(talk.domain.strategies)
        assert exact.max() < 90
        torch.testing.assert_close(
            torch.tensor([float(p) for _, p, _ in bars]), exact, atol=0.051, rtol=0
        )
        (drawn,) = [name for name, _, how in bars if how == "drawn"]
        assert drawn == talk.domain.strategies[int(exact.argmax())] == talk.turns[-1].strategy


def test_a_forced_strategy_stays_until_the_planner_chooses_again(start, capsys):
    talk = start(temperature=0)
    talk.take("Hello")
    (first,) = {turn.strategy for turn in talk.turns[1::2]}
    other = next(name for name in ESCONV.strategies if name != first)
    for line in (
        "/undo",
        f"/strategy {other.upper()}",
        "Hello",
        "And you?",
        "/strategy nonsense",
        "So?",
        "/undo",
        "/undo",
        "/undo",
    ):
        if line == "/strategy nonsense":
            assert "nonsense" not in capsys.readouterr().out
        talk.take(line)
        assert all(turn.strategy == other for turn in talk.turns[1::2])
    assert "'nonsense' is no strategy; there are Question," in capsys.readouterr().out
    assert not talk.turns
    talk.take("/strategy")
    talk.take("Hello")
    assert talk.turns[1].strategy == first


def test_compare_repeats_the_reply_and_shows_what_it_was_before(start, capsys):
    talk = start()
    for message in ("I failed my exam.", "Twice!"):
        talk.take(message)
    before, reply = talk.turns, talk.turns[-1]
    capsys.readouterr()
    talk.take("/compare")
    sft, dpo = re.fullmatch(
        r"before DPO \[(?:.+?)\]: (.*)\nafter DPO \[(?:.+?)\]: (.*)\n",
        capsys.readouterr().out,
        re.S,
    ).groups()
    assert dpo == reply.text != sft
    assert talk.turns == before
    with adapter_only(talk.model, "rg-sft"):
        assert sft == talk.say(Dialogue("", before[:-1]), reply.strategy, "sft", "")
    talk.stages = {"sp": ["sft"], "rg": ["sft"]}
    capsys.readouterr()
    talk.take("/compare")
    assert (
        f"before DPO [{reply.strategy}]: {sft}\n"
        f"after DPO: there is no adapter in {talk.config.out}/rg/dpo\n" == capsys.readouterr().out
    )


@pytest.mark.parametrize("tokens, kept", [(5, True), (0, False)])
def test_what_was_written_before_an_interrupt_stays(start, capsys, monkeypatch, tokens, kept):
    def interrupted(*args):
        for step, drawn in enumerate(grow_branches(*args)):
            if step == tokens:
                raise KeyboardInterrupt
            yield drawn

    talk = start()
    monkeypatch.setattr(chat, "grow_branches", interrupted)
    talk.take("Hello")
    output = capsys.readouterr().out
    assert "… (stopped)" in output
    assert ("your message is taken back" in output) is not kept
    assert [turn.speaker for turn in talk.turns] == (["seeker", "supporter"] if kept else [])
    if kept:
        assert output.endswith(f"]: {talk.turns[1].text} … (stopped)\n")
    # No adapter stays switched off.
    assert not any(layer.off for layer in lora_layers(talk.model).values())


def test_an_overlong_conversation_forgets_its_beginning_and_says_so_once(start, capsys):
    dialogue = Dialogue("", (Turn("seeker", "word " * 40),))
    prompt = start().read("rg", dialogue, [""], 2048, ESCONV.strategies[1]).sequences[0].prompt
    talk = start(max_length=len(prompt) + 12 + 30)
    for turn in range(4):
        talk.take("word " * 40)
        assert len(talk.turns) == 2 * turn + 2
        warnings = capsys.readouterr().out.count("outgrown --max-length")
        assert warnings == (1 if turn == 1 else 0)


def test_a_reply_streams_in_whole_characters(toy):
    tokenizer = toy[1]
    text = "\n  She said “née”,\n  then 🫂 and 你好 …  "
    ids = tokenizer(text, add_special_tokens=False).input_ids
    halves = [n for n in range(len(ids)) if tokenizer.decode(ids[:n]).endswith("\ufffd")]
    for n in (halves[0], halves[-1]):  # A reply may end within a character.
        streamed = "".join(stream_text(tokenizer, ids[:n]))
        assert "\ufffd" not in streamed
        assert text.strip().startswith(streamed)
    pieces = list(filter(None, stream_text(tokenizer, ids)))
    assert "".join(pieces) == text.strip()
    assert pieces[-3:] == [" 你", "好", " …"]


@pytest.mark.parametrize("blank", ["never", "first", "always"])
def test_a_reply_streams_without_losing_a_letter(blank, toy):
    """Whatever the tokenizer's own settings do to blanks, and after whichever token."""
    tokenizer = deepcopy(toy[1])
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.add_tokens(["ok", "[Question]"], special_tokens=True)
    inner = tokenizer.backend_tokenizer
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=blank)
    to_text = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=blank)]
    inner.decoder = decoders.Sequence(to_text)
    text = "[Question] I do n't know , ok ? 🫂👩\u200d👩 né e .\n\n It 's  you , 你好 !"
    ids = tokenizer(f" {text} <|end|>", add_special_tokens=False).input_ids
    pieces = list(stream_text(tokenizer, ids))
    assert "".join(pieces) == decode(tokenizer, ids) == text
    assert max(map(len, pieces)) <= len("[Question]") + 1
    for n in range(len(ids)):
        begun = decode(tokenizer, ids[:n])
        assert "".join(stream_text(tokenizer, ids[:n])) == begun
        assert text.startswith(begun)


@pytest.mark.parametrize(
    "text",
    [
        "I want to die", "i just wanna die.", "I’m thinking about suicide", "im suicidal",
        "I dont want to live anymore", "kms",
        "I don’t want to be here any more", "I'm going to kill myself", "I might end my life",
        "I want to end it all",
        "I wish I was dead", "I wish I'd never been born",
        "Everyone would be better off without me",
        "there is no reason to live", "I'm tired of living",
        "I want to go to sleep and never wake up",
        "I don't think I can go on.", "I hurt myself last night", "I've been cutting again",
        "I cut my wrists",
        "I took an overdose", "I swallowed a whole bottle of pills", "I want to jump off a bridge",
        "I don't feel safe at home",
        "my husband hits me", "MY DAD BEATS ME", "he threatened to kill me",
        "she's going to hurt me", "I was raped",
        "He has a gun", "I'm going to hurt someone", "I could kill him", "I want\nto die",
        "I fear for my life",
    ],
)  # fmt: skip
def test_danger_is_noticed(text):
    assert in_danger(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "I was killing time", "this job is killing me", "I cut my hair", "we are cutting costs",
        "I'm dying to see that film",
        "my phone died", "I hurt my back", "it hurts me when he says that",
        "it hit me how alone I am", "They kicked me out",
        "I feel safe now", "I don't want to live with my parents",
        "I don't want to hurt her feelings", "I ran 5 kms",
        "I'm dead tired", "shoot me an email", "I'm in danger of losing my job",
        "I want my job back",
        "my grandmother died last year", "The deadline is tomorrow",
    ],
)  # fmt: skip
def test_idioms_are_no_danger(text):
    assert not in_danger(text)
