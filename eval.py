"""Evaluation: true success with intervals, the detector's confusion table, pictures.

    python eval.py                                      # the newest run, half a minute for the pointmass
    python eval.py --run runs/pointmass-stage2-s0 --episodes 1000
    python eval.py --run runs/pointmass-stage1-s0 --greedy

Writes into the run's folder: evaluation.json, trajectories.png (as Figure 9), steps_to_go.png (as Figure 2),
episodes.gif and, for Stage 2, curves.png.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from common import pictures
from common.cli import UserError, cli
from common.runs import newest_run, read_json, write_json
from common.setup import make_env
from common.weights import load_model
from model import EFM
from rollout import describe, evaluate, rollout


@dataclass
class Config:
    run: str = ""  # folder of a Stage 1 or Stage 2 run; empty: the newest finished one
    episodes: int = 500  # evaluation episodes
    seed: int = 0  # of the episodes and the sampled actions
    success_threshold: float | None = None  # s of the detector [steps]; None: the run's own
    policy: str = "policy"  # which checkpoint acts; early_policy: the best at cloning, if that is another
    temperature: float | None = None  # of the sampled actions; None: the domain's
    greedy: bool = False  # the most probable action instead of a sampled one


def load_run(folder: Path, num_envs: int, policy: str = "policy") -> tuple[VectorEnv, EFM, EFM]:
    """The domain of a run, num_envs at once, the run's policy and its reward model."""
    settings = read_json(folder / "config.json")
    if "stage1" in settings:  # Stage 2 may practise in another domain than Stage 1 saw
        taught = read_json(Path(settings["stage1"]) / "config.json")
        settings = taught | {"domain": settings.get("domain") or taught.get("domain")}
    if not {"domain", "obs"} <= settings.keys():
        raise UserError(f"{folder}/config.json: not a Stage 1 or Stage 2 run's; name another --run")
    env = make_env(settings["domain"], num_envs, obs=settings["obs"])
    acting = load_model(folder / f"{policy}.safetensors", env)
    return env, acting, load_model(folder / "reward.safetensors", env, acting)


def to_the_end(d: Tensor, truth: Tensor) -> Tensor:
    """What ends an episode here: true success, bool (n,)."""
    return truth


def film(policy: EFM, reward_model: EFM, env: VectorEnv, seed: int, temperature: float,
         greedy: bool = False) -> pictures.Film:
    """One episode in each simulation, watched. The same seed gives the same scenes, whoever acts."""
    frames, tracks = [], []

    def watch() -> None:
        frames.append(np.stack(env.render()))  # (n, H, W, 3)
        tracks.append(env.track())  # (n, 2)

    generator = torch.Generator().manual_seed(seed)
    scenes = 6 * 10**8 + seed  # apart from those of training and of evaluation
    episodes = rollout(policy, reward_model, env, scenes, generator, to_the_end, temperature, greedy, watch)
    goals = []
    for i in range(env.num_envs):
        first = int((episodes.row == i).nonzero()[0])
        goals.append(episodes.goals[first])
    reached = episodes.truth[:, -1].numpy()
    d = episodes.d.numpy()
    return pictures.Film(np.stack(frames, 1), np.stack(tracks, 1), goals, episodes.length, reached, d)


def main(cfg: Config) -> None:
    folder = Path(cfg.run) if cfg.run else newest_run("*-stage[12]-s*")
    if folder is None:
        raise UserError("runs/: no finished run; run `python stage1.py` first or name a run with --run")
    settings = read_json(folder / "config.json")
    practised = "gamma" in settings
    if practised and not (folder / "metrics.csv").exists():
        raise UserError(f"{folder}/metrics.csv: missing; name a finished run with --run")

    env, policy, reward_model = load_run(folder, cfg.episodes, cfg.policy)
    if cfg.success_threshold is None:
        cfg.success_threshold = settings.get("success_threshold", env.success_threshold)
    if cfg.temperature is None:
        cfg.temperature = env.temperature
    how = {"seed": cfg.seed, "temperature": cfg.temperature, "greedy": cfg.greedy}
    summary = evaluate(policy, reward_model, env, s=cfg.success_threshold, **how)
    write_json(folder / "evaluation.json", {"run": str(folder), "policy": cfg.policy, **how, **summary})

    env, policy, reward_model = load_run(folder, 8, cfg.policy)
    shown = film(policy, reward_model, env, **how)
    pictures.trajectories(shown).savefig(folder / "trajectories.png")
    pictures.steps_to_go(shown, cfg.success_threshold).savefig(folder / "steps_to_go.png")
    pictures.save_gif([shown.part(4)], folder / "episodes.gif", env.metadata["render_fps"])
    if practised:
        pictures.curves(folder / "metrics.csv").savefig(folder / "curves.png")
    pictures.close()
    print(describe(summary))
    print(f"wrote evaluation.json and pictures to {folder}/")


if __name__ == "__main__":
    cli(Config, main)
