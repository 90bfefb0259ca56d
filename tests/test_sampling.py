"""pytest tests/test_sampling.py"""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from architectures import KINDS, build, configure

from desc import attention, sampling
from desc.domain import ESCONV
from desc.encoding import encode
from desc.esconv import Dialogue, Turn
from desc.prompts import Layout, build_messages
from desc.sampling import (
    draw_strategies,
    generate,
    group_dialogues,
    score_strategies,
    temper,
    write_dialogues,
)

CONFIG = SimpleNamespace(
    layout=Layout(strategy_at="system"),
    seed=0,
    temperature=0.7,
    top_p=0.95,
    max_new_tokens=6,
    max_length=2048,
    max_tokens=1024,
)


def test_temper_by_hand():
    """p = (0.5, 0.3, 0.2) in falling order.

    T = 1/2 squares each p and gives (0.25, 0.09, 0.04) / 0.38. top_p keeps a token if the mass
    before it is below top_p. So 0.6 keeps 0.5 and 0.3, which gives (0.5, 0.3) / 0.8. 0.5 keeps only
    the first token, because the mass before the second is 0.5. T = 0 is greedy."""
    logps = torch.tensor([[0.2, 0.5, 0.3]]).log()
    torch.testing.assert_close(temper(logps, 0.5, 1.0), torch.tensor([[0.04, 0.25, 0.09]]) / 0.38)
    torch.testing.assert_close(temper(logps, 1.0, 0.6), torch.tensor([[0.0, 0.625, 0.375]]))
    torch.testing.assert_close(temper(logps, 1.0, 0.5), torch.tensor([[0.0, 1.0, 0.0]]))
    torch.testing.assert_close(temper(logps, 0.0, 1.0), torch.tensor([[0.0, 1.0, 0.0]]))


