"""Token sequences -> a forest of prefix trees that a model reads once.

Turn k's prompt is a prefix of turn k+1's, and both answers of a pair share their prompt. So equal
prefixes are merged, and the tokens of the tree are laid in depth-first order. A token may look at
itself and its ancestors only, and in depth-first order the descendants of node k are the run k …
end[k] - 1, so the whole attention mask is one line:

    query q sees key k   iff   k <= q < end[k]

Every sequence is tokenised alone and only equal prefixes merge, so each token sees exactly what it
would see in a sequence of its own, at the same position: log-probabilities and gradients are the
same."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from os.path import commonprefix

import torch

from desc.encoding import Item, Sequence

SHARING = ("dialogue", "pair", "none")
PADDING = 512  # nodes, on a GPU; FlexAttention wants multiples of 128


@dataclass(frozen=True, eq=False)  # a key of caches by identity
class Forest:
    """N nodes, M completion tokens, S sequences. All int64."""

    ids: torch.Tensor  # (N,) tokens in depth-first order
    depth: torch.Tensor  # (N,) distance from the root: the position ids
    end: torch.Tensor  # (N,) one past the last descendant
    rows: torch.Tensor  # (M,) node whose hidden state predicts a completion token
    targets: torch.Tensor  # (M,) that token
    owner: torch.Tensor  # (M,) the sequence it belongs to
    size: int  # S

    def to(self, device: torch.device) -> "Forest":
        """On its way to a GPU it is padded, for FlexAttention is compiled for few lengths, and
        pinned, so that no one waits for the copy."""
        if self.ids.device == device:
            return self
        forest = pad(self, PADDING)
        tensors = (getattr(forest, f.name).pin_memory() for f in fields(self)[:-1])
        return Forest(*(tensor.to(device, non_blocking=True) for tensor in tensors), self.size)


def grow(sequences: list[Sequence]) -> Forest:
    """The prefix tree of `sequences` (a forest where their first tokens differ). Sequence s keeps
    number s as its owner.

    Raises ValueError for an empty prompt (nothing would predict the first completion token) or an
    empty completion."""
    if any(not prompt or not completion for prompt, completion in sequences):
        raise ValueError("a sequence needs a prompt and a completion of at least one token each")
    # A sequence's last token predicts nothing, so it is a target but no node.
    inputs = [list(prompt) + list(completion[:-1]) for prompt, completion in sequences]
    ids, depth, end = [], [], []
    path, previous = [], []  # nodes and tokens from the root to the leaf laid last
    paths = [[] for _ in sequences]
    # lexicographic order is a depth-first walk of the tree
    for s in sorted(range(len(inputs)), key=inputs.__getitem__):
        shared = len(commonprefix([previous, inputs[s]]))
        for node in path[shared:]:  # the branch we leave has no more descendants
            end[node] = len(ids)
        path = path[:shared] + list(range(len(ids), len(ids) + len(inputs[s]) - shared))
        ids += inputs[s][shared:]
        depth += range(shared, len(inputs[s]))
        end += [0] * (len(ids) - len(end))
        paths[s], previous = path, inputs[s]
    for node in path:
        end[node] = len(ids)
    rows = [
        node for (prompt, _), nodes in zip(sequences, paths) for node in nodes[len(prompt) - 1 :]
    ]
    targets = [token for _, completion in sequences for token in completion]
    owner = [s for s, (_, completion) in enumerate(sequences) for _ in completion]
    return Forest(*map(torch.tensor, (ids, depth, end, rows, targets, owner)), len(sequences))


def join(forests: list[Forest]) -> Forest:
    """Several forests laid one after another; sequences are numbered on in the same order. `end`
    keeps them apart."""
    parts, nodes, sequences = [], 0, 0
    for f in forests:
        parts.append(
            (f.ids, f.depth, f.end + nodes, f.rows + nodes, f.targets, f.owner + sequences)
        )
        nodes, sequences = nodes + len(f.ids), sequences + f.size
    return Forest(*map(torch.cat, zip(*parts)), sequences)


def plant(items: list[Item], share: str) -> Forest:
    """Items -> forest. `share` says which equal prefixes merge: all of them ("dialogue"), those
    within an item ("pair"), or "none"."""
    if share == "dialogue":
        return grow([sequence for item in items for sequence in item.sequences])
    if share == "pair":
        return join([grow(item.sequences) for item in items])
    return join([grow([sequence]) for item in items for sequence in item.sequences])


def pack(
    items: list[Item], share: str, max_tokens: int, ranks: int = 1
) -> list[tuple[list[Item], Forest]]:
    """Cut a batch into micro-batches of at most `max_tokens` nodes, or twice the longest sequence
    where that is more.

    Items of one dialogue are planted together when sharing by dialogue, and cut only where they
    must be. Trees are not laid together where that would leave one of the `ranks` without work."""
    groups: dict[object, list[Item]] = {}
    for item in items:
        groups.setdefault(item.dialogue if share == "dialogue" else id(item), []).append(item)
    planted = list(_fit(groups.values(), share, max_tokens))
    most = min(max_tokens, sum(len(forest.ids) for _, forest in planted) // ranks)
    batches, room = [], 0
    for group, forest in planted:
        if len(forest.ids) > room:
            batches.append(([], []))
            room = max(most, len(forest.ids))
        batches[-1][0].extend(group)
        batches[-1][1].append(forest)
        room -= len(forest.ids)
    return [(members, join(forests)) for members, forests in batches]


def _fit(groups: Iterable[list[Item]], share: str, max_tokens: int):
    """Plant each group, cutting those that are too large where neighbours in the tree share least:
    rg's between two strategies."""
    for group in groups:
        group = sorted(group, key=lambda item: item.sequences[0].prompt)
        forest = plant(group, share)
        # Below twice the longest sequence most of the tree is one trunk, which both halves would
        # read.
        if len(forest.ids) <= max(max_tokens, 2 * int(forest.depth.max())) or len(group) == 1:
            yield group, forest
        else:
            shared = [
                len(commonprefix([a.sequences[0].prompt, b.sequences[0].prompt]))
                for a, b in pairwise(group)
            ]
            # else near the middle
            cut = 1 + min(
                range(len(shared)), key=lambda i: (shared[i], abs(i + 1 - len(group) / 2))
            )
            yield from _fit((group[:cut], group[cut:]), share, max_tokens)


