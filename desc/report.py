"""What an evaluation found, as rows of numbers and as a table."""

from collections import Counter

import numpy as np

from desc.esconv import Dialogue
from desc.metrics import bias_of_confusion, bootstrap, confusion, expected_confusion, negative_log_likelihood, scores_of_confusion
from desc.metrics import text_scores
from desc.strategies import Strategies

PLAN = ("accuracy", "greedy", "Q", "Q_W", "B", "nll", "invalid")
TEXT = ("distinct-1", "bleu-1", "f1", "rouge-l", "length", "corpus distinct-1", "corpus bleu-4")


def summarise(records: list[dict], strategies: Strategies, seed: int) -> dict:
    """The scores of one system, in percent but for B, the likelihood and the length, with intervals for Q and B; "greedy" is the
    accuracy of the likeliest strategy."""
    parsed = [[(g, p) for g, p in zip(r["gold"], r["predicted"]) if p] for r in records]
    counts = [confusion(*zip(*turns), strategies) if turns else np.zeros((len(strategies),) * 2) for turns in parsed]
    scores, turns = scores_of_confusion(sum(counts)), sum(len(r["gold"]) for r in records)
    row = {
        "turns": turns,
        "accuracy": 100 * scores.accuracy,
        "Q": 100 * scores.macro_f1,
        "Q_W": 100 * scores.weighted_f1,
        "B": bias_of_confusion(sum(counts)).bias,
        "Q interval": [100 * x for x in bootstrap(lambda w: scores_of_confusion(w).macro_f1, counts, seed=seed)],
        "B interval": list(bootstrap(lambda w: bias_of_confusion(w).bias, counts, seed=seed)),
        "preferences": dict(zip(strategies, bias_of_confusion(sum(counts)).preferences.tolist())),
        "invalid": 100 * (1 - sum(map(len, parsed)) / turns),
    }
    if all(r["logps"] for r in records):
        logps, gold = np.concatenate([r["logps"] for r in records]), [name for r in records for name in r["gold"]]
        row["nll"] = negative_log_likelihood(logps, gold, strategies)
        row["greedy"] = 100 * np.mean(logps.argmax(-1) == [strategies.index(name) for name in gold])
    answered = [r for r in records if r["replies"]]
    if answered:
        row |= text_scores([text for r in answered for text in r["human"]], [text for r in answered for text in r["replies"]])
        row["replies"] = sum(len(r["replies"]) for r in answered)
    return row


def frequency_row(train: list[Dialogue], test: list[Dialogue], strategies: Strategies) -> dict:
    """The expected scores of always drawing from the training strategies' frequencies: what knowing nothing of the context gives."""
    counts = Counter(turn.strategy for dialogue in train for turn in dialogue.turns[1::2])
    frequencies = np.array([counts[name] for name in strategies]) / counts.total()
    gold = [turn.strategy for dialogue in test for turn in dialogue.turns[1::2]]
    expected = expected_confusion(np.tile(frequencies, (len(gold), 1)), gold, strategies)
    scores = scores_of_confusion(expected)
    logps = np.log(np.maximum(np.tile(frequencies, (len(gold), 1)), 1e-12))
    row = {"turns": len(gold), "accuracy": 100 * scores.accuracy, "Q": 100 * scores.macro_f1, "Q_W": 100 * scores.weighted_f1}
    return row | {"B": bias_of_confusion(expected).bias, "nll": negative_log_likelihood(logps, gold, strategies)}


def markdown(lines: list[list[str]]) -> str:
    """A table of its head and its lines."""
    head, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body])


def table(rows: dict[str, dict]) -> str:
    """Markdown: a row a system, only the columns that some row has."""
    columns = [c for c in PLAN + TEXT if any(c in row for row in rows.values())]

    def cell(row, column):
        text = f"{row[column]:.3f}" if column in ("B", "nll") else f"{row[column]:.1f}"
        low, high = row.get(f"{column} interval", (None, None))
        return text if low is None else text + (f" ({low:.2f}–{high:.2f})" if column == "B" else f" ({low:.1f}–{high:.1f})")

    return markdown([["system", *columns], *([name, *(cell(row, c) if c in row else "" for c in columns)] for name, row in rows.items())])


def mining_table(found: dict) -> str:
    """What desc.mining.account says, as text."""
    answers = max(found["answers"], 1)

    def counted(counts: dict) -> str:
        return ", ".join(f"{name} {n} ({100 * n / answers:.1f} %)" for name, n in sorted(counts.items(), key=lambda c: -c[1])) or "none"

    lines = [f"{found['answers']} answers, {found['pairs']} pairs"]
    lines += [f"{name}: {counted(found[name])}" for name in ("judged", "kept", "dropped") if found[name]]
    rows = [["strategy", "chosen", "rejected"]]
    rows += [[name, str(n), str(found["rejected strategies"][name])] for name, n in found["chosen strategies"].items()]
    return "\n".join([*lines, "", markdown(rows), *(f"warning: {text}" for text in found["warnings"])])
