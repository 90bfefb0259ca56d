"""Chat templates in the shapes that models have, in our own words. With each, prompt, completion
and end of turn are what the template itself makes of the whole conversation, or it is refused in
one line.

    pytest tests/test_templates.py -q
"""

import json
import shutil
from copy import deepcopy
from dataclasses import asdict
from datetime import date, datetime
from functools import partial

import pytest
import torch
from scripts import ROOT, run
from tokenizers import decoders, normalizers, pre_tokenizers
from transformers import AddedToken
from transformers.utils import chat_template_utils

from desc import DescError, cli, encoding, flags
from desc.domain import ESCONV
from desc.encoding import decode, encode_completion, encode_prompt
from desc.modeling import load
from desc.prompts import TASKS, build_examples, build_messages
from desc.storage import zoo
from desc.storage.journal import Journal, journal_settings
from desc.templates import defuse, end_of_turn, form_of, pin_date, read_template, render
from evaluate import EvalConfig
from mine_preferences import MineConfig
from train_dpo import DPOConfig
from train_sft import SFTConfig

encode = partial(encoding.encode, speakers=ESCONV.speakers)
encode_example = partial(encoding.encode_example, speakers=ESCONV.speakers)
SHIPPED = ROOT / "examples" / "chat_template.jinja"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
MESSAGE = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
CHATML = "{% for m in messages %}" + MESSAGE + "{% endfor %}" + ASK
ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
)
LLAMA3 = "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"  # noqa: E501
ASK_LLAMA3 = (
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
DATED = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0].role == "system" %}
    {%- set said = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set said = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{{- said + "<|eot_id|>" }}
{%- for m in messages %}"""
QWEN3 = """\
{%- for m in messages %}
    {%- set text = m.content %}
    {%- if m.role == "assistant" %}
        {%- set thought = "" %}
        {%- if "</think>" in text %}
            {%- set thought = text.split("</think>")[0].split("<think>")[-1].strip("\\n") %}
            {%- set text = text.split("</think>")[-1].lstrip("\\n") %}
        {%- endif %}
        {%- if loop.last %}
            {%- set text = "<think>\\n" + thought + "\\n</think>\\n\\n" + text.lstrip("\\n") %}
        {%- endif %}
    {%- endif %}
    {{- "<|im_start|>" + m.role + "\\n" + text + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- "<think>\\n\\n</think>\\n\\n" }}
    {%- endif %}
{%- endif %}"""
ZEPHYR = """\
{% for m in messages %}
{% if m.role == 'user' %}
{{ '<|user|>
' + m.content + eos_token }}
{% elif m.role == 'system' %}
{{ '<|system|>
' + m.content + eos_token }}
{% elif m.role == 'assistant' %}
{{ '<|assistant|>
' + m.content + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
# {name: (template, the mark that ends an answer, whether it knows no system message)}
RENDERED = {
    "ChatML": (CHATML, "<|im_end|>", False),
    "ChatML with a system message of its own": (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}"
        "{% endif %}" + CHATML,
        "<|im_end|>",
        False,
    ),
    "drops the system message": (
        CHATML.replace(MESSAGE, "{% if m.role != 'system' %}" + MESSAGE + "{% endif %}"),
        "<|im_end|>",
        True,
    ),
    "trims": (CHATML.replace("m.content", "m.content | trim"), "<|im_end|>", False),
    "ignores add_generation_prompt": (CHATML.removesuffix(ASK), "<|im_end|>", False),
    "reads texts and lists of parts": (
        CHATML.replace(
            MESSAGE,
            "{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}"
            "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
            "{{ '<|im_end|>\n' }}",
        ),
        "<|im_end|>",
        False,
    ),
    "blanks around every text": (
        CHATML.replace("'\n' + m.content + '", "' ' + m.content + ' ").replace("nt\n", "nt"),
        "<|im_end|>",
        False,
    ),
    "the line break after the header is the model's": (
        CHATML.replace("assistant\n", "assistant"),
        "<|im_end|>",
        False,
    ),
    "Llama 3": (
        "{{ bos_token }}{% for m in messages %}" + LLAMA3 + "{% endfor %}" + ASK_LLAMA3,
        "<|eot_id|>",
        False,
    ),
    "Llama 3.1": (DATED + LLAMA3 + "{% endfor %}" + ASK_LLAMA3, "<|eot_id|>", False),
    "Llama 2": (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
        + ALTERNATE
        + "{% set text = m.content %}{% if loop.first and system is defined %}"
        "{% set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + text %}{% endif %}"
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        "</s>",
        False,
    ),
    "Mistral": (
        "{{ bos_token }}{% for m in messages %}" + ALTERNATE + "{% if m.role == 'user' %}"
        "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}"
        "{% endif %}{% endfor %}",
        "</s>",
        True,
    ),
    "Mistral 0.3, whose system text moves to the latest question and then is gone": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
        "{% elif loop.last and system is defined %}"
        "{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
        "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}{% endfor %}",
        "</s>",
        True,
    ),
    "Gemma 2": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
        + ALTERNATE
        + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n'"
        " + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<end_of_turn>",
        True,
    ),
    "Qwen 3": (QWEN3, "<|im_end|>", False),
    "Phi-3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<|end|>",
        False,
    ),
    "Phi-3 as it first was": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '<|user|>\n' + m.content + '<|end|>\n<|assistant|>\n' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}",
        "<|end|>",
        True,
    ),
    "Zephyr": (ZEPHYR, "</s>", False),
}
LEAVES_OUT = "leaves out what the {} says; use another model or template"
# {name: (template, what the error says after "the chat template ")}
REFUSED = {
    "DeepSeek R1": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
        "{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% else %}"
        "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}",
        "asks for an answer in another way than it renders one ('<｜Assistant｜><think>\\n' against"
        " '<｜Assistant｜>'), as models do that must think first; use an instruct model, or another"
        " template",
    ),
    "a wrapped answer": (
        CHATML.replace(
            "m.content", "(m.content if m.role != 'assistant' else '<a>' + m.content + '</a>')"
        ),
        "puts '<a>' before an answer, which the model would have to write; use another model or"
        " template",
    ),
    "something after an answer": (
        CHATML.replace("m.content", "m.content + (' Bye.' if m.role == 'assistant' else '')"),
        "puts 'Bye.' after an answer, which the model would have to write; use another model or"
        " template",
    ),
    "a channel before an answer": (
        "{% for m in messages %}{{ '<|start|>' + m.role + ('<|channel|>final' if m.role =="
        " 'assistant' else '') + '<|message|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        "puts '<|channel|>final<|message|>' before an answer, which the model would have to write;"
        " use another model or template",
    ),
    "the latest exchange alone": (
        CHATML.replace("in messages", "in messages[:1] + messages[1:][-2:]"),
        LEAVES_OUT.format("user"),
    ),
    "no earlier answers": (
        CHATML.replace("%}{{", "%}{% if m.role != 'assistant' or loop.last %}{{", 1).replace(
            "}}{% endfor", "}}{% endif %}{% endfor"
        ),
        LEAVES_OUT.format("assistant"),
    ),
    "no answers": (
        CHATML.replace("in messages", "in messages if m.role != 'assistant'"),
        LEAVES_OUT.format("assistant"),
    ),
    "lists of parts alone": (
        CHATML.replace("m.content", "m.content | map(attribute='text') | join"),
        LEAVES_OUT.format("system"),
    ),
    "nothing": ("", LEAVES_OUT.format("system")),
    "another first answer": (
        CHATML.replace("m.content", "('' if messages | length > 3 else ' ') + m.content"),
        "renders a first answer in another way than a later one; use another model or template",
    ),
    "GLM-4, whose next turn ends an answer": (
        "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        "ends an assistant's message with no special token; use a model or a template that does",
    ),
    "broken": (
        "{% for m in messages %}{{ m.content }",
        "cannot render these messages (unexpected '}'); use another model or template, or other"
        " messages",
    ),
    "fails": (
        "{{ messages[7].content.strip() + 1 }}",
        "cannot render these messages (list object has no element 7); use another model or"
        " template, or other messages",
    ),
    "refuses": (
        "{{ raise_exception('Not today.\nTraceback: …') }}",
        "cannot render these messages (Not today.); use another model or template, or other"
        " messages",
    ),
}
MARKS = (
    "<|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn>"
    " <end_of_turn> <think> </think> <｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜> <sop>"
    " <|start|> <|channel|> <|message|>"
).split()
BLANK_FIRST = ("first", "always", "normalizer")


