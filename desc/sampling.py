"""What a model would do: the exact distribution over strategies, and replies in batches."""

import zlib
from functools import partial
from itertools import chain

import torch
from transformers import DynamicCache

from desc import distributed
from desc.encoding import Sequence, encode
from desc.esconv import Dialogue
from desc.modeling import forward, sequence_logps, tree_mask
from desc.prompts import build_messages
from desc.strategies import ESCONV, Strategies
from desc.tree import grow, pack, sees


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
    written = generate(model, prompts, config, seeded(config.seed, "write", dialogue.id).initial_seed())
    return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]


@torch.no_grad()
def generate(model, prompts: list[list[int]], config, seed: int) -> list[list[int]]:
    """One sampled continuation a prompt, without its end-of-turn token; temperature 0 is greedy.

    The prompts are read once, as the tree that they are. Then each continuation is a branch that grows from its prompt's last node, a
    token at a time, and sees its ancestors and itself alone."""
    stop = model.generation_config.eos_token_id
    forest = grow([Sequence(prompt, [stop]) for prompt in prompts]).to(model.device)
    draw, cache = torch.Generator(model.device).manual_seed(seed), DynamicCache()
    logits = forward(model, forest.ids, forest.depth, partial(tree_mask, forest), forest.rows, cache)
    branches = torch.arange(len(prompts), device=model.device)
    growing, depth = branches, forest.depth
    nodes = torch.arange(len(depth), device=model.device)
    visible = sees(forest)(forest.rows[:, None], nodes)  # (B, L): what the next token of each branch sees
    written = [[] for _ in prompts]
    for length in range(1, config.max_new_tokens + 1):
        tokens = torch.multinomial(temper(logits.float(), config.temperature, config.top_p), 1, generator=draw)[:, 0]
        growing, tokens = growing[tokens != stop], tokens[tokens != stop]
        for branch, token in zip(growing.tolist(), tokens.tolist()):
            written[branch].append(token)
        if not len(growing) or length == config.max_new_tokens:
            break
        here = forest.depth[forest.rows[growing]] + length
        depth = torch.cat([depth, here])
        visible = torch.cat([visible, branches[:, None] == growing], dim=1)

        def mask(window: int | None):
            seen = visible[growing]
            return (seen if window is None else seen & (here[:, None] - depth < window))[None, None]

        logits = forward(model, tokens, here, mask, cache=cache)
    return written
