"""Runs: intervals, files that are never half written, folders, which run is the newest."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from common import UserError
from common.runs import Run, newest_run, read_json, run_folder, wilson, write_atomically, write_json
from common.weights import add_lora, save_model, trainable_state
from model import EFM, EFMConfig
from tokens import Tokenizer


@dataclass
class Config:
    seed: int = 0
    eval_every: int = 2
    out: str | None = None
    resume: bool = False


@dataclass
class Progress:
    update: int = 0


class Weights:
    """What keeps its state itself."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"tensor": self.tensor}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.tensor = state["tensor"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- numbers -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Wilson's interval at 95 %, four digits, e.g. statsmodels' proportion_confint(method="wilson")
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (8, 10, 0.4902, 0.9433),
     (81, 263, 0.2553, 0.3662), (490, 500, 0.9636, 0.9891), (1, 1, 0.2065, 1.0)],
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


# --- files ---------------------------------------------------------------------------------------------
def test_write_atomically_keeps_the_old_file_when_the_writer_fails():
    path = Path("file")

    def half(p: Path) -> None:
        p.write_text("hal")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    assert not path.exists()
    write_atomically(path, lambda p: p.write_text("old"))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    assert path.read_text() == "old"
    write_atomically(path, lambda p: p.write_text("new"))
    assert path.read_text() == "new" and os.listdir() == ["file"]  # what failed before leaves nothing behind


def test_read_json_names_the_file():
    write_json(Path("a.json"), {"x": [1, 2.5], "y": "ü"})
    assert read_json(Path("a.json")) == {"x": [1, 2.5], "y": "ü"}
    with pytest.raises(UserError, match=r"b\.json: no such file"):
        read_json(Path("b.json"))
    for damaged in (b'{"x": 1', b"", b"[1, 2]", b"\xff\xfe\x00"):
        Path("a.json").write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.json: damaged"):
            read_json(Path("a.json"))


def tiny_model() -> EFM:
    sizes = {"width": 8, "depth": 1, "heads": 1, "kv_heads": 1, "head_dim": 8, "mlp_dim": 8}
    cfg = EFMConfig(**sizes, state_names=("red",), state_dim=2)
    return EFM(cfg, Tokenizer.train(["move to the red goal"]))


def test_a_saved_model_is_the_same_bytes_every_time():
    """safetensors keeps several metadata entries in a random order, so two copies of one model could differ."""
    model = tiny_model()
    for i in range(12):
        save_model(model, Path(str(i)))
    assert len({Path(str(i)).read_bytes() for i in range(12)}) == 1


# --- a run's folder ------------------------------------------------------------------------------------
def started(folder: str = "run", **settings) -> Run:
    cfg = Config(**settings)
    run = Run(Path(folder).absolute(), cfg)  # TensorBoard goes on writing after the test
    run.start()
    return run


def rows(folder: Path) -> list[str]:
    return (folder / "metrics.csv").read_text().splitlines()


