# %% [markdown]
# # Self-improvement on one page: the paper's pointmass (Appendix E, Figure 9)
# A point must reach a goal; demonstrations wander through five waypoints first. **Stage 1** clones them and
# learns to predict the steps left. **Stage 2** practises alone, rewarded when *its own* prediction goes down.
# The task is the authors' notebook's; docs/deviations.md says where we deviate.
#
#     python pointmass.py --seed 0           # half a minute on an idle core; writes runs/pointmass-toy-s0
#     python pointmass.py --gamma 0          # an ablation, in a folder of its own
#     jupytext --to notebook pointmass.py    # pip install jupytext; the same page as a notebook

# %% Setup
import copy
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
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
    bins: int = 140  # classes of the steps-to-go prediction: one step each (the notebook: 50)
    gamma: float = 0.9  # discount of the Monte Carlo returns
    c: float = 0.1  # scale of the REINFORCE loss (the notebook: 1 / 140, the paper's large models: 0.05)
    success: Literal["detector", "ground-truth"] = "detector"  # what ends a practice episode
    success_threshold: float | None = None  # s: the detector fires when d(o, g) <= s; None: calibrated
    keep_optimizer: bool = True  # Stage 2 goes on with Stage 1's Adam state; False: a fresh Adam
    stage1_updates: int = 4_000  # minibatches of 256
    stage2_steps: int = 196_608  # environment steps of practice, at 32 updates of 64 per 2,048 steps


