"""The prefix tree: drawn by hand, equal to one sequence at a time, packed, with sliding windows, in
blocks.

    pytest tests/test_tree.py -q

With --slow and DESC_ESCONV set, SmolLM2 also runs on two dialogues of ESConv.

HAND, the forest drawn by hand, has four sequences (prompt » completion):

    s0  1 2 » 3 4        s1  1 2 » 5        s2  1 2 6 7 » 8 9        s3  9 » 1

A sequence's last token is a target but no node, so the forest has seven nodes (n: token), in
depth-first order:

    0: 1 ── 1: 2 ─┬─ 2: 3
                  └─ 3: 6 ── 4: 7 ── 5: 8
    6: 9

node    0  1  2  3  4  5  6      s0 predicts 3 at node 1 and 4 at node 2. s1 predicts 5 at node 1.
ids     1  2  3  6  7  8  9      s2 predicts 8 at node 4 and 9 at node 5. s3 predicts 1 at node 6.
depth   0  1  2  2  3  4  0      So rows 1 2 1 4 5 6, targets 3 4 5 8 9 1, owner 0 0 1 2 2 3.
end     6  6  3  6  6  6  7
"""

import random
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from architectures import KINDS, ODD, build, configure
from torch.nn.attention.flex_attention import flex_attention

from desc import DescError, attention
from desc.domain import ESCONV
from desc.encoding import Item, TokenSequence, encode, encode_example
from desc.esconv import load_dialogues
from desc.forward import TargetLogps, sequence_logps, tree_mask
from desc.lora import add_adapter
from desc.modeling import load
from desc.prompts import build_examples
from desc.tree import SHARING, dense_mask, grow, join, pack, pad, plant

HAND = [
    TokenSequence([1, 2], [3, 4]),
    TokenSequence([1, 2], [5]),
    TokenSequence([1, 2, 6, 7], [8, 9]),
    TokenSequence([9], [1]),
]


def values(forest):
    return {
        name: getattr(forest, name).tolist()
        for name in ("ids", "depth", "end", "rows", "targets", "owner")
    }


def one_by_one(model, sequences):
    """The oracle, of shape (S,). Each sequence has a plain forward of its own. Its value is
    − cross_entropy, summed over its completion."""
    logps = []
    for prompt, completion in sequences:
        ids = torch.tensor([prompt + completion], device=model.device)
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        logps.append(-F.cross_entropy(logits.float(), ids[0, len(prompt) :], reduction="sum"))
    return torch.stack(logps)


def random_items(seed, dialogues=3, turns=4, vocabulary=40):
    """Pairs as dialogues make them: the prompts of a dialogue grow, and each has two answers. The
    vocabulary is so small that branches meet by chance.

    One pair occurs twice. Some pairs have two equal answers, and in some pairs the rejected answer
    continues the chosen one."""
    draw = random.Random(seed)

    def tokens(longest):
        return [draw.randrange(vocabulary) for _ in range(draw.randint(1, longest))]

    items = []
    for d in range(dialogues):
        prompt = [d] + tokens(5)
        for t in range(turns):
            chosen = tokens(4)
            rejected = draw.choice([tokens(4), chosen, chosen + tokens(3)])
            items.append(
                Item(
                    f"{d}/{t}",
                    str(d),
                    [TokenSequence(prompt, chosen), TokenSequence(prompt, rejected)],
                )
            )
            prompt = prompt + chosen + tokens(5)
    items.append(Item("again", items[1].dialogue, items[1].sequences))
    return items


def flat(items):
    return [sequence for item in items for sequence in item.sequences]


# --- drawn by hand --------------------------------------------------------------------------------


def test_grow():
    forest = grow(HAND)
    assert values(forest) == {
        "ids": [1, 2, 3, 6, 7, 8, 9],
        "depth": [0, 1, 2, 2, 3, 4, 0],
        "end": [6, 6, 3, 6, 6, 6, 7],
        "rows": [1, 2, 1, 4, 5, 6],
        "targets": [3, 4, 5, 8, 9, 1],
        "owner": [0, 0, 1, 2, 2, 3],
    }
    assert forest.size == 4