def test_an_existing_folder_is_refused_without_resume():
    Path("run").mkdir()
    Path("run/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="run: this run exists.*--resume.*--out"):
        Run(Path("run"), Config())
    assert os.listdir("run") == ["notes.txt"]


def test_nothing_is_written_before_start():
    run = Run(Path("run"), Config())
    assert not run.done and run.state is None and os.listdir() == []
    run.start()
    assert set(os.listdir("run")) == {"config.json", "metrics.csv"}


def test_another_configuration_is_refused_by_naming_the_flag():
    started().metrics.close()
    before = Path("run/config.json").read_bytes()
    for changed, flag in (({"seed": 1}, "--seed 0"), ({"eval_every": 3}, "--eval-every 2")):
        with pytest.raises(UserError, match=f"run: was started with {flag}, this is "):
            Run(Path("run"), Config(**changed, resume=True))
    assert Path("run/config.json").read_bytes() == before
    started(out="elsewhere", resume=True).metrics.close()  # these two may differ


def test_a_run_from_before_a_switch_goes_on_with_the_switch_off():
    @dataclass
    class Later(Config):
        switch: bool = False

    started().metrics.close()
    with pytest.raises(UserError, match="run: was started with --switch None, this is True"):
        Run(Path("run"), Later(switch=True, resume=True))
    Run(Path("run"), Later(resume=True))


def test_a_run_from_before_a_flag_goes_on_with_what_it_did():
    @dataclass
    class Later(Config):
        reward: str = "loss"

    started().metrics.close()
    Run(Path("run"), Later(resume=True))
    with pytest.raises(UserError, match="run: was started with --reward loss, this is error"):
        Run(Path("run"), Later(reward="error", resume=True))


def test_the_configuration_says_all_but_out_and_resume():
    started("a/b", seed=4, out="a/b").metrics.close()
    assert json.loads(Path("a/b/config.json").read_text()) == {"seed": 4, "eval_every": 2}


def test_rows():
    run = started()
    run.log(1, {"update": 1, "loss": 1 / 3, "big": 1234567.0, "nan": math.nan})
    run.log(2, {"update": 2000000, "loss": 2.0, "big": 1e-7, "nan": 0.0})
    expected = ["update,loss,big,nan", "1,0.333333,1.23457e+06,nan", "2000000,2,1e-07,0"]
    assert rows(Path("run")) == expected  # without closing
    assert list(Path("run").glob("events.out.tfevents.*"))


def tracked(resume: bool = False) -> tuple[Run, Progress, Weights]:
    """A run that has things to continue from."""
    run = Run(Path("run").absolute(), Config(resume=resume))
    progress, weights = Progress(), Weights(torch.zeros(3, dtype=torch.long))
    run.track(progress=progress, weights=weights)
    run.start()
    return run, progress, weights


def test_resume_cuts_the_metrics_back_to_what_the_checkpoint_knew():
    run, progress, weights = tracked()
    assert run.state is None and not run.done and not run.resumed
    run.log(1, {"update": 1, "loss": 0.5})
    progress.update, weights.tensor = 1, torch.arange(3)
    run.checkpoint()
    run.log(2, {"update": 2, "loss": 0.25})  # and here the run is killed
    assert len(rows(Path("run"))) == 3

    run, progress, weights = tracked(resume=True)
    assert run.resumed and progress.update == 1 and weights.tensor.tolist() == [0, 1, 2]
    assert rows(Path("run")) == ["update,loss", "1,0.5"]
    run.log(2, {"update": 2, "loss": 0.75})
    progress.update = 2
    run.checkpoint()
    assert rows(Path("run")) == ["update,loss", "1,0.5", "2,0.75"]
    again, progress, _ = tracked(resume=True)
    assert progress.update == 2 and rows(Path("run")) == ["update,loss", "1,0.5", "2,0.75"]
    assert again.seconds() >= again.state["seconds"] >= 0


@pytest.mark.parametrize("rank", [0, 4])
def test_everything_that_is_tracked_goes_on_exactly(rank, torchvision_ops):
    """A model, with adapters or without, its optimiser, both generators, a dataclass, an object of its own."""

    def things() -> dict:
        torch.manual_seed(0)
        model = tiny_model()
        if rank:
            model = add_lora(model, rank, Path("base.safetensors"))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        generators = {"rng": np.random.default_rng(0), "generator": torch.Generator().manual_seed(0)}
        own = {"progress": Progress(), "weights": Weights(torch.zeros(1)), "nothing": None}
        return {"model": model, "optimizer": optimizer} | generators | own

    def work(model, optimizer, rng, generator, progress, weights, nothing) -> list[float]:
        for p in model.parameters():
            if p.requires_grad:
                noise = torch.from_numpy(rng.normal(size=p.shape)).float()
                p.grad = noise + torch.randn(p.shape, generator=generator)
        optimizer.step()
        progress.update += 1
        weights.tensor = weights.tensor + progress.update
        state = trainable_state(model)
        return [progress.update, weights.tensor.item(), *(v.sum().item() for v in state.values())]

    whole = things()
    run = Run(Path("run").absolute(), Config())
    run.track(**whole)
    run.start()
    work(**whole)
    run.checkpoint()
    expected = work(**whole)
    assert len(set(expected)) > 5

    again = things()
    run = Run(Path("run").absolute(), Config(resume=True))
    run.track(**again)
    assert work(**again) == expected


def test_a_checkpoint_that_lacks_something_is_refused():
    run, *_ = tracked()
    run.checkpoint()
    run = Run(Path("run"), Config(resume=True))
    with pytest.raises(UserError, match=r"run/resume\.pt: has no rng"):
        run.track(rng=np.random.default_rng(0))


def test_resume_before_the_first_checkpoint_starts_the_metrics_anew():
    run = started()
    run.log(1, {"update": 1, "loss": 0.5})  # and here the run is killed
    run = started(resume=True)
    assert run.state is None
    run.log(1, {"update": 1, "loss": 0.5})
    assert rows(Path("run")) == ["update,loss", "1,0.5"]


def test_resume_removes_what_a_killed_process_was_writing():
    started().metrics.close()
    Path("run/resume.pt.12345.tmp").write_bytes(b"half of it")
    Path("run/notes.tmp").write_text("mine")
    started(resume=True).metrics.close()
    assert not Path("run/resume.pt.12345.tmp").exists() and Path("run/notes.tmp").read_text() == "mine"


def test_resume_without_a_folder_starts_one():
    run = started(resume=True)
    run.log(1, {"update": 1})
    assert run.state is None and rows(Path("run")) == ["update", "1"]


def test_a_damaged_checkpoint_is_named_and_kept():
    run = started()
    run.log(1, {"update": 1})
    run.checkpoint()
    whole = Path("run/resume.pt").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"nonsense"):
        Path("run/resume.pt").write_bytes(damaged)
        with pytest.raises(UserError, match=r"resume\.pt: .*damaged"):
            Run(Path("run"), Config(resume=True))
        assert Path("run/resume.pt").read_bytes() == damaged and len(rows(Path("run"))) == 2