@pytest.fixture
def tokenizer_with(toy):
    """A function: the toy's tokenizer with a template and with the marks of many models. `blank`
    says where it puts a blank before a text, as the tokenizers of Llama 2's kind do."""

    def tokenizer_with(template, marks=MARKS, blank="never"):
        tokenizer = deepcopy(toy[1])
        tokenizer.chat_template, tokenizer.pinned_date = template, None
        tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
        tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in marks], True)
        inner = tokenizer.backend_tokenizer
        if blank == "normalizer":  # before every text between two marks
            to_piece = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            inner.normalizer, inner.pre_tokenizer = normalizers.Sequence(to_piece), None
            to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            inner.decoder = decoders.Sequence([*to_text, decoders.Strip(" ", 1, 0)])
        elif blank != "never":
            inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=blank)
            to_text = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=blank)]
            inner.decoder = decoders.Sequence(to_text)
        return tokenizer

    return tokenizer_with


def folded(messages):
    """An oracle of how a system message joins the first user message."""
    system, user, *rest = messages
    assert (system["role"], user["role"]) == ("system", "user")
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]


def check_sequence(tokenizer, example, end: str, folds: bool):
    """Prompt and completion are the ids of the template's own text, as far as it goes."""
    messages = folded(example.messages) if folds else example.messages
    answered = [*messages, {"role": "assistant", "content": example.completion}]
    options = {"tokenize": False, "enable_thinking": False}
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
    whole = tokenizer.apply_chat_template(answered, **options)
    (sequence,) = encode_example(tokenizer, example, 10**6).sequences
    ids = tokenizer(whole, add_special_tokens=False).input_ids
    ours = sequence.prompt + sequence.completion
    assert ours == ids[: len(ours)]
    assert tokenizer.decode(ids[len(ours) :]).strip() in ("", "</s>")  # which Phi-3 adds
    assert tokenizer.convert_ids_to_tokens(sequence.completion)[-1] == end
    assert sequence.completion.count(sequence.completion[-1]) == 1
    assert decode(tokenizer, sequence.completion) == example.completion
    asked = tokenizer(asked, add_special_tokens=False).input_ids
    assert sequence.prompt[: len(asked)] == asked
    prompt = tokenizer.decode(sequence.prompt)
    for message in example.messages:
        assert message["content"].strip() in prompt


