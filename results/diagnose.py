"""Why practice works or does not: python results/diagnose.py --run runs/tabletop-stage1-s0 appends to results/diagnose.csv.

Of a Stage 1 or Stage 2 run, over fresh episodes: how good d is (order correlation with the steps truly left, d at the end
of successes and of failures, what thresholds s detect) and how noisy the REINFORCE gradient is (cosine between the gradients
of disjoint batches of 64 and of 1,024 tuples: 1 without noise, 0 if there is nothing but noise).
"""

import csv
import dataclasses
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import eval as evaluation  # noqa: E402 - the repository's root is not installed
import stage2  # noqa: E402
from model import QUESTION_ACTION, action_tokenizer  # noqa: E402


@dataclasses.dataclass
class Args:
    run: Path  # folder of a Stage 1 or Stage 2 run
    episodes: int = 256  # fresh episodes, for d and for the gradient
    seed: int = 0


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, ties in order of appearance."""
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


def quality(r: dict) -> dict[str, float]:
    """How good d is over a rollout that ran to the true end or the horizon."""
    d, truth, length = r["d"].numpy(), r["truth"].numpy(), r["length"]
    reached = truth[:, -1]
    within, left, predicted = [], [], []
    for i in np.flatnonzero(reached & (length >= 5)):
        left.append(length[i] - np.arange(length[i] + 1))
        predicted.append(d[i, : length[i] + 1])
        within.append(rank_correlation(left[-1], predicted[-1]))
    row = {"success": reached.mean(), "mean_steps": length.mean(), "order_within_episodes": np.mean(within),
           "order_over_all": rank_correlation(np.concatenate(left), np.concatenate(predicted)),
           "d_end_of_success_median": np.median(d[reached, -1]),
           "d_end_of_failure_median": np.median(d[~reached, -1]) if (~reached).any() else np.nan}  # fmt: skip
    for s in (1, 2, 3, 5, 8):
        row |= {f"detected_at_{s}": (d <= s).any(1).mean(), f"early_detections_at_{s}": evaluation.early_detections(d, truth, s)}
    return {k: round(float(v), 4) for k, v in row.items()}


def temperature(env) -> float:
    """At which the policy practises."""
    return stage2.practice(env)["temperature"]


def gradient_noise(policy, env, rollouts: list[dict], gamma: float) -> dict[str, float]:
    """Mean cosine between REINFORCE gradients of disjoint batches, of the gamma given."""
    ranges, flat = action_tokenizer(**env.action_tokens).ranges, []
    obs = {k: torch.cat([r["obs"][k] for r in rollouts]) for k in rollouts[0]["obs"]}
    tokens, goals = torch.cat([r["tokens"] for r in rollouts]), np.concatenate([r["goals"] for r in rollouts])
    returns = torch.cat([stage2.monte_carlo_returns(stage2.rewards(r["d"]), gamma)[r["row"], r["t"]] for r in rollouts])
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    for i in order[: len(order) // 64 * 64].split(64):
        log_prob = policy.log_prob(
            {k: v[i] for k, v in obs.items()}, [QUESTION_ACTION.format(g) for g in goals[i]], tokens[i], ranges, temperature(env)
        )
        policy.zero_grad()
        stage2.reinforce_loss(log_prob, returns[i], 1.0).backward()
        flat.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    large = [torch.stack(flat[k : k + 16]).mean(0) for k in range(0, len(flat) - 15, 16)]
    cosine = lambda gs: np.mean([torch.cosine_similarity(a, b, 0).item() for a, b in pairwise(gs)])  # noqa: E731
    numbers = {
        "cosine_64": cosine(flat),
        "cosine_1024": cosine(large),
        "return_mean": returns.mean(),
        "return_std": returns.std(),
    }
    return {f"{k}_gamma_{gamma:g}": round(float(v), 4) for k, v in numbers.items()}


def main(args: Args) -> None:
    env, policy, reward_model = evaluation.load_run(args.run, args.episodes)
    generator = torch.Generator().manual_seed(args.seed)
    ends = {end: stage2.rollout(policy, reward_model, env, 7 * 10**8 + 10**4 * k, generator, end, env.success_threshold,
                                temperature=temperature(env))
            for k, end in enumerate(("ground-truth", "detector"))}  # fmt: skip
    row = {"run": args.run.name, "episodes": args.episodes, "tuples": len(ends["detector"]["tokens"])} | quality(
        ends["ground-truth"]
    )
    for gamma in (0.0, 0.9, 1.0):
        row |= gradient_noise(policy, env, [ends["detector"]], gamma)
    out = Path(__file__).parent / "diagnose.csv"
    new = not out.exists()
    with open(out, "a", newline="") as f:
        writer = csv.DictWriter(f, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
    print("\n".join(f"{k:28} {v}" for k, v in row.items()))


if __name__ == "__main__":
    main(tyro.cli(Args))
