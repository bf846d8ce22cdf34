"""Wrong commands, damaged checkpoints and unfit datasets: one line, exit code 2, nothing written."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import envs
import eval as evaluation
import pointmass
import stage0
import stage1
import stage2
from common import demos
from common.cli import cli
from common.weights import save_model
from model import EFM, EFMConfig
from tests.tiny import SIZES, tiny_presets
from tokens import Tokenizer

ROOT = Path(stage1.__file__).resolve().parent
SCRIPTS = {"stage0": stage0, "stage1": stage1, "stage2": stage2, "eval": evaluation}
# sizes that make a command finish in a second, should it go wrong and be accepted
TINY = {
    "stage0": "--updates 2 --batch 4 --eval-every 1",
    "stage1": "--episodes 30 --updates 4 --eval-every 2 --eval-episodes 4",
    "stage2": "--iterations 2 --updates 1 --batch 4 --num-envs 2 --first-look 2 --eval-episodes 2",
    "eval": "--episodes 2",
}
ONE, TWO, ZERO = (f"runs/pointmass-{s}-s0" for s in ("stage1", "stage2", "images-stage0"))
CACHE = f"data/pointmass-state-30-s0-v{demos.FORMAT}.npz"


def call(script: ModuleType, args: list[str]) -> None:
    """What `python script.py args` does, in this process and in the present folder."""
    before = sys.argv
    sys.argv = [f"{script.__name__}.py", *args]
    try:
        cli(script.Config, script.main)
    finally:
        sys.argv = before


def tree(folder: Path) -> dict[str, str]:
    """Every path under a folder with the hash of its content; a link and an empty folder count, too."""
    found = {}
    for p in sorted(folder.rglob("*")):
        found[str(p.relative_to(folder))] = hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
    return found


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> Path:
    """A folder with finished runs of Stage 0, 1 and 2 and the cached demonstrations."""
    folder, before = tmp_path_factory.mktemp("valid"), Path.cwd()
    os.chdir(folder)
    try:
        with tiny_presets():
            for name in ("stage0", "stage1", "stage2"):
                call(SCRIPTS[name], TINY[name].split())
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(valid, tmp_path, monkeypatch) -> Path:
    """The present folder: a fresh copy of `valid`."""
    shutil.copytree(valid, tmp_path / "here")
    (tmp_path / "minari").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "here"


# --- what is wrong ----------------------------------------------------------------------------------------
def truncate(path: str) -> None:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])


def remove(path: str) -> None:
    shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def text(path: str, content: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(content)


def edit(path: str, **changes) -> None:
    """Change keys of a JSON file; None deletes one."""
    value = json.loads(Path(path).read_text()) | changes
    Path(path).write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def reshape(path: str) -> None:
    """Weights of another width under the old sizes."""
    import safetensors.torch

    with safetensors.safe_open(path, "pt") as f:
        meta, weights = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    safetensors.torch.save_file({k: v[..., :-1].contiguous() for k, v in weights.items()}, path, meta)


def foreign(path: str) -> None:
    """A safetensors file of another project."""
    import safetensors.torch

    safetensors.torch.save_file({"weight": torch.zeros(2)}, path)


def model(path: str, obs: str, words: list[str] | None = None, size: int = 32) -> None:
    """A whole checkpoint, of a model that reads `obs` and knows only `words`."""
    env = envs.make_vec("pointmass", 1, obs=obs)
    sizes = {"state_names": env.state_names, "state_dim": 2} if obs == "state" else {"image_size": size}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.train(words or [*env.instructions(), *env.questions(), *env.state_names])
    save_model(EFM(EFMConfig(**SIZES, **sizes), tokenizer), Path(path))


def minari_of_images() -> None:
    """A Minari dataset with the spaces of --obs images, and no success in it."""
    import minari
    from minari.data_collector.episode_buffer import EpisodeBuffer

    env = envs.make_vec("pointmass", 1, obs="images")
    o, _ = env.reset(seed=0)
    frames = np.repeat(o["images"], 3, 0)
    buffer = EpisodeBuffer(
        observations={"instruction": [o["instruction"][0]] * 3, "images": frames},
        actions=np.zeros((2, 2), np.float32),
        rewards=[0.0, 0.0],
        terminations=[False, False],
        truncations=[False, True],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari asks for authors and links
        minari.create_dataset_from_buffers(
            "nanoefm/images-v0",
            [buffer],
            action_space=env.single_action_space,
            observation_space=env.single_observation_space,
        )


class Code:
    """In a pickle: code that would make a file."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def unfinish(run: str) -> None:
    remove(f"{run}/summary.json")


