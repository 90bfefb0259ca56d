"""pytest tests/test_text.py

The text metrics of replies. Each figure is checked against one worked by hand, NLTK or
rouge_score."""

import random
import re

import numpy as np
import pytest

from desc.evaluation.text import (
    bleu,
    bleu_counts,
    common_subsequence,
    corpus_scores,
    near_copies,
    rouge_l,
    self_repetition,
    turn_scores,
    words,
)

SENTENCES = (
    "I'm so sorry to hear that. Don't you think it's hard?",
    "That sounds hard... I understand how you feel, and I can't imagine it.",
    "Have you tried talking to your friends about it?",
    "Have you tried to talk to a friend? It's worth a try.",
    "You are so strong!",
    "Hi there",
    "Yes",
    "I think that you should talk to your friends about how you feel, I think so.",
)


def random_pairs(seed: int, turns: int = 60) -> tuple[list[str], list[str]]:
    """(references, replies); each text is one or two of SENTENCES."""
    rng = random.Random(seed)
    texts = [" ".join(rng.sample(SENTENCES, rng.choice((1, 2)))) for _ in range(2 * turns)]
    return texts[:turns], texts[turns:]


def text_scores(references: list[str], replies: list[str]) -> dict[str, float]:
    """The means of turn_scores, in percent but for the length, and corpus_scores."""
    pairs = zip(references, replies, strict=True)
    turns = [turn_scores(words(reference), words(reply)) for reference, reply in pairs]
    if not turns:
        turns = [turn_scores([], [])]
    means = {}
    for name in turns[0]:
        scale = 1 if name == "length" else 100
        means[name] = scale * np.mean([scores[name] for scores in turns])
    return means | corpus_scores(references, replies)


# Words


@pytest.mark.parametrize(
    "text, expected",
    [
        ("I'm sure you don't.", "i 'm sure you do n't ."),
        ("It's 10:30, isn't it?!", "it 's 10:30 , is n't it ? !"),
        ("Well... that costs $3,000", "well ... that costs $ 3,000"),
        ("He can't; I cannot -- we're gonna", "he ca n't ; i can not -- we 're gon na"),
        ("my parents' well-known 'idea'", "my parents ' well-known ' idea '"),
        ("At 5 o'clock (e.g. today)", "at 5 o'clock ( e.g . today )"),
        ("  ", ""),
    ],
)
def test_words(text, expected):
    assert words(text) == expected.split()


def test_words_agree_with_nltk():
    """NLTK's word tokeniser needs one sentence at a time; these end at "." "?" "!" before white
    space."""
    tokenizer = pytest.importorskip("nltk.tokenize").NLTKWordTokenizer()
    for text in SENTENCES:
        tokens = []
        for sentence in re.split(r"(?<=[.?!])\s+", text):
            tokens += tokenizer.tokenize(sentence)
        assert words(text) == [token.lower() for token in tokens]


# Text overlap


def test_identical_texts_score_100():
    """All three have four words or more, as BLEU-4 needs."""
    texts = list(SENTENCES[:3])
    scores = text_scores(texts, texts)
    names = ["f1", "rouge-l"]
    for n in (1, 2, 3, 4):
        names += [f"bleu-{n}", f"corpus bleu-{n}"]
    assert [scores[name] for name in names] == pytest.approx([100] * len(names))


def test_distinct_by_hand():
    """In "a a b a b": 2 of 5 words, 3 of 4 pairs (aa ab ba ab), 3 of 3 triples. In "a b": 2 of 2,
    1 of 1, no triple, which counts as 0.

    Per turn and averaged: 70, 87.5, 50. Of both together: 2 of 7 words, 3 of 5 pairs, 3 of 3
    triples."""
    scores = text_scores(["x", "x"], ["a a b a b", "a b"])
    assert [scores[f"distinct-{n}"] for n in (1, 2, 3)] == pytest.approx([70, 87.5, 50])
    assert [scores[f"corpus distinct-{n}"] for n in (1, 2, 3)] == pytest.approx([200 / 7, 60, 100])
    assert scores["length"] == 3.5


def test_f1_by_hand():
    """In common "the" twice and "cat" once: overlap 3, precision 3/4, recall 3/6, F1 = 2 · 3 / (4 +
    6) = 0.6."""
    assert text_scores(["the cat saw the big dog"], ["the the cat the"])["f1"] == pytest.approx(60)


def test_rouge_l_by_hand():
    """With "a b d" in common: P = 3/4, R = 3/5, β² = 1.44,
    F = 2.44 · 0.45 / (0.6 + 1.44 · 0.75) = 1.098 / 1.68."""
    assert rouge_l("a b c d e".split(), "a b x d".split()) == pytest.approx(1.098 / 1.68)