def test_grow_does_not_depend_on_the_order_of_sequences():
    """The tree is the same. Only the order of the rows changes: s3, s2, s1, s0 predict at the nodes
    6 | 4 5 | 1 | 1 2."""
    forest = grow(HAND[::-1])
    assert values(forest) == values(grow(HAND)) | {
        "rows": [6, 4, 5, 1, 1, 2],
        "targets": [1, 8, 9, 5, 3, 4],
        "owner": [0, 1, 1, 2, 3, 3],
    }


def test_repeated_sequences_cost_no_node():
    once, thrice = grow(HAND[:1]), grow(3 * HAND[:1])
    assert thrice.ids.tolist() == once.ids.tolist() == [1, 2, 3]
    assert thrice.rows.tolist() == [1, 2, 1, 2, 1, 2]
    assert thrice.owner.tolist() == [0, 0, 1, 1, 2, 2]


def test_dense_mask():
    x, o = True, False
    assert dense_mask(grow(HAND)).tolist() == [  # key
        [x, o, o, o, o, o, o],  # query 0
        [x, x, o, o, o, o, o],
        [x, x, x, o, o, o, o],
        [x, x, o, x, o, o, o],  # the parent of node 3 is node 1, as of node 2
        [x, x, o, x, x, o, o],
        [x, x, o, x, x, x, o],
        [o, o, o, o, o, o, x],  # a tree of its own
    ]
    assert dense_mask(grow(HAND), window=2).tolist() == [  # itself and its parent
        [x, o, o, o, o, o, o],
        [x, x, o, o, o, o, o],
        [o, x, x, o, o, o, o],
        [o, x, o, x, o, o, o],
        [o, o, o, x, x, o, o],
        [o, o, o, o, x, x, o],
        [o, o, o, o, o, o, x],
    ]


def test_join_counts_nodes_and_sequences_on():
    """HAND has seven nodes and four sequences. The two nodes (5, 6) and the one sequence of 5 » 6 7
    follow them, so they are nodes 7 and 8 and sequence 4."""
    forest = join([grow(HAND), grow([TokenSequence([5], [6, 7])])])
    expected = {
        "ids": [5, 6],
        "depth": [0, 1],
        "end": [9, 9],
        "rows": [7, 8],
        "targets": [6, 7],
        "owner": [4, 4],
    }
    assert values(forest) == {
        name: first + expected[name] for name, first in values(grow(HAND)).items()
    }
    assert forest.size == 5
    mask = dense_mask(forest)
    assert torch.equal(mask[:7, :7], dense_mask(grow(HAND)))
    assert not mask[:7, 7:].any()
    assert not mask[7:, :7].any()


def test_each_way_of_sharing_merges_what_it_should():
    """Two items both hold HAND[0] and HAND[1]. All in one tree are 3 nodes. One tree per item gives
    3 + 3 nodes. Without sharing there are 3 + 2 + 3 + 2."""
    items = [Item(name, "0", HAND[:2]) for name in "ab"]
    assert [len(plant(items, share).ids) for share in SHARING] == [3, 6, 10]
    assert [plant(items, share).owner.tolist() for share in SHARING] == 3 * [[0, 0, 1, 2, 2, 3]]


@pytest.mark.parametrize("sequence", [TokenSequence([], [1, 2]), TokenSequence([1, 2], [])])
def test_empty_prompt_and_empty_completion_are_refused(sequence):
    with pytest.raises(ValueError, match="at least one token"):
        grow([HAND[0], sequence])


# --- exact ----------------------------------------------------------------------------------------


def adapt(model):
    """A copy of a model with an adapter that is not 0."""
    model = deepcopy(model)
    torch.manual_seed(0)
    add_adapter(model, "sft", rank=4, alpha=8)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def adapted(toy_on_device):
    return adapt(toy_on_device[0])


def gradients(model, logps):
    """The gradients of a weighted sum of `logps` by the adapter's parameters. Every loss gives such
    weights."""
    weights = torch.linspace(-1, 1, len(logps), device=logps.device)
    return torch.autograd.grad(
        (weights * logps).sum(), [p for p in model.parameters() if p.requires_grad]
    )


