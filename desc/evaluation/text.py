"""Text metrics of replies: words, distinct-n, BLEU, F1, ROUGE-L, repetition.

Each is in 0 … 1 unless its docstring says otherwise."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

# What the Treebank conventions split from the word before it: "do|n't", "it|'s".
CLITIC = r"(?:n't|'(?:s|m|d|ll|re|ve))\b"
# The first of these that matches:
# - a run of full stops, a dash, or a clitic;
# - the first half of "can|not", "gon|na", "wan|na" or "got|ta";
# - a word, which may hold "'" and "." between letters ("o'clock", "e.g") and "," and ":" before
#   digits ("3,000", "10:30");
# - one character by itself.
WORD = re.compile(
    rf"\.\.+|--|{CLITIC}|\b(?:can(?=not\b)|(?:gon|wan)(?=na\b)|got(?=ta\b))"
    rf"|(?:(?!{CLITIC}|--)"
    r"(?:[^\s'.,:;?!@#$%&*()\[\]{}<>\"“”‘’]|(?<=\w)(?:['.](?=\w)|[,:](?=\d))))+|\S"
)


def words(text: str) -> list[str]:
    """Lower-cased words and punctuation marks, nearly those of NLTK's word_tokenize (Treebank
    conventions).

    Quotation marks stay as they are written; NLTK turns them into `` and ''. But for these, 99.8 %
    of ESConv's 18,376 supporter texts are split as by NLTK, which found their sentences by a Punkt
    model fitted to ESConv. With them it is 99.1 %."""
    return WORD.findall(text.lower())


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n tokens, in their order."""
    return list(zip(*(tokens[i:] for i in range(n))))


def distinct(grams: Sequence[tuple[str, ...]]) -> float:
    """The share of different n-grams, 0 … 1 (Li et al. 2016); 0 if there are none."""
    return len(set(grams)) / max(len(grams), 1)


def bleu_counts(reference: list[str], reply: list[str]) -> np.ndarray:
    """(5, 2) counts, to be summed over turns: first the lengths (reference, reply), then for n = 1
    … 4 the n-grams (matched, of the reply)."""
    counts = [(len(reference), len(reply))]
    for n in range(1, 5):
        grams = Counter(ngrams(reply, n))
        matched = grams & Counter(ngrams(reference, n))
        # A reply too short for an n-gram counts as one without a match, as in NLTK.
        counts.append((matched.total(), max(grams.total(), 1)))
    return np.array(counts, float)


def bleu(counts: np.ndarray) -> np.ndarray:
    """BLEU-1 … BLEU-4 (4,), each in 0 … 1 (Papineni et al. 2002), from bleu_counts (5, 2); 0 if no
    word matches.

    The first order without a match counts as 1/2 of a match, the second as 1/4, … (NIST's
    smoothing, NLTK's method 3)."""
    reference, reply = counts[0]
    matches, totals = counts[1:].T
    if matches[0] == 0:
        return np.zeros(4)
    missing = matches == 0
    precisions = np.where(missing, 0.5 ** missing.cumsum(), matches) / totals
    brevity = min(0.0, 1 - reference / reply)
    return np.exp(brevity + np.log(precisions).cumsum() / np.arange(1, 5))


def word_f1(reference: list[str], reply: list[str]) -> float:
    """Unigram F1, 0 … 1: the harmonic mean of precision and recall of the words as multisets."""
    common = Counter(reference) & Counter(reply)
    return 2 * common.total() / max(len(reference) + len(reply), 1)


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    lengths = [0] * (len(b) + 1)  # lengths[j]: of the words of `a` so far and b[:j]
    for x in a:
        before = lengths
        lengths = [0]
        for j, y in enumerate(b):
            lengths.append(before[j] + 1 if x == y else max(before[j + 1], lengths[j]))
    return lengths[-1]


def rouge_l(reference: list[str], reply: list[str], beta: float = 1.2) -> float:
    """F of the longest common subsequence, 0 … 1 (Lin 2004). Recall weighs beta² times as much as
    precision."""
    common = common_subsequence(reference, reply)
    # F = (1 + β²) P R / (R + β² P) with P = common / |reply| and R = common / |reference|,
    # multiplied out.
    return (1 + beta**2) * common / max(len(reply) + beta**2 * len(reference), 1)


def turn_scores(reference: list[str], reply: list[str]) -> dict[str, float]:
    """The text metrics of one turn, from its words; each in 0 … 1 but the length, in words."""
    scores = {f"distinct-{n}": distinct(ngrams(reply, n)) for n in (1, 2, 3)}
    for n, score in enumerate(bleu(bleu_counts(reference, reply)), 1):
        scores[f"bleu-{n}"] = score
    scores["f1"] = word_f1(reference, reply)
    scores["rouge-l"] = rouge_l(reference, reply)
    scores["length"] = len(reply)
    return scores


def self_repetition(replies: Sequence[str]) -> tuple[int, int]:
    """(repeated, all) trigrams of one dialogue's replies. A trigram is repeated if an earlier reply
    has it."""
    earlier = set()
    repeated = total = 0
    for reply in replies:
        grams = ngrams(words(reply), 3)
        repeated += sum(gram in earlier for gram in grams)
        total += len(grams)
        earlier.update(grams)
    return repeated, total


def near_copies(replies: Sequence[str], least: float = 0.9) -> float:
    """The share of replies, 0 … 1, whose set of words is nearly that of another reply: 2 |a ∩ b| /
    (|a| + |b|) ≥ `least` (Dice)."""
    if not replies:
        return 0.0
    bags = [set(words(reply)) for reply in replies]
    column = {word: i for i, word in enumerate(sorted(set().union(*bags)))}
    has_word = np.zeros((len(bags), len(column)), np.float32)
    for row, bag in zip(has_word, bags):
        row[[column[word] for word in bag]] = 1
    size = has_word.sum(1)
    common = has_word @ has_word.T
    alike = 2 * common >= least * (size[:, None] + size) - 1e-6
    np.fill_diagonal(alike, False)
    return float(alike.any(1).mean())


def corpus_scores(references: Sequence[str], replies: Sequence[str]) -> dict[str, float]:
    """Metrics of all replies together, in percent: "corpus distinct-n" over all their n-grams,
    "corpus bleu-n" from the summed counts. 0 if there are no replies.

    This is what others usually report. The paper's are means over turns (`turn_scores`), and very
    different figures. Raises ValueError if the numbers of references and replies differ."""
    pairs = zip(references, replies, strict=True)
    turns = [(words(reference), words(reply)) for reference, reply in pairs]
    if not turns:
        turns = [([], [])]
    scores = {}
    for n in (1, 2, 3):
        grams = [gram for _, reply in turns for gram in ngrams(reply, n)]
        scores[f"corpus distinct-{n}"] = 100 * distinct(grams)
    counts = sum(bleu_counts(reference, reply) for reference, reply in turns)
    for n, score in enumerate(bleu(counts), 1):
        scores[f"corpus bleu-{n}"] = 100 * float(score)
    return scores
