"""What a model would do: the exact distribution over strategies, and replies in batches."""

import zlib
from itertools import chain

import torch
from transformers import GenerationConfig

from desc import distributed
from desc.encoding import encode
from desc.esconv import Dialogue
from desc.modeling import sequence_logps
from desc.prompts import build_messages
from desc.strategies import ESCONV, Strategies
from desc.tree import pack


def seeded(*parts) -> torch.Generator:
    """A generator whose seed depends on all of `parts`, so that work done in any order, or resumed, draws the same."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, parts)).encode()))


@torch.no_grad()
def score_strategies(
    model, tokenizer, task: str, dialogues: list[Dialogue], strategies: Strategies = ESCONV, max_length: int = 2048, max_tokens: int = 2048
) -> torch.Tensor:
    """log p(strategy | context) of every strategy at every supporter turn, human history: (T, K) fp32, rows sum to 1 in probability.

    The K names are K branches at each turn of a dialogue's tree. `sp` scores "name" with its end of turn; `vanilla` scores the
    tag "[name]" that opens its completion. Probability on anything but a name is left out by normalising."""
    texts = [f"[{name}]" if task == "vanilla" else name for name in strategies]
    items = []
    for dialogue in dialogues:
        for turn in range(len(dialogue)):
            messages = build_messages(task, dialogue, turn, strategies=strategies)
            items.append(encode(tokenizer, f"{dialogue.id}/{turn}", dialogue.id, messages, texts, max_length, end=task == "sp"))
    scored, ranks = [], distributed.size() if distributed.sharded(model) else 1
    for members, forest in distributed.portion(model, pack(items, "dialogue", max_tokens, ranks)):
        logps = sequence_logps(model, forest).view(len(members), len(strategies)).log_softmax(-1).cpu()
        scored += zip((item.id for item in members), logps)
    rows = dict(chain(*distributed.collect(scored))) if distributed.sharded(model) else dict(scored)
    return torch.stack([rows[item.id] for item in items])


def temper(logps: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Probabilities (…, K) as sampled: sharpened by 1/temperature, then the smallest set of at least `top_p` mass, renormalised.

    Temperature 0 puts all mass on the most likely."""
    if temperature == 0:
        return torch.nn.functional.one_hot(logps.argmax(-1), logps.shape[-1]).float()
    probabilities, order = (logps / temperature).softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = torch.where(before < top_p, probabilities, 0.0)
    return torch.zeros_like(kept).scatter(-1, order, kept / kept.sum(-1, keepdim=True))


def plan_dialogue(model, tokenizer, config, task: str, dialogue: Dialogue, strategies: Strategies) -> tuple[torch.Tensor, list[str]]:
    """The exact distribution (T, K) at every supporter turn, as logarithms, and one strategy drawn from each of its rows.

    `config` (a desc.cli.SampleConfig) says at what temperature and top_p, and seeds the draw together with the dialogue's id."""
    logps = score_strategies(model, tokenizer, task, [dialogue], strategies, config.max_length, config.max_tokens)
    probabilities = temper(logps, config.temperature, config.top_p)
    drawn = torch.multinomial(probabilities, 1, generator=seeded(config.seed, "plan", dialogue.id))[:, 0]
    return logps, [strategies.names[i] for i in drawn.tolist()]


def write_dialogue(
    model, tokenizer, config, task: str, dialogue: Dialogue, planned: list[str | None], strategies: Strategies
) -> list[str]:
    """What the module of `task` writes at every supporter turn, on the human history; one sampled text a turn.

    `planned` goes into rg's system message, and opens vanilla's answer as the tag "[strategy]", which is not repeated in what is
    returned; None leaves the whole answer to vanilla or sp (free decoding). The history is cut to leave room for max_new_tokens."""
    prompts = []
    for turn, strategy in enumerate(planned):
        messages = build_messages(task, dialogue, turn, strategy, strategies)
        tag = f"[{strategy}]" if task == "vanilla" and strategy else ""
        room = config.max_length - config.max_new_tokens
        item = encode(tokenizer, f"{dialogue.id}/{turn}", dialogue.id, messages, [tag], room, end=False)
        prompts.append(item.sequences[0].prompt + item.sequences[0].completion)
    return generate(model, tokenizer, prompts, config, seeded(config.seed, "write", dialogue.id).initial_seed())


@torch.no_grad()
def generate(model, tokenizer, prompts: list[list[int]], config, seed: int) -> list[str]:
    """One sampled continuation a prompt, as text without its end-of-turn token; temperature 0 is greedy. One left-padded batch."""
    pad, width = model.generation_config.pad_token_id, max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    settings = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=pad,
        **({"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0} if config.temperature else {}),
    )
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        written = model.generate(ids, attention_mask=mask, generation_config=settings)[:, width:]
    return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
