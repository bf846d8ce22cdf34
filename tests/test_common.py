"""What is common to the scripts: intervals, the learning rate, files that are never half written, run folders, run choice."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import common
import model as models
from common import Run, UserError, learning_rate, stage0_run, stage1_run, wilson


@dataclass
class Config:
    seed: int = 0
    eval_every: int = 2
    out: str = ""
    resume: bool = False


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- numbers ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Wilson's interval at 95 %, four digits, e.g. statsmodels' proportion_confint(method="wilson")
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (8, 10, 0.4902, 0.9433), (81, 263, 0.2553, 0.3662),
     (490, 500, 0.9636, 0.9891), (1, 1, 0.2065, 1.0)],
)  # fmt: skip
def test_wilson(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=1.5e-4)


def test_wilson_stays_a_proportion():
    assert wilson(0, 0) == (0.0, 1.0)
    for n in (1, 3, 50):
        for k in range(n + 1):
            low, high = wilson(k, n)
            assert 0 <= low <= k / n <= high <= 1 and high - low < 1
            assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low))  # successes and failures are alike


def test_learning_rate():
    assert learning_rate(0, 1000, 3.0) == pytest.approx(3.0 / 100)
    assert learning_rate(24, 10**7, 3.0) == pytest.approx(0.75)  # linear in the warm-up
    assert learning_rate(500, 1000, 3.0) == pytest.approx(0.55 * 3)  # half-way down
    assert learning_rate(1000, 1000, 3.0) == pytest.approx(0.3)  # a tenth
    assert all(0 < learning_rate(u, 4, 1.0) <= 0.04 for u in range(4))  # a run shorter than the warm-up


# --- files ------------------------------------------------------------------------------------------------------------
def test_write_atomically_keeps_the_old_file_when_the_writer_fails():
    path = Path("file")

    def half(p: Path) -> None:
        p.write_text("hal")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        common.write_atomically(path, half)
    assert not path.exists()
    common.write_atomically(path, lambda p: p.write_text("old"))
    with pytest.raises(OSError, match="disk full"):
        common.write_atomically(path, half)
    assert path.read_text() == "old"
    common.write_atomically(path, lambda p: p.write_text("new"))
    assert path.read_text() == "new" and os.listdir() == ["file"]  # what failed before leaves nothing behind


def test_read_json_names_the_file():
    common.write_json(Path("a.json"), {"x": [1, 2.5], "y": "ü"})
    assert common.read_json(Path("a.json")) == {"x": [1, 2.5], "y": "ü"}
    with pytest.raises(UserError, match=r"b\.json: no such file"):
        common.read_json(Path("b.json"))
    for damaged in (b'{"x": 1', b"", b"[1, 2]", b"\xff\xfe\x00"):
        Path("a.json").write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.json: damaged"):
            common.read_json(Path("a.json"))


def test_a_saved_model_is_the_same_bytes_every_time():
    """safetensors keeps several metadata entries in a random order, so two copies of one model could differ."""
    cfg = models.EFMConfig(width=8, depth=1, heads=1, kv_heads=1, head_dim=8, mlp_dim=8, state_names=("red",), state_dim=2)
    model = models.EFM(cfg, models.Tokenizer.train(["move to the red goal"]))
    for i in range(12):
        models.save_model(model, Path(str(i)))
    assert len({Path(str(i)).read_bytes() for i in range(12)}) == 1


# --- a run's folder ---------------------------------------------------------------------------------------------------
def started(folder: str = "run", **settings) -> Run:
    cfg = Config(**settings)
    run = Run(Path(folder).absolute(), cfg, cfg.resume)  # TensorBoard goes on writing after the test
    run.start()
    return run


def rows(folder: Path) -> list[str]:
    return (folder / "metrics.csv").read_text().splitlines()


def test_an_existing_folder_is_refused_without_resume():
    Path("run").mkdir()
    Path("run/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="run: this run exists.*--resume.*--out"):
        Run(Path("run"), Config(), resume=False)
    assert os.listdir("run") == ["notes.txt"]


def test_nothing_is_written_before_start():
    run = Run(Path("run"), Config(), resume=False)
    assert not run.done and run.state is None and os.listdir() == []
    run.start()
    assert set(os.listdir("run")) == {"config.json", "metrics.csv"}


def test_another_configuration_is_refused_by_naming_the_flag():
    started().metrics.close()
    before = Path("run/config.json").read_bytes()
    for cfg, flag in ((Config(seed=1), "--seed"), (Config(eval_every=3), "--eval[-_]every")):
        with pytest.raises(UserError, match=f"run: .*{flag}"):
            Run(Path("run"), cfg, resume=True)
    assert Path("run/config.json").read_bytes() == before
    started(out="elsewhere", resume=True).metrics.close()  # these two may differ


def test_the_configuration_says_all_but_out_and_resume():
    started("a/b", seed=4, out="a/b").metrics.close()
    assert json.loads(Path("a/b/config.json").read_text()) == {"seed": 4, "eval_every": 2}


def test_rows():
    run = started()
    run.log(1, {"update": 1, "loss": 1 / 3, "big": 1234567.0, "nan": math.nan})
    run.log(2, {"update": 2000000, "loss": 2.0, "big": 1e-7, "nan": 0.0})
    assert rows(Path("run")) == ["update,loss,big,nan", "1,0.333333,1.23457e+06,nan", "2000000,2,1e-07,0"]  # without closing
    assert list(Path("run").glob("events.out.tfevents.*"))


def test_resume_cuts_the_metrics_back_to_what_the_checkpoint_knew():
    run = started()
    assert run.state is None and not run.done
    run.log(1, {"update": 1, "loss": 0.5})
    run.checkpoint(update=1, weights=torch.arange(3))
    run.log(2, {"update": 2, "loss": 0.25})  # and here the run is killed
    assert len(rows(Path("run"))) == 3

    run = started(resume=True)
    assert run.state["update"] == 1 and run.state["weights"].tolist() == [0, 1, 2]
    assert rows(Path("run")) == ["update,loss", "1,0.5"]
    run.log(2, {"update": 2, "loss": 0.75})
    run.checkpoint(update=2)
    assert rows(Path("run")) == ["update,loss", "1,0.5", "2,0.75"]
    again = started(resume=True)
    assert again.state["update"] == 2 and rows(Path("run")) == ["update,loss", "1,0.5", "2,0.75"]
    assert again.seconds() >= again.state["seconds"] >= 0


def test_resume_before_the_first_checkpoint_starts_the_metrics_anew():
    run = started()
    run.log(1, {"update": 1, "loss": 0.5})  # and here the run is killed
    run = started(resume=True)
    assert run.state is None
    run.log(1, {"update": 1, "loss": 0.5})
    assert rows(Path("run")) == ["update,loss", "1,0.5"]


def test_resume_without_a_folder_starts_one():
    run = started(resume=True)
    run.log(1, {"update": 1})
    assert run.state is None and rows(Path("run")) == ["update", "1"]


def test_a_damaged_checkpoint_is_named_and_kept():
    run = started()
    run.log(1, {"update": 1})
    run.checkpoint(update=1)
    whole = Path("run/resume.pt").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"nonsense"):
        Path("run/resume.pt").write_bytes(damaged)
        with pytest.raises(UserError, match=r"resume\.pt: .*damaged"):
            Run(Path("run"), Config(resume=True), resume=True)
        assert Path("run/resume.pt").read_bytes() == damaged and len(rows(Path("run"))) == 2


def test_a_file_is_not_a_run_folder():
    Path("file").write_text("mine")
    for folder in (Path("file"), Path("file/run")):
        with pytest.raises(UserError, match="file"):
            Run(folder, Config(resume=True), resume=True).start()
    assert Path("file").read_text() == "mine"


def test_a_finished_run_keeps_its_metrics_without_its_checkpoint():
    """resume.pt is the large file that one deletes when a run is finished."""
    run = started()
    run.log(1, {"update": 1})
    run.checkpoint(update=1)
    run.finish({})
    Path("run/resume.pt").unlink()
    assert Run(Path("run"), Config(resume=True), resume=True).done
    assert rows(Path("run")) == ["update", "1"]


def test_finish_writes_command_commit_and_seconds(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/stage1.py", "--out", "my run"])
    run = started("my run")
    assert not Path("my run/summary.json").exists()
    summary = run.finish({"stage": "stage1", "success": 0.5})
    assert json.loads(Path("my run/summary.json").read_text()) == summary
    assert summary["success"] == 0.5 and isinstance(summary["seconds"], float) and summary["seconds"] >= 0
    assert shlex.split(summary["command"]) == ["python", "stage1.py", "--out", "my run"]
    repository = Path(common.__file__).parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True, check=False).stdout.strip()
    assert git.startswith(summary["commit"]) if git else summary["commit"] == "unknown"
    assert not git or re.fullmatch("[0-9a-f]{7,40}", summary["commit"])
    assert Run(Path("my run"), Config(resume=True), resume=True).done


# --- which run --------------------------------------------------------------------------------------------------------
def finished(name: str, time: int | None) -> Path:
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if time is not None:
        (folder / "summary.json").write_text("{}")
        os.utime(folder / "summary.json", (time, time))
    return folder


def test_newest_run_is_the_last_to_finish():
    assert common.newest_run("*-stage1-s*") is None
    finished("pointmass-stage1-s0", 200)
    finished("pointmass-stage1-s1", 300)
    finished("pointmass-stage1-s2", 100)
    finished("pointmass-stage1-s3", None)  # still running
    finished("pointmass-stage2-s0", 400)
    assert common.newest_run("*-stage1-s*") == Path("runs/pointmass-stage1-s1")
    assert common.newest_run("*-stage[12]-s*") == Path("runs/pointmass-stage2-s0")


def test_stage1_run():
    with pytest.raises(UserError, match=r"runs/.*--stage1"):
        stage1_run("")
    finished("pointmass-images-stage1-s5", 10)
    finished("pointmass-images-stage0-s5", 20)
    assert stage1_run("") == Path("runs/pointmass-images-stage1-s5")
    assert stage1_run("elsewhere/x") == Path("elsewhere/x")


def test_stage0_run(capsys):
    assert stage0_run("", "pointmass") is None and "stage0.py" in capsys.readouterr().out
    finished("pointmass-images-stage0-s1", 10)
    finished("other-images-stage0-s0", 20)
    assert stage0_run("", "pointmass") == Path("runs/pointmass-images-stage0-s1")
    assert "runs/pointmass-images-stage0-s1" in capsys.readouterr().out  # which one, is said
    assert stage0_run("none", "pointmass") is None
    assert stage0_run("elsewhere/x", "pointmass") == Path("elsewhere/x")


def test_run_folder_names_what_is_not_the_default():
    assert common.run_folder("pointmass", "state", "state", "stage1", 3) == Path("runs/pointmass-stage1-s3")
    assert common.run_folder("pointmass", "images", "state", "stage2", 0) == Path("runs/pointmass-images-stage2-s0")