@pytest.mark.parametrize("name", RENDERED)
def test_a_sequence_is_the_templates_own_rendering(name, tokenizer_with, sample):
    template, end, folds = RENDERED[name]
    tokenizer = tokenizer_with(template)
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == end
    for task in TASKS:
        for example in build_examples(task, sample[:2]):
            check_sequence(tokenizer, example, end, folds)


@pytest.mark.parametrize("blank", BLANK_FIRST)
@pytest.mark.parametrize("name", ["ChatML", "Gemma 2", "Llama 2", "Mistral", "Phi-3", "Zephyr"])
def test_no_blank_slips_in_before_a_completion(name, blank, tokenizer_with, sample):
    """These tokenizers put a blank before a text that follows nothing. The completion follows the
    prompt."""
    template, end, folds = RENDERED[name]
    tokenizer = tokenizer_with(template, blank=blank)
    assert tokenizer.tokenize("Why") == ["▁Wh", "y"] != tokenizer_with(template).tokenize("Why")
    for task in TASKS:
        check_sequence(tokenizer, build_examples(task, sample[:1])[1], end, folds)


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_be_matched_is_refused_in_one_line(name, tokenizer_with):
    template, reason = REFUSED[name]
    tokenizer = tokenizer_with(template)
    with pytest.raises(DescError) as caught:
        end_of_turn(tokenizer)
    assert str(caught.value) == f"the chat template {reason}"


