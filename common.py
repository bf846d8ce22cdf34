"""What every script needs and no equation lives in: commands, run folders, exact resume, seeds, device."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import tyro
from gymnasium.vector import VectorEnv

import envs
from model import EFM, load_model


class UserError(Exception):
    """Wrong input: `cli` prints it as one line on standard error and exits with code 2."""


def cli(config: type, main: Callable[[Any], Any]) -> None:
    """Parse `config` from the command line (tyro) and run `main` with it; wrong input is one line and exit code 2."""
    name = Path(sys.argv[0]).name
    try:
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                cfg = tyro.cli(config, description=sys.modules["__main__"].__doc__)
        except SystemExit as e:
            if e.code:
                text = re.sub(r"[^\x20-\x7e]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", errors.getvalue()))
                raise UserError(" ".join(re.sub(r"-{4,}", " ", text).split()) or "wrong arguments") from None
            raise
        main(cfg)
    except (UserError, envs.CannotRender) as e:
        print(f"{name}: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)


def learning_rate(update: int, updates: int, peak: float) -> float:
    """A cosine from `peak` to a tenth of it, scaled down linearly over the first 100 updates."""
    return peak * min(1.0, (update + 1) / 100) * (0.55 + 0.45 * math.cos(math.pi * update / updates))


def require(cfg: Any, least: float, *fields: str) -> None:
    """Raise UserError unless each of the configuration's fields is at least `least` (and a number)."""
    for field in fields:
        if not least <= getattr(cfg, field) < float("inf"):
            raise UserError(f"--{field.replace('_', '-')} {getattr(cfg, field)}: must be at least {least:g}")


def make_env(domain: str, num_envs: int, **kwargs: Any) -> VectorEnv:
    """`envs.make_vec`; an unknown domain or kind of observation is a UserError."""
    try:
        return envs.make_vec(domain, num_envs, **kwargs)
    except ValueError as e:
        raise UserError(e) from None


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(path: Path, env: VectorEnv) -> EFM:
    """`model.load_model` onto the device; a missing or damaged file, or one of another domain, is a UserError."""
    try:
        model = load_model(path).to(device())
    except ValueError as e:
        raise UserError(e) from None
    needs = (env.size, ()) if env.obs == "images" else (0, env.state_names)
    reads = env.size if model.cfg.resize else model.cfg.image_size
    words = model.tokenizer.tokenizer.encode(" ".join(env.instructions()), add_special_tokens=False).tokens
    if (reads, model.cfg.state_names) != needs or "<unk>" in words:
        raise UserError(f"{path}: this model is not for --domain {env.name} --obs {env.obs}; name another run")
    return model


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write to a neighbour and rename: a reader, or a run killed here, sees the old file or the new one, never half."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def write_json(path: Path, value: dict) -> None:
    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=2) + "\n"))


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name the folder of a finished run") from None
    except (ValueError, OSError) as e:
        raise UserError(f"{path}: damaged ({e}); delete the run and train it again") from None


def load_state(path: Path) -> dict:
    """What `Run.checkpoint` wrote."""
    try:
        state = torch.load(path, weights_only=False, map_location=device())
        return state | {key: state[key] for key in ("seconds", "metrics_bytes")}
    except Exception as e:  # unpickling a damaged file can raise nearly anything
        raise UserError(f"{path}: missing or damaged ({type(e).__name__}); delete the run and start it again") from None


def run_folder(domain: str, obs: str, default_obs: str, stage: str, seed: int) -> Path:
    """runs/{domain}-{stage}-s{seed}; a run that is not on the domain's default observations says so in its name."""
    return Path("runs") / f"{domain}{'' if obs == default_obs else '-' + obs}-{stage}-s{seed}"


def newest_run(pattern: str) -> Path | None:
    """The folder under runs/ of the newest finished run whose name matches, by the time of its summary."""
    done = sorted(Path("runs").glob(f"{pattern}/summary.json"), key=lambda p: p.stat().st_mtime_ns)
    return done[-1].parent if done else None


