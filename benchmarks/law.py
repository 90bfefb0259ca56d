"""The law of self-mined pairs, shown on a table of eight strategies (docs/tour.md, section 7).

    python benchmarks/law.py --data ESConv.json --split-file split.json

The policy is a table of eight logits. desc.losses.dpo_loss trains it to convergence on all pairs
(a, b). A pair weighs p(a) q_T(b): people choose a with p, and b is sampled from the reference q at
temperature T. p and q are drawn from --seed. --data adds a p: people's, in its training turns.

Prints how far the trained table is from the law (desc.losses.self_mined_optimum), then also for
finite data: at each of N turns a is drawn from p, and b from q_T ("drawn") or every b counts with
its q_T ("exact"). Draws the figure --out (extra `report`)."""

from dataclasses import dataclass
from itertools import product

import torch

from desc import cli
from desc.domain import ESCONV
from desc.esconv import load_splits
from desc.evaluation.figures import load_matplotlib
from desc.flags import flag, parse
from desc.losses import dpo_loss, self_mined_optimum

BETAS = (0.1, 0.2, 0.5, 1.0, 2.0)
COLOURS = {1.5: "#c98a00", 1.0: "#1f968b", 0.7: "#d1495b", 0.5: "#440154"}  # of each T
SETTINGS = ((1.0, 1.0), (0.5, 0.7), (0.2, 0.7))  # beta and T; the paper's planner and generator
TURNS, REPEATS = (300, 3000, 30000), 20  # of finite data


@dataclass
class Config:
    data: str | None = flag(None, "sample, esconv, or a file in ESConv's schema: the second p")
    split_file: str | None = flag(None, "JSON with the indices of train, valid and test")
    seed: int = flag(0, "seeds p, q, finite data and the split", at_least=0, at_most=2**32 - 1)
    out: str = flag("docs/law.png", "the file of the figure")


def weigh_pairs(people: torch.Tensor, reference: torch.Tensor, temperature: float) -> torch.Tensor:
    """(K, K): p(a) q_T(b), how often people choose a where b is sampled from the reference."""
    return people[:, None] * (reference.log() / temperature).softmax(-1)


def train(reference: torch.Tensor, weights: torch.Tensor, beta: float) -> torch.Tensor:
    """(K,), the policy of least DPO loss over the pairs (a, b), a ≠ b, of these weights (K, K)."""
    a, b = (weights - weights.diag().diag()).nonzero(as_tuple=True)
    shares, before = weights[a, b] / weights[a, b].sum(), reference.log()
    logits = before.clone().requires_grad_()
    limits = {"max_iter": 500, "tolerance_grad": 1e-12, "tolerance_change": 0}
    optimizer = torch.optim.LBFGS([logits], line_search_fn="strong_wolfe", **limits)

    def expected_loss():
        optimizer.zero_grad()
        policy = logits.log_softmax(-1)
        loss = dpo_loss(policy[a], policy[b], before[a], before[b], beta)[0] @ shares
        loss.backward()
        return loss

    optimizer.step(expected_loss)
    return logits.detach().softmax(-1)


def finite_differences(people, reference, turns, beta, temperature) -> torch.Tensor:
    """(2,), the largest difference from the law, with drawn and with exact pairs."""
    weights = weigh_pairs(people, reference, temperature).flatten()
    counts = weights.multinomial(turns, replacement=True).bincount(minlength=64).view(8, 8).double()
    drawn = train(reference, counts, beta)
    shares = torch.stack([people, counts.sum(1) / turns])  # a as people choose, and as drawn
    law, exact = self_mined_optimum(shares, reference, beta, temperature)
    return (torch.stack([drawn, exact]) - law).abs().amax(-1)


def tabulate(people: torch.Tensor, reference: torch.Tensor, axes) -> None:
    """Print both tables of p and q, and draw predicted and trained probabilities on the axes."""
    print(f"people p    {people.numpy().round(3)}\nreference q {reference.numpy().round(3)}\n")
    lines = [["beta", "T", "exponent of q", "exponent of p", "largest difference", "KL(p‖trained)"]]
    for beta, t in product(BETAS, COLOURS):
        law = self_mined_optimum(people, reference, beta, t)
        policy = train(reference, weigh_pairs(people, reference, t), beta)
        axes.loglog(law, policy, "o", color=COLOURS[t], alpha=0.6, markersize=5)
        divergence = (people * (people / policy).log()).sum().abs()
        line = [str(beta), str(t), f"{1 - 1 / (beta * t):.2f}", f"{1 / beta:g}"]
        lines.append([*line, f"{(policy - law).abs().max():.0e}", f"{divergence:.3f}"])
    print(cli.markdown(lines), end="\n\n")
    lines = [["turns", "beta", "T", "difference, drawn", "difference, exact"]]
    for turns, setting in product(TURNS, SETTINGS):
        total = sum(finite_differences(people, reference, turns, *setting) for _ in range(REPEATS))
        lines.append([*map(str, (turns, *setting)), *(f"{mean:.3f}" for mean in total / REPEATS)])
    print(cli.markdown(lines), end="\n\n", flush=True)


def draw_optimum(axes) -> None:
    """What becomes of one of two strategies: people use it 0.3 of the time, and the model 0.6."""
    p, q = torch.tensor([[0.3, 0.7], [0.6, 0.4]]).double()
    betas = torch.linspace(0.1, 2, 200)[:, None]
    for t, colour in COLOURS.items():
        axes.plot(betas, self_mined_optimum(p, q, betas, t)[:, 0], color=colour, label=f"T = {t}")
    for share, name in ((0.3, "people: 0.3"), (0.6, "the model before DPO: 0.6")):
        axes.axhline(share, color="black", linewidth=1, linestyle="--")
        axes.text(0.1, share - 0.03, name)
    for (beta, t), name in zip(SETTINGS[1:], ("planner", "generator")):
        point, place = (beta, train(q, weigh_pairs(p, q, t), beta)[0]), (0.1, 0.3 * beta + 0.03)
        text = f"paper's {name}: {point[1]:.3f}"
        axes.annotate(text, point, place, arrowprops={"arrowstyle": "-"})
        axes.semilogx(*point, "o", color="black", zorder=3)
    axes.set(xlabel="beta", ylabel="probability after DPO", title="One of two strategies")
    axes.set_xticks(BETAS, map(str, BETAS))
    axes.legend(frameon=False, loc="lower right")


def main():
    config = parse(Config)
    figure = load_matplotlib().figure.Figure((10, 4.2), 130, layout="constrained")
    left, right = figure.subplots(1, 2)
    torch.manual_seed(config.seed)
    people, reference = torch.randn(2, 8).double().softmax(-1)
    tabulate(people, reference, left)
    if config.data:
        dialogues = load_splits(config.data, config.split_file, seed=config.seed)["train"]
        turns = [turn.strategy for dialogue in dialogues for turn in dialogue.supporter_turns()]
        counts = torch.tensor([turns.count(name) for name in ESCONV.strategies])
        tabulate(counts.double() / len(turns), reference, left)
    left.axline((1e-3, 1e-3), (1, 1), color="black", linewidth=0.8, zorder=0)
    left.set(xlabel="predicted probability", ylabel="trained probability", title="Eight strategies")
    draw_optimum(right)
    figure.savefig(config.out)


if __name__ == "__main__":
    cli.run(main)
