"""Token sequences -> a forest of prefix trees that a model reads once.

Turn k's prompt is a prefix of turn k + 1's, and both answers of a pair share their prompt. So equal
prefixes are merged, and the tokens of the tree are laid out in depth-first order. A token may look
at itself and its ancestors only. In depth-first order the descendants of node k are the run
k … end[k] - 1, so the whole attention mask is one line:

    query q sees key k   iff   k <= q < end[k]

Each sequence is tokenised alone, and only equal prefixes merge. So each token sees exactly what it
would see in a sequence of its own, at the same position: log-probabilities and gradients are the
same."""

from dataclasses import dataclass, fields, replace
from os.path import commonprefix

import torch

from desc.encoding import Item, TokenSequence

SHARING = ("dialogue", "pair", "none")
PADDING = 512  # nodes, on a GPU; FlexAttention needs multiples of 128


@dataclass(frozen=True, eq=False)  # compared by identity, so that it can be a cache's key
class Forest:
    """N nodes, M completion tokens, S sequences. All int64."""

    ids: torch.Tensor  # (N,) tokens in depth-first order
    depth: torch.Tensor  # (N,) distance from the root: the position ids
    end: torch.Tensor  # (N,) one past the last descendant
    rows: torch.Tensor  # (M,) node whose hidden state predicts a completion token
    targets: torch.Tensor  # (M,) that token
    owner: torch.Tensor  # (M,) the sequence it belongs to
    size: int  # S
    nodes: int  # N without what fills it up, which is no work

    def to(self, device: torch.device) -> "Forest":
        """On its way to a GPU it is padded, because FlexAttention reads whole blocks."""
        if self.ids.device == device:
            return self
        forest = pad(self, PADDING)
        tensors = [getattr(forest, field.name) for field in fields(self)[:-2]]
        return Forest(*[send(tensor, device) for tensor in tensors], self.size, self.nodes)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the CPU, on its way to `device`. A copy from pinned memory to a GPU holds nothing
    up."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def shared_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences have in common from the start."""
    return len(commonprefix([a, b]))


def grow(sequences: list[TokenSequence]) -> Forest:
    """The prefix tree of `sequences`, or a forest if their first tokens differ. Sequence s is owner
    number s.

    The sequences are visited in lexicographic order, which is a depth-first walk of their tree:
    what a sequence shares with the one before it is laid already, and the rest is a new branch.

    Raises ValueError for an empty prompt (nothing would predict the first completion token) or an
    empty completion."""
    if any(not prompt or not completion for prompt, completion in sequences):
        raise ValueError("a sequence needs a prompt and a completion of at least one token each")
    # A sequence's last token predicts nothing, so it is a target but no node.
    inputs = [list(prompt) + list(completion[:-1]) for prompt, completion in sequences]
    ids, depth, end = [], [], []
    path, previous = [], []  # nodes and tokens from the root to the leaf laid last
    paths = [[] for _ in sequences]  # of each sequence: the node of each of its tokens
    for s in sorted(range(len(inputs)), key=inputs.__getitem__):
        shared = shared_prefix(previous, inputs[s])
        # Close the branch that is left here: it has no more descendants.
        for node in path[shared:]:
            end[node] = len(ids)
        # Append the suffix that is new; its nodes' ends are set when their branch is closed.
        suffix = inputs[s][shared:]
        new_nodes = list(range(len(ids), len(ids) + len(suffix)))
        ids += suffix
        depth += range(shared, len(inputs[s]))
        end += [0] * len(suffix)
        # Record the path.
        path = path[:shared] + new_nodes
        paths[s], previous = path, inputs[s]
    for node in path:
        end[node] = len(ids)

    rows, targets, owner = [], [], []
    for s, (prompt, completion) in enumerate(sequences):
        rows += paths[s][len(prompt) - 1 :]  # the prompt's last token predicts the first target
        targets += completion
        owner += [s] * len(completion)
    tensors = map(torch.tensor, (ids, depth, end, rows, targets, owner))
    return Forest(*tensors, len(sequences), len(ids))


def join(forests: list[Forest]) -> Forest:
    """Several forests laid one after another, their sequences numbered on in the same order. `end`
    keeps them apart."""
    parts, nodes, sequences = [], 0, 0
    for f in forests:
        end, rows, owner = f.end + nodes, f.rows + nodes, f.owner + sequences
        parts.append((f.ids, f.depth, end, rows, f.targets, owner))
        nodes, sequences = nodes + len(f.ids), sequences + f.size
    return Forest(*map(torch.cat, zip(*parts)), sequences, sum(f.nodes for f in forests))


