"""What both neighbours need and neither method is about: episodes counted, tuples kept, rows logged, a run ended."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from common import UserError, setup
from common.counting import confusion, evaluate
from common.demos import Demonstrations
from common.options import ScaleFlags
from common.runs import Run
from envs.tabletop_language import Meaning, texts
from model import EFM
from rollout import Episodes, rollout

EPISODE_COLUMNS = ("true_at_end", "detected", "false_positives", "mean_steps", "return_mean", "return_std",
                   "return_negative", "entropy")  # fmt: skip
JUDGED_COLUMNS = (*EPISODE_COLUMNS, "false_positive_rate", "false_negative_rate", "precision", "base_rate")
Batch = dict[str, Any]  # n tuples: tensors, and `goals`, a list of n texts


# --- a run ------------------------------------------------------------------------------------------------------------
@dataclass
class Counts:
    """Of a run's Progress: what each row of metrics.csv begins with."""

    row: int = 0  # of metrics.csv
    env_steps: int = 0
    episodes: int = 0


def act(policy: EFM, judge: EFM | None, env: VectorEnv, cfg: Any, now: Counts, generator: torch.Generator,
        ends: Callable[[Tensor, Tensor], Tensor]) -> Episodes:  # fmt: skip
    """One episode of each simulation; counted."""
    seed = 10**9 * (cfg.seed + 1) + now.episodes
    episodes = rollout(policy, judge, env, seed, generator, ends)
    now.episodes += env.num_envs
    now.env_steps += len(episodes.tokens)
    return episodes


def failures(policy: EFM, env: VectorEnv, cfg: Any, now: Counts, generator: torch.Generator) -> Batch:
    """The observations of cfg.failures episodes that fail to the horizon; the ground truth is who labels them."""
    found, failed = 0, Store()
    for _ in range(40):  # rounds at most: a policy that hardly fails would try for ever
        r = act(policy, None, env, cfg, now, generator, lambda d, truth: truth)
        failure = ~r.truth[:, -1]
        mine = failure[r.row]
        state = torch.cat([r.obs["state"][mine], r.last["state"][failure]]).cpu()
        goals = [*r.goals[mine.numpy()], *r.goals[: env.num_envs][failure.numpy()]]  # at t = 0 all are there
        failed.add({"state": state, "goals": goals, "done": torch.zeros(len(goals), dtype=torch.long)})
        found += int(failure.sum())
        if found >= cfg.failures:
            break
    if not found:
        raise UserError(f"--stage1 {cfg.stage1}: its policy never fails, and the judge needs failures; name another")
    return failed.columns


def log(run: Run, now: Counts, columns: tuple[str, ...], row: dict, tell: bool, kept: dict[str, EFM], **where: int):
    """A row of metrics.csv, with what it lacks of the columns as NaN, the models to keep, and a checkpoint."""
    now.row += 1
    counts = {"row": now.row} | where | {"env_steps": now.env_steps, "episodes": now.episodes}
    run.log(now.row, counts | dict.fromkeys(columns, math.nan) | row | {"seconds": run.seconds()}, tell)
    run.keep(**kept)
    run.checkpoint()


def finish(run: Run, cfg: ScaleFlags, now: Counts, env: VectorEnv, stage: str, **more: Any) -> None:
    """summary.json: what the run took, its policy's success, and the table of Stage 1's detector over it."""
    told = {"stage": stage, "domain": env.name, "obs": env.obs, "seed": cfg.seed, "stage1": cfg.stage1}
    told |= {"episodes": now.episodes, "env_steps": now.env_steps} | more
    s = setup.measured_threshold(Path(cfg.stage1), env)
    run.finish(told, lambda: evaluate(run.folder, cfg.eval_episodes, cfg.seed, s))


# --- tuples -----------------------------------------------------------------------------------------------------------
def join(a: Batch, b: Batch) -> Batch:
    """The tuples of both."""
    return {k: a[k] + b[k] if k == "goals" else torch.cat([a[k], b[k]]) for k in a}


@dataclass
class Store:
    """Tuples that were seen, to be drawn again."""

    columns: Batch = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.columns.get("goals", []))

    def add(self, new: Batch) -> None:
        self.columns = join(self.columns, new) if self.columns else new

    def batch(self, n: int, rng: np.random.Generator) -> Batch:
        rows = rng.integers(len(self), size=n)
        return {k: [v[i] for i in rows] if k == "goals" else v[rows] for k, v in self.columns.items()}


def next_states(r: Episodes) -> Tensor:
    """The state after each tuple of the episodes, float (M, S, d): the next tuple's, or the episode's last."""
    place = torch.full(r.d.shape, -1)
    place[r.row, r.t] = torch.arange(len(r.row))
    following = place[r.row, r.t + 1]  # the next tuple, -1 where the episode ends
    return torch.where(following[:, None, None] < 0, r.last["state"].cpu()[r.row], r.obs["state"].cpu()[following])


def rows_of_pairs(demos: Demonstrations, pairs: list[tuple[int, int]]) -> np.ndarray:
    """The rows, final observations left out, of demonstrations that push one of the blocks to its partner."""
    said = [text for a, b in pairs for text in texts(Meaning("block2block", a, b), 4)]
    return demos.acted[np.isin(demos.instruction[demos.episode[demos.acted]], said)]


def to_judge(demos: Demonstrations, acted: np.ndarray, n: int, positives: int, rng: np.random.Generator) -> np.ndarray:
    """Rows int (n,); one in eight is drawn from the yeses: of all rows one in forty is a yes, so few teach only no."""
    yes = acted[demos.steps.numpy()[acted] <= positives] + 1  # the observation behind each of the last actions
    return np.concatenate([rng.choice(yes, max(1, n // 8)), rng.choice(acted, n - max(1, n // 8))])


# --- what is told -----------------------------------------------------------------------------------------------------
def per_state(r: Episodes, s: float) -> dict[str, float]:
    """d <= s against true success, over every observation of the episodes (RoboFuME's Table II)."""
    seen = torch.arange(r.d.shape[1]) <= torch.from_numpy(r.length)[:, None]
    yes, true = (r.d <= s)[seen].numpy(), r.truth[seen].numpy()
    counted = confusion(yes, true)
    return {
        "false_positive_rate": counted["false_positives"] / max(1, int((~true).sum())),
        "false_negative_rate": counted["false_negatives"] / max(1, int(true.sum())),
        "precision": counted["precision"],
        "base_rate": float(true.mean()),
    }


def per_task(r: Episodes, tasks: list[str], names: tuple[str, ...]) -> dict[str, float]:
    """`true_NAME`: the share of a task's episodes that were truly done at their end; tasks: one name a simulation."""
    truth, tasks = r.truth[:, -1].numpy(), np.array(tasks)
    return {f"true_{n}": float(truth[tasks == n].mean()) if (tasks == n).any() else math.nan for n in names}


def grad_norm(loss: Tensor, model: nn.Module) -> float:
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    return math.sqrt(sum(g.square().sum().item() for g in gradients if g is not None))


def step(optimizer: torch.optim.Optimizer, loss: Tensor, model: nn.Module) -> None:
    """One step along the loss's gradient, cut off at norm 1."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