def assert_near(tensor, expected, share, scale=0.0):
    """No number is further off than this share of the largest expected, or of `scale` if that is
    larger."""
    assert tensor.shape == expected.shape
    difference = (tensor.float() - expected.float()).abs().max()
    assert difference <= share * max(scale, float(expected.detach().abs().max()))


def assert_same(model, items, share, max_tokens=10**9):
    expected = one_by_one(model, flat(items))
    ((members, forest),) = pack(items, share, max_tokens)
    logps = sequence_logps(model, forest)
    place = {id(item): i for i, item in enumerate(members)}
    order = [2 * place[id(item)] + answer for item in items for answer in (0, 1)]
    # Near -600, neighbouring fp32 numbers are 6e-5 apart.
    torch.testing.assert_close(logps[order], expected, atol=1e-4, rtol=1e-6)
    for grad, oracle in zip(gradients(model, logps[order]), gradients(model, expected)):
        assert oracle.abs().max() > 1e-2
        assert_near(grad, oracle, 2e-5)


@pytest.mark.parametrize("share", SHARING)
@pytest.mark.parametrize("seed", range(3))
def test_random_trees_equal_one_sequence_at_a_time(adapted, share, seed):
    assert_same(adapted, random_items(seed), share)


@torch.no_grad()
def test_in_bf16_a_tree_is_as_near_to_fp32_as_one_sequence_at_a_time(toy_on_device):
    narrow = deepcopy(toy_on_device[0]).bfloat16()
    exact = deepcopy(narrow).float()  # the same weights
    sequences = flat(random_items(0))
    expected = one_by_one(exact, sequences)
    ours = (sequence_logps(narrow, grow(sequences)) - expected).norm()
    theirs = (one_by_one(narrow, sequences) - expected).norm()
    assert 1e-3 < ours < 2 * theirs


def test_sharing_saves_nodes_and_never_a_target():
    """Without shared nodes, the test above would check nothing."""
    for seed in range(3):
        items = random_items(seed)
        forests = {share: plant(items, share) for share in SHARING}
        assert len(forests["dialogue"].ids) < len(forests["pair"].ids) < len(forests["none"].ids)
        assert len(forests["none"].ids) == sum(len(p) + len(c) - 1 for p, c in flat(items))
        assert {tuple(f.targets.tolist()) for f in forests.values()} == {
            tuple(t for _, c in flat(items) for t in c)
        }


def test_dialogues_of_the_sample_equal_one_sequence_at_a_time(adapted, toy, sample):
    items = []
    for example in build_examples("vanilla", sample[:2]):
        answers = [example.completion, "[Others] I see."]
        items.append(
            encode(
                toy[1],
                f"{example.dialogue}/{example.turn}",
                example.dialogue,
                example.messages,
                answers,
                2048,
                ESCONV.speakers,
            )
        )
    assert_same(adapted, items, "dialogue")


@pytest.mark.slow
def test_smollm2_on_esconv_equals_one_sequence_at_a_time(smollm2, esconv_path):
    model, tokenizer = smollm2
    examples = build_examples(
        "sp", sorted(load_dialogues(esconv_path), key=lambda d: len(str(d)))[:2]
    )
    items = [encode_example(tokenizer, example, 2048, ESCONV.speakers) for example in examples]
    with torch.no_grad():
        forest = plant(items, "dialogue")
        assert 2 * len(forest.ids) < len(plant(items, "none").ids)
        torch.testing.assert_close(
            sequence_logps(model, forest), one_by_one(model, flat(items)), atol=1e-4, rtol=0
        )