Damage = Callable[[], object] | None
NEW = "--out runs/new"
CASES: list[tuple[str, str, Damage, str]] = [  # script, arguments, what was done before, what is named
    # the command line itself
    ("stage0", "--nope 3", None, "--nope"),
    ("stage1", "--nope 3", None, "--nope"),
    ("stage2", "--resum", None, "--resum"),
    ("eval", "runs/pointmass-stage1-s0", None, "runs/pointmass-stage1-s0"),
    ("stage0", "--updates many", None, "--updates"),
    ("stage1", "--episodes 1.5", None, "--episodes"),
    ("stage2", "--gamma high", None, "--gamma"),
    ("stage2", "--success maybe", None, "--success"),
    ("stage2", "--stage1", None, "--stage1"),
    ("eval", "--success-threshold three", None, "--success-threshold"),
    ("eval", "--success-threshold nan", None, "--success-threshold nan"),
    # values
    ("stage0", "--domain nope", None, "--domain nope"),
    ("stage1", "--domain nope", None, "--domain nope"),
    ("stage0", "--model nope", None, "--model nope"),
    ("stage1", "--model nope", None, "--model nope"),
    ("stage1", "--obs sound", None, "--obs sound"),
    ("stage1", f"--domain tabletop,colour=red {NEW}", None, "--domain tabletop,colour=red"),
    ("stage1", f"--domain tabletop,blocks=5 {NEW}", None, "blocks 5"),
    ("stage1", f"--domain pointmass,obs=images {NEW}", None, "--domain pointmass,obs=images"),
    ("stage1", f"--domain tabletop,blocks=8,blocks=4 {NEW}", None, "twice"),
    ("stage1", f"--domain pointmass,size=0 --obs images {NEW}", None, "size 0"),
    ("stage1", f"--domain aloha,size=big --obs images {NEW}", None, "size big"),
    ("stage2", f"--domain tabletop {NEW}", None, "--domain tabletop"),  # Stage 1 was elsewhere
    *(("stage0", f"--{f} {v} {NEW}", None, f"--{f} {v}")
      for f in ("updates", "batch", "eval-every") for v in (0, -1)),
    *(("stage1", f"--{f} 0 {NEW}", None, f"--{f} 0")
      for f in ("eval-every", "eval-episodes", "data-fraction")),
    *(("stage1", f"--{f} {v} {NEW}", None, f"--{f} {v}")
      for f, v in (("batch", -1), ("batch", 1), ("lr", -1.0), ("lr", "nan"))),
    ("stage1", f"--episodes 1 {NEW}", None, "--episodes 1"),
    ("stage1", f"--updates -1 {NEW}", None, "--updates -1"),
    ("stage0", f"--domain aloha {NEW}", None, "--domain aloha"),
    ("stage1", f"--data-fraction 5 {NEW}", None, "--data-fraction 5"),
    ("stage1", f"--data-fraction 0.01 {NEW}", None, "--data-fraction 0.01"),
    ("stage2", f"--operator {NEW}", None, "--operator"),
    ("stage2", f"--c nan {NEW}", None, "--c"),
    ("stage2", f"--success-threshold nan {NEW}", None, "--success-threshold"),
    ("stage2", f"--success-bonus nan {NEW}", None, "--success-bonus"),
    ("stage2", f"--lr inf {NEW}", None, "--lr"),
    ("stage1", f"--episodes -3 {NEW}", None, "--episodes -3"),
    *(("stage2", f"--{f} 0 {NEW}", None, f"--{f} 0")
      for f in ("updates", "batch", "num-envs", "iterations", "temperature", "patience", "eval-episodes")),
    ("stage2", f"--iterations -1 {NEW}", None, "--iterations -1"),
    ("stage2", f"--num-envs -2 {NEW}", None, "--num-envs -2"),
    ("eval", "--episodes 0", None, "--episodes 0"),
    ("eval", "--episodes -4", None, "--episodes -4"),
    ("stage0", f"--seed -1 {NEW}", None, "--seed"),
    ("stage1", f"--seed -1 {NEW}", None, "--seed"),
    ("stage0", f"--lr -1 {NEW}", None, "--lr"),
    ("stage1", f"--lr nan {NEW}", None, "--lr"),
    ("stage2", f"--lr -1 {NEW}", None, "--lr"),
    # an existing run
    ("stage0", "", None, ZERO),
    ("stage1", "", None, ONE),
    ("stage2", "", None, TWO),
    ("stage1", "--out data", None, "data"),
    ("stage2", f"--out {ONE}", None, ONE),
    ("stage1", "--out file", lambda: text("file", "mine"), "file"),
    ("stage1", "--out file --resume", lambda: text("file", "mine"), "file"),
    ("stage1", "--out file/run", lambda: text("file", "mine"), "file"),
    # resuming
    ("stage0", "--seed 0 --batch 5 --resume", lambda: unfinish(ZERO), "--batch"),
    ("stage1", "--batch 64 --resume", lambda: unfinish(ONE), "--batch"),
    ("stage1", "--eval-every 3 --resume", lambda: unfinish(ONE), "--eval-every"),
    ("stage2", "--gamma 0.7 --resume", lambda: unfinish(TWO), "--gamma"),
    ("stage1", f"--out {TWO} --resume", None, TWO),
    ("stage0", "--resume", lambda: (unfinish(ZERO), truncate(f"{ZERO}/resume.pt")), "resume.pt"),
    ("stage1", "--resume", lambda: (unfinish(ONE), truncate(f"{ONE}/resume.pt")), "resume.pt"),
    ("stage2", f"--resume --stage1 {ONE}", lambda: (unfinish(TWO), text(f"{TWO}/resume.pt", "")),
     "resume.pt"),
    ("stage1", "--resume", lambda: (unfinish(ONE), torch.save({"seed": 2}, f"{ONE}/resume.pt")), "resume.pt"),
    ("stage1", "--resume", lambda: (unfinish(ONE), text(f"{ONE}/config.json", '{"seed"')), "config.json"),
    ("stage1", "--resume", lambda: (unfinish(ONE), torch.save(Code(), f"{ONE}/resume.pt")), "resume.pt"),
    ("stage2", f"--keep-optimizer {NEW}", lambda: torch.save(Code(), f"{ONE}/resume.pt"), "resume.pt"),
    # demonstrations
    ("stage1", NEW, lambda: truncate(CACHE), CACHE),
    ("stage1", NEW, lambda: text(CACHE, ""), CACHE),
    ("stage1", NEW, lambda: np.savez(CACHE, state=np.zeros((3, 10))), CACHE),
    ("stage1", f"--dataset nanoefm/nothing-v0 {NEW}", None, "--dataset nanoefm/nothing-v0"),
    ("stage1", f"--dataset nanoefm/images-v0 {NEW}", minari_of_images, "--dataset nanoefm/images-v0"),
    ("stage1", f"--dataset nanoefm/images-v0 --obs images --init none {NEW}", minari_of_images,
     "--dataset nanoefm/images-v0"),
    # --init
    ("stage1", f"--obs images --init runs/nothing {NEW}", None, "runs/nothing"),
    ("stage1", f"--obs images --init {ZERO} {NEW}", lambda: truncate(f"{ZERO}/policy.safetensors"), ZERO),
    ("stage1", f"--obs images --init {ONE} {NEW}", None, ONE),  # it reads states
    ("stage1", f"--obs images --init runs/other {NEW}",  # it knows no colours
     lambda: model("runs/other/policy.safetensors", "images", ["where is the cup"]),
     "runs/other/policy.safetensors"),
    ("stage1", f"--obs images --init runs/other {NEW}",  # of larger frames
     lambda: model("runs/other/policy.safetensors", "images", size=64), "runs/other/policy.safetensors"),
    # --stage1
    ("stage2", NEW, lambda: remove("runs"), "--stage1"),
    ("stage2", f"--stage1 runs/nothing {NEW}", None, "runs/nothing/config.json"),
    ("stage2", f"--stage1 {CACHE} {NEW}", None, CACHE),
    ("stage2", NEW, lambda: text(f"{ONE}/config.json", '{"domain": "pointmass",'), f"{ONE}/config.json"),
    ("stage2", NEW, lambda: text(f"{ONE}/config.json", "[]"), f"{ONE}/config.json"),
    ("stage2", NEW, lambda: edit(f"{ONE}/config.json", domain=None), ONE),
    ("stage2", NEW, lambda: edit(f"{ONE}/config.json", domain="nope"), "nope"),
    ("stage2", NEW, lambda: edit(f"{ONE}/config.json", obs="sound"), "sound"),
    ("stage2", NEW, lambda: remove(f"{ONE}/policy.safetensors"), f"{ONE}/policy.safetensors"),
    ("stage2", NEW, lambda: remove(f"{ONE}/reward.safetensors"), f"{ONE}/reward.safetensors"),
    ("stage2", NEW, lambda: truncate(f"{ONE}/policy.safetensors"), f"{ONE}/policy.safetensors"),
    ("stage2", NEW, lambda: truncate(f"{ONE}/reward.safetensors"), f"{ONE}/reward.safetensors"),
    ("stage2", NEW, lambda: text(f"{ONE}/reward.safetensors", ""), f"{ONE}/reward.safetensors"),
    ("stage2", NEW, lambda: reshape(f"{ONE}/policy.safetensors"), f"{ONE}/policy.safetensors"),
    ("stage2", NEW, lambda: foreign(f"{ONE}/reward.safetensors"), f"{ONE}/reward.safetensors"),
    ("stage2", NEW, lambda: model(f"{ONE}/policy.safetensors", "images"), ONE),  # it reads frames
    ("stage2", f"--keep-optimizer {NEW}", lambda: remove(f"{ONE}/resume.pt"), f"{ONE}/resume.pt"),
    ("stage2", f"--keep-optimizer {NEW}", lambda: truncate(f"{ONE}/resume.pt"), f"{ONE}/resume.pt"),
    ("stage2", f"--stage1 {ZERO} {NEW}", None, ZERO),
    # eval
    ("eval", "", lambda: remove("runs"), "--run"),
    ("eval", "--run runs/nothing", None, "runs/nothing/config.json"),
    ("eval", f"--run {ZERO}", None, ZERO),
    ("eval", f"--run {ONE}", lambda: text(f"{ONE}/config.json", "{"), f"{ONE}/config.json"),
    ("eval", f"--run {ONE}", lambda: remove(f"{ONE}/reward.safetensors"), f"{ONE}/reward.safetensors"),
    ("eval", f"--run {ONE}", lambda: truncate(f"{ONE}/policy.safetensors"), f"{ONE}/policy.safetensors"),
    ("eval", f"--run {ONE}", lambda: edit(f"{ONE}/config.json", domain="nope"), "nope"),
    ("eval", f"--run {TWO}", lambda: edit(f"{TWO}/config.json", domain=None), f"{TWO}/config.json"),
    ("eval", f"--run {TWO}", lambda: remove(f"{TWO}/metrics.csv"), f"{TWO}/metrics.csv"),
]  # fmt: skip
NAMES = [
    f"{i}-{script}-{args.replace(NEW, '').strip().replace('/', '.').replace(' ', '_')}"
    for i, (script, args, *_) in enumerate(CASES)
]