class Payload:
    """What a pickle can do: here it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def test_a_checkpoint_with_code_in_it_is_refused_and_has_not_run():
    run, progress, _ = tracked()
    run.checkpoint()
    state = torch.load("run/resume.pt", weights_only=True)
    torch.save(state | {"progress": Payload()}, "run/resume.pt")
    with pytest.raises(UserError, match=r"resume\.pt: missing or damaged"):
        Run(Path("run"), Config(resume=True))
    assert not Path("it-ran").exists()
    torch.load("run/resume.pt", weights_only=False)
    assert Path("it-ran").exists()  # so the payload is one


def test_weights_that_are_no_numbers_do_not_replace_good_ones():
    run, model = started(), tiny_model()
    run.keep(policy=model)
    good = Path("run/policy.safetensors").read_bytes()
    for bad in (math.nan, math.inf):
        model.state_weight.data[0, 0, 0] = bad
        with pytest.raises(UserError, match="run: weights of policy are no numbers any more; .*--lr"):
            run.keep(policy=model)
        assert Path("run/policy.safetensors").read_bytes() == good
    assert not list(Path("run").glob("*.tmp"))


@pytest.mark.parametrize("folder", ["/proc/nowhere/run", "/dev/null/run"])
def test_a_folder_that_cannot_be_made_is_refused_at_once(folder):
    with pytest.raises(UserError, match=f"^{folder}: .*--out"):
        Run(Path(folder), Config())


def test_a_folder_behind_a_closed_one_is_refused_at_once(monkeypatch):
    """Some systems do not even say whether it exists."""

    def closed(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", closed)
    with pytest.raises(UserError, match="^closed/run: cannot be written .Permission denied.; .*--out"):
        Run(Path("closed/run"), Config())


def test_a_file_is_not_a_run_folder():
    Path("file").write_text("mine")
    for folder in (Path("file"), Path("file/run")):
        with pytest.raises(UserError, match="file"):
            Run(folder, Config(resume=True)).start()
    assert Path("file").read_text() == "mine"


def test_a_finished_run_keeps_its_metrics_without_its_checkpoint():
    """resume.pt is the large file that one deletes when a run is finished."""
    run = started()
    run.log(1, {"update": 1})
    run.checkpoint()
    run.finish({})
    Path("run/resume.pt").unlink()
    assert Run(Path("run"), Config(resume=True)).done
    assert rows(Path("run")) == ["update", "1"]


def test_finish_writes_command_commit_and_seconds(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["/somewhere/stage1.py", "--out", "my run"])
    run = started("my run")
    assert not Path("my run/summary.json").exists()
    run.finish({"stage": "stage1"}, lambda: {"success": 0.5})
    summary = json.loads(Path("my run/summary.json").read_text())
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(summary)
    assert summary["stage"] == "stage1" and summary["success"] == 0.5
    assert isinstance(summary["seconds"], float) and summary["seconds"] >= 0
    assert shlex.split(summary["command"]) == ["python", "stage1.py", "--out", "my run"]
    head = {"cwd": Path(common.__file__).parent, "capture_output": True, "text": True, "check": False}
    git = subprocess.run(["git", "rev-parse", "HEAD"], **head).stdout.strip()
    assert git.startswith(summary["commit"]) if git else summary["commit"] == "unknown"
    assert not git or re.fullmatch("[0-9a-f]{7,40}", summary["commit"])
    assert Run(Path("my run"), Config(resume=True)).done


# --- which run -----------------------------------------------------------------------------------------
def finished(name: str, time: int | None) -> Path:
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if time is not None:
        (folder / "summary.json").write_text("{}")
        os.utime(folder / "summary.json", (time, time))
    return folder


def test_newest_run_is_the_last_to_finish():
    assert newest_run("*-stage1-s*") is None
    finished("pointmass-stage1-s0", 200)
    finished("pointmass-stage1-s1", 300)
    finished("pointmass-stage1-s2", 100)
    finished("pointmass-stage1-s3", None)  # still running
    finished("pointmass-stage2-s0", 400)
    assert newest_run("*-stage1-s*") == Path("runs/pointmass-stage1-s1")
    assert newest_run("*-stage[12]-s*") == Path("runs/pointmass-stage2-s0")


def test_run_folder_names_what_is_not_the_default():
    assert run_folder("pointmass", "state", "state", "stage1", 3) == Path("runs/pointmass-stage1-s3")
    assert run_folder("pointmass", "images", "state", "stage2", 0) == Path("runs/pointmass-images-stage2-s0")