def test_of_several_templates_the_default_is_used(tokenizer_with):
    messages = [{"role": "user", "content": "Hello"}]
    tokenizer = tokenizer_with({"rag": "{{ messages[9] }}", "default": CHATML})
    assert (
        render(tokenizer, messages) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    for without in ({"rag": CHATML, "tool_use": CHATML}, None):
        with pytest.raises(DescError) as caught:
            end_of_turn(tokenizer_with(without))
        advice = "use an instruct model, or give one as chat_template"
        assert str(caught.value) == f"has no chat template; {advice}"


def test_a_model_with_a_template_that_cannot_be_matched_is_not_loaded(tmp_path):
    shutil.copytree(zoo.locate("toy"), tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text(REFUSED["refuses"][0], encoding="utf-8")
    with pytest.raises(DescError) as caught:
        load(str(tmp_path / "m"), torch.float32)
    reason = f"the chat template {REFUSED['refuses'][1]}"
    assert str(caught.value) == f"model {tmp_path / 'm'}: {reason}"


def test_messages_that_a_template_refuses_are_named(tokenizer_with):
    """The template passes the trial at load, but not these messages."""
    tokenizer = tokenizer_with(RENDERED["Gemma 2"][0])
    twice = 2 * [{"role": "user", "content": "Hello"}]
    with pytest.raises(DescError) as caught:
        encode(tokenizer, "pair 7", "7", twice, ["Hi"], 1000)
    assert str(caught.value) == (
        "pair 7: the chat template cannot render these messages (Roles must alternate"
        " user/assistant); use another model or template, or other messages"
    )
    tokenizer = tokenizer_with(CHATML.replace("m.content", "m.content | replace('x', '')"))
    with pytest.raises(DescError) as caught:
        encode(tokenizer, "pair 8", "8", [{"role": "user", "content": "my ex"}], ["Hi"], 1000)
    assert str(caught.value) == (
        "pair 8: the chat template leaves out, or changes, what the user says ('my ex');"
        " use another model or template"
    )


def test_thinking_is_switched_off_in_the_prompt_and_not_in_the_completion(tokenizer_with, sample):
    tokenizer = tokenizer_with(QWEN3)
    for task in TASKS:
        example = build_examples(task, sample[:1])[-1]
        (sequence,) = encode_example(tokenizer, example, 10**6).sequences
        prompt = tokenizer.decode(sequence.prompt)
        assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert prompt.count("<think>") == 1
        assert tokenizer.decode(sequence.completion) == f"{example.completion}<|im_end|>"


@pytest.mark.parametrize("name", ["Gemma 2", "drops the system message", "Mistral"])
@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_that_was_cut_still_begins_with_the_system_text(
    name, task, tokenizer_with, sample
):
    """It joins the first user message that is left."""
    tokenizer = tokenizer_with(RENDERED[name][0])
    messages = build_messages(task, sample[0], 4, "Question")
    full = encode(tokenizer, "0", "0", messages, ["Yes."], 10**6).sequences[0]
    item = encode(tokenizer, "0", "0", messages, ["Yes."], len(full.prompt) - 20)
    assert item.turns_cut > 0
    prompt = tokenizer.decode(item.sequences[0].prompt)
    system, oldest = messages[0]["content"], sample[0].turns[0].text
    assert f"{system}\n\n" in prompt and oldest in tokenizer.decode(full.prompt)
    assert oldest not in prompt and sample[0].turns[8].text in prompt
    later = build_messages(task, sample[0], 4, "Question")
    if task == "sp":
        begin = later[1]["content"].index(sample[0].turns[2 * item.turns_cut].text)
        later[1]["content"] = later[1]["content"][begin - len("seeker: ") :]
    else:
        later = later[:1] + later[1 + 2 * item.turns_cut :]
    assert item.sequences[0].prompt == encode_prompt(tokenizer, later)


def test_an_answer_may_be_begun_for_the_model(tokenizer_with, sample):
    """In vanilla by the tag of the strategy, behind the blank that the template puts before an
    answer. In rg by nothing, because the model writes that blank, too."""
    tokenizer = tokenizer_with(RENDERED["Llama 2"][0])
    assert (form_of(tokenizer).lead, form_of(tokenizer).trail) == (" ", " ")
    messages = build_messages("vanilla", sample[0], 1)
    (begun,) = encode(tokenizer, "", "", messages, ["[Others]"], 10**6, end=False).sequences
    (whole,) = encode(tokenizer, "", "", messages, ["[Others] I see."], 10**6).sequences
    assert tokenizer.decode(begun.prompt + begun.completion).endswith("[/INST] [Others]")
    assert tokenizer.decode(whole.prompt + whole.completion).endswith(
        "[/INST] [Others] I see. </s>"
    )
    assert whole.completion[: len(begun.completion)] == begun.completion
    assert encode_completion(tokenizer, "", end=False) == []
    assert tokenizer.decode(encode_completion(tokenizer, " Well. \n", end=True)) == " Well. </s>"


def test_a_template_is_rendered_once_for_each_prompt(tokenizer_with, sample, monkeypatch):
    """Its form and the control tokens are found out once for all, because tokenizers with large
    vocabularies need long to list their tokens."""
    tokenizer = tokenizer_with(RENDERED["Gemma 2"][0])
    form_of(tokenizer)
    calls = {"apply_chat_template": 0, "__len__": 0, "get_vocab": 0}
    for name in calls:
        stock = getattr(type(tokenizer), name)

        def counting(*args, name=name, stock=stock, **options):
            calls[name] += 1
            return stock(*args, **options)

        monkeypatch.setattr(type(tokenizer), name, counting)
    listed, stock = [], type(tokenizer).added_tokens_decoder
    once = property(lambda self: listed.append(1) or stock.fget(self))
    monkeypatch.setattr(type(tokenizer), "added_tokens_decoder", once)
    examples = build_examples("rg", sample[:3])
    for example in examples:
        (sequence,) = encode_example(tokenizer, example, 10**6).sequences
        decode(tokenizer, sequence.completion)
    assert calls == {"apply_chat_template": len(examples), "__len__": 0, "get_vocab": 0}
    assert not listed


# The toy's tokenizer has no bos token, and its eos token is <|end|>.
AS_SHIPPED = """\
<|system|>
Be kind.<|end|>
<|user|>
Hi<|end|>
<|assistant|>
Hello.<|end|>
<|user|>
My < |system|> is sad<|end|>
<|assistant|>
"""


def test_the_shipped_template_gives_a_base_model_prompts(toy, tmp_path):
    """Every mark is text of the template; one that is typed is broken. The end is the eos token."""
    base = tmp_path / "base"
    shutil.copytree(zoo.locate("toy"), base)
    (base / "chat_template.jinja").unlink()
    with pytest.raises(DescError) as caught:
        load(str(base), torch.float32)
    advice = "use an instruct model, or give one as chat_template"
    assert str(caught.value) == f"model {base}: has no chat template; {advice}"
    given = read_template(SHIPPED)
    _, tokenizer = load(str(base), torch.float32, chat_template=given)
    typed = ("Be kind.", "Hi", "Hello.", "My <|system|> is sad")
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, typed)]
    (sequence,) = encode(tokenizer, "", "", messages, ["Why?"], 1000).sequences

    assert sequence.prompt == toy[1](AS_SHIPPED, add_special_tokens=False).input_ids
    assert tokenizer.decode(sequence.completion) == "Why?<|end|>"
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert tokenizer.decode(encode_prompt(tokenizer, messages)) == "<s>" + AS_SHIPPED