@pytest.mark.parametrize(("script", "args", "damage", "culprit"), CASES, ids=NAMES)
def test_wrong_input_is_one_line_and_nothing_is_written(script, args, damage, culprit, here, capsys):
    if "--dataset" in args:
        pytest.importorskip("minari")
    if damage:
        damage()
    before = tree(here.parent)
    given = args.split()
    sizes = TINY[script].split()  # those that the case does not set itself
    sizes = [x for flag, value in zip(sizes[::2], sizes[1::2], strict=True) if flag not in given for x in (flag, value)]
    with pytest.raises(SystemExit) as end:
        call(SCRIPTS[script], [*sizes, *given])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.count("\n") == 1 and error.endswith("\n") and "Traceback" not in error, error
    assert error.startswith(f"{script}.py: ") and culprit in error, error
    assert tree(here.parent) == before


def test_the_same_commands_without_the_mistake_are_accepted(here, capsys, monkeypatch):
    """So the cases above fail for their mistake alone; and a cluster's leftover is no mistake."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("stage0", "stage1", "stage2"):
        call(SCRIPTS[name], [*TINY[name].split(), *NEW.split()])
        assert (here / "runs/new/summary.json").exists()
        shutil.rmtree(here / "runs/new")
    assert capsys.readouterr().err == ""


def test_practice_goes_on_from_a_run_of_stage_2(here):
    call(stage2, [*TINY["stage2"].split(), *NEW.split(), "--stage1", TWO])
    settings = json.loads((here / "runs/new/config.json").read_text())
    assert settings["stage1"] == TWO and settings["domain"] == "pointmass" and settings["obs"] == "state"
    assert (here / "runs/new/reward.safetensors").read_bytes() == (here / TWO / "reward.safetensors").read_bytes()
    assert (here / "runs/new/summary.json").exists()


@pytest.mark.parametrize("leftover", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}])
@pytest.mark.parametrize("several", [True, False])
def test_a_clusters_leftover_variables_are_ignored(leftover, several, here, capsys, monkeypatch):
    for name, value in leftover.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["eval.py", "--run", "runs/nothing"])
    with pytest.raises(SystemExit) as end:
        cli(evaluation.Config, evaluation.main, several)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "runs/nothing" in error


def test_resuming_a_finished_run_changes_nothing(here, capsys):
    before = tree(here)
    for name, folder in (("stage0", ZERO), ("stage1", ONE), ("stage2", TWO)):
        remove(f"{folder}/resume.pt")  # the large file, of no use to a finished run
        del before[f"{folder}/resume.pt"]
        call(SCRIPTS[name], [*TINY[name].split(), "--resume"])
        assert f"{folder}: this run is finished" in capsys.readouterr().out
    assert tree(here) == before


def test_ctrl_c_does_not_wait_for_the_other_thread():
    """One side would work for a minute more."""
    code = """
