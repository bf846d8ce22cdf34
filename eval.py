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

from common import UserError, options, pictures, ranks
from common.cli import cli
from common.counting import evaluate
from common.options import Count, Positive, Size, Whole
from common.pictures import Film
from common.runs import describe, newest_run, write_json
from common.setup import load_run, measured_threshold, run_settings
from model import EFM
from rollout import rollout

SHOWN = 8  # episodes in the pictures


@dataclass
class Config:
    run: str = ""  # folder of a Stage 1 or Stage 2 run; empty: the newest finished one
    episodes: Count = 500  # evaluation episodes
    seed: Whole = 0  # of the episodes and the sampled actions
    success_threshold: Size | None = None  # s of the detector [steps]; None: the run's own
    policy: str = "policy"  # which checkpoint acts; early_policy: the best at cloning, if that is another
    temperature: Positive | None = None  # of the sampled actions; None: the domain's
    greedy: bool = False  # the most probable action instead of a sampled one


def to_the_end(d: Tensor, truth: Tensor) -> Tensor:
    """What ends an episode here: true success, bool (n,)."""
    return truth


def film(policy: EFM, reward_model: EFM, env: VectorEnv, seed: int, temperature: float, greedy: bool) -> Film:
    """One episode in each simulation, watched. The same seed gives the same scenes, whoever acts."""
    frames, tracks = [], []

    def watch() -> None:
        frames.append(np.stack(env.render()))  # (n, H, W, 3)
        tracks.append(env.track())  # (n, 2)

    generator = torch.Generator().manual_seed(seed)
    scenes = 6 * 10**8 + seed  # apart from those of training and of evaluation
    how = {"temperature": temperature, "greedy": greedy, "keep": False, "watch": watch}
    episodes = rollout(policy, reward_model, env, scenes, generator, to_the_end, **how)
    goals = []
    for i in range(env.num_envs):
        first = int((episodes.row == i).nonzero()[0])
        goals.append(episodes.goals[first])
    reached = episodes.truth[:, -1].numpy()
    d = episodes.d.numpy()
    return Film(np.stack(frames, 1), np.stack(tracks, 1), goals, episodes.length, reached, d)


def main(cfg: Config) -> None:
    options.check(cfg)
    folder = Path(cfg.run) if cfg.run else newest_run("*-stage[12]-s*")
    if folder is None:
        raise UserError("runs/: no finished run; run `python stage1.py` first or name a run with --run")
    settings = run_settings(folder)
    practised = "gamma" in settings
    if practised and not (folder / "metrics.csv").exists():
        raise UserError(f"{folder}/metrics.csv: missing; name a finished run with --run")

    env, policy, reward_model = load_run(folder, SHOWN, cfg.policy)
    ranks.choose_threads(options.DeviceFlags(), sum(p.numel() for p in policy.parameters()))
    options.fill(cfg, {"success_threshold": measured_threshold(folder, env), "temperature": env.temperature})
    s, how = cfg.success_threshold, {"greedy": cfg.greedy, "temperature": cfg.temperature}
    summary = evaluate(folder, cfg.episodes, cfg.seed, s, policy=cfg.policy, **how)
    told = {"run": str(folder), "seed": cfg.seed, "policy": cfg.policy, "greedy": cfg.greedy, **summary}
    write_json(folder / "evaluation.json", told)

    shown = film(policy, reward_model, env, cfg.seed, **how)
    pictures.trajectories(shown).savefig(folder / "trajectories.png")
    pictures.steps_to_go(shown, s).savefig(folder / "steps_to_go.png")
    pictures.save_gif([shown.part(4)], folder / "episodes.gif", env.metadata["render_fps"])
    if practised:
        pictures.curves(folder / "metrics.csv").savefig(folder / "curves.png")
    pictures.close()
    print(describe(told))
    print(f"wrote evaluation.json and pictures to {folder}/")


if __name__ == "__main__":
    cli(Config, main)
