"""What a model would answer: the exact distribution over strategies, and replies that grow on the
tree."""

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from transformers import DynamicCache

from desc.domain import Domain, Strategies
from desc.encoding import Item, TokenSequence, decode, encode, tokenize
from desc.esconv import Dialogue
from desc.forward import forward, sequence_logps, tree_mask
from desc.lora import adapter_only, ready_adapters
from desc.prompts import build_messages
from desc.tree import Forest, grow, pack, sees


def seed_of(*parts) -> int:
    """A seed that depends on all of `parts`, so that work draws the same in any order, and when it
    is resumed."""
    return zlib.crc32("/".join(map(str, parts)).encode())


def seeded(*parts) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*parts))


def strategy_items(
    tokenizer, task: str, dialogues: list[Dialogue], domain: Domain, config
) -> list[Item]:
    """Every supporter turn with all K strategies as its completions, on the human history.

    `sp` is scored on "name" and its end of turn, `vanilla` on the tag "[name]" that opens its
    completion. `config` (a desc.flags.DataConfig) says how prompts are laid out, and how long they
    may be."""
    texts = [f"[{name}]" if task == "vanilla" else name for name in domain.strategies]
    items, end = [], task == "sp"
    for dialogue in dialogues:
        for turn in range(len(dialogue)):
            messages = build_messages(task, dialogue, turn, None, domain, config.layout)
            name, room = f"{dialogue.id}/{turn}", config.max_length
            item = encode(tokenizer, name, dialogue.id, messages, texts, room, domain.speakers, end)
            items.append(item)
    return items


def score_strategies(
    model, tokenizer, task: str, dialogues: list[Dialogue], domain: Domain, config
) -> torch.Tensor:
    """log p(strategy | context) of every strategy at every supporter turn: (T, K) fp32, whose rows
    sum to 1 in probability.

    The K names are K branches at each turn of a dialogue's tree, so one pass gives them all.
    Probability on anything but a name is left out by normalising."""
    items = strategy_items(tokenizer, task, dialogues, domain, config)
    return score(model, items, config.max_tokens)


@torch.no_grad()
def score(model, items: list[Item], max_tokens: int) -> torch.Tensor:
    """log p(completion | prompt), normalised over each item's K completions: (len(items), K) fp32.
    Items are told apart by id."""
    scored: dict[str, torch.Tensor] = {}
    for members, forest in pack(items, "dialogue", max_tokens):
        scored |= branch_logps(model, members, forest)
    return torch.stack([scored[item.id] for item in items])


def branch_logps(model, members: list[Item], forest: Forest) -> dict[str, torch.Tensor]:
    """log p(completion | prompt), normalised over each item's K completions: (K,) fp32 on the CPU,
    by the item's id. `forest` holds the sequences of `members`, which may be none."""
    logps = sequence_logps(model, forest).cpu()
    if not members:
        return {}
    logps = logps.view(len(members), -1).log_softmax(-1)  # (items, K)
    return {item.id: row for item, row in zip(members, logps)}