# --- packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", SHARING)
@pytest.mark.parametrize("max_tokens", [1, 30, 60, 150, 10**6])
def test_pack_cuts_within_the_budget_and_changes_no_number(toy_on_device, share, max_tokens):
    model = toy_on_device[0]
    items = random_items(3, dialogues=4)
    # This dialogue's turns branch after two tokens, as those of rg do because of their strategies.
    # It has 2 + 16 · 10 nodes, of which each sequence has 12.
    items += [
        Item(
            f"w/{i}",
            "w",
            [TokenSequence([5, 6] + 10 * [i], [7]), TokenSequence([5, 6] + 10 * [i], [8])],
        )
        for i in range(16)
    ]
    batches = pack(items, share, max_tokens)
    for members, forest in batches:
        assert len(forest.ids) <= max(
            max_tokens, 2 * max(len(p) + len(c) for p, c in flat(members))
        )
    assert sorted(id(item) for members, _ in batches for item in members) == sorted(map(id, items))
    if max_tokens == 10**6:
        assert len(batches) == 1
    with torch.no_grad():
        expected = dict(zip(map(id, items), one_by_one(model, flat(items)).view(-1, 2)))
        for members, forest in batches:
            assert forest.size == 2 * len(members)
            logps = sequence_logps(model, forest).view(-1, 2)
            torch.testing.assert_close(
                logps, torch.stack([expected[id(item)] for item in members]), atol=1e-4, rtol=0
            )


def test_pack_makes_no_more_batches_than_it_must():
    """Ten items have 3 nodes each. Of these, three fit into 9 tokens, so there are four batches.
    Sharing merges the ten into one tree of 3 nodes."""
    items = [Item(str(i), str(i), HAND[:2]) for i in range(10)]
    assert [len(members) for members, _ in pack(items, "pair", 9)] == [3, 3, 3, 1]
    together = [Item(str(i), "0", HAND[:2]) for i in range(10)]
    ((members, forest),) = pack(together, "dialogue", 9)
    assert len(members) == 10 and len(forest.ids) == 3


def test_dialogues_of_a_micro_batch_share_what_they_begin_with():
    """Two dialogues of four nodes begin with the same three tokens, so together they have five. As
    pairs they share nothing, and do not fit into one batch."""
    items = [
        Item("a", "a", [TokenSequence([1, 2, 3, 4], [5])]),
        Item("b", "b", [TokenSequence([1, 2, 3, 6], [7])]),
    ]
    ((members, forest),) = pack(items, "dialogue", 5)
    assert members == items
    assert forest.ids.tolist() == [1, 2, 3, 4, 6]
    assert forest.targets.tolist() == [5, 7] and forest.owner.tolist() == [0, 1]
    assert [len(forest.ids) for _, forest in pack(items, "pair", 5)] == [4, 4]
    assert [len(forest.ids) for _, forest in pack(items, "dialogue", 4)] == [4, 4]


def test_pack_cuts_a_tree_where_least_is_shared():
    """Token 0 has four children, the strategies 1 … 4, each followed by the chain 9 9. That makes
    1 + 4 · 3 nodes, and 7 fit into a batch. A cut between the strategies 2 and 3 repeats only token
    0. A cut after half of the items, among those of strategy 2, would repeat 0 2 9."""
    prompts = [[0, 1, 9, 9], [0, 2, 9], [0, 2, 9, 9], [0, 2, 9, 9], [0, 3, 9, 9], [0, 4, 9, 9]]
    items = [Item(str(i), "0", [TokenSequence(prompt, [7])]) for i, prompt in enumerate(prompts)]
    assert [len(forest.ids) for _, forest in pack(items[::-1], "dialogue", 100)] == [13]
    assert [len(forest.ids) for _, forest in pack(items[::-1], "dialogue", 7)] == [7, 7]


# --- other architectures, sliding windows ---------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS | ODD)
def test_architectures_equal_the_stock_model(kind, toy, device, tmp_path):
    """So do the gradients of the embeddings. The model is loaded from a folder, like a user's. A
    model in ODD may be refused with a DescError instead, but it must never give wrong numbers."""
    # more words than the toy's tokenizer has, and the narrowest heads that FlexAttention reads
    stock = build(configure(kind, vocab_size=850, head_dim=16)).to(device)
    stock.save_pretrained(tmp_path)
    toy[1].save_pretrained(tmp_path)
    sequences = flat(random_items(0, vocabulary=50))
    try:
        model = load(str(tmp_path), torch.float32, device)[0]
        logps = sequence_logps(model, grow(sequences))
    except DescError:
        assert kind in ODD
        return
    expected = one_by_one(stock, sequences)
    torch.testing.assert_close(logps, expected, atol=1e-4, rtol=1e-5)
    ours, theirs = (
        torch.autograd.grad(y.sum(), m.get_input_embeddings().weight)[0]
        for y, m in ((logps, model), (expected, stock))
    )
    assert_near(ours, theirs, 1e-4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "window" in kind])
