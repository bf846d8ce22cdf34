"""Evaluation: the detector's table by hand, numbers that agree with each other, pictures that open."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import envs
import eval as evaluation
import model as models
from model import EFM, EFMConfig, Tokenizer

EPISODES = 12


# --- by hand ----------------------------------------------------------------------------------------------------------
def test_confusion():
    detected = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0], bool)
    truth = np.array([1, 0, 0, 1, 0, 0, 0, 0, 1, 1], bool)
    assert evaluation.confusion(detected, truth) == {
        "true_positives": 1, "false_positives": 2, "false_negatives": 3, "true_negatives": 4,
        "false_positive_rate": pytest.approx(2 / 6), "false_negative_rate": pytest.approx(3 / 4)}  # fmt: skip


def test_confusion_without_a_class():
    every, never = np.ones(3, bool), np.zeros(3, bool)
    table = evaluation.confusion(every, every)
    assert table["true_positives"] == 3 and table["false_positive_rate"] == 0 and table["false_negative_rate"] == 0
    assert evaluation.confusion(every, never)["false_positive_rate"] == 1
    assert evaluation.confusion(never, every)["false_negative_rate"] == 1


def test_early_detections():
    d = np.array([
        [9, 2, 9, 9, 9, 9],  # fires at 1, true at 3: kept for s >= 2
        [9, 2, 2, 9, 9, 1],  # fires at 1, true at 5: too late for s = 3, and the later detections do not count
        [9, 9, 9, 9, 3, 9],  # d = s fires at 4, true at 4
        [9, 9, 9, 9, 9, 9],  # never fires: not asked
        [9, 9, 9, 9, 9, 1],  # fires on the last observation, never true
    ], float)  # fmt: skip
    truth = np.zeros((5, 6), bool)
    truth[0, 3], truth[1, 5], truth[2, 4:], truth[3, 5] = True, True, True, True
    assert evaluation.early_detections(d, truth, 3.0) == pytest.approx(2 / 4)
    assert evaluation.early_detections(d, truth, 2.0) == pytest.approx(1 / 3)  # the third row no longer fires
    assert evaluation.early_detections(d, truth, 2.5) == pytest.approx(1 / 3)  # within ceil(2.5) = 3 steps
    assert evaluation.early_detections(d, truth, 0.5) == 0  # nothing fires


def test_success_before_the_detection_alone_does_not_count():
    d, truth = np.array([[9.0, 9, 9, 1, 9]]), np.array([[False, True, False, False, False]])
    assert evaluation.early_detections(d, truth, 1.0) == 0


# --- a run ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """An untrained model in the folder of a Stage 2 run, with two iterations of metrics."""
    folder = tmp_path_factory.mktemp("runs") / "pointmass-stage2-s0"
    stage1 = folder.parent / "pointmass-stage1-s0"
    env = envs.make_vec("pointmass", 1)
    cfg = EFMConfig(width=16, depth=1, heads=2, kv_heads=1, head_dim=8, mlp_dim=16, state_names=env.state_names,
                    state_dim=env.state_dim)  # fmt: skip
    torch.manual_seed(0)
    model = EFM(cfg, Tokenizer.train([*env.instructions(), *env.state_names]))
    for path, config in ((stage1, {"domain": "pointmass", "obs": "state", "seed": 0}),
                         (folder, {"stage1": str(stage1), "gamma": 0.9})):  # fmt: skip
        path.mkdir()
        common.write_json(path / "config.json", config)
        for name in ("policy", "reward"):
            models.save_model(model, path / f"{name}.safetensors")
    names = ("env_steps", "success", "detected", "mean_steps", "return_mean", "return_std", "entropy")
    with open(folder / "metrics.csv", "w") as f:
        csv.writer(f).writerows([names, [100, 0.1, 0.2, 90, -1, 2, 6], [200, 0.2, 0.3, 80, 1, 2, 5.5]])
    return folder


@pytest.mark.parametrize("s", [3.0, 69.0, 200.0])
def test_evaluate_is_consistent(run, s):
    r = evaluation.evaluate(run, EPISODES, seed=1, s=s)
    n = {k: r[k] for k in ("true_positives", "false_positives", "false_negatives", "true_negatives")}
    assert r["eval_episodes"] == EPISODES and sum(n.values()) == EPISODES and all(v >= 0 for v in n.values())
    assert 0 <= r["success_low"] <= r["success"] <= r["success_high"] <= 1 and r["success_low"] < r["success_high"]
    assert (r["success_low"], r["success_high"]) == common.wilson(round(r["success"] * EPISODES), EPISODES)
    assert 1 <= r["mean_steps"] <= 140 and 0 <= r["early_detections"] <= 1
    assert r["false_positive_rate"] == n["false_positives"] / max(1, n["false_positives"] + n["true_negatives"])
    assert r["false_negative_rate"] == n["false_negatives"] / max(1, n["false_negatives"] + n["true_positives"])
    if s == 200:  # above every d: each episode is ended at once, by the detector
        assert n["true_positives"] + n["false_positives"] == EPISODES
    if s == 3:  # an untrained d is about 70: the detector never fires
        assert n["true_positives"] + n["false_positives"] == 0 and r["early_detections"] == 0


def test_evaluate_is_repeatable_and_seeded(run):
    a, b, c = (evaluation.evaluate(run, 4, seed=seed, s=69.0) for seed in (0, 0, 3))
    assert a == b
    assert a != c


def test_next_to_no_temperature_is_greedy(run, monkeypatch):
    seen, rollout = [], evaluation.rollout
    monkeypatch.setattr(evaluation, "rollout", lambda *a, **k: seen.append(rollout(*a, **k)) or seen[-1])
    for how in ({"temperature": 1e-6}, {"greedy": True}, {}):
        evaluation.evaluate(run, 4, 0, 69.0, **how)
    cold, greedy, drawn = (r["tokens"] for r in seen[::2])
    assert torch.equal(cold, greedy) and not torch.equal(greedy, drawn)


def test_pictures(run):
    evaluation.film(run, seed=0, s=3.0, greedy=False, policy="policy", temperature=1.0)
    evaluation.curves(run)
    for name in ("trajectories.png", "steps_to_go.png", "curves.png"):
        with Image.open(run / name) as picture:
            picture.load()
            assert min(picture.size) > 200, name
            assert len(picture.convert("L").getcolors()) > 10, name  # not an empty page
    with Image.open(run / "episodes.gif") as film:
        assert film.n_frames > 1 and film.size == (4 * 256, 256)
        first = np.asarray(film.convert("RGB")).copy()
        film.seek(film.n_frames - 1)
        assert not np.array_equal(first, np.asarray(film.convert("RGB")))  # something moved


def test_main_writes_what_it_says(run, tmp_path, monkeypatch, capsys):
    for name in ("film", "curves"):
        monkeypatch.setattr(evaluation, name, lambda *_, name=name, **how: print("drew", name))
    cfg = evaluation.Config(run=str(run), episodes=3, s=69.0, greedy=True)
    evaluation.main(cfg)
    out = capsys.readouterr().out
    assert "drew film" in out and "drew curves" in out and str(run) in out
    written = json.loads((run / "evaluation.json").read_text())
    assert written["s"] == 69 and written["greedy"] is True and written["run"] == str(run)
    assert written["temperature"] == 1  # the domain's
    assert written | evaluation.evaluate(run, 3, 0, 69.0, greedy=True) == written
    evaluation.main(dataclasses.replace(cfg, run=str(run.parent / "pointmass-stage1-s0")))
    assert "drew curves" not in capsys.readouterr().out  # a Stage 1 run has no learning curve of this kind


def test_describe_shows_every_number():
    text = evaluation.describe({"success": 0.123456, "episodes": 500, "stage": "stage1"})
    assert [line.split() for line in text.splitlines()] == [["success", "0.1235"], ["episodes", "500"], ["stage", "stage1"]]
