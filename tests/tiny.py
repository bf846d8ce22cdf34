"""What several test files need: models that run in milliseconds, and folders of runs made of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import envs
from common.runs import Run
from common.weights import save_model
from model import EFM, PRESETS, EFMConfig
from tokens import Tokenizer

DECODER = {"width": 16, "depth": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp_dim": 16}
SIZES = DECODER | {"vit_width": 16, "vit_heads": 2, "vit_mlp_dim": 16}
LARGER = {"width": 24, "depth": 2, "head_dim": 12, "mlp_dim": 32, "vit_depth": 1, "vit_mlp_dim": 24}
SMALL = EFMConfig(**SIZES | LARGER)


@contextlib.contextmanager
def tiny_presets() -> Iterator[None]:
    """Inside, the models that the domains take are tiny."""
    before = dict(PRESETS)
    for name in ("nano", "nano-vision", "nano-view", "nano-deep"):
        PRESETS[name] = dataclasses.replace(PRESETS[name], **SIZES)
    try:
        yield
    finally:
        PRESETS.update(before)


def pilot_twice(experiment: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script's pilot, and once more: what is there is not trained or measured again. The pilot's folder."""
    folder = Path(f"runs/{name}-pilot")
    with tiny_presets():
        experiment.main(experiment.Config(pilot=True))
        before = (folder / f"{name}.csv").read_bytes()
        monkeypatch.setattr(Run, "start", None)
        monkeypatch.setattr(experiment, "measure", None)
        experiment.main(experiment.Config(pilot=True))
    assert (folder / f"{name}.csv").read_bytes() == before and not Path("results").exists()
    return folder


def small(obs: str, seed: int, domain: str = "pointmass") -> EFM:
    """An untrained model for a domain."""
    env = envs.make_vec(domain, 1, obs=obs)
    states = {"state_names": env.state_names, "state_dim": env.state_dim}
    sizes = states if obs == "state" else {"image_size": env.size}
    torch.manual_seed(seed)
    tokenizer = Tokenizer.train([*env.instructions(), *env.state_names])
    return EFM(dataclasses.replace(SMALL, **sizes), tokenizer)


def stage1_run(folder: Path, obs: str, domain: str = "pointmass") -> None:
    """What Stage 2 reads of a Stage 1 run, untrained."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"domain": domain, "obs": obs, "seed": 0}))
    save_model(small(obs, 0, domain), folder / "policy.safetensors")
    save_model(small(obs, 1, domain), folder / "reward.safetensors")


def metrics(folder: Path) -> list[list[str]]:
    """The lines of metrics.csv without `seconds`, the last column."""
    lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    assert lines[0][-1] == "seconds" and all(len(line) == len(lines[0]) for line in lines)
    return [line[:-1] for line in lines]