@torch.no_grad()
def test_the_windows_of_these_models_matter(kind):
    """If they did not matter, the test above would pass without any window."""
    sequences = flat(random_items(0, vocabulary=50))
    narrow, wide = (
        one_by_one(build(configure(kind, sliding_window=window)), sequences) for window in (4, 1000)
    )
    assert (narrow - wide).abs().max() > 0.1


# --- attention ------------------------------------------------------------------------------------


def first_nodes(count):
    """The first `count` nodes of a forest of four dialogues, whose paths have up to 200 nodes.
    Nothing is predicted."""
    forest = grow(flat(random_items(0, dialogues=4, turns=40)))
    assert len(forest.ids) > count
    parts = {name: getattr(forest, name)[:count] for name in ("ids", "depth", "end")}
    return replace(forest, **parts | {"end": parts["end"].clamp(max=count)})


def plain_attention(query, key, value, visible, scaling):
    """The oracle: softmax(scaling · q kᵀ) v in fp32, (1, N, H, E). Heads in groups share keys."""
    each = query.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(each, dim=1) for x in (key, value))
    scores = (query.float() @ key.mT * scaling).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize(
    "dtype, width, window",
    [
        (torch.float32, 64, None),
        (torch.float32, 128, 50),
        (torch.bfloat16, 64, 50),
        (torch.bfloat16, 128, None),
    ],
    ids=str,
)
def test_attention_is_a_softmax_over_what_each_node_sees(dtype, width, window, device):
    """On the CPU block by block, and on a GPU FlexAttention: outputs and gradients, with ordinary
    scores and with scores of a few hundred.

    In bf16, neighbouring numbers are 2^-8 to 2^-7 apart. There the large scores themselves are
    rounded by whole units, so no more can be said than that all is finite."""
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4 * 2**-8}[dtype]
    for nodes in (1, 127, 128, 129, 511, 513):
        forest = first_nodes(nodes).to(device)
        visible = dense_mask(forest, window)
        for size in (1, 6):
            inputs = [
                (torch.randn(1, heads, len(visible), width, device=device) * scale).to(dtype)
                for heads, scale in ((4, size), (2, size), (2, 1))
            ]
            inputs = [x.requires_grad_() for x in inputs]
            scaling = width**-0.5
            mask = tree_mask(forest, window)
            output, _ = attention.tree_attention(None, *inputs, mask, scaling)
            expected = plain_attention(*inputs, visible, scaling)
            assert output.dtype == dtype
            direction = torch.randn_like(expected)
            ours, theirs = (
                torch.autograd.grad((y.float() * direction).sum(), inputs)
                for y in (output, expected)
            )
            for tensor, oracle in zip((output, *ours), (expected, *theirs)):
                if dtype == torch.bfloat16 and size > 1:
                    assert tensor.isfinite().all()
                else:
                    # a node that sees itself alone has gradients of 0 beside others of about 1
                    assert_near(tensor, oracle, tolerance * size**2, scale=1.0)


def test_blocks_of_the_mask_are_as_full_as_they_say():
    """FlexAttention reads a block that is listed as full without asking the rule, and does not read
    one that is not listed. Few of those it asks about turn out to be all hidden or all seen."""
    for window in (None, 3, 50, 150):
        forest = pad(first_nodes(1000), 128)
        visible = dense_mask(forest, window).unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
        some, every = visible.any(3).any(1), visible.all(3).all(1)  # (8, 8)
        mask = attention.flex_mask(forest, window)
        asked = as_matrix(mask.kv_num_blocks, mask.kv_indices)
        full = as_matrix(mask.full_kv_num_blocks, mask.full_kv_indices)
        assert not (asked & full).any()
        assert not (full & ~every).any()
        assert not (some & ~full & ~asked).any()
        assert (asked & (every | ~some)).sum() <= 8
        transposed = as_matrix(mask.q_num_blocks, mask.q_indices)
        assert torch.equal(transposed.T, asked)  # what the backward pass reads
        transposed = as_matrix(mask.full_q_num_blocks, mask.full_q_indices)
        assert torch.equal(transposed.T, full)


