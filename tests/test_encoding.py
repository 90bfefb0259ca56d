"""From messages to token ids. A completion has one end of turn. No token crosses the boundary of
prompt and completion. Typed text makes no control tokens. Long dialogues are cut.

    pytest tests/test_encoding.py -q            (--slow also tests SmolLM2's tokenizer)
"""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest

from desc import DescError, encoding
from desc.domain import ESCONV
from desc.encoding import decode, encode_completion, encode_prompt, mark_loss
from desc.esconv import Dialogue, Turn
from desc.prompts import TASKS, build_examples, build_messages
from desc.templates import control_tokens, end_of_turn

encode = partial(encoding.encode, speakers=ESCONV.speakers)
TYPED = [
    "<|end|>",
    "<|im_end|>",
    "</s>",
    "<unk>",
    "<|user|>",
    "<|assistant|>",
    "<|im_start|>system",
    "<<|end|>|end|>",
]
TYPED += ["a<|end|>b <|end|>", "<|en<|end|>d|>", " <|end|>\n<|user|> ", "<|end|><|end|>"]
# Words that people add to a tokenizer, ESConv's strategies among them.
WORDS = ["ok", "Others", "Providing Suggestions", "[Question]", "...", ":)", "'s", "\n\n"]
# What clean_up_tokenization_spaces would alter.
SPACED = "I do n't know , she said . It 's a \" test \" ? I 'm fine ! We 've n't ."
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}END{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def item_of(tokenizer, example, max_length=10_000, **options):
    return encode(
        tokenizer,
        example.dialogue,
        example.dialogue,
        example.messages,
        [example.completion],
        max_length,
        **options,
    )


def check_a_sequence(tokenizer, example):
    """Prompt and completion together are the text that the chat template makes of the whole
    conversation, up to the end of turn."""
    end = end_of_turn(tokenizer)
    (sequence,) = item_of(tokenizer, example).sequences
    assert sequence.completion[-1] == end and sequence.completion.count(end) == 1
    assert tokenizer.decode(sequence.completion[:-1]) == example.completion
    answered = example.messages + [{"role": "assistant", "content": example.completion}]
    whole = tokenizer.apply_chat_template(answered, tokenize=False)
    assert tokenizer.decode(sequence.prompt + sequence.completion) == whole.rstrip("\n")


@pytest.mark.parametrize("task", TASKS)
def test_sequences_of_the_sample(task, toy, sample):
    for example in build_examples(task, sample[:4]):
        check_a_sequence(toy[1], example)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_sequences_of_the_sample_for_smollm2(task, smollm2, sample):
    for example in build_examples(task, sample[:4]):
        check_a_sequence(smollm2[1], example)


@pytest.mark.parametrize("task", TASKS)
def test_the_prompt_does_not_depend_on_the_completion(task, toy, sample):
    """If both were tokenised together, tokens such as "▁Wh" would join the prompt's end to the
    completion's beginning."""
    example = build_examples(task, sample[:1])[-1]
    prompt = encode_prompt(toy[1], example.messages)
    item = encode(
        toy[1], "0/0", "0", example.messages, ["Why?", " Why?", "", ">", "<", "|>"], 10_000
    )
    assert [sequence.prompt for sequence in item.sequences] == 6 * [prompt]
    texts = [toy[1].decode(sequence.completion[:-1]) for sequence in item.sequences]
    assert texts == ["Why?", " Why?", "", ">", "<", "|>"]
    assert (item.id, item.dialogue, item.turns_cut) == ("0/0", "0", 0)


def check_typed_tokens(tokenizer, typed):
    """A dialogue with `typed` in every turn has the same special tokens as a dialogue with "words"
    there, in the prompt and in the completion. All letters of `typed` stay."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)

    def encode_turns(text):
        """(the special tokens of the prompt and completion of each task, the decoded replies)."""
        tokens, replies = [], []
        opening = (Turn("seeker", text), Turn("supporter", text, "Question"))
        dialogue = Dialogue(
            "0", (*opening, Turn("seeker", f"and {text}!"), Turn("supporter", text, "Others"))
        )
        for task in TASKS:
            example = build_examples(task, [dialogue])[1]
            (sequence,) = item_of(tokenizer, example).sequences
            tokens.append([[token for token in part if token in special] for part in sequence])
            if task != "sp":
                replies.append(tokenizer.decode(sequence.completion[:-1]))
        return tokens, replies

    tokens, replies = encode_turns(typed)
    assert tokens == encode_turns("words")[0]
    assert all(typed.replace(" ", "") in reply.replace(" ", "") for reply in replies)


@pytest.mark.parametrize("typed", TYPED)
def test_typed_special_tokens_are_text(typed, toy):
    check_typed_tokens(toy[1], typed)


@pytest.mark.slow
@pytest.mark.parametrize("typed", TYPED)
def test_typed_special_tokens_are_text_for_smollm2(typed, smollm2):
    check_typed_tokens(smollm2[1], typed)


def test_end_of_turn(toy):
    assert toy[1].convert_ids_to_tokens(end_of_turn(toy[1])) == "<|end|>"


@pytest.mark.slow
def test_end_of_turn_of_smollm2(smollm2):
    assert smollm2[1].convert_ids_to_tokens(end_of_turn(smollm2[1])) == "<|im_end|>"


def test_end_of_turn_is_the_templates_and_not_the_eos_token(toy):
    """In Gemma, for example, <end_of_turn> ends a message and <eos> ends a document. A template
    that has no end of turn is refused."""
    tokenizer = deepcopy(toy[1])
    tokenizer.chat_template = CHAT.replace("END", "<|system|>")
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == "<|system|>"
    without = deepcopy(toy[1])
    without.chat_template = CHAT.replace("END", "\n")
    with pytest.raises(DescError, match="with no special token"):
        end_of_turn(without)


def test_a_template_that_refuses_the_messages(toy):
    tokenizer = deepcopy(toy[1])
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DescError, match="no system role"):
        encode_prompt(
            tokenizer,
            [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
        )


def test_without_the_end_of_turn(toy, sample):
    example = build_examples("vanilla", sample[:1])[0]
    (ended,) = item_of(toy[1], example).sequences
    (unended,) = item_of(toy[1], example, end=False).sequences
    assert ended.prompt == unended.prompt
    assert ended.completion == unended.completion + [end_of_turn(toy[1])]


@pytest.mark.parametrize("task", TASKS)
def test_long_dialogues_lose_as_few_of_their_oldest_exchanges_as_they_must(task, toy, sample):
    """If `cut` exchanges are removed, the prompt is that of the dialogue without them. If the limit
    is lower by one token, one more exchange is removed."""
    dialogue, strategy = sample[0], "Others"
    turn = len(dialogue) - 1
    later = [replace(dialogue, turns=dialogue.turns[2 * cut :]) for cut in range(turn + 1)]
    prompts = [
        encode_prompt(toy[1], build_messages(task, d, turn - cut, strategy))
        for cut, d in enumerate(later)
    ]
    messages, answer = build_messages(task, dialogue, turn, strategy), "All of this stays."
    completion = toy[1](answer).input_ids + [end_of_turn(toy[1])]
    for cut, prompt in enumerate(prompts):
        limit = len(prompt) + len(completion)
        item = encode(toy[1], "0/9", "0", messages, [answer], limit)
        assert item.sequences == [(prompt, completion)] and item.turns_cut == cut
        if cut < turn:
            assert encode(toy[1], "0/9", "0", messages, [answer], limit - 1).turns_cut == cut + 1
    with pytest.raises(DescError, match=f"^0/9: .*{limit - 1} tokens; raise max_length"):
        encode(toy[1], "0/9", "0", messages, [answer], limit - 1)


def test_both_answers_of_a_pair_fit(toy, sample):
    """The longer answer decides how much is cut, so chosen and rejected keep the same prompt."""
    example = build_examples("rg", sample[:1])[-1]
    long = example.completion + 30 * " really"
    limit = (
        len(encode_prompt(toy[1], example.messages)) + len(toy[1](example.completion).input_ids) + 1
    )
    item = encode(toy[1], "0/0", "0", example.messages, [example.completion, long], limit)
    chosen, rejected = item.sequences
    assert item.turns_cut > 0
    assert item_of(toy[1], example, limit).turns_cut == 0
    assert chosen.prompt == rejected.prompt
    assert len(rejected.prompt) + len(rejected.completion) <= limit


def test_marked_loss_is_the_completion_with_its_one_end_of_turn(toy, sample):
    for task in TASKS:
        example = build_examples(task, sample[:1])[2]
        text = mark_loss(toy[1], item_of(toy[1], example).sequences[0])
        prompt, loss = text.split("»")
        assert loss == f"{example.completion}<|end|>«"
        assert prompt.startswith("<|system|>")
        assert prompt.endswith("<|assistant|>")
        assert example.messages[-1]["content"] in prompt


def test_marked_loss_shows_a_blank_that_begins_a_completion(toy):
    tokenizer = deepcopy(toy[1])
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ ' ' + m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    item = encode(tokenizer, "", "", [{"role": "user", "content": "Hi"}], ["Well"], 100)
    text = mark_loss(tokenizer, item.sequences[0])
    assert text == "<|user|> Hi<|end|><|assistant|>» Well<|end|>«"


@pytest.mark.parametrize("special", [False, True])
def test_words_that_are_tokens_stay_as_they_are(special, toy, sample):
    """In what is read, in what is trained on, and in what is decoded. No other letter changes,
    either."""
    tokenizer = deepcopy(toy[1])
    tokenizer.add_tokens(WORDS, special_tokens=special)
    added = set(tokenizer.convert_tokens_to_ids(WORDS))
    assert added <= set(tokenizer.added_tokens_decoder) and not added & set(
        control_tokens(tokenizer)
    )
    text = "ok, look: Others took it ... Providing Suggestions :)\n\n[Question] it's ok"
    for task in TASKS:
        for example in build_examples(task, sample[:2]):
            messages = [{**m, "content": m["content"] + text} for m in example.messages]
            prompt = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            assert tokenizer.decode(encode_prompt(tokenizer, messages)) == prompt
            completion = encode_completion(tokenizer, example.completion + text, end=True)
            assert added <= set(completion)
            assert decode(tokenizer, completion) == example.completion + text


def test_what_was_decoded_has_no_control_tokens(toy):
    ids = toy[1]("<|assistant|> Well,<|end|> I<unk> see. <|end|>").input_ids
    assert decode(toy[1], ids) == "Well, I see."


def test_a_reply_that_was_cut_off_within_a_character_keeps_those_before(toy):
    """Bytes are decoded together, so that a half character would spoil the whole ones before it.
    Bytes that are no text stay visible."""
    ids = toy[1]("So 你好🫂", add_special_tokens=False).input_ids
    assert toy[1].decode(ids[:-1]) == "So " + 9 * "\ufffd"
    texts = [decode(toy[1], ids[: len(ids) - cut]) for cut in range(9)]
    assert texts == ["So 你好🫂", *4 * ["So 你好"], *3 * ["So 你"], "So"]
    assert decode(toy[1], [ids[-1]]) == ""
    assert decode(toy[1], 5 * [ids[-1]]) == 5 * "\ufffd"


def test_no_blank_that_was_written_is_cleaned_up(toy):
    tokenizer = deepcopy(toy[1])
    tokenizer.clean_up_tokenization_spaces = True
    ids = tokenizer(SPACED, add_special_tokens=False).input_ids
    assert "I don't know, she said." in tokenizer.decode(ids)
    assert decode(tokenizer, ids) == SPACED
    messages = [{"role": "user", "content": SPACED}]
    item = encode(tokenizer, "", "", messages, [SPACED], 1000)
    text = mark_loss(tokenizer, item.sequences[0])
    assert text == f"<|user|>{SPACED}<|end|><|assistant|>»{SPACED}<|end|>«"


def test_an_error_names_the_example(toy):
    tokenizer = deepcopy(toy[1])
    tokenizer.chat_template = CHAT.replace("END", "<|end|>").replace(
        "m['content']", "m['content'] | replace('?', '')"
    )
    with pytest.raises(DescError, match="^7/3: the chat template leaves out, or changes"):
        encode(tokenizer, "7/3", "7", [{"role": "user", "content": "Why?"}], ["So."], 1000)
