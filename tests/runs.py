"""Runs of tiny models that several test files need: made in seconds, and the same everywhere."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import stage0
import stage1
import stage2
from common.cli import cli
from envs.pointmass import PointmassVectorEnv
from model import PRESETS

TINY = {"width": 16, "depth": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp_dim": 16,
        "vit_width": 16, "vit_heads": 2, "vit_mlp_dim": 16}  # fmt: skip
SCRIPTS = {"stage0": stage0, "stage1": stage1, "stage2": stage2}
# Stage 0's and Stage 1's last look comes before eval_every updates are over; Stage 2 saves its policy from
# iteration 5 on, and its threshold is about what an untrained model says: the detector ends some episodes
PRACTICE = {"iterations": 8, "updates": 2, "batch": 8, "num_envs": 4, "lr": 1e-2, "eval_episodes": 2, "first_look": 4}
SETTINGS = {
    "stage0": {"updates": 5, "batch": 4, "eval_every": 2},
    "stage1": {"episodes": 30, "updates": 5, "eval_every": 2, "batch": 16, "eval_episodes": 2},
    "stage2": PRACTICE | {"success_threshold": 67.0, "stage1": "runs/stage1"},
}


@contextlib.contextmanager
def quick(stage: str) -> Iterator[None]:
    """Inside, a stage's models are tiny, its runs end without an evaluation, its practice episodes are short."""
    with pytest.MonkeyPatch.context() as patch:
        for preset in ("nano", "nano-vision"):
            patch.setitem(PRESETS, preset, dataclasses.replace(PRESETS[preset], **TINY))
        for script in (stage1, stage2):
            patch.setattr(script, "evaluate", lambda *_, **__: {})  # after training, and tested elsewhere
        if stage == "stage2":
            patch.setattr(PointmassVectorEnv, "horizon", 24)  # demonstrations need longer ones
            patch.setattr(stage2, "first_look", lambda *_: [1000.0, 0.0])  # a few updates are better than that
        yield


def train(stage: str, out: Path | str, **settings) -> None:
    """A stage's main on tiny settings, or on others."""
    with quick(stage):
        script = SCRIPTS[stage]
        script.main(script.Config(**SETTINGS[stage] | settings, out=str(out)))


def command(stage: str, args: str) -> None:
    """What `python stage1.py args` does, on the same settings where `args` says nothing else."""
    given = args.split()
    flags = {f"--{field.replace('_', '-')}": str(value) for field, value in SETTINGS[stage].items()}
    few = [x for flag, value in flags.items() if flag not in given for x in (flag, value)]
    with quick(stage), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{stage}.py", *few, *given])
        cli(SCRIPTS[stage].Config, SCRIPTS[stage].main)


def tree(folder: Path) -> dict[str, str]:
    """Every path under a folder with the hash of its content; an empty folder counts, too."""
    paths = sorted(folder.rglob("*"))
    files = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths if p.is_file()}
    return {str(p.relative_to(folder)): files.get(p, "folder") for p in paths}
