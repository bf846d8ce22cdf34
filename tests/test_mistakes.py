"""What goes wrong in whole runs: code in a file, a diverging policy, a folder, compiler or device that is missing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common import ranks
from tests.runs import command, train, tree

CACHE = Path("data/pointmass-state-30-s0-v2.npz")


@pytest.fixture
def here(references, tmp_path, monkeypatch) -> Path:
    """The present folder: a copy of finished runs."""
    shutil.copytree(references, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture(autouse=True)
def as_before():
    threads, chosen, sides = torch.get_num_threads(), ranks.chosen, ranks.sides
    yield
    torch.set_num_threads(threads)
    ranks.chosen, ranks.sides = chosen, sides


def refused(stage: str, args: str, capsys) -> str:
    """The one line that a command ends with, at exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        command(stage, args)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and error.startswith(f"{stage}.py: "), error
    return error


# --- code in a file -----------------------------------------------------------------------------------
class Payload:
    """What a pickle can do: here it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("it-ran",)


@pytest.mark.parametrize(
    ("stage", "args", "path"),
    [
        ("stage0", "--out runs/stage0 --resume", "runs/stage0/resume.pt"),
        ("stage1", "--out runs/stage1 --resume", "runs/stage1/resume.pt"),
        ("stage2", "--out runs/stage2 --resume", "runs/stage2/resume.pt"),
        ("stage2", "--out runs/new --keep-optimizer", "runs/stage1/resume.pt"),
    ],
)
def test_code_in_a_checkpoint_does_not_run(here, stage, args, path, capsys):
    state = torch.load(path, weights_only=True)
    torch.save(state | {"optimizer": Payload()}, path)
    Path(path).with_name("summary.json").unlink()  # it is still to be gone on with
    before = tree(here)
    assert path in refused(stage, args, capsys)
    assert tree(here) == before
    torch.load(path, weights_only=False)
    assert Path("it-ran").exists()  # so the payload is one


def test_code_in_demonstrations_does_not_run(here, capsys):
    with np.load(CACHE) as f:
        data = dict(f)
    np.savez(CACHE, **data | {"action": np.array([Payload()], dtype=object)})
    before = tree(here)
    assert str(CACHE) in refused("stage1", "--out runs/new", capsys)
    assert tree(here) == before
    with np.load(CACHE, allow_pickle=True) as f:
        f["action"]
    assert Path("it-ran").exists()


# --- a learning rate that is far too large ------------------------------------------------------------
@pytest.mark.parametrize("stage", ["stage0", "stage1", "stage2"])
def test_a_run_that_diverges_ends_in_one_line_and_keeps_what_was_good(here, stage, capsys):
    error = refused(stage, "--lr 1e30 --out runs/new", capsys)
    assert "--lr" in error and not Path("runs/new/summary.json").exists()
    kept = {path.name: load_file(path) for path in Path("runs/new").glob("*.safetensors")}
    assert all(value.isfinite().all() for weights in kept.values() for value in weights.values())
    if stage == "stage2":  # until practice finds a better policy, it is Stage 1's
        for name in ("policy", "reward"):
            before = load_file(f"runs/stage1/{name}.safetensors")
            assert all(torch.equal(before[k], v) for k, v in kept[f"{name}.safetensors"].items())


# --- what can be refused is refused before any work ---------------------------------------------------
@pytest.mark.parametrize("stage", ["stage0", "stage1", "stage2"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_recorded(here, stage, monkeypatch, capsys):
    monkeypatch.setattr("common.demos.record", None)
    shutil.rmtree("data")
    before = tree(here)
    assert "/proc/x/y" in refused(stage, "--out /proc/x/y", capsys)
    assert tree(here) == before


def test_a_place_for_demonstrations_that_cannot_be_written_is_named(here, monkeypatch, capsys):
    monkeypatch.setattr("common.demos.record", None)
    shutil.rmtree("data")
    Path("data").write_text("mine")
    before = tree(here)
    error = refused("stage1", "--out runs/new", capsys)
    assert "data: a file is in the way" in error and "--out" not in error  # which would not help
    assert tree(here) == before


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_without_a_compiler_compile_is_refused(here, stage, monkeypatch, capsys):
    (here / "empty").mkdir()
    monkeypatch.setenv("PATH", str(here / "empty"))
    before = tree(here)
    assert "--compile: needs a C++ compiler" in refused(stage, "--compile --out runs/new", capsys)
    assert tree(here) == before


@pytest.mark.parametrize("name", ["cuda", "mps"])
@pytest.mark.parametrize("stage", ["stage0", "stage1", "stage2"])
def test_a_device_that_is_not_there_is_refused(here, stage, name, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    before = tree(here)
    assert f"--device {name}: there is none here" in refused(stage, f"--device {name} --out runs/new", capsys)
    assert tree(here) == before


# --- going on -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", ["stage0", "stage1", "stage2"])
def test_a_run_remembers_its_threads(here, stage, monkeypatch, capsys):
    """Another number adds up in another order."""
    run = Path("runs") / stage
    assert json.loads((run / "config.json").read_text())["threads"] == 1
    Path(run / "summary.json").unlink()
    before = tree(here)
    error = refused(stage, f"--threads 2 --out {run} --resume", capsys)
    assert f"{run}: was started with --threads 1, this is 2" in error
    assert tree(here) == before
    monkeypatch.setattr(ranks, "CORES", 4)  # it goes on as it began, on any machine
    command(stage, f"--out {run} --resume")
    assert (run / "summary.json").exists() and ranks.sides == torch.get_num_threads() == 1


def test_a_finished_run_is_not_gone_on_with_for_longer(here, capsys):
    before = tree(here)
    error = refused("stage1", "--updates 60 --out runs/stage1 --resume", capsys)
    assert "runs/stage1: was started with --updates 5, this is 60" in error and tree(here) == before


def test_practice_goes_on_from_a_practised_policy(here):
    practised = load_file("runs/stage2/policy.safetensors")
    assert any(not torch.equal(v, practised[k]) for k, v in load_file("runs/stage1/policy.safetensors").items())
    train("stage2", "runs/again", stage1="runs/stage2", iterations=1)  # too few to find a better one
    again = load_file("runs/again/policy.safetensors")
    assert all(torch.equal(practised[k], v) for k, v in again.items())
    reward = load_file("runs/again/reward.safetensors")
    assert all(torch.equal(v, reward[k]) for k, v in load_file("runs/stage1/reward.safetensors").items())
    config = json.loads(Path("runs/again/config.json").read_text())
    assert config["stage1"] == "runs/stage2" and config["obs"] == "state"