def test_a_given_template_replaces_the_models_own(toy):
    _, tokenizer = load("toy", torch.float32, chat_template="<|system|>" + zoo.TEMPLATE)
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "Hi"}])
    assert prompt == toy[1]("<|system|><|user|>Hi<|end|><|assistant|>").input_ids


@pytest.mark.parametrize(
    "written, says",
    [
        (None, ": cannot be read (No such file or directory)"),
        (b"", ": is empty; it should hold a chat template in Jinja"),
        (b"\xef\xbb\xbf \n", ": is empty; it should hold a chat template in Jinja"),
        (b"\xff", ": is not UTF-8 (byte 0); save it as UTF-8"),
        (b"\n{{ messages[0].content }", ": line 2: no valid Jinja (unexpected '}')"),
        (b"{{ 1 | shout }}", ": line 1: no valid Jinja (No filter named 'shout'.)"),
    ],
)
def test_a_file_that_is_no_template_is_refused_in_one_line(written, says, tmp_path):
    path = tmp_path / "t.jinja"
    if written is not None:
        path.write_bytes(written)
    with pytest.raises(DescError) as caught:
        read_template(path)
    assert str(caught.value) == f"{path}{says}"


def test_a_template_that_python_cannot_compile_is_refused_in_one_line(tmp_path):
    """Python allows about 100 levels of indentation."""
    (tmp_path / "t.jinja").write_text("{% if 1 %}" * 120 + "{% endif %}" * 120)
    with pytest.raises(DescError, match=r"t\.jinja: no valid Jinja \(too many .*\)$"):
        read_template(tmp_path / "t.jinja")