@pytest.mark.parametrize("seed", range(3))
def test_rouge_l_agrees_with_rouge_score(seed):
    """rouge_score gives P and R of the longest common subsequence, and F with β = 1; F with β = 1.2
    follows from P and R."""
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    rng = random.Random(seed)
    for _ in range(50):
        reference = rng.choices("abcdef", k=rng.randint(1, 15))
        reply = rng.choices("abcdef", k=rng.randint(1, 15))
        score = scorer.score(" ".join(reference), " ".join(reply))["rougeL"]
        assert common_subsequence(reference, reply) / len(reference) == pytest.approx(score.recall)
        assert rouge_l(reference, reply, beta=1) == pytest.approx(score.fmeasure)
        weighed = score.recall + 1.44 * score.precision
        expected = 2.44 * score.precision * score.recall / weighed if weighed else 0
        assert rouge_l(reference, reply) == pytest.approx(expected)


def nltk_bleu(pairs: list[tuple[list[str], list[str]]]) -> list[float]:
    """BLEU-1 … BLEU-4 of (reference, reply) pairs."""
    nltk = pytest.importorskip("nltk.translate.bleu_score")
    smoothing = nltk.SmoothingFunction().method3
    references = [[reference] for reference, _ in pairs]
    replies = [reply for _, reply in pairs]
    return [
        nltk.corpus_bleu(references, replies, weights=[1 / n] * n, smoothing_function=smoothing)
        for n in (1, 2, 3, 4)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_bleu_agrees_with_nltk(seed):
    """One turn or many, with short replies and empty ones among them."""
    rng = random.Random(seed)

    def random_words() -> list[str]:
        return rng.choices("abcdefgh", k=rng.randint(0, 12))

    for turns in [1] * 60 + [2, 5, 20]:
        pairs = [(random_words(), random_words()) for _ in range(turns)]
        counts = sum(bleu_counts(reference, reply) for reference, reply in pairs)
        assert bleu(counts) == pytest.approx(nltk_bleu(pairs))


def test_text_scores_average_bleu_over_turns_and_sum_its_counts_over_the_corpus():
    references, replies = random_pairs(0)
    pairs = [(words(reference), words(reply)) for reference, reply in zip(references, replies)]
    scores = text_scores(references, replies)
    mean_of_turns = 100 * np.mean([nltk_bleu([pair]) for pair in pairs], axis=0)
    of_corpus = 100 * np.array(nltk_bleu(pairs))
    assert [scores[f"bleu-{n}"] for n in (1, 2, 3, 4)] == pytest.approx(mean_of_turns)
    assert [scores[f"corpus bleu-{n}"] for n in (1, 2, 3, 4)] == pytest.approx(of_corpus)


@pytest.mark.parametrize(
    "references, replies", [(["Hello there."], [""]), ([""], [""]), ([], []), ([""], ["..."])]
)
def test_empty_texts_overlap_by_zero(references, replies):
    scores = text_scores(references, replies)
    names = [name for name in scores if "bleu" in name or name in ("f1", "rouge-l")]
    assert len(scores) == 17 and len(names) == 10
    assert all(scores[name] == 0 for name in names)
    if replies != ["..."]:
        assert set(scores.values()) == {0}


def test_an_empty_reply_counts_as_a_turn():
    one = text_scores(["You are so strong!"], ["You are strong!"])
    two = text_scores(["You are so strong!"] * 2, ["You are strong!", ""])
    for name in ("distinct-1", "bleu-1", "f1", "rouge-l", "length"):
        assert two[name] == pytest.approx(one[name] / 2)


def test_order_of_turns_does_not_matter():
    references, replies = random_pairs(1)
    order = np.random.default_rng(0).permutation(len(replies))
    shuffled = text_scores([references[i] for i in order], [replies[i] for i in order])
    assert shuffled == pytest.approx(text_scores(references, replies))


def test_unequal_numbers_of_texts_are_an_error():
    with pytest.raises(ValueError):
        text_scores(["a", "b"], ["a"])


# Repetition


def test_self_repetition_counts_trigrams_of_earlier_replies():
    """The first reply has 3 trigrams. The second has 4, and "i am here" and "am here for" are in
    the first one too. What recurs within one reply does not count."""
    assert self_repetition(["I am here for you", "Yes, I am here for"]) == (2, 7)
    assert self_repetition(["go go go go", "Hm"]) == (0, 2)


def test_near_copies_are_replies_that_have_a_twin():
    twins = [
        "I am so sorry to hear that you lost your job.",
        "i am so sorry to hear that you lost your Job!",
    ]
    assert near_copies([*twins, "What happened?", ""]) == pytest.approx(2 / 4)
    assert near_copies(twins[:1]) == near_copies([]) == 0
    assert near_copies(["a b c d e f g h i", "a b c d e f g h j"], 8 / 9) == 1  # 2 · 8 / 18
    assert near_copies(["a b c d e f g h i", "a b c d e f g h j"]) == 0