@pytest.mark.parametrize("task, history", [("sp", "text"), ("sp", "messages"), ("vanilla", "text")])
def test_scored_strategies_are_those_of_each_sequence_alone(toy_on_device, sample, task, history):
    model, tokenizer = toy_on_device
    dialogue, layout = sample[0], Layout(history=history)
    config = SimpleNamespace(layout=layout, max_length=2048, max_tokens=700)
    scored = score_strategies(model, tokenizer, task, [dialogue], ESCONV, config)
    turn = len(dialogue) - 1
    texts = [name if task == "sp" else f"[{name}]" for name in ESCONV.strategies]
    messages, end = build_messages(task, dialogue, turn, layout=layout), task == "sp"
    item = encode(tokenizer, "", "", messages, texts, 2048, ESCONV.speakers, end)
    alone = []
    with torch.no_grad():
        for prompt, completion in item.sequences:
            ids = torch.tensor([prompt + completion], device=model.device)
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
            alone.append(-F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").cpu())
    torch.testing.assert_close(scored[turn], torch.stack(alone).log_softmax(0), atol=1e-4, rtol=0)
    assert (tokenizer.eos_token_id == item.sequences[0].completion[-1]) is (task == "sp")


@pytest.mark.parametrize("kind", ["toy", *(kind for kind in KINDS if "window" in kind)])
def test_branches_of_a_tree_grow_as_each_prompt_would_alone(kind, toy, device):
    """One prompt continues another, one occurs twice, two differ only near their ends, and one
    shares nothing. The continuations end at different lengths."""
    model = deepcopy(toy[0]) if kind == "toy" else build(configure(kind, head_dim=32))
    model.to(device)
    prompts = [
        [5, 6, 7, 8],
        [5, 6, 7, 8, 9, 10, 11],
        [5, 6, 7, 8],
        [5, 6, 7, 8, 9, 10, 12, 13],
        [20, 21],
    ]

    def greedy(stop, max_new_tokens=10):
        model.generation_config.eos_token_id = stop
        config = SimpleNamespace(temperature=0, top_p=1.0, max_new_tokens=max_new_tokens)
        return generate(model, [prompts], config, [0])[0]

    alone = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(10):
                logits = model(torch.tensor([ids], device=device)).logits
                ids.append(int(logits[0, -1].argmax()))
        alone.append(ids[len(prompt) :])
    model.set_attn_implementation(attention.register())
    assert greedy(stop=-1) == alone
    stop = alone[1][4]
    cut = [ids[: ids.index(stop)] if stop in ids else ids for ids in alone]
    assert greedy(stop) == cut != alone
    assert greedy(stop=-1, max_new_tokens=3) == [ids[:3] for ids in alone]
    # Whichever of several end tokens comes first ends a reply.
    stops = [alone[4][3], stop, -1]
    first = [min([ids.index(t) for t in stops if t in ids], default=len(ids)) for ids in alone]
    cut_first = [ids[:n] for ids, n in zip(alone, first)]
    assert greedy(stops) == greedy(stops[::-1]) == cut_first
    assert greedy([stop]) == cut != cut_first != greedy(stops[:1])


def test_draws_depend_on_seed_and_dialogue_alone(toy_on_device, sample):
    """So a resumed mining run draws what an uninterrupted run would have drawn. The global
    generator stays as it was."""
    model, tokenizer = toy_on_device
    dialogue = sample[0]

    def write(config):
        planned = [(turn, "Question") for turn in range(len(dialogue))]
        (replies,) = write_dialogues(model, tokenizer, config, "rg", [(dialogue, planned)], ESCONV)
        return replies

    logps = score_strategies(model, tokenizer, "vanilla", [dialogue], ESCONV, CONFIG)
    strategies = draw_strategies(logps, CONFIG, dialogue, ESCONV.strategies)
    replies = write(CONFIG)
    torch.rand(3)
    state = torch.get_rng_state()
    assert draw_strategies(logps, CONFIG, dialogue, ESCONV.strategies) == strategies
    assert write(CONFIG) == replies
    assert torch.equal(torch.get_rng_state(), state)
    assert write(SimpleNamespace(**vars(CONFIG) | {"seed": 1})) != replies


def test_dialogues_are_answered_at_once_as_each_alone(toy_on_device, sample, monkeypatch):
    """Replies end at different lengths, and those of one dialogue before those of another."""
    model, tokenizer = toy_on_device
    monkeypatch.setattr(model.generation_config, "eos_token_id", list(range(0, len(tokenizer), 5)))
    config = SimpleNamespace(**vars(CONFIG) | {"max_new_tokens": 12})
    planned = [
        (dialogue, [(turn, "Question") for turn in range(count)])
        for dialogue, count in zip(sample, (4, 0, 1, 5))
    ]
    at_once = write_dialogues(model, tokenizer, config, "rg", planned, ESCONV)
    alone = [write_dialogues(model, tokenizer, config, "rg", [one], ESCONV)[0] for one in planned]
    assert at_once == alone
    assert [len(replies) for replies in at_once] == [4, 0, 1, 5]
    lengths = {len(tokenizer(reply).input_ids) for replies in at_once for reply in replies}
    assert len(lengths) > 3


def test_dialogues_are_grouped_by_what_they_say():
    """In order, by 7 tokens: 3 + 4, then 2, which has no room for 9, then 9 alone, then 1."""

    def tokenizer(text, add_special_tokens):
        return SimpleNamespace(input_ids=text.split())

    work = {}
    for key, words in zip("abcde", (3, 4, 2, 9, 1)):
        turns = Turn("seeker", "Hi"), Turn("supporter", "so " * (words - 1), "Others")
        work[key] = Dialogue(key, turns)
    groups = group_dialogues(work, tokenizer, 7)
    assert [list(group) for group in groups] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert groups[0]["b"] is work["b"]


def test_a_reply_keeps_its_blanks_and_added_words(toy, sample, monkeypatch):
    """Also with a tokenizer whose own settings would clean up what it decodes."""
    tokenizer = deepcopy(toy[1])
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.add_tokens(["ok", "[Question]"], special_tokens=True)
    texts = ["I do n't know , ok ?", "[Question] It 's ok ."]
    written = [tokenizer(f" {text}\n<|user|>").input_ids for text in texts]
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in written] != texts
    monkeypatch.setattr(sampling, "generate", lambda *args: [written])
    planned = [(sample[0], [(0, "Question"), (1, "Question")])]
    for task in ("rg", "vanilla"):
        replies = write_dialogues(None, tokenizer, CONFIG, task, planned, ESCONV)
        assert replies == [texts]