@pytest.mark.parametrize("kind", [SFTConfig, DPOConfig, MineConfig, EvalConfig, flags.SampleConfig])
def test_every_script_loads_its_tokenizer_with_the_flags_template(kind, monkeypatch):
    task = ["--task", "sp"] if issubclass(kind, flags.TaskConfig) else []
    monkeypatch.setattr("sys.argv", ["script.py", *task, "--chat-template", str(SHIPPED)])
    config = flags.parse(kind)
    config.model, config.dtype, config.date = "toy", "float32", "2026-01-05"
    _, tokenizer = cli.load_model(config, torch.device("cpu"))
    assert tokenizer.chat_template == SHIPPED.read_text()
    assert tokenizer.decode(encode_prompt(tokenizer, [{"role": "user", "content": "Hi"}])) == (
        "<|user|>\nHi<|end|>\n<|assistant|>\n"
    )


def test_a_given_template_is_tried_out_as_a_models_own():
    template, reason = REFUSED["no answers"]
    with pytest.raises(DescError) as caught:
        load("toy", torch.float32, chat_template=template)
    assert str(caught.value) == f"model toy: the chat template {reason}"


def test_an_adapter_remembers_its_chat_template(toy, tmp_path):
    """Training puts its text beside the adapter. Where the file lay is of no matter. Without the
    flag or with another text the adapter is refused."""
    mine, other = tmp_path / "mine.jinja", tmp_path / "other.jinja"
    shutil.copy(SHIPPED, mine)
    other.write_text(SHIPPED.read_text() + "{#- another -#}")
    common = ("--task", "sp", "--model", "toy", "--out", tmp_path, "--eval-dialogues", 1)
    train = ("train_sft.py", *common, "--train-dialogues", 1, "--epochs", 1)
    run(*train, "--chat-template", mine)
    sft = tmp_path / "sp" / "sft"
    kept = sft / "chat_template.jinja"
    assert kept.read_text() == (sft / "last" / kept.name).read_text() == mine.read_text()

    def use(chat_template):
        config = flags.Config(model="toy", chat_template=chat_template and str(chat_template))
        return cli.use_adapter(config, deepcopy(toy[0]), sft, "sp")

    assert use(mine) and use(kept)
    refused = f"{sft}: was trained with another chat template; "
    for given in (None, other):
        with pytest.raises(DescError) as caught:
            use(given)
        assert str(caught.value) == f"{refused}give --chat-template {kept}, or train it again"
    dpo = ("train_dpo.py", *common, "--dtype", "float32")
    assert f"uses the adapter {sft}" in run(*dpo, "--chat-template", kept)
    assert (tmp_path / "sp" / "dpo" / kept.name).read_text() == kept.read_text()

    run(*train)  # now with the toy's own
    assert not list(sft.rglob(kept.name))
    assert use(None)
    with pytest.raises(DescError) as caught:
        use(mine)
    assert str(caught.value) == f"{refused}give no --chat-template, or train it again"
    (sft / "config.json").unlink()  # as if others had made it
    assert use(mine)


