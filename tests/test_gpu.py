"""results/gpu.py draws and learns what the stages do."""

from __future__ import annotations

import functools
import sys
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "results"))
import gpu  # noqa: E402

import common  # noqa: E402
import envs  # noqa: E402
import model as models  # noqa: E402
import stage1  # noqa: E402
from envs.tabletop import corner, foveate  # noqa: E402

CPU = torch.device("cpu")


def test_foveated_is_foveate():
    rng = np.random.default_rng(0)
    pictures, at = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8), rng.uniform(-0.9, 1.9, (40, 2))
    views = gpu.foveated(torch.from_numpy(pictures), torch.from_numpy(corner(at, 16)))
    for i in range(40):
        np.testing.assert_array_equal(views[i], foveate(pictures[i], at[i])[0])


def test_scenes_are_stage_0s():
    domain = "tabletop,size=32"
    (qpos, *asked), _ = gpu.scenes(domain, 3, 7, [2, 5])
    images, *expected = envs.make_vec(domain, 1, obs="images").scenes(np.random.default_rng([7, 2]), 3)
    np.testing.assert_array_equal(gpu.draw(domain, qpos, CPU, common.device()), images)
    assert asked[0] == expected[0]
    np.testing.assert_array_equal(asked[1], expected[1])
    np.testing.assert_array_equal(asked[2], expected[2])


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(models.PRESETS, "nano-vision", models.EFMConfig(width=16, depth=1, vit_width=16, patch_size=16))


def test_the_same_demonstrations_and_the_same_updates(tmp_path, monkeypatch, small):
    monkeypatch.chdir(tmp_path)
    domain, episodes = "tabletop,size=32", 20
    begun = [Future(), Future()]
    for k, part in enumerate(begun):
        part.set_result(gpu.demonstrations(domain, episodes, 0, slice(k, None, 2)))
    usual, data = stage1.record(domain, "images", episodes, 0), gpu.drawn(domain, begun)
    assert sorted(data["length"]) == sorted(usual["length"]) and set(data["instruction"]) == set(usual["instruction"])
    on_host = data | {"frames": data["frames"].cpu().numpy()}
    i = int(np.flatnonzero((usual["length"] == data["length"][0]) & (usual["instruction"] == data["instruction"][0]))[0])
    rows = np.arange(data["length"][0])
    np.testing.assert_array_equal(on_host["frames"][rows], usual["frames"][usual["start"][i] + rows])
    np.testing.assert_array_equal(data["action"][rows], usual["action"][usual["start"][i] + rows])

    settings = {"domain": domain, "obs": "images", "model": "nano-vision", "init": "none", "episodes": episodes, "updates": 4}
    settings |= {"batch": 12, "eval_every": 2, "eval_episodes": 1}
    with monkeypatch.context() as m:
        m.setattr(stage1, "load_demonstrations", lambda cfg: on_host)
        stage1.main(stage1.Config(**settings, out="eager"))
    gpu.run_stage1(stage1.Config(**settings, out="replayed"), data)
    eager, replayed = (np.genfromtxt(f"{run}/metrics.csv", delimiter=",", skip_header=1)[:, :-1] for run in ("eager", "replayed"))
    np.testing.assert_allclose(eager, replayed, rtol=1e-4)
    assert np.ptp(eager[:, 4]) > 0


def test_each_number_of_objectives_has_a_graph(monkeypatch, small):
    monkeypatch.setattr(models.Gemma, "sparse", False)
    domain = "tabletop,size=32,family=mixed"
    data = stage1.record(domain, "images", 6, 0)
    demos = stage1.Demonstrations(data, np.arange(6), 4)
    env = envs.make_vec(domain, 1, obs="images")
    tokenizer = models.Tokenizer.train([*env.instructions(), models.QUESTION_INSTRUCTION])
    model = models.EFM(models.replace(models.PRESETS["nano-vision"], image_size=32), tokenizer).to(common.device())
    actions, steps = models.action_tokenizer(**env.action_tokens), models.StepsToGo(env.steps_cap, env.steps_bins)

    def losses(model, demos, bc_rows, steps_rows, episodes):
        obs, action, goals, _ = demos.batch(bc_rows, common.device())
        each = {"bc": stage1.bc_loss(model, obs, goals, actions.encode(action).to(common.device()), actions.ranges)}
        obs, _, goals, to_go = demos.batch(steps_rows, common.device())
        each["steps"] = stage1.steps_to_go_loss(model, obs, goals, steps.encode(to_go).to(common.device()), steps.ranges)
        if len(episodes):
            each["instruction"] = stage1.instruction_loss(model, *demos.first_and_last(episodes, common.device()))
        return each

    replayed, rng = gpu.Replayed(model), np.random.default_rng(0)
    for asked in (3, 3, 0, 0):
        rows = rng.choice(demos.acted, 4), rng.integers(len(demos.index), size=5), rng.integers(6, size=asked)
        found = []
        for f in (functools.partial(losses, model), functools.partial(replayed, losses)):
            model.zero_grad()
            now = f(demos, *rows)
            sum(now.values()).backward()
            found.append([sum(now.values()).item(), *(p.grad.clone() for p in model.parameters())])
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
    assert len(replayed.captured) == 2


def test_from_scenes_to_a_summary(tmp_path, monkeypatch, small):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 1)
    settings = {
        "domain": "tabletop,size=32",
        "stage0_updates": 2,
        "episodes": 12,
        "model": "nano-vision",
        "updates": 2,
        "batch": 6,
    }
    gpu.main(gpu.Config(**settings, eval_episodes=2, out="stage1"))
    summary = common.read_json(Path("stage1/summary.json"))
    assert summary["eval_episodes"] == 2 and summary["episodes"] == 12 and Path("stage1/policy.safetensors").exists()
    assert len(np.genfromtxt("stage0/metrics.csv", delimiter=",", skip_header=1, ndmin=2)) == 1
    assert common.make_env("tabletop", 1, obs="images").scenes.__name__ == "scenes"  # the usual one again
    with pytest.raises(common.UserError, match="stage1: this run exists"):
        gpu.main(gpu.Config(**settings, out="stage1"))


@pytest.mark.parametrize(("settings", "says"), [
    ({"domain": "tabletop,look=real"}, "--domain tabletop,look=real: only"),
    ({"domain": "tabletop,history=1"}, "--domain tabletop,history=1: only"),
    ({"domain": "aloha"}, "--domain aloha: only"),
    ({"init": "nowhere"}, "nowhere/policy.safetensors: no such"),
    ({"model": "tiny"}, "--model tiny: unknown"),
    ({"episodes": 1}, "--episodes 1: must be"),
    ({"data_fraction": 0.0}, "--data-fraction 0.0: must be"),
    ({"out": "runs/here"}, "--out runs/here: a Stage 1"),
])  # fmt: skip
def test_wrong_input_is_refused_before_any_work(tmp_path, monkeypatch, settings, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(common.UserError, match=says):
        gpu.main(gpu.Config(**settings))
    assert not list(tmp_path.iterdir())