import os, signal, sys, time
sys.path.insert(0, os.environ["ROOT"])
from dataclasses import dataclass
from common import ranks
from common.cli import cli

@dataclass
class Config:
    sides: int = 2

def main(cfg):
    ranks.sides = cfg.sides
    print("begun")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    ranks.side_by_side(lambda: time.sleep(60 * (cfg.sides - 1)), lambda: os.kill(os.getpid(), signal.SIGINT))

cli(Config, main)
"""
    for sides, told in ((2, "-c: interrupted"), (1, "KeyboardInterrupt")):
        command = [sys.executable, "-c", code, "--sides", str(sides)]
        p = subprocess.run(command, env=os.environ | {"ROOT": str(ROOT)}, capture_output=True, text=True, timeout=50, check=False)
        assert p.returncode == -signal.SIGINT and p.stderr.strip().endswith(told) and p.stdout == "begun\n", p.stderr


# --- as a process -----------------------------------------------------------------------------------------
def process(script: str, args: list[str], cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / script), *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("command", "culprit"),
    [
        ("stage1.py --domain nope", "--domain nope"),
        ("pointmass.py --bins 0", ""),
        ("eval.py --run nothing", "nothing"),
    ],
)
def test_wrong_input_of_a_process(command, culprit, tmp_path):
    script, *args = command.split()
    p = process(script, args, tmp_path)
    assert p.returncode == 2 and p.stdout == ""
    assert p.stderr.startswith(f"{script}: ") and p.stderr.count("\n") == 1 and culprit in p.stderr
    assert not list(tmp_path.iterdir())


# --- help -------------------------------------------------------------------------------------------------
def shown(help_text: str) -> str:
    """Without the frame around the options, in one line."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", re.sub(r"\x1b\[[0-9;]*m", "", help_text)).split())