# %% The task
def step(pos: Tensor, vel: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Ten substeps of `vel += action; pos += vel`, the action held, in closed form; float (B, 2) each."""
    return pos + 10 * vel + 55 * action, vel + 10 * action  # 55 = 1 + 2 + ... + 10


def reached(pos: Tensor, goal: Tensor) -> Tensor:
    return (pos - goal).norm(dim=-1) < GOAL_RADIUS  # bool (B,)


def expert(pos: Tensor, vel: Tensor, target: Tensor) -> Tensor:
    """PD controller, float (B, 2). Straight to the goal it needs 12.5 steps: the yardstick for Stage 2."""
    return KP * (target - pos) - KD * vel


def uniform(n: int, half_width: float, rng: torch.Generator) -> Tensor:
    return (torch.rand(n, 2, generator=rng) * 2 - 1) * half_width


# %% Demonstrations: through the waypoints, then to the goal; all episodes are simulated at once
def demonstrate(episodes: int, rng: torch.Generator) -> dict[str, Tensor]:
    """M flat tuples, (M, 2) or (M,), final observations included; episodes under 10 are dropped."""
    pos, goal = uniform(episodes, START, rng), uniform(episodes, GOAL, rng)
    targets = torch.stack([*(uniform(episodes, GOAL, rng) for _ in range(N_WAYPOINTS)), goal], 1)  # (E, 6, 2)
    vel, alive, frames = torch.zeros_like(pos), torch.ones(episodes, dtype=torch.bool), []
    each, k = torch.arange(episodes), torch.zeros(episodes, dtype=torch.long)  # k: the next target
    while alive.any():
        action = expert(pos, vel, targets[each, k])
        frames.append((pos, vel, action, alive))
        if len(frames) > 1:  # a start may lie in its goal; arriving counts on the way to a waypoint, too
            alive = alive & ~reached(pos, goal)
        pos, vel = step(pos, vel, action)
        k = (k + reached(pos, targets[each, k])).clamp(max=N_WAYPOINTS)
    pos, vel, action, alive = (torch.stack(x, 1) for x in zip(*frames, strict=True))  # (E, T, ...)
    length = alive.sum(1)  # (E,) tuples, final observation included
    data = {"pos": pos, "vel": vel, "action": action, "goal": goal[:, None].expand_as(pos)}
    data["steps_to_go"] = length[:, None] - 1 - torch.arange(alive.shape[1])  # 0 at the goal
    data["episode"] = each[:, None].expand_as(alive)
    return {key: value[alive & (length >= 10)[:, None]] for key, value in data.items()}


# %% Two networks: a Gaussian policy and a categorical steps-to-go predictor
def mlp(n_in: int, n_out: int) -> nn.Sequential:
    hidden = [nn.Linear(n_in, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(128, n_out))


def bin_of(steps: Tensor, bins: int) -> Tensor:
    """The class of a steps-to-go label, long (B,): bins of HORIZON / bins steps; the last takes the rest."""
    return (steps * bins // HORIZON).clamp(max=bins - 1)


class Agent(nn.Module):
    """Policy and distance network on z-scored inputs: obs (B, 7), of which the policy sees the first six."""

    def __init__(self, data: dict[str, Tensor], bins: int):
        super().__init__()
        self.policy, self.distance, self.floor = mlp(6, 4), mlp(7, bins), 0.01  # floor: of the policy's scale
        for name in ("pos", "vel", "action"):  # the goal is normalised with the position's statistics
            self.register_buffer(f"{name}_mean", data[name].mean(0))
            self.register_buffer(f"{name}_std", data[name].std(0))
        self.register_buffer("edges", torch.arange(bins) * (HORIZON / bins))  # (K,) left edges: d can be 0

    def observe(self, pos: Tensor, vel: Tensor, goal: Tensor) -> Tensor:
        """Position, velocity, goal, and how many radii away it is: so d soon finds the edge of the goal."""
        radii = (goal - pos).norm(dim=-1, keepdim=True) / GOAL_RADIUS
        pos, goal = ((x - self.pos_mean) / self.pos_std for x in (pos, goal))
        return torch.cat([pos, (vel - self.vel_mean) / self.vel_std, goal, radii], -1)  # (B, 7)

    def action_distribution(self, obs: Tensor) -> torch.distributions.Normal:
        mean, raw_scale = self.policy(obs[..., :6]).chunk(2, -1)
        return torch.distributions.Normal(mean, F.softplus(raw_scale) + self.floor, validate_args=False)

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        """log p(a | o, g) of a z-scored action, float (B,)."""
        return self.action_distribution(obs).log_prob(action).sum(-1)

    def d(self, obs: Tensor) -> Tensor:
        """d(o, g) = Σ_k p(k | o, g) · edge_k: expected steps to go, float (B,)."""
        return self.distance(obs).softmax(-1) @ self.edges  # [Eq. 1]


# %% Stage 1: supervised fine-tuning (Section 3.1)
def stage1(agent: Agent, data: dict[str, Tensor], cfg: Config, rng: torch.Generator) -> torch.optim.Optimizer:
    """Train both networks on minibatches of 256; every tenth episode is held out. Returns the optimiser."""
    obs = agent.observe(data["pos"], data["vel"], data["goal"])  # (M, 7)
    action = (data["action"] - agent.action_mean) / agent.action_std  # (M, 2)
    label = bin_of(data["steps_to_go"], cfg.bins)  # (M,)
    train = torch.where(data["episode"] % 10 > 0)[0]
    optimizer = torch.optim.Adam(agent.parameters(), fused=True)
    for update in range(cfg.stage1_updates):
        optimizer.param_groups[0]["lr"] = 3e-3 * min((update + 1) / 100, 1 - update / cfg.stage1_updates)
        i = train[torch.randint(len(train), (256,), generator=rng)]
        bc = -agent.log_prob(obs[i], action[i]).mean()  # [L_BC]
        steps = F.cross_entropy(agent.distance(obs[i]), label[i])  # [L_steps_to_go]
        optimizer.zero_grad()
        (bc + steps).backward()
        optimizer.step()
        if (update + 1) % 500 == 0:
            print(f"stage 1  update {update + 1}  loss: bc {bc.item():.2f}  steps to go {steps.item():.2f}")
    return optimizer


@torch.no_grad()
def calibrate(agent: Agent, data: dict[str, Tensor], precision: float = 0.9) -> float:
    """s = max {s : of the held-out observations with d <= s, a share >= precision is in the goal}; else 0."""
    data = {key: value[data["episode"] % 10 == 0] for key, value in data.items()}
    d, order = agent.d(agent.observe(data["pos"], data["vel"], data["goal"])).sort()
    share = (data["steps_to_go"][order] == 0).cumsum(0) / torch.arange(1, len(d) + 1)  # s = d[0], d[1], ...
    return max(d[share >= precision].tolist(), default=0.0)


# %% Rolling out, on a batch of episodes at once
@torch.no_grad()
def rollout(agent: Agent, reward_model: Agent, n: int, rng: torch.Generator, ends) -> dict[str, Tensor]:
    """n episodes with sampled actions, until `ends(d, truth)`, bool (n,), or HORIZON: obs (n, T, 7), action
    (n, T, 2), valid (n, T); frozen at the end pos (n, T + 1, 2), d and truth (n, T + 1); goal (n, 2)."""
    pos, goal = uniform(n, START, rng), uniform(n, GOAL, rng)
    vel, alive = torch.zeros_like(pos), torch.ones(n, dtype=torch.bool)
    obs = agent.observe(pos, vel, goal)
    moves, seen = [], [(pos, reward_model.d(obs), reached(pos, goal))]
    while alive.any() and len(moves) < HORIZON:
        policy = agent.action_distribution(obs)
        action = policy.mean + policy.stddev * torch.randn(n, 2, generator=rng)
        next_pos, next_vel = step(pos, vel, action * agent.action_std + agent.action_mean)
        pos, vel = (torch.where(alive[:, None], new, x) for new, x in ((next_pos, pos), (next_vel, vel)))
        moves.append((obs, action, alive))
        obs = agent.observe(pos, vel, goal)
        seen.append((pos, reward_model.d(obs), reached(pos, goal)))
        alive = alive & ~ends(*seen[-1][1:])
    obs, action, valid = (torch.stack(x, 1) for x in zip(*moves, strict=True))
    pos, d, truth = (torch.stack(x, 1) for x in zip(*seen, strict=True))
    return {"obs": obs, "action": action, "valid": valid, "pos": pos, "d": d, "truth": truth, "goal": goal}


def rewards(d: Tensor) -> Tensor:
    """r_t = d(o_t, g) - d(o_t+1, g): float (n, T + 1) -> (n, T), the last step included."""
    return d[:, :-1] - d[:, 1:]  # [Eq. 2]


def monte_carlo_returns(reward: Tensor, gamma: float) -> Tensor:
    """R_t = Σ_{i>=t} γ^(i-t) r_i, float (n, T) -> (n, T); rewards after an episode's end must be 0."""
    returns = reward.clone()
    for t in reversed(range(reward.shape[1] - 1)):
        returns[:, t] += gamma * returns[:, t + 1]
    return returns


# %% Stage 2: online self-improvement (Section 3.2, Algorithm 1)
def reinforce_loss(log_prob: Tensor, returns: Tensor, c: float) -> Tensor:
    """-c · R_t · log p(a_t | o_t, g), averaged over the batch; log_prob, returns float (B,)."""
    return -(c * returns * log_prob).mean()


def stage2(agent: Agent, optimizer: torch.optim.Optimizer, s: float, cfg: Config, rng: torch.Generator):
    """Practise; leaves the best policy (fewest mean steps over 3 iterations) in `agent`. Returns metrics."""
    reward_model = copy.deepcopy(agent).requires_grad_(False)
    optimizer = optimizer if cfg.keep_optimizer else torch.optim.Adam(agent.parameters(), fused=True)
    optimizer.param_groups[0]["lr"] = 4e-4
    agent.floor = 0.2  # from here on: with Stage 1's 0.01 log p is so steep that a few tuples blow it up
    ends = (lambda d, truth: d <= s) if cfg.success == "detector" else (lambda d, truth: truth)
    rows, env_steps, episodes, mean_steps, best = [], 0, 0, 64.0, (1e9, copy.deepcopy(agent.state_dict()))
    while env_steps + 2 * 2048 <= cfg.stage2_steps:  # room for an iteration  [Alg. 1, line 1]
        buffer, ended, n = [], [], 0
        while n < 2048:  # whole episodes, enough for N = 32 updates of B = 64
            b = rollout(agent, reward_model, 1 + int((2048 - n) / mean_steps), rng, ends)  # [Alg. 1, line 2]
            returns, valid = monte_carlo_returns(rewards(b["d"]), cfg.gamma), b["valid"]  # [Alg. 1, line 4]
            buffer.append((b["obs"][valid], b["action"][valid], returns[valid]))  # [Alg. 1, line 5]
            ended.append((b["d"][:, -1], b["truth"][:, -1]))
            n += int(valid.sum())
        obs, action, returns = (torch.cat(x) for x in zip(*buffer, strict=True))
        for i in torch.randperm(n, generator=rng)[:2048].split(64):  # drops leftovers  [Alg. 1, line 8]
            loss = reinforce_loss(agent.log_prob(obs[i], action[i]), returns[i], cfg.c)  # [Alg. 1, line 7]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.policy.parameters(), 1.0)
            optimizer.step()
        d, truth = (torch.cat(x) for x in zip(*ended, strict=True))
        env_steps, episodes, mean_steps = env_steps + n, episodes + len(d), n / len(d)
        rows.append({"env_steps": env_steps, "episodes": episodes, "mean_steps": mean_steps})
        for key, x in (("true_at_end", truth), ("detected", d <= s), ("return_mean", returns)):
            rows[-1][key] = x.float().mean().item()
        print("stage 2", *(f" {key} {x:.2f}" for key, x in rows[-1].items()))
        score = sum(row["mean_steps"] for row in rows[-3:]) / 3
        if len(rows) >= 3 and score < best[0]:  # later policies can be worse
            best = score, copy.deepcopy(agent.state_dict())
    agent.load_state_dict(best[1])
    return rows


# %% Evaluation and Figure 9
def evaluate(agent: Agent, rng: torch.Generator, n: int = 1000) -> dict[str, float]:
    """True success (95 % Wilson interval) and mean steps, sampled actions; a failure counts HORIZON."""
    b = rollout(agent, agent, n, rng, lambda d, truth: truth)
    p, steps, w = b["truth"][:, -1].double().mean().item(), b["valid"].sum().item() / n, 1.96**2 / n
    low, high = ((p + w / 2 + sign * (w * (p * (1 - p) + w / 4)) ** 0.5) / (1 + w) for sign in (-1, 1))
    return {"success": p, "success_low": low, "success_high": high, "mean_steps": steps, "eval_episodes": n}


def figure9(path: Path, data: dict[str, Tensor], agents: list[Agent], rows: list[dict]) -> None:
    """Eight demonstrations, eight episodes of each agent from the same starts, and how practice went."""
    import matplotlib.pyplot as plt

    some = [data["episode"] == e for e in data["episode"].unique()[:8]]
    panels = [("demonstrations", [data["pos"][e] for e in some], [data["goal"][e][0] for e in some])]
    for title, agent in zip(("after Stage 1", "after Stage 2"), agents, strict=True):
        b = rollout(agent, agent, 8, torch.Generator().manual_seed(0), lambda d, truth: truth)
        panels.append((title, b["pos"], b["goal"]))
    fig, axes = plt.subplots(1, 4, figsize=(13, 3.6), layout="constrained")
    for ax, (title, tracks, goals) in zip(axes, panels, strict=False):
        for colour, track, goal in zip(plt.cm.viridis(range(0, 256, 32)), tracks, goals, strict=True):
            ax.plot(*track.T, "s-", markevery=[0], color=colour, lw=1, ms=4)
            ax.add_patch(plt.Circle(goal.tolist(), GOAL_RADIUS, fill=False, color=colour))
        ax.set(title=title, xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal", xlabel="x", ylabel="y")
    curves = [(row["true_at_end"], row["mean_steps"] / HORIZON) for row in rows]
    axes[3].plot([row["env_steps"] for row in rows], curves, label=["ended in the goal", "steps / 140"])
    axes[3].set(title="practice episodes", xlabel="environment steps", ylim=(0, 1))
    axes[3].legend()
    fig.savefig(path, dpi=110)


# %% Both stages, in order
def main(cfg: Config) -> None:
    start, here = time.time(), Path(sys.argv[0]).resolve().parent
    torch.set_num_threads(1)  # two are 1.3 times as fast on idle cores, and fifteen times slower on busy ones
    rng = torch.manual_seed(cfg.seed)  # torch's own generator: one seed fixes everything
    data = demonstrate(cfg.episodes, rng)
    agent = Agent(data, cfg.bins)
    optimizer = stage1(agent, data, cfg, rng)
    clone = copy.deepcopy(agent)  # Stage 1's agent, for the figure
    s = calibrate(agent, data) if cfg.success_threshold is None else cfg.success_threshold
    first = evaluate(agent, rng) | {"episodes": cfg.episodes, "seconds": time.time() - start}
    rows = stage2(agent, optimizer, s, cfg, rng)
    second = evaluate(agent, rng) | {key: rows[-1][key] for key in ("episodes", "env_steps")}
    changed = sorted(asdict(cfg).items() - asdict(Config(seed=cfg.seed)).items())  # its own folder
    out = Path("runs") / "-".join([f"pointmass-toy-s{cfg.seed}", *(f"{key}={x}" for key, x in changed)])
    out.mkdir(parents=True, exist_ok=True)
    figure9(out / "figure9.png", data, [clone, agent], rows)
    lines = (",".join(map(str, line)) + "\n" for line in (rows[0], *map(dict.values, rows)))
    (out / "metrics.csv").write_text("".join(lines))
    summary = {f"stage1_{k}": v for k, v in first.items()} | {f"stage2_{k}": v for k, v in second.items()}
    git = subprocess.run("git rev-parse --short HEAD", shell=True, cwd=here, capture_output=True, text=True)
    summary |= dict(success_threshold=s, seed=cfg.seed, commit=git.stdout[:7], seconds=time.time() - start)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2), f"\nwrote figure9.png, metrics.csv and summary.json to {out}/")


if __name__ == "__main__":
    import tyro

    cfg = tyro.cli(Config, args=[] if "ipykernel" in sys.modules else None)  # a notebook has others
    if min(cfg.episodes - 99, cfg.bins, cfg.stage1_updates, cfg.stage2_steps - 4095) < 1:
        sys.exit(print("pointmass.py: --episodes < 100, --stage2-steps < 4096, or a 0", file=sys.stderr) or 2)
    main(cfg)