def temper(logps: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Probabilities (…, K) as sampled: sharpened by 1/temperature, then the smallest set of at
    least `top_p` mass, renormalised.

    Temperature 0 puts all mass on the most likely."""
    if temperature == 0:
        return torch.nn.functional.one_hot(logps.argmax(-1), logps.shape[-1]).float()
    probabilities, order = (logps / temperature).softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = torch.where(before < top_p, probabilities, 0.0)
    return torch.zeros_like(kept).scatter(-1, order, kept / kept.sum(-1, keepdim=True))


def draw_strategies(
    logps: torch.Tensor, config, dialogue: Dialogue, strategies: Strategies
) -> list[str]:
    """A strategy from each row of log-probabilities (T, K), of turns of `dialogue`.

    `config` (a desc.flags.SampleConfig) says at what temperature and top_p, and seeds the draw
    together with the dialogue's id."""
    probabilities = temper(logps, config.temperature, config.top_p)
    generator = seeded(config.seed, "plan", dialogue.id)
    drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    return [strategies[i] for i in drawn.tolist()]


def group_dialogues(
    work: dict[str, Dialogue], tokenizer, max_tokens: int
) -> list[dict[str, Dialogue]]:
    """Consecutive dialogues, by key, which are answered at once: what they say is together at most
    `max_tokens` tokens, unless one alone says more.

    On a GPU a token's time probably goes into starting kernels, which are as many for one dialogue
    as for ten (docs/speed.md)."""
    groups, room = [], 0
    for key, dialogue in work.items():
        tokens = sum(len(tokenize(tokenizer, turn.text)) for turn in dialogue.turns)
        if tokens > room or not groups:
            groups.append({})
            room = max_tokens
        groups[-1][key] = dialogue
        room -= tokens
    return groups


def write_dialogues(
    model,
    tokenizer,
    config,
    task: str,
    planned: list[tuple[Dialogue, list[tuple[int, str | None]]]],
    domain: Domain,
) -> list[list[str]]:
    """What the module of `task` writes at each (turn, strategy) that is planned for each of some
    dialogues, on the human history: one sampled text each.

    - sp and rg read the history and the strategy where config.layout says.
    - vanilla's answer opens with it as the tag "[strategy]", which is not repeated in the result.
    - None leaves the whole answer to vanilla or sp (free decoding).

    The oldest exchanges are dropped to leave room for max_new_tokens."""
    prompts, room = [], config.max_length - config.max_new_tokens
    for dialogue, turns in planned:
        prompts.append([])
        for turn, strategy in turns:
            messages = build_messages(task, dialogue, turn, strategy, domain, config.layout)
            tag = f"[{strategy}]" if task == "vanilla" and strategy else ""
            name = f"{dialogue.id}/{turn}"
            item = encode(
                tokenizer, name, dialogue.id, messages, [tag], room, domain.speakers, end=False
            )
            prompts[-1].append(item.sequences[0].prompt + item.sequences[0].completion)
    seeds = [seed_of(config.seed, "write", dialogue.id) for dialogue, _ in planned]
    written = generate(model, prompts, config, seeds)
    return [[decode(tokenizer, ids) for ids in texts] for texts in written]


def generate(
    model, prompts: list[list[list[int]]], config, seeds: list[int]
) -> list[list[list[int]]]:
    """One sampled continuation of each prompt, without the token that ended it. Prompts come in
    groups, each with a seed. Temperature 0 takes the likeliest token."""
    written = [[[] for _ in group] for group in prompts]
    branches = [ids for group in written for ids in group]
    with ready_adapters(model):
        for branch, token in grow_branches(model, prompts, config, seeds):
            branches[branch].append(token)
    return written


@torch.no_grad()
def grow_branches(
    model, prompts: list[list[list[int]]], config, seeds: list[int]
) -> Iterator[tuple[int, int]]:
    """The tokens of `generate` as they are drawn, each with the number of its prompt.

    The prompts are read once, as the forest that they are. Then each continuation is a branch that
    grows from its prompt's last node, a token at a time, and sees its ancestors and itself alone.
    Each of the model's end tokens (generation_config.eos_token_id) ends it. A group draws with a
    generator of its own, so what it draws does not depend on the other groups."""
    group_of = [i for i, group in enumerate(prompts) for _ in group]
    growing = list(range(len(group_of)))
    if not growing:
        return
    ends = torch.atleast_1d(torch.tensor(model.generation_config.eos_token_id))
    forest = grow([TokenSequence(p, ends[:1].tolist()) for group in prompts for p in group])
    forest, ends = forest.to(model.device), ends.to(model.device)
    draws = [torch.Generator(model.device).manual_seed(seed) for seed in seeds]
    cache, mask = DynamicCache(), partial(tree_mask, forest)
    logits = forward(model, forest.ids, forest.depth, mask, forest.rows, cache)
    branches, depth = torch.arange(len(growing), device=model.device), forest.depth
    branch = branches  # those that still grow
    nodes = torch.arange(len(depth), device=model.device)
    # (B, L): what the next token of each branch sees
    visible = sees(forest)(forest.rows[:, None], nodes)
    for length in range(1, config.max_new_tokens + 1):
        odds = temper(logits.float(), config.temperature, config.top_p)
        counts = Counter(group_of[i] for i in growing)
        noise = torch.empty_like(odds)
        for group, part in zip(counts, noise.split(list(counts.values()))):
            part.exponential_(generator=draws[group])
        # As torch.multinomial draws, but for its checks, each of which waits for the GPU.
        tokens = (odds / noise).argmax(-1)
        goes_on = ~torch.isin(tokens, ends)
        branch, tokens = branch[goes_on], tokens[goes_on]
        growing = branch.tolist()
        yield from zip(growing, tokens.tolist())
        if not growing or length == config.max_new_tokens:
            break
        new_depth = forest.depth[forest.rows[branch]] + length
        depth = torch.cat([depth, new_depth])
        visible = torch.cat([visible, branches[:, None] == branch], dim=1)
        mask = partial(branch_mask, visible[branch], new_depth[:, None] - depth)
        logits = forward(model, tokens, new_depth, mask, cache=cache)


def branch_mask(visible: torch.Tensor, distance: torch.Tensor, window: int | None) -> torch.Tensor:
    """(1, 1, B, L): what B new tokens see of L nodes, from what is on their paths (B, L) and how
    many tokens back it lies (B, L). With `window`, only the last `window` tokens."""
    seen = visible if window is None else visible & (distance < window)
    return seen[None, None]


def stream_text(tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of a reply in the pieces that its tokens add. White space at the end, and half a
    character, wait for what follows."""
    ids, before = [], ""
    for token in tokens:
        ids.append(token)
        text = decode(tokenizer, ids)
        if not text.endswith("\ufffd"):  # what bytes that are no character yet are decoded as
            yield text[len(before) :]
            before = text


@dataclass(frozen=True)
class LocalSampler:
    """Answers with the model's own modules. The adapter that bears a module's name is that
    module."""

    model: torch.nn.Module
    tokenizer: object
    config: object  # desc.flags' SampleConfig and DataConfig in one
    domain: Domain
    calibration: object | None = None  # of the planner: a desc.calibration.Calibration

    def plan_logps(self, dialogue: Dialogue, task: str) -> torch.Tensor:
        """The planner's log p(strategy | context) at every turn, calibrated if it is: (T, K)."""
        config = self.config
        with adapter_only(self.model, task):
            items = strategy_items(self.tokenizer, task, [dialogue], self.domain, config)
            logps = score(self.model, items, config.max_tokens)
        return self.calibration.apply(logps) if self.calibration else logps

    def plan(self, dialogue: Dialogue, turns: list[int], task: str = "sp") -> list[str]:
        logps = self.plan_logps(dialogue, task)[turns]
        return draw_strategies(logps, self.config, dialogue, self.domain.strategies)

    def distribution(self, dialogue: Dialogue, task: str = "sp") -> torch.Tensor:
        """How often `plan` draws each strategy at every turn: (T, K)."""
        logps = self.plan_logps(dialogue, task)
        return temper(logps, self.config.temperature, self.config.top_p)

    def write(
        self, planned: list[tuple[Dialogue, list[tuple[int, str]]]], task: str = "rg"
    ) -> list[list[str]]:
        """A reply at each (turn, strategy) of each dialogue."""
        with adapter_only(self.model, task):
            return write_dialogues(
                self.model, self.tokenizer, self.config, task, planned, self.domain
            )

    def whole(self, asked: list[tuple[Dialogue, list[int]]]) -> list[list[tuple[str, str]]]:
        """(strategy, reply) at these turns of each dialogue, by one model for both."""
        plans = [self.plan(dialogue, turns, "vanilla") for dialogue, turns in asked]
        planned = [
            (dialogue, list(zip(turns, plan))) for (dialogue, turns), plan in zip(asked, plans)
        ]
        replies = self.write(planned, "vanilla")
        return [list(zip(plan, texts)) for plan, texts in zip(plans, replies)]