def assert_fields(text: str, config: type) -> None:
    text = text[text.rindex("-h, --help") :]  # the docstring names flags, too
    for field in dataclasses.fields(config):
        option = re.search(rf"--{field.name.replace('_', '-')}(?![\w-]).*?\(default: (.*?)\)(?= --|$)", text)
        assert option, field.name
        assert option[1] in (str(field.default), repr(field.default)), (field.name, option[1])


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_help_on_a_console_without_our_letters(script, monkeypatch):
    """A Windows console, or PYTHONIOENCODING=cp1252: a Greek letter becomes a question mark."""
    assert "τ" in stage1.__doc__  # such a letter
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setitem(sys.modules, "__main__", script)
    with pytest.raises(SystemExit) as end:
        call(script, ["--help"])
    console.flush()
    text = shown(console.buffer.getvalue().decode("cp1252"))
    expected = script.__doc__.encode("cp1252", "replace").decode("cp1252")
    assert end.value.code == 0 and " ".join(expected.split()) in text
    assert_fields(text, script.Config)


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_help(script, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "__main__", script)
    with pytest.raises(SystemExit) as end:
        call(script, ["--help"])
    captured = capsys.readouterr()
    text = shown(captured.out)
    assert end.value.code == 0 and captured.err == "" and not list(tmp_path.iterdir())
    assert " ".join(script.__doc__.split()) in text
    assert text.count(f"python {script.__name__}.py") >= 3
    assert_fields(text, script.Config)


def test_help_of_pointmass(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")  # for this process: a console without our letters
    p = process("pointmass.py", ["--help"], tmp_path)
    text = shown(p.stdout)
    assert p.returncode == 0 and p.stderr == "" and not list(tmp_path.iterdir())
    assert pointmass.Config.__doc__ in text
    assert_fields(text, pointmass.Config)
