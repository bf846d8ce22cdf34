"""eval.py: it writes what it says, the pictures open, and a run's folder is all that it needs."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import envs.pointmass
import eval as evaluation
import stage2
from common.counting import evaluate
from common.runs import describe, write_json
from common.weights import save_model
from tests.tiny import small, stage1_run

PICTURES = ("trajectories.png", "steps_to_go.png", "episodes.gif")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """An untrained model in a Stage 2 run's folder, with two iterations' metrics; Stage 1's is beside it."""
    folder = tmp_path_factory.mktemp("runs") / "pointmass-stage2-s0"
    stage1_run(folder.with_name("pointmass-stage1-s0"), "state")
    folder.mkdir()
    settings = {"stage1": str(folder.with_name("pointmass-stage1-s0")), "domain": "pointmass", "obs": "state"}
    write_json(folder / "config.json", settings | {"seed": 0, "gamma": 0.9, "success_threshold": 5.0})
    for name in ("policy", "reward"):
        save_model(small("state", 0), folder / f"{name}.safetensors")
    names = ("env_steps", "true_at_end", "detected", "mean_steps", "return_mean", "return_std", "entropy")
    with open(folder / "metrics.csv", "w") as f:
        csv.writer(f).writerows([names, [100, 0.1, 0.2, 90, -1, 2, 6], [200, 0.2, 0.3, 80, 1, 2, 5.5]])
    return folder


@pytest.fixture
def short(monkeypatch) -> None:
    """Episodes of few steps."""
    monkeypatch.setattr(envs.pointmass.PointmassVectorEnv, "horizon", 8)


def test_main_writes_what_it_says(run, capsys, short):
    evaluation.main(evaluation.Config(run=str(run), episodes=3, success_threshold=69.0, greedy=True))
    out = capsys.readouterr().out
    assert f"wrote evaluation.json and pictures to {run}/" in out
    written = json.loads((run / "evaluation.json").read_text())
    assert written["success_threshold"] == 69 and written["greedy"] is True and written["run"] == str(run)
    assert written["temperature"] == 1  # the domain's
    assert written | evaluate(run, 3, 0, 69.0, greedy=True) == written
    for name in (*PICTURES, "curves.png"):
        with Image.open(run / name) as picture:
            picture.load()
            assert min(picture.size) > 200, name
            assert len(picture.convert("L").getcolors()) > 10, name  # not an empty page
    with Image.open(run / "episodes.gif") as film:
        assert film.n_frames > 1 and film.size == (4 * 256, 256)
        first = np.asarray(film.convert("RGB")).copy()
        film.seek(film.n_frames - 1)
        assert not np.array_equal(first, np.asarray(film.convert("RGB")))  # something moved


def test_a_stage_1_run_has_no_curves_of_practice(run, short):
    folder = run.with_name("pointmass-stage1-s0")
    evaluation.main(evaluation.Config(run=str(folder), episodes=3))
    assert all((folder / name).exists() for name in PICTURES) and not (folder / "curves.png").exists()
    assert json.loads((folder / "evaluation.json").read_text())["success_threshold"] == 3  # the domain's


def test_a_run_folder_stands_alone(tmp_path, monkeypatch, short):
    """Evaluated from anywhere, without Stage 1's folder, by another name, to the same numbers."""
    monkeypatch.chdir(tmp_path)
    stage1_run(Path("runs/stage1"), "state")
    few = {"iterations": 1, "updates": 1, "batch": 8, "num_envs": 2, "first_look": 2, "eval_episodes": 2}
    stage2.main(stage2.Config(stage1="runs/stage1", out="runs/stage2", success_threshold=5.0, **few))
    before = evaluate(Path("runs/stage2"), 3, 0, 5.0)
    shutil.rmtree("runs/stage1")
    Path("runs").rename("renamed")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    folder = tmp_path / "renamed" / "stage2"
    evaluation.main(evaluation.Config(run=str(folder), episodes=3))
    after = json.loads((folder / "evaluation.json").read_text())
    assert after | before == after
    assert after["success_threshold"] == 5  # the run's own
    assert not list(Path().iterdir())  # nothing is written where one stands


def test_describe_shows_every_number():
    text = describe({"success": 0.123456, "episodes": 500, "stage": "stage1"})
    lines = [line.split() for line in text.splitlines()]
    assert lines == [["success", "0.1235"], ["episodes", "500"], ["stage", "stage1"]]
