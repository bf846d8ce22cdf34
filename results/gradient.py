"""What the rewards of practice point at: python results/gradient.py --run runs/tabletop-images-stage1-s0, tabletop only.

REINFORCE gradients of disjoint quarters of fresh practice episodes, by discount and by where rewards are cut off, against one
another (1 without noise) and against those of a control that knows the truth: returns, at gamma 0.9, cut off at 3 and less
their mean, of a geometric d: the steps of straight ways to behind the block and from there to the point the expert aims at, at
full speed. Quarters are compared by pairs, with the control a quarter with the other three. Appends to --out.
"""

import csv
import dataclasses
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import eval as evaluation  # noqa: E402 - the repository's root is not installed
import stage2  # noqa: E402
from envs.tabletop import STRIDE  # noqa: E402
from model import QUESTION_ACTION, action_tokenizer  # noqa: E402


@dataclasses.dataclass
class Args:
    run: Path  # folder of a Stage 1 or Stage 2 run on the tabletop
    episodes: int = 64  # at once ...
    rounds: int = 2  # ... and how often
    out: Path = Path(__file__).parent / "tabletop_images_gradient.csv"


def geometric_d(env) -> np.ndarray:
    """Steps of the straight ways at full speed, float (N,)."""
    block = env.pos[np.arange(env.num_envs), env.tasks.block]
    gap = env.tasks.points(env.pos)[:, 6] - block
    left = np.linalg.norm(gap, axis=1)
    behind = block - env.reach * gap / np.maximum(left, 1e-9)[:, None]
    return (left + np.linalg.norm(behind - env.tool, axis=1)) / STRIDE


def practise(args: Args, env, policy, reward_model) -> list[dict]:
    """Rollouts as in Stage 2, with `geometric`: the control's d, float (n, T + 1), frozen at the episode's end like d."""
    rollouts, generator = [], torch.Generator().manual_seed(0)
    for k in range(args.rounds):
        truth: list[np.ndarray] = []
        r = stage2.rollout(policy, reward_model, env, 9 * 10**8 + 10**4 * k, generator, "detector", env.success_threshold,
                           watch=lambda t=truth: t.append(geometric_d(env)))  # fmt: skip
        g = torch.from_numpy(np.stack(truth, 1)).float()
        last = torch.from_numpy(r["length"])[:, None]
        rollouts.append(r | {"geometric": g.gather(1, torch.minimum(torch.arange(g.shape[1])[None], last))})
    return rollouts


def all_returns(rollouts: list[dict]) -> dict[str, torch.Tensor]:
    """Returns (M,) of every tuple, by name of the setting."""

    def returns(d: str, gamma: float, clip: float = float("inf")) -> torch.Tensor:
        rewards = [stage2.rewards(r[d]).clamp(-clip, clip) for r in rollouts]
        each = zip(rewards, rollouts, strict=True)
        return torch.cat([stage2.monte_carlo_returns(x, gamma)[r["row"], r["t"]] for x, r in each])

    found = {
        f"d, gamma {g:g}, cut off at {c:g}": returns("d", g, c) for g in (0, 0.5, 0.9, 0.95) for c in (float("inf"), 1, 2, 4)
    }
    found["d, gamma 1"] = returns("d", 1.0)
    found |= {f"geometric, gamma {g:g}, cut off at 3": returns("geometric", g, 3.0) for g in (0.5, 0.9)}
    control = found["geometric, gamma 0.9, cut off at 3"]
    return found | {"control: geometric, gamma 0.9, cut off at 3, less their mean": control - control.mean()}


def main(args: Args) -> None:
    env, policy, reward_model = evaluation.load_run(args.run, args.episodes)
    rollouts = practise(args, env, policy, reward_model)
    returns = all_returns(rollouts)
    names, values = list(returns), torch.stack(list(returns.values()))
    obs = {k: torch.cat([r["obs"][k] for r in rollouts]) for k in rollouts[0]["obs"]}
    tokens, goals = torch.cat([r["tokens"] for r in rollouts]), np.concatenate([r["goals"] for r in rollouts])
    episode = torch.cat([r["row"] + args.episodes * k for k, r in enumerate(rollouts)])
    ranges = action_tokenizer(**env.action_tokens).ranges
    if policy.cfg.image_size:  # frozen, as in Stage 2
        policy.vision_tower.requires_grad_(False)
    named = [(k, p) for k, p in policy.named_parameters() if p.requires_grad]
    params = [p for _, p in named]
    blocks = torch.cat([torch.full((p.numel(),), ".layers." in k) for k, p in named])
    quarters = torch.zeros(4, len(names), len(blocks))
    for q in range(4):
        for i in torch.nonzero(episode % 4 == q).flatten().split(64):
            prompts = [QUESTION_ACTION.format(g) for g in goals[i.numpy()]]
            log_prob = policy.log_prob({k: v[i] for k, v in obs.items()}, prompts, tokens[i], ranges)
            for j, value in enumerate(values):
                loss = stage2.reinforce_loss(log_prob, value[i], 1.0) * len(i)
                gradient = torch.autograd.grad(loss, params, retain_graph=True, materialize_grads=True, allow_unused=True)
                quarters[q, j] += torch.cat([(g.to_dense() if g.is_sparse else g).flatten() for g in gradient])
    cosine = torch.nn.functional.cosine_similarity
    others = quarters[:, -1].sum(0) - quarters[:, -1]  # the control's gradient of the other three quarters
    new = not args.out.exists()
    with open(args.out, "a", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        if new:
            columns = ["quarters_all", "quarters_blocks", "control_all", "control_blocks"]
            writer.writerow(["run", "tuples", "returns", "mean", "std", *columns])
        for j, name in enumerate(names):
            row = [args.run.name, len(tokens), name, values[j].mean().item(), values[j].std().item()]
            for part in (slice(None), blocks):
                row.append(np.mean([cosine(a[part], b[part], 0) for a, b in combinations(quarters[:, j], 2)]))
            for part in (slice(None), blocks):
                row.append(np.mean([cosine(quarters[q, j][part], others[q][part], 0) for q in range(4)]))
            row[3:] = [round(float(x), 4) for x in row[3:]]
            writer.writerow(row)
            print(*row, sep="  ")


if __name__ == "__main__":
    main(tyro.cli(Args))