def test_answers_with_another_chat_template_are_not_reused(tmp_path):
    """Its text counts, not its place. Without the flag all is as before there was one."""
    mine = tmp_path / "mine.jinja"
    shutil.copy(SHIPPED, mine)
    given = (None, str(SHIPPED), str(mine))
    plain, shipped, copied = (
        flags.answer_settings(flags.TaskConfig(task="sp", chat_template=path), ["sp"])
        for path in given
    )
    assert plain["chat_template"] is None and shipped == copied != plain


class Tomorrow(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2031, 2, 3, 4, 5, 6)


def test_a_pinned_date_outlasts_midnight(tokenizer_with, sample, monkeypatch):
    messages = build_messages("rg", sample[0], 2, "Question")
    template = RENDERED["Llama 3.1"][0]
    pinned, free = tokenizer_with(template), tokenizer_with(template)
    pin_date(pinned, "2026-01-05")
    assert f"Today Date: {date.today():%d %b %Y}\n" in render(free, messages)
    before = render(pinned, messages)
    assert before == pinned.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, date_string="05 Jan 2026"
    )
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert "Today Date: 03 Feb 2031\n" in render(free, messages)
    assert render(pinned, messages) == before
    pin_date(pinned, "2026-01-06")
    assert render(pinned, messages) == before.replace("05 Jan", "06 Jan")


@pytest.mark.parametrize(
    "clock",
    [
        "{{ strftime_now('%A %d %B %Y, %a %-d %b %y, %j %U %w %G-%V-%u') }}",
        "{{ strftime_now('%F %D %e %x %C %h') }}{{ strftime_now('100%% on %m/%d') }}",
        "{{ strftime_now(format='%Y') | int + 1 }}{{ strftime_now('%d').lstrip('0') }}",
        "{% macro day() %}{{ strftime_now('%B') }}{% endmacro %}{{ day() }}",
        "{% if strftime_now is defined %}{% set d = strftime_now('it\\'s %Y') %}{{ d }}{% endif %}",
        "{%-if true-%}{% set now = strftime_now %}{{ now('%Y-%m-%d') }}{%-endif%}",
        "{% for x in [1, 2] %}{{ strftime_now('%Y' if x == 1 else '%m') }}{% endfor %}",
        "\n\n  {% if true %}{{ strftime_now('%c %H:%M:%S %p') }}{% endif %}\n\n {{ 1 }}",
        "no clock",
    ],
)
def test_a_pinned_clock_tells_what_the_clock_told_that_midnight(clock, tokenizer_with, monkeypatch):
    """Every directive of strftime, and all that stands around it, stays as it was."""
    template = clock + CHATML
    messages = [{"role": "user", "content": "Hi"}]
    pinned = tokenizer_with(template)
    pin_date(pinned, "2031-02-03")
    ours = render(pinned, messages)
    midnight = type("Midnight", (Tomorrow,), {"now": classmethod(lambda cls: cls(2031, 2, 3))})
    monkeypatch.setattr(chat_template_utils, "datetime", midnight)
    theirs = tokenizer_with(template).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert ours == theirs


