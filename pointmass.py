# %% [markdown]
# # Self-improvement on one page: the paper's pointmass (Appendix E, Figure 9)
# A point must reach a goal; the demonstrations wander through five random waypoints first. **Stage 1** clones them and
# learns to predict the steps left. **Stage 2** practises alone, rewarded when *its own* prediction of the steps left goes
# down. Task, expert, networks and losses are the authors' notebook's; the README lists where we deviate and why.
#
#     python pointmass.py                       # about a minute on two CPU cores; writes runs/pointmass-toy-s0
#     python pointmass.py --gamma 0 --seed 1    # one of the README's ablations

# %% Setup
import copy
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HORIZON = 140  # environment steps until an episode times out; also the cap of the steps-to-go labels
GOAL_RADIUS = 0.15  # success: distance to the goal below this, after an environment step
START, GOAL = 1.0, 0.9  # starts ~ U[-1, 1]^2 at rest, goals and waypoints ~ U[-0.9, 0.9]^2
KP, KD, N_WAYPOINTS = 2e-4, 0.0125, 5  # gains of the PD expert; what it visits before the goal


@dataclass
class Config:
    """The paper on one page: both stages on the toy pointmass."""

    seed: int = 0  # fixes everything: data, weights, rollouts, evaluation
    episodes: int = 10_000  # demonstrations for Stage 1
    bins: int = 50  # classes of the steps-to-go prediction
    gamma: float = 0.9  # discount of the Monte Carlo returns
    c: float = 0.02  # scale of the REINFORCE loss (the notebook: 1 / 140, the paper's large models: 0.05)
    success: Literal["detector", "ground-truth"] = "detector"  # what ends a practice episode
    success_threshold: float = 1.0  # s: the detector fires when d(o, g) <= s (the paper: 3)
    freeze_reward: bool = True  # False: d keeps learning from the practice episodes, so the reward moves
    keep_optimizer: bool = True  # Stage 2 goes on with Stage 1's Adam state; False: a fresh Adam
    label_bug: bool = False  # the notebook's bug: raw step counts as class indices, none above `bins` learns
    stage1_updates: int = 10_000  # minibatches of 256
    stage2_steps: int = 131_072  # environment steps of practice, at 32 updates of 64 per 2,048 steps


