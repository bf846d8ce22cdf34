"""An interrupted run that is resumed ends in the same bytes as one that was not, whenever it was killed."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors

from common import UserError
from common.runs import Run
from tests.runs import train, tree

ROOT = Path(__file__).resolve().parents[1]


# Runs are named by absolute paths: the TensorBoard writer of an interrupted one outlives its test.
class Killed(BaseException):
    """Not an Exception: nothing in the scripts can catch it."""


def metrics(folder: Path) -> list[list[str]]:
    """The lines of metrics.csv without `seconds`, the last column."""
    lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    assert lines[0][-1] == "seconds" and all(len(line) == len(lines[0]) for line in lines)
    return [line[:-1] for line in lines]


def content(path: Path) -> tuple[dict[str, str], dict[str, list]]:
    with safetensors.safe_open(path, "np") as f:
        return f.metadata(), {k: f.get_tensor(k).tolist() for k in f.keys()}  # noqa: SIM118


def assert_same(run: Path, reference: Path) -> None:
    assert metrics(run) == metrics(reference)
    names = sorted(p.name for p in reference.glob("*.safetensors"))
    assert names and sorted(p.name for p in run.glob("*.safetensors")) == names
    for name in names:
        assert content(run / name) == content(reference / name), name
        assert (run / name).read_bytes() == (reference / name).read_bytes(), f"{name}: in other bytes"
    assert (run / "config.json").read_bytes() == (reference / "config.json").read_bytes()
    assert (run / "summary.json").exists()
    assert not list(run.glob("*.tmp"))


def test_the_references_are_worth_comparing(references):
    """Weights that never change and a file that is written once would make every test below pass."""
    for name in ("stage0", "stage1"):
        assert [row[0] for row in metrics(references / "runs" / name)] == ["update", "2", "4", "5"]
    rows = metrics(references / "runs/stage2")
    assert len(rows) == 9 and len({tuple(r[3:]) for r in rows}) == 9
    detected = [float(row[rows[0].index("detected")]) for row in rows[1:]]
    assert any(0 < share < 1 for share in detected), detected
    policies = [content(references / f"runs/{name}/policy.safetensors")[1] for name in ("stage1", "stage2")]
    assert policies[0] != policies[1]  # practice found a better policy


POINTS = [  # which call of which method of Run is the last one, and whether it still takes place
    ("stage0", "log", 1, True), ("stage0", "checkpoint", 2, False), ("stage0", "checkpoint", 2, True),
    ("stage0", "finish", 1, False),
    ("stage1", "start", 1, True), ("stage1", "log", 1, False), ("stage1", "log", 1, True),
    ("stage1", "checkpoint", 1, False), ("stage1", "checkpoint", 1, True), ("stage1", "log", 2, True),
    ("stage1", "checkpoint", 2, False), ("stage1", "finish", 1, False),
    ("stage2", "start", 1, True), ("stage2", "log", 1, True), ("stage2", "checkpoint", 2, True),
    ("stage2", "checkpoint", 5, False), ("stage2", "checkpoint", 6, False), ("stage2", "finish", 1, False),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "method", "number", "done"), POINTS, ids=lambda p: str(p))
def test_interrupted_and_resumed(references, stage, method, number, done, tmp_path, monkeypatch):
    """A kill between two calls; a `checkpoint` that does not take place comes after policy.safetensors."""
    if stage == "stage2":
        shutil.copytree(references / "runs/stage1", tmp_path / "runs/stage1")
    shutil.copytree(references / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    original, calls = getattr(Run, method), []

    def interrupt(self, *args, **kwargs):
        calls.append(method)
        if len(calls) < number or done:
            result = original(self, *args, **kwargs)
            if len(calls) < number:
                return result
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, method, interrupt)
        train(stage, tmp_path / "runs" / stage)
    assert not Path(f"runs/{stage}/summary.json").exists()
    train(stage, tmp_path / "runs" / stage, resume=True)
    assert_same(Path(f"runs/{stage}"), references / "runs" / stage)


def test_interrupted_twice(references, tmp_path, monkeypatch):
    """The second interruption comes before anything new is checkpointed; the third run ends the same."""
    shutil.copytree(references / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    original = Run.checkpoint
    for resume, last in ((False, 1), (True, 0), (True, 1)):
        calls = []

        def interrupt(self, calls=calls, last=last):
            if len(calls) == last:
                raise Killed
            calls.append(self)
            original(self)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Run, "checkpoint", interrupt)
            train("stage1", tmp_path / "runs/stage1", resume=resume)
    train("stage1", tmp_path / "runs/stage1", resume=True)
    assert_same(Path("runs/stage1"), references / "runs/stage1")


def test_resume_of_a_run_that_never_began(references, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no demonstrations either
    train("stage1", tmp_path / "runs/stage1", resume=True)
    assert_same(Path("runs/stage1"), references / "runs/stage1")


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_finished_practice_goes_on_with_more_iterations(references, interrupted, tmp_path, monkeypatch):
    """Five iterations and three more are eight, also if the three are interrupted."""
    shutil.copytree(references / "runs/stage1", tmp_path / "runs/stage1")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "runs/stage2"
    train("stage2", out, iterations=5)
    assert (out / "summary.json").exists() and len(metrics(out)) == 6
    before = tree(out)
    with pytest.raises(UserError, match="was started with --iterations 5, this is 4"):
        train("stage2", out, iterations=4, resume=True)
    with pytest.raises(UserError, match="this run exists"):
        train("stage2", out)
    (out / "resume.pt").rename(tmp_path / "resume.pt")
    with pytest.raises(UserError, match="resume.pt: gone"):
        train("stage2", out, resume=True)
    (tmp_path / "resume.pt").rename(out / "resume.pt")
    assert tree(out) == before  # fewer ones, no --resume, or no resume.pt: nothing is changed
    if interrupted:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Run, "log", killed)
            train("stage2", out, resume=True)
        assert not (out / "summary.json").exists()  # it would be of five iterations
    train("stage2", out, resume=True)
    assert_same(out, references / "runs/stage2")


def killed(*_: object, **__: object) -> None:
    raise Killed


# --- real processes, really killed --------------------------------------------------------------------
STAGES = {
    "stage1": "--episodes 200 --updates 60 --eval-every 5 --eval-episodes 4 --out runs/stage1",
    "stage2": "--stage1 runs/stage1 --iterations 8 --updates 4 --first-look 8 --success-threshold 60 --eval-episodes 4"
    " --out runs/stage2",
}


def start(stage: str, cwd: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / f"{stage}.py"), *STAGES[stage].split(), *more]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    error = process.communicate(timeout=600)[1]
    assert process.returncode == 0, error


@pytest.mark.slow
def test_killed_twenty_times(tmp_path):
    """Each stage is killed ten times, whenever; a run that gets to its end is begun anew."""
    rng, reference, cwd = np.random.default_rng(0), tmp_path / "reference", tmp_path / "killed"
    reference.mkdir()
    cwd.mkdir()
    for stage in STAGES:
        began = time.time()
        finish(start(stage, reference))
        duration, kills, finished = time.time() - began, 0, 0
        while kills < 10:
            process = start(stage, cwd, "--resume")
            try:
                error = process.communicate(timeout=rng.uniform(0, duration))[1]
                assert process.returncode == 0, error
                assert_same(cwd / "runs" / stage, reference / "runs" / stage)
                shutil.rmtree(cwd / "runs" / stage)
                shutil.rmtree(cwd / "data", ignore_errors=True)
                finished += 1
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
        finish(start(stage, cwd, "--resume"))
        assert_same(cwd / "runs" / stage, reference / "runs" / stage)
        print(f"{stage}: {duration:.1f} s, {kills} kills, {finished + 1} runs to the end")