def as_matrix(counts, columns):
    """How a BlockMask lists blocks -> (B, B) bool."""
    blocks = torch.zeros(columns.shape[2:], dtype=torch.bool)
    for row, (count, indices) in enumerate(zip(counts[0, 0], columns[0, 0])):
        blocks[row, indices[:count].long()] = True
    return blocks


@pytest.mark.parametrize("block", [1, 3, 7, 256])
def test_block_attention_equals_sdpa(block, monkeypatch):
    """Outputs and gradients are equal for the forest drawn by hand and a random one. Four query
    heads share two key heads."""
    monkeypatch.setattr(attention, "BLOCK", block)
    for forest in (grow(HAND), grow(flat(random_items(0)))):
        mask = dense_mask(forest)[None, None]
        nodes = mask.shape[-1]
        torch.manual_seed(0)
        query, key, value = (
            torch.randn(1, heads, nodes, 8, requires_grad=True) for heads in (4, 2, 2)
        )
        output = attention.BlockAttention.apply(query, key, value, mask, 0.3)
        pairs = [x.repeat_interleave(2, dim=1) for x in (key, value)]
        expected = F.scaled_dot_product_attention(
            query, *pairs, attn_mask=mask, scale=0.3
        ).transpose(1, 2)
        assert output.shape == expected.shape == (1, nodes, 4, 8)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
        direction = torch.randn_like(output)
        ours, theirs = (
            torch.autograd.grad((y * direction).sum(), (query, key, value))
            for y in (output, expected)
        )
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_size_of_blocks_changes_nothing(toy, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 3)
    assert_same(adapt(toy[0]), random_items(1), "dialogue")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("seed", range(3))
def test_the_block_mask_is_the_dense_mask(seed, window, monkeypatch):
    """FlexAttention's uncompiled forward, which also runs on the CPU."""
    monkeypatch.setattr(attention, "compiled_flex", lambda: flex_attention)
    forest = pad(grow(flat(random_items(seed))), 128)
    nodes = len(forest.ids)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, nodes, 16) for heads in (6, 2, 2))
    mask = attention.flex_mask(forest, window)
    output, _ = attention.tree_attention(None, query, key, value, mask, 0.3)
    expected = attention.BlockAttention.apply(
        query, key, value, dense_mask(forest, window)[None, None], 0.3
    )
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    assert mask.shape == (1, 1, nodes, nodes)


def test_padding_changes_no_number(adapted):
    forest = grow(flat(random_items(0)))
    padded = pad(forest, 64)
    assert len(padded.ids) % 64 == 0 and pad(padded, 64).ids.equal(padded.ids)
    assert padded.nodes == len(forest.ids) < len(padded.ids)
    assert dense_mask(padded)[padded.nodes :].sum(-1).eq(1).all()  # padding sees only itself
    torch.testing.assert_close(
        sequence_logps(adapted, padded), sequence_logps(adapted, forest), atol=1e-5, rtol=0
    )


# --- log-probabilities ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_log_probabilities_in_chunks_are_those_of_all_rows_at_once(dtype, rows, device):
    """300 rows are two chunks and a rest. The values are those of cross-entropy in fp32, and so are
    the gradients, up to one rounding to `dtype`."""
    logits = (5 * torch.randn(rows, 50, device=device)).to(dtype).requires_grad_()
    targets = torch.randint(50, (rows,), device=device)
    weights = torch.randn(rows, device=device)
    logps = TargetLogps.apply(logits, targets)
    expected = -F.cross_entropy(logits.float(), targets, reduction="none")
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, expected)
    ours, theirs = (torch.autograd.grad((weights * y).sum(), logits)[0] for y in (logps, expected))
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=tolerance)