# %% The task
def step(pos: Tensor, vel: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Ten substeps of `vel += action; pos += vel` in closed form, the action held; float (B, 2) each. Sum 1..10 = 55."""
    return pos + 10 * vel + 55 * action, vel + 10 * action


def reached(pos: Tensor, goal: Tensor) -> Tensor:
    """bool (B,): the point is within GOAL_RADIUS of the goal."""
    return (pos - goal).norm(dim=-1) < GOAL_RADIUS


def expert(pos: Tensor, vel: Tensor, target: Tensor) -> Tensor:
    """PD controller, float (B, 2). Straight to the goal it needs 12.5 steps: the yardstick for Stage 2."""
    return KP * (target - pos) - KD * vel


def uniform(n: int, half_width: float, rng: torch.Generator) -> Tensor:
    return (torch.rand(n, 2, generator=rng) * 2 - 1) * half_width


# %% Demonstrations: through the waypoints, then to the goal; all episodes are simulated at once
def demonstrate(episodes: int, rng: torch.Generator) -> dict[str, Tensor]:
    """M flat tuples, (M, 2) or (M,), the final observations included with 0 steps to go; episodes under 10 are dropped."""
    pos, goal = uniform(episodes, START, rng), uniform(episodes, GOAL, rng)
    vel, k = torch.zeros_like(pos), torch.zeros(episodes, dtype=torch.long)
    targets = torch.stack([uniform(episodes, GOAL, rng) for _ in range(N_WAYPOINTS)] + [goal], 1)  # (E, 6, 2)
    alive, frames = torch.ones(episodes, dtype=torch.bool), []
    while alive.any():
        action = expert(pos, vel, targets[torch.arange(episodes), k])
        frames.append((pos, vel, action, alive))
        arrived = reached(pos, goal) & (len(frames) > 1)  # checked after a step: also on the way to a waypoint
        alive = alive & ~arrived
        pos, vel = step(pos, vel, action)
        k = (k + reached(pos, targets[torch.arange(episodes), k])).clamp(max=N_WAYPOINTS)
    pos, vel, action, alive = (torch.stack(x, 1) for x in zip(*frames, strict=True))  # (E, T, ...)
    length = alive.sum(1, keepdim=True)  # (E, 1) tuples, final state included
    data = {"pos": pos, "vel": vel, "goal": goal[:, None].expand_as(pos), "action": action,
            "steps_to_go": length - 1 - torch.arange(alive.shape[1]),
            "episode": torch.arange(episodes)[:, None].expand_as(alive)}  # fmt: skip
    return {key: value[alive & (length >= 10)] for key, value in data.items()}


# %% Two networks: a Gaussian policy and a categorical steps-to-go predictor
def mlp(n_out: int) -> nn.Sequential:
    layers = [m for n_in in (6, 256, 256) for m in (nn.Linear(n_in, 256), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(256, n_out))


class Agent(nn.Module):
    """Policy and distance network on z-scored inputs (position, velocity, goal)."""

    def __init__(self, data: dict[str, Tensor], bins: int):
        super().__init__()
        self.policy, self.distance, self.width, self.floor = mlp(4), mlp(bins), HORIZON / bins, 0.01
        for name in ("pos", "vel", "action"):  # the goal is normalised with the position's statistics
            self.register_buffer(f"{name}_mean", data[name].mean(0))
            self.register_buffer(f"{name}_std", data[name].std(0))
        self.register_buffer("edges", torch.arange(bins) * self.width)  # (K,) left edges: d can reach 0

    def observe(self, pos: Tensor, vel: Tensor, goal: Tensor) -> Tensor:
        pos, goal = ((x - self.pos_mean) / self.pos_std for x in (pos, goal))
        return torch.cat([pos, (vel - self.vel_mean) / self.vel_std, goal], -1)  # (B, 6)

    def action_distribution(self, obs: Tensor) -> torch.distributions.Normal:
        mean, raw_scale = self.policy(obs).chunk(2, -1)
        return torch.distributions.Normal(mean, F.softplus(raw_scale) + self.floor, validate_args=False)

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        """log p(a | o, g) of a z-scored action, float (B,)."""
        return self.action_distribution(obs).log_prob(action).sum(-1)

    def steps_to_go_loss(self, obs: Tensor, steps: Tensor, label_bug: bool = False) -> Tensor:
        """-log p(steps to go | o, g), float (B,). The authors' notebook computes the bin, then forgets to use it."""
        bins = len(self.edges)
        label = steps.clamp(max=HORIZON - 1) // self.width if not label_bug else steps
        loss = F.cross_entropy(self.distance(obs), label.long().clamp(max=bins - 1), reduction="none")
        return loss * (label < bins)  # a label outside the classes gives no gradient

    def d(self, obs: Tensor) -> Tensor:
        """d(o, g) = Σ_k p(k | o, g) · edge_k: expected steps to go, float (B,)."""
        return self.distance(obs).softmax(-1) @ self.edges  # [Eq. 1]


# %% Stage 1: supervised fine-tuning (Section 3.1)
def stage1(agent: Agent, data: dict[str, Tensor], cfg: Config, rng: torch.Generator) -> torch.optim.Optimizer:
    """Train both networks on minibatches of 256; 90 % of the episodes train, 10 % validate. Returns the optimiser."""
    obs = agent.observe(data["pos"], data["vel"], data["goal"])
    action = (data["action"] - agent.action_mean) / agent.action_std
    train, valid = torch.where(data["episode"] % 10 > 0)[0], torch.where(data["episode"] % 10 == 0)[0][:20_000]

    def losses(i: Tensor) -> tuple[Tensor, Tensor]:
        bc = -agent.log_prob(obs[i], action[i]).mean()  # [L_BC]
        return bc, agent.steps_to_go_loss(obs[i], data["steps_to_go"][i], cfg.label_bug).mean()  # [L_steps_to_go]

    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-4, fused=True)
    for update in range(cfg.stage1_updates):
        loss = sum(losses(train[torch.randint(len(train), (256,), generator=rng)]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (update + 1) % 2000 == 0:
            with torch.no_grad():
                print("stage 1  update {}  validation: bc {:.3f}  steps to go {:.3f}".format(update + 1, *losses(valid)))
    return optimizer


# %% Rolling out, on a batch of episodes at once
@torch.no_grad()
def rollout(agent: Agent, reward_model: Agent, n: int, rng: torch.Generator, end: str, s: float) -> dict[str, Tensor]:
    """n episodes with sampled actions, each until `end` ("detector" or "ground-truth") or HORIZON.

    Returns obs (n, T, 6), action (n, T, 2), reward (n, T), 0 where not valid (n, T), pos (n, T + 1, 2), goal (n, 2);
    truth, detected bool (n,): did the episode end in the goal, did it end in d <= s."""
    pos, goal = uniform(n, START, rng), uniform(n, GOAL, rng)
    vel, alive = torch.zeros_like(pos), torch.ones(n, dtype=torch.bool)
    obs = agent.observe(pos, vel, goal)
    d, out, path = reward_model.d(obs), [], [pos]
    while alive.any() and len(out) < HORIZON:
        policy = agent.action_distribution(obs)
        action = policy.mean + policy.stddev * torch.randn(n, 2, generator=rng)
        next_pos, next_vel = step(pos, vel, action * agent.action_std + agent.action_mean)
        pos, vel = (torch.where(alive[:, None], new, old) for new, old in ((next_pos, pos), (next_vel, vel)))
        next_obs = agent.observe(pos, vel, goal)
        d_next = reward_model.d(next_obs)
        reward = torch.where(alive, d - d_next, 0.0)  # [Eq. 2], on the last step too
        out.append((obs, action, reward, alive))
        path.append(pos)
        truth, detected = reached(pos, goal), d_next <= s  # success(o, g) = 1[d(o, g) <= s]
        obs, d, alive = next_obs, d_next, alive & ~(detected if end == "detector" else truth)
    episodes = {k: torch.stack(x, 1) for k, x in zip(("obs", "action", "reward", "valid"), zip(*out, strict=True), strict=True)}
    return episodes | {"pos": torch.stack(path, 1), "goal": goal, "truth": truth, "detected": detected}


def monte_carlo_returns(reward: Tensor, gamma: float) -> Tensor:
    """R_t = Σ_{i>=t} γ^(i-t) r_i along the last axis, float (n, T)."""
    returns = reward.clone()
    for t in reversed(range(reward.shape[-1] - 1)):
        returns[..., t] += gamma * returns[..., t + 1]
    return returns


# %% Stage 2: online self-improvement (Section 3.2, Algorithm 1)
def stage2(agent: Agent, optimizer: torch.optim.Optimizer, cfg: Config, rng: torch.Generator) -> list[dict]:
    """Practise; leaves the best policy so far (fewest mean steps over 3 iterations) in `agent`. Returns metrics."""
    reward_model = copy.deepcopy(agent).requires_grad_(False) if cfg.freeze_reward else agent
    optimizer = optimizer if cfg.keep_optimizer else torch.optim.Adam(agent.parameters(), lr=3e-4, fused=True)
    agent.floor = 0.2  # practice explores; with Stage 1's floor log p gets so steep that a few tuples blow up an update
    rows, env_steps, episodes, best = [], 0, 0, (float("inf"), copy.deepcopy(agent.state_dict()))
    while env_steps + 2 * 2048 <= cfg.stage2_steps:  # room for an iteration  [Alg. 1, line 1]
        batch, tuples, n = [], [], 0
        while n < 2048:  # whole episodes, enough for N = 32 updates of B = 64  [Alg. 1, line 2]
            b = rollout(agent, reward_model, 32, rng, cfg.success, cfg.success_threshold)
            returns, valid = monte_carlo_returns(b["reward"], cfg.gamma), b["valid"]  # [Alg. 1, line 4]
            steps = valid.flip(1).cumsum(1).flip(1)  # (n, T) until the end of the episode; for freeze_reward=False
            ended = b["detected" if cfg.success == "detector" else "truth"][:, None].expand_as(valid)
            tuples.append((b["obs"][valid], b["action"][valid], returns[valid], steps[valid], ended[valid]))
            batch.append(b)  # [Alg. 1, line 5]
            n += len(tuples[-1][0])
        obs, action, returns, steps, ended = (torch.cat(x) for x in zip(*tuples, strict=True))
        for i in torch.randperm(n, generator=rng)[:2048].split(64):  # [Alg. 1, line 7]; leftovers are dropped  [Alg. 1, line 8]
            loss = -(cfg.c * returns[i] * agent.log_prob(obs[i], action[i])).mean()
            if not cfg.freeze_reward:
                loss = loss + (agent.steps_to_go_loss(obs[i], steps[i], cfg.label_bug) * ended[i]).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.policy.parameters(), 1.0)
            optimizer.step()
        truth, detected = (torch.cat([b[k] for b in batch]) for k in ("truth", "detected"))
        env_steps, episodes = env_steps + n, episodes + len(truth)
        means = {"success": truth, "detected": detected, "false_detections": detected & ~truth, "return_mean": returns}
        rows.append(
            {"env_steps": env_steps, "episodes": episodes, "mean_steps": n / len(truth), "return_std": returns.std().item()}
        )
        rows[-1] |= {k: v.float().mean().item() for k, v in means.items()}
        print("stage 2", *(f" {k} {v:.2f}" for k, v in rows[-1].items()))
        score = sum(r["mean_steps"] for r in rows[-3:]) / 3
        if len(rows) >= 3 and score < best[0]:  # later policies can be worse: the paper, too, stops at the peak
            best = score, copy.deepcopy(agent.state_dict())
    agent.load_state_dict(best[1])
    return rows


# %% Evaluation and figures
def evaluate(agent: Agent, rng: torch.Generator, n: int = 1000) -> dict[str, float]:
    """True success (95 % Wilson interval) and mean steps, sampled actions; a failed episode counts HORIZON steps."""
    b = rollout(agent, agent, n, rng, "ground-truth", 0.0)
    p, w = b["truth"].double().mean().item(), 1.96**2 / n
    low, high = ((p + w / 2 + sign * (w * (p * (1 - p) + w / 4)) ** 0.5) / (1 + w) for sign in (-1, 1))
    return {"success": p, "success_low": low, "success_high": high, "mean_steps": b["valid"].sum().item() / n, "eval_episodes": n}


def figures(path: Path, data: dict[str, Tensor], agents: list[Agent], rows: list[dict], summary: dict) -> None:
    """Figure 9 (dataset, Stage 1 and Stage 2 trajectories) and below it both learning curves and d(o, g) at rest."""
    import matplotlib.pyplot as plt

    episodes = [data["episode"] == e for e in data["episode"].unique()[:8]]
    panels = [("demonstrations", [data["pos"][e] for e in episodes], [data["goal"][e][0] for e in episodes])]
    for name, agent in zip(("stage1", "stage2"), agents, strict=True):
        b = rollout(agent, agent, 8, torch.Generator().manual_seed(0), "ground-truth", 0.0)
        title = f"{name}: {summary[name + '_success']:.1%}, {summary[name + '_mean_steps']:.1f} steps"
        panels.append((title, [p[: v.sum() + 1] for p, v in zip(b["pos"], b["valid"], strict=True)], b["goal"]))
    fig, axes = plt.subplots(2, 3, figsize=(12, 7), height_ratios=(4, 3), layout="constrained")
    for ax, (title, paths, goals) in zip(axes[0], panels, strict=True):
        for colour, track, goal in zip(plt.get_cmap("viridis")(torch.linspace(0, 0.95, 8)), paths, goals, strict=True):
            ax.plot(*track.T, ".-", color=colour, lw=0.8, ms=2)
            ax.plot(*track[0], "s", color=colour, ms=4)
            ax.add_patch(plt.Circle(goal.tolist(), GOAL_RADIUS, fill=False, color=colour))
        ax.set(title=title, xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal", xlabel="x [length]", ylabel="y [length]")
    axes[1, 1].axhline(12.5, color="#D55E00", ls="--", label="PD straight to the goal [steps]")
    for ax, keys in zip(axes[1], (["success", "detected"], ["mean_steps"]), strict=False):
        ax.plot([r["env_steps"] for r in rows], [[r[key] for key in keys] for r in rows], label=keys)
        ax.set(xlabel="environment steps", ylabel="practice, one seed", xticks=range(0, rows[-1]["env_steps"], 40_000))
        ax.legend()
    axis = torch.linspace(-1.3, 1.3, 80)
    pos = torch.cartesian_prod(axis, axis)  # x slowest; at rest, the goal in the middle
    d = agents[0].d(agents[0].observe(pos, torch.zeros_like(pos), torch.zeros_like(pos))).detach().reshape(80, 80).T
    fig.colorbar(axes[1, 2].pcolormesh(axis, axis, d), label="d(o, g) at rest [steps]")
    axes[1, 2].add_patch(plt.Circle((0, 0), GOAL_RADIUS, fill=False, color="white"))
    axes[1, 2].set(xlabel="x [length]", ylabel="y [length]", aspect="equal")
    fig.savefig(path, dpi=120)


# %% Both stages, in order
def main(cfg: Config) -> None:
    start = time.time()
    rng = torch.manual_seed(cfg.seed)  # torch's own generator: one seed fixes everything
    data = demonstrate(cfg.episodes, rng)
    agent = Agent(data, cfg.bins)
    optimizer = stage1(agent, data, cfg, rng)
    clone = copy.deepcopy(agent)  # Stage 1's agent, for the figure
    first = evaluate(agent, rng) | {"episodes": cfg.episodes, "seconds": round(time.time() - start, 1)}
    rows = stage2(agent, optimizer, cfg, rng)
    second = evaluate(agent, rng) | {"episodes": rows[-1]["episodes"], "env_steps": rows[-1]["env_steps"]}
    summary = {f"stage1_{k}": v for k, v in first.items()} | {f"stage2_{k}": v for k, v in second.items()}
    changed = [f"-{f.name}={getattr(cfg, f.name)}" for f in fields(cfg) if f.name != "seed" and getattr(cfg, f.name) != f.default]
    out = Path("runs") / f"pointmass-toy-s{cfg.seed}{''.join(changed)}"  # an ablation gets a folder of its own
    out.mkdir(parents=True, exist_ok=True)
    figures(out / "figure9.png", data, [clone, agent], rows, summary)
    (out / "metrics.csv").write_text("".join(",".join(map(str, x)) + "\n" for x in (rows[0], *(r.values() for r in rows))))
    summary |= {"seed": cfg.seed, "command": shlex.join(["python", *sys.argv]), "seconds": round(time.time() - start, 1)}
    git = subprocess.run("git rev-parse --short HEAD", shell=True, cwd=Path(sys.argv[0]).resolve().parent, capture_output=True)
    (out / "summary.json").write_text(json.dumps(summary | {"commit": git.stdout.decode().strip()}, indent=2) + "\n")
    print(json.dumps(summary, indent=2), f"\nwrote figure9.png, metrics.csv and summary.json to {out}/")


if __name__ == "__main__":
    import tyro

    cfg = tyro.cli(Config, args=[] if "ipykernel" in sys.modules else None)  # a notebook's arguments are not ours
    if min(cfg.episodes - 99, cfg.bins, cfg.stage1_updates, cfg.stage2_steps - 4095) < 1:
        sys.exit(print("pointmass.py: --episodes under 100, --stage2-steps under 4096 or a 0", file=sys.stderr) or 2)
    main(cfg)
