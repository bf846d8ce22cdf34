"""results/gpu.py draws and learns what the stages do."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "results"))
import gpu  # noqa: E402

import common  # noqa: E402
import envs  # noqa: E402
import eval as evaluation  # noqa: E402
import model as models  # noqa: E402
import stage1  # noqa: E402
from envs.tabletop import foveate  # noqa: E402

CPU = torch.device("cpu")
SCORES = ("success", "success_low", "success_high", "mean_steps", "early_detections")


def test_foveated_is_foveate():
    rng = np.random.default_rng(0)
    pictures, at = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8), rng.uniform(-0.9, 1.9, (40, 2))
    views = gpu.foveated(torch.from_numpy(pictures), torch.from_numpy(at))
    for i in range(40):
        np.testing.assert_array_equal(views[i], foveate(pictures[i], at[i])[0])


def test_scenes_are_stage_0s():
    domain = "tabletop,size=32"
    (qpos, *asked), _ = gpu.scenes(domain, 3, 7, [2, 5])
    images, *expected = envs.make_vec(domain, 1, obs="images").scenes(np.random.default_rng([7, 2]), 3)
    np.testing.assert_array_equal(gpu.draw(domain, qpos, CPU), images)
    assert asked[0] == expected[0]
    np.testing.assert_array_equal(asked[1], expected[1])
    np.testing.assert_array_equal(asked[2], expected[2])


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(models.PRESETS, "nano-vision", models.EFMConfig(width=16, depth=1, vit_width=16, patch_size=16))
    monkeypatch.setattr(evaluation, "evaluate", lambda *args, **kwargs: {})
    places = ((stage1, "load_demonstrations"), (stage1, "Demonstrations"), (common, "distribute"), (models.Gemma, "embed"))
    for module, name in places:
        monkeypatch.setattr(module, name, getattr(module, name))  # gpu.py puts others in their places


def test_the_same_demonstrations_and_the_same_updates(tmp_path, monkeypatch, small):
    monkeypatch.chdir(tmp_path)
    domain, episodes = "tabletop,size=32", 20
    kept = sum((gpu.demonstrations(domain, episodes, 0, k, 2) for k in range(2)), [])
    usual = stage1.record(domain, "images", episodes, 0)
    assert sorted(len(e[2]) for e in kept) == sorted(usual["length"]) and {e[0] for e in kept} == set(usual["instruction"])

    class Done:
        def result(self):
            return kept

    data = gpu.drawn(domain, [Done()])
    i = int(np.flatnonzero((usual["length"] == data["length"][0]) & (usual["instruction"] == data["instruction"][0]))[0])
    rows = np.arange(data["length"][0])
    np.testing.assert_array_equal(data["frames"][rows], usual["frames"][usual["start"][i] + rows])
    np.testing.assert_array_equal(data["action"][rows], usual["action"][usual["start"][i] + rows])

    settings = {"domain": domain, "obs": "images", "model": "nano-vision", "init": "none", "episodes": episodes, "updates": 4}
    settings |= {"batch": 12, "eval_every": 2}
    monkeypatch.setattr(stage1, "load_demonstrations", lambda cfg: data | {"frames": data["frames"].numpy()})
    stage1.main(stage1.Config(**settings, out="eager"))
    gpu.run_stage1(stage1.Config(**settings, out="replayed"), data)
    eager, replayed = (np.genfromtxt(f"{run}/metrics.csv", delimiter=",", skip_header=1)[:, :-1] for run in ("eager", "replayed"))
    np.testing.assert_allclose(eager, replayed, rtol=1e-4)
    assert np.ptp(eager[:, 4]) > 0


def test_from_scenes_to_a_summary(tmp_path, monkeypatch, small):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(evaluation, "evaluate", lambda folder, *args, **kwargs: dict.fromkeys(SCORES, 0.5))
    gpu.main(gpu.Config("tabletop,size=32", scenes=2, episodes=12, model="nano-vision", updates=2, batch=6, out="run"))
    summary = common.read_json(Path("run/summary.json"))
    assert summary["success"] == 0.5 and summary["episodes"] == 12 and Path("run/policy.safetensors").exists()
    assert len(np.genfromtxt("run-stage0/metrics.csv", delimiter=",", skip_header=1, ndmin=2)) == 1
    assert common.make_env("tabletop", 1, obs="images").scenes.__name__ == "scenes"  # the usual one again