def stage0_run(init: str, domain: str) -> Path | None:
    """The Stage 0 run that `--init` names: a folder, "none", or "" for the domain's newest one, if there is one."""
    if init == "none":
        return None
    folder = Path(init) if init else newest_run(f"{domain}-images-stage0-s*") or newest_run(f"{domain}-stage0-s*")
    print(f"starting from {folder}" if folder else "starting from scratch: no Stage 0 run here (python stage0.py makes one)")
    return folder


def stage1_run(folder: str) -> Path:
    """The Stage 1 run that `--stage1` names; "": the newest finished one."""
    found = Path(folder) if folder else newest_run("*-stage1-s*")
    if found is None:
        raise UserError("runs/: no finished Stage 1 run; run `python stage1.py` first or name a run with --stage1")
    return found


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion; (0, 1) without observations."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


class Run:
    """A run's folder: config.json, metrics.csv, TensorBoard events, checkpoints, summary.json.

    A folder that exists is never written to unless `resume` is set and the configuration is the same. Everything a run
    continues from is in one file, resume.pt, replaced atomically; metrics.csv is cut back to what that file knows.
    """

    def __init__(self, folder: Path, cfg: Any, resume: bool):
        self.folder, self.state, self.tensorboard, self.began = folder, None, None, time.time()
        if any(p.is_file() for p in (folder, *folder.parents)):
            raise UserError(f"--out {folder}: a file is in the way; choose another folder")
        self.config = json.loads(json.dumps({k: v for k, v in asdict(cfg).items() if k not in ("resume", "out")}))
        if folder.exists() and not resume:
            raise UserError(f"{folder}: this run exists; continue it with --resume, or choose another --out")
        if (folder / "config.json").exists():
            before = read_json(folder / "config.json")
            for key in before.keys() | self.config.keys():
                if before.get(key) != self.config.get(key):
                    flag = key.replace("_", "-")
                    raise UserError(
                        f"{folder}: was started with another --{flag}; resume with the same flags or choose another --out"
                    )
        if (folder / "resume.pt").exists():
            self.state = load_state(folder / "resume.pt")
        self.done = (folder / "summary.json").exists()
        self.seconds_before = self.state["seconds"] if self.state else 0.0

    def start(self) -> None:
        """Create the folder, or cut metrics.csv back to what resume.pt knows. Until here nothing has been written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "config.json", self.config)
        self.metrics = open(self.folder / "metrics.csv", "a+b")
        self.metrics.truncate(self.state["metrics_bytes"] if self.state else 0)
        self.metrics.seek(0, os.SEEK_END)

    def seconds(self) -> float:
        return self.seconds_before + time.time() - self.began

    def log(self, step: int, row: dict[str, float]) -> None:
        """Append a row to metrics.csv and to TensorBoard."""
        if self.tensorboard is None:  # a slow import, and only a run needs it
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(self.folder, purge_step=step)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if self.metrics.tell() == 0:
            writer.writerow(row)
        writer.writerow(f"{v:.6g}" if isinstance(v, float) else v for v in row.values())
        self.metrics.write(text.getvalue().encode())
        self.metrics.flush()
        for key, value in row.items():
            self.tensorboard.add_scalar(key, value, step)

    def checkpoint(self, **state: Any) -> None:
        """Replace resume.pt: what `resume` continues from, exactly."""
        state |= {"metrics_bytes": self.metrics.tell(), "seconds": self.seconds()}
        write_atomically(self.folder / "resume.pt", lambda p: torch.save(state, p))

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write summary.json: the mark of a finished run."""
        try:
            commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                                    cwd=Path(__file__).parent, check=False).stdout.strip()  # fmt: skip
        except OSError:  # no git on this machine
            commit = ""
        summary |= {"seconds": round(self.seconds(), 1), "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
                    "commit": commit or "unknown"}  # fmt: skip
        write_json(self.folder / "summary.json", summary)
        self.metrics.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        return summary


def open_run(cfg: Any, env: VectorEnv, stage: str) -> Run:
    """The run of a stage's configuration, in `cfg.out` or its usual folder; says so if it is finished already (`done`)."""
    folder = Path(cfg.out) if cfg.out else run_folder(env.name, env.obs, env.default_obs, stage, cfg.seed)
    run = Run(folder, cfg, cfg.resume)
    if run.done:
        print(f"{folder}: this run is finished; nothing to resume")
    return run