def plant(items: list[Item], share: str) -> Forest:
    """Items -> forest. `share` says which equal prefixes merge: all of them ("dialogue"), those
    within an item ("pair"), or none ("none")."""
    if share == "dialogue":
        return grow([sequence for item in items for sequence in item.sequences])
    if share == "pair":
        return join([grow(item.sequences) for item in items])
    return join([grow([sequence]) for item in items for sequence in item.sequences])


def pack(
    items: list[Item], share: str, max_tokens: int, parts: int = 1
) -> list[tuple[list[Item], Forest]]:
    """A batch as micro-batches of at most `max_tokens` nodes, or twice the longest sequence if that
    is more: (its items, their forest) of each.

    With share "dialogue" the items of a dialogue are planted together, and split only if they must
    be. Dialogues of a micro-batch then share what they begin with alike, such as the system
    message. Trees are not laid together if there would be fewer micro-batches than `parts`."""
    groups: dict[object, list[Item]] = {}
    for item in items:
        group = item.dialogue if share == "dialogue" else id(item)
        groups.setdefault(group, []).append(item)
    planted = []
    for group in groups.values():
        planted += plant_within(group, share, max_tokens)
    budget = min(max_tokens, sum(len(forest.ids) for _, forest in planted) // parts)
    micro_batches, room = [], 0
    for group, forest in planted:
        nodes, trunk = len(forest.ids), trunk_of(group)
        if share == "dialogue" and micro_batches:
            nodes -= shared_prefix(trunk_of(micro_batches[-1][0]), trunk)
        if nodes > room:
            nodes = len(forest.ids)
            micro_batches.append(([], []))
            room = max(budget, nodes)
        members, forests = micro_batches[-1]
        members += group
        forests.append(forest)
        room -= nodes
    if share == "dialogue":
        return [(members, plant(members, share)) for members, _ in micro_batches]
    return [(members, join(forests)) for members, forests in micro_batches]


def trunk_of(group: list[Item]) -> list[int]:
    """The tokens with which all sequences of some items begin."""
    prompts = [sequence.prompt for item in group for sequence in item.sequences]
    return commonprefix([min(prompts), max(prompts)])


def plant_within(group: list[Item], share: str, max_tokens: int) -> list[tuple[list[Item], Forest]]:
    """Plant a group of items. A tree that is too large is split, again and again if need be."""
    group = sorted(group, key=lambda item: item.sequences[0].prompt)
    forest = plant(group, share)
    # Below twice the longest sequence most of the tree is one trunk, which both halves would read.
    limit = max(max_tokens, 2 * int(forest.depth.max()))
    if len(forest.ids) <= limit or len(group) == 1:
        return [(group, forest)]
    split = where_least_is_shared([item.sequences[0].prompt for item in group])
    before, after = group[:split], group[split:]
    return plant_within(before, share, max_tokens) + plant_within(after, share, max_tokens)


def where_least_is_shared(prompts: list[list[int]]) -> int:
    """Where to split sorted prompts: between the two neighbours that share least (for rg, two
    strategies), and among several such places at the one nearest to the middle."""

    def cost(i: int) -> tuple[int, float]:
        return shared_prefix(prompts[i - 1], prompts[i]), abs(i - len(prompts) / 2)

    return min(range(1, len(prompts)), key=cost)


def pad(forest: Forest, multiple: int) -> Forest:
    """The forest with lone nodes after its last, up to a multiple of nodes. Kernels are compiled
    for each length, and so they meet few lengths. No number changes."""
    nodes = len(forest.ids)
    extra = -nodes % multiple
    ids = torch.nn.functional.pad(forest.ids, (0, extra))
    depth = torch.nn.functional.pad(forest.depth, (0, extra))
    ends = torch.arange(nodes + 1, nodes + extra + 1, device=forest.ids.device)
    return replace(forest, ids=ids, depth=depth, end=torch.cat([forest.end, ends]))


def sees(forest: Forest, window: int | None = None):
    """The mask as a rule on node numbers: (query, key) -> bool. With `window`, only the last
    `window` tokens of the query's path."""
    end, depth = forest.end, forest.depth

    def rule(query, key):
        visible = (key <= query) & (query < end[key])
        return visible if window is None else visible & (depth[query] - depth[key] < window)

    return rule


def dense_mask(forest: Forest, window: int | None = None) -> torch.Tensor:
    """(N, N) bool, [q, k] true where query q may attend to key k."""
    node = torch.arange(len(forest.ids), device=forest.ids.device)
    return sees(forest, window)(node[:, None], node[None, :])