def test_a_date_of_ones_own_reaches_the_prompt(tmp_path):
    """From --date to what is trained on."""
    folder = tmp_path / "dated"
    shutil.copytree(zoo.locate("toy"), folder)
    template = "<|system|>It is {{ strftime_now('%-d %B %Y') }}.<|end|>" + zoo.TEMPLATE
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _, tokenizer = load(str(folder), torch.float32, date="2026-01-05")
    asked = render(tokenizer, [{"role": "user", "content": "Hi"}])
    assert asked == "<|system|>It is 5 January 2026.<|end|><|user|>Hi<|end|><|assistant|>"
    _, today = load(str(folder), torch.float32)
    assert f"It is {date.today():%-d %B %Y}." in render(today, [{"role": "user", "content": "Hi"}])
    options = ("--task", "sp", "--model", folder, "--out", tmp_path / "out", "--show-example")
    shown = run("train_sft.py", *options, "--date", "2026-01-31")
    assert "<|system|>It is 31 January 2026.<|end|>" in shown
    wrong = run("train_sft.py", *options, "--date", "31.1.2026", fails=True)
    assert wrong == "error: --date 31.1.2026: should be auto or a date like 2026-01-31\n"


def test_a_run_that_goes_on_another_day_keeps_its_date(tmp_path, capsys):
    begun = flags.TrainConfig(task="sp", date="2026-01-05", dtype="float32")
    settings = flags.training_settings(begun)
    dates = []
    for given, kept in (("auto", settings), ("auto", {}), ("2026-01-06", settings)):
        config = flags.TrainConfig(task="sp", date=given, dtype="float32")
        cli.resolve_auto(config, torch.device("cpu"), kept)
        cli.save_config(config, tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
        assert saved["date"] == config.date
        dates.append(config.date)
    assert dates == ["2026-01-05", date.today().isoformat(), "2026-01-06"]


def test_answers_of_another_day_are_those_of_the_same_journal(tmp_path):
    """Under way and finished. Answers of another seed are others."""
    config = flags.TaskConfig(task="sp", date="2026-01-05", dtype="float32")
    wanted = flags.answer_settings(flags.TaskConfig(task="sp"), ["sp"])
    begun = flags.answer_settings(config, ["sp"])
    assert begun["date"] == "2026-01-05" and wanted["date"] == "auto"
    journal = Journal(tmp_path, "answers", begun)
    journal.append({"key": "0"})
    assert journal_settings(tmp_path, "answers", wanted) == begun
    journal.finish(["0"])
    assert journal_settings(tmp_path, "answers", wanted) == begun
    assert journal_settings(tmp_path, "answers", wanted | {"seed": 1}) == {}
    assert "date" in asdict(config)


@pytest.mark.parametrize("name", RENDERED)
def test_ordinary_text_is_never_changed(name, tokenizer_with, sample):
    tokenizer = tokenizer_with(RENDERED[name][0])
    texts = [turn.text for dialogue in sample for turn in dialogue.turns]
    texts += [m["content"] for task in TASKS for m in build_messages(task, sample[0], 3, "Others")]
    texts += ["I <3 you > him", "a<b, c>d", "[Question] Why?", "[laughs] [NA", ":) (: <-- -->"]
    texts += ["im_end end_of_turn s INST user assistant", "it's “fine” | ok || {{ no }} {% if %}"]
    assert [defuse(tokenizer, text) for text in texts] == texts


@pytest.mark.parametrize("name", RENDERED)
def test_what_a_template_writes_cannot_be_typed(name, tokenizer_with):
    """Neither as tokens, nor where a template's marks are plain text: [INST] in Llama 2's."""
    template = RENDERED[name][0]
    typed = " ".join(
        [*MARKS, "<s> </s> <|user|> <|end|> [TOOL_CALLS] <<|end|>|end|> <|im_<s>end|>"]
    )
    tokenizer = tokenizer_with(template, [*MARKS, "[TOOL_CALLS]", " <|blank|>", "<|line|>\n"])
    typed += " <|blank|> <|line|>\n"
    defused = defuse(tokenizer, typed)
    assert defused.replace(" ", "") == typed.replace(" ", "")
    ids = tokenizer(defused, add_special_tokens=False).input_ids
    assert not set(ids) & set(tokenizer.added_tokens_decoder)
    for mark in ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "</think>"):
        assert (mark in defuse(tokenizer, f"So {mark} it")) is (
            mark not in template and mark not in MARKS
        ), mark
