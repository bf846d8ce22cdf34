# %% [markdown]
# # Appendix E, seen: what the reward is made of
# Exercise 6 in pictures; do it with paper and pencil first. With V = -d and any γ, Equation 2's reward is
#
#     r_t = (1 - γ) V(o_t+1)  +  [γ V(o_t+1) - V(o_t)]                                         [Eq. 3]
#           the task's part      shaping, which changes no optimal policy
#
# and its discounted sum from t to the last step T is
#
#     R_t = (1 - γ) Σ_{i=t}^T γ^(i-t) V(o_i+1)  +  γ^(T-t+1) V(o_T+1)  -  V(o_t)
#           what comes                             where it ended         the baseline
#
# V is the value of the policy μ that gave the demonstrations, if each step costs 1; V(o_t) depends on nothing
# that is done after t, and so is a baseline. Run it as a script or, behind `jupytext --to notebook`, as cells.
#
#     python exercises/appendix_e.py            # half a minute; writes runs/exercises/appendix_e.png

# %% Stage 1 of pointmass.py, trained once and kept, and its episodes
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path("exercises").resolve()
sys.path.insert(0, str(HERE.parent))
import pointmass  # noqa: E402 - the repository's root is not installed
from exercises import practice  # noqa: E402

GAMMA = 0.9


def parts_of_reward(value: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """The task's part and the shaping of r_t: V float (T + 1,) -> float (T,) each."""
    return (1 - gamma) * value[1:], gamma * value[1:] - value[:-1]


def parts_of_return(value: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """What comes, where it ended, and the baseline of R_t: V float (T + 1,) -> float (T,) each."""
    task, _ = parts_of_reward(value, gamma)
    coming = pointmass.monte_carlo_returns(task[None], gamma)[0]
    end = gamma ** torch.arange(len(task), 0, -1.0) * value[-1]
    return coming, end, -value[:-1]


def episode(b: dict[str, Tensor], i: int) -> tuple[Tensor, Tensor]:
    """Track (T + 1, 2) and V (T + 1,) of episode i."""
    length = int(b["valid"][i].sum()) + 1
    return b["pos"][i, :length], -b["d"][i, :length]


# %% One episode that arrived, and one that ran out of time
def draw(b: dict[str, Tensor], gamma: float, path: Path) -> None:
    steps, arrived = b["valid"].sum(1), b["truth"][:, -1]
    chosen = {
        "arrived": int(torch.where(arrived, (steps - 60).abs(), 999).argmin()),  # some 60 steps long
        "out of time": int((~arrived).float().argmax()),
    }
    fig, axes = plt.subplots(2, 4, figsize=(13, 6), layout="constrained")
    for row, (name, i) in zip(axes, chosen.items(), strict=True):
        track, value = episode(b, i)
        shown = row[0].scatter(*track.T, c=value, s=8, cmap="viridis")
        row[0].add_patch(plt.Circle(b["goal"][i].tolist(), pointmass.GOAL_RADIUS, fill=False, color="black"))
        row[0].plot(*track[0], "s", color="black", ms=5, label="start")
        row[0].set(title=f"{name}: the track", aspect="equal", xlabel="x", ylabel="y")
        row[0].legend(fontsize=8)
        fig.colorbar(shown, label="V = -d [steps]")

        row[1].plot(value, color="#0072B2")
        row[1].set(title="V^μ(o_t)", xlabel="t", ylabel="[steps]")

        task, shaping = parts_of_reward(value, gamma)
        row[2].plot(task + shaping, color="black", lw=2, label="r_t")
        row[2].plot(task, color="#D55E00", label="the task's part")
        row[2].plot(shaping, color="#009E73", label="shaping")
        row[2].set(title=f"reward, γ = {gamma}", xlabel="t")
        row[2].margins(y=0.3)
        row[2].legend(fontsize=7, handlelength=1.2, loc="lower right", ncols=3, columnspacing=1)

        coming, end, baseline = parts_of_return(value, gamma)
        row[3].plot(coming + end + baseline, color="black", lw=2, label="R_t")
        row[3].plot(coming, color="#D55E00", label="what comes")
        row[3].plot(baseline, color="#009E73", label="the baseline, -V(o_t)")
        row[3].plot(end, color="#CC79A7", ls="--", label="where it ended")
        row[3].set(title=f"return, γ = {gamma}", xlabel="t")
        row[3].margins(y=0.4)
        row[3].legend(fontsize=7, handlelength=1.2, loc="lower left", ncols=2, columnspacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)


# %% [markdown]
# Above: the goal is reached, V ends at 0, and so does the last term. Below: time ran out at some V < 0, and
# the formula without the last term is wrong, most of all for the last actions. Everywhere the shaping nearly
# cancels the baseline's noise: R_t moves far less than its parts.

# %% The picture
if __name__ == "__main__":
    agent, _, _, _ = practice.stage1(pointmass.Config(), {})
    rng = torch.Generator().manual_seed(0)
    draw(
        pointmass.rollout(agent, agent, 64, rng, lambda d, truth: truth),
        GAMMA,
        practice.CACHE / "appendix_e.png",
    )
    print(f"wrote {practice.CACHE / 'appendix_e.png'}")