def deal(
    batches: list[tuple[list[Item], Forest]], ranks: int
) -> list[list[tuple[list[Item], Forest]]]:
    """Micro-batches -> each rank's: about as many nodes, and exactly as many forwards, for ranks
    that share a model wait for each other.

    What is missing is made up by a forest of one node and no sequence, whose loss and gradient are
    zero."""
    each, hands = -(-len(batches) // ranks), [[] for _ in range(ranks)]
    nodes = [0] * ranks
    # the largest first, each to the rank with least to do
    for batch in sorted(batches, key=lambda batch: -len(batch[1].ids)):
        rank = min((r for r in range(ranks) if len(hands[r]) < each), key=nodes.__getitem__)
        hands[rank].append(batch)
        nodes[rank] += len(batch[1].ids)
    blank = Forest(
        *(torch.tensor(values, dtype=torch.int64) for values in ([0], [0], [1], [], [], [])), 0
    )
    return [hand + [([], blank)] * (each - len(hand)) for hand in hands]


def pad(forest: Forest, multiple: int) -> Forest:
    """Lone nodes after the last, up to a multiple, so that kernels compiled for a length meet few
    of them. No number changes."""
    nodes = len(forest.ids)
    extra = -nodes % multiple
    ids, depth = (
        torch.nn.functional.pad(values, (0, extra)) for values in (forest.ids, forest.depth)
    )
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
