"""Runs: a folder with a configuration, metrics and checkpoints, and an exact resume from one file."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from common import UserError, ranks
from common.options import flag
from common.weights import save_base, save_model, trainable_state
from model import EFM

# What runs did before there was such a flag. What a flag that is False does not do, they did not do.
WITHOUT = {"reward": "loss"}


# --- files --------------------------------------------------------------------------------------------------
def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write to a neighbour and rename: a reader, or a run killed here, sees the old file or the new one, never half."""
    # with the process in its name: another may be writing the same file
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    """What `Run.checkpoint` wrote: tensors, numbers, texts, lists, dicts. Anything else is refused and has not run."""
    try:
        # on the CPU: of sharded weights a GPU holds a part only
        state = torch.load(path, weights_only=True, map_location="cpu")
        return state | {key: state[key] for key in ("seconds", "metrics_bytes")}
    except Exception as e:  # a damaged file can raise nearly anything
        raise UserError(f"{path}: missing or damaged ({type(e).__name__}); delete the run and start it again") from None


def require_writable(folder: Path, way_out: str = "choose another folder with --out") -> None:
    """Raise UserError unless a folder can be made here, or written to, before anything else is done."""
    try:
        there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except NotADirectoryError:
        raise UserError(f"{folder}: a file is in the way; {way_out}") from None
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e.strerror}); {way_out}") from None


# --- folders ------------------------------------------------------------------------------------------------
def run_folder(domain: str, obs: str, default_obs: str, stage: str, seed: int) -> Path:
    """runs/{domain}-{stage}-s{seed}; a run that is not on the domain's default observations says so in its name."""
    kind = "" if obs == default_obs else f"-{obs}"
    return Path("runs") / f"{domain}{kind}-{stage}-s{seed}"


def newest_run(pattern: str) -> Path | None:
    """The folder under runs/ of the newest finished run whose name matches, by the time of its summary."""
    done = sorted(Path("runs").glob(f"{pattern}/summary.json"), key=lambda p: p.stat().st_mtime_ns)
    return done[-1].parent if done else None


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion; (0, 1) without observations."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def describe(row: dict) -> str:
    """A summary, one quantity a line."""
    return "\n".join(f"{k:20} {v:.4g}" if isinstance(v, float) else f"{k:20} {v}" for k, v in row.items())


# --- what a run continues from ------------------------------------------------------------------------------
def saved(thing: Any) -> Any:
    """The state of something that `Run.track` was given, as tensors, numbers, texts, lists and dicts."""
    if isinstance(thing, EFM):
        return trainable_state(thing)
    if isinstance(thing, np.random.Generator):
        return thing.bit_generator.state
    if isinstance(thing, torch.Generator):
        return thing.get_state()
    if is_dataclass(thing):
        return asdict(thing)
    return thing.state_dict()


def restore(thing: Any, state: Any) -> None:
    """The reverse of `saved`, in place."""
    if isinstance(thing, EFM):
        # of a model with adapters they alone are kept
        thing.load_state_dict(state, strict=not thing.lora_rank)
    elif isinstance(thing, torch.optim.Optimizer):
        ranks.load_optimizer(thing, state)
    elif isinstance(thing, np.random.Generator):
        thing.bit_generator.state = state
    elif isinstance(thing, torch.Generator):
        thing.set_state(state)
    elif is_dataclass(thing):
        for name, value in state.items():
            setattr(thing, name, value)
    else:
        thing.load_state_dict(state)


class Run:
    """A run's folder: config.json, metrics.csv, TensorBoard events, checkpoints, summary.json.

    A folder that exists is never written to unless `cfg.resume` is set and the configuration is the same, but for more
    iterations: nothing but the end hangs on them, so a finished run goes on as if it had been told so at first. All a
    run continues from is in one file, resume.pt, replaced atomically; metrics.csv is cut back to what that file knows.
    """

    def __init__(self, folder: Path, cfg: Any, **more: Any):
        """more: what else config.json has to say, such as the observations of a Stage 2 run."""
        self.folder, self.tensorboard, self.tracked = folder, None, {}
        self.began, self.state = time.time(), None
        require_writable(folder)
        told = asdict(cfg) | more
        self.config = json.loads(json.dumps({k: v for k, v in told.items() if k not in ("resume", "out")}))
        if folder.exists() and not cfg.resume:
            raise UserError(f"{folder}: this run exists; continue it with --resume, or choose another --out")
        longer = False
        if (folder / "config.json").exists():
            longer = self._compare(read_json(folder / "config.json"))
        if (folder / "resume.pt").exists():
            self.state = load_state(folder / "resume.pt")
        finished = (folder / "summary.json").exists()
        if finished and longer and self.state is None:
            raise UserError(f"{folder}/resume.pt: gone, so this run cannot go on; choose another --out")
        self.done = finished and not longer
        self.seconds_before = self.state["seconds"] if self.state else 0.0
        if self.done:
            print(f"{folder}: this run is finished; nothing to resume")

    def _compare(self, before: dict) -> bool:
        """Whether all is the same but for more iterations; else UserError, or False if all is the same."""
        longer = False
        for key in self.config | before:
            now = self.config.get(key)
            was = before.get(key, WITHOUT.get(key, now if now is False else None))
            if key == "iterations" and was and now and now > was:
                longer = True
            elif was != now:
                raise UserError(
                    f"{self.folder}: was started with {flag(key)} {was}, this is {now}; resume with the same flags and "
                    "version, or choose another --out"
                )
        return longer

    @property
    def resumed(self) -> bool:
        return self.state is not None

    def track(self, **things: Any) -> None:
        """What the run continues from: kept by `checkpoint` from now on, and, in a resumed run, restored at once.

        A model, an optimiser, a random generator of NumPy or PyTorch, a dataclass, or anything with `state_dict` and
        `load_state_dict`; None is left out.
        """
        for name, thing in things.items():
            if thing is None:
                continue
            self.tracked[name] = thing
            if self.resumed:
                if name not in self.state:
                    raise UserError(f"{self.folder}/resume.pt: has no {name}; it is of another version, start again")
                restore(thing, self.state.pop(name))  # at 3B tens of gigabytes

    def start(self, **models: EFM) -> None:
        """Create the folder, or cut metrics.csv back to what resume.pt knows. Until here nothing has been written.

        models: the first checkpoints, NAME.safetensors, which `keep` replaces.
        """
        ranks.all_gather(None)  # every rank has looked at the folder as it was
        if ranks.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_behind in self.folder.glob("*.*.tmp"):  # by a process that was killed while it wrote
                left_behind.unlink()
            (self.folder / "summary.json").unlink(missing_ok=True)  # of fewer iterations
            write_json(self.folder / "config.json", self.config)
            self.metrics = open(self.folder / "metrics.csv", "a+b")
            self.metrics.truncate(self.state["metrics_bytes"] if self.resumed else 0)
            self.metrics.seek(0, os.SEEK_END)
            # the frozen weights below new adapters: once, the checkpoints name them
            for thing in self.tracked.values():
                if isinstance(thing, EFM) and thing.lora_rank and not thing.base.exists():
                    write_atomically(thing.base, lambda p, model=thing: save_base(model, p))
        if not self.resumed:
            self.keep(**models)

    def steps(self, first: int, end: int, name: str) -> Iterator[int]:
        """range(first, end) with a progress bar."""
        silent = ranks.rank() > 0 or None  # None: where standard error is no terminal
        return tqdm(range(first, end), initial=first, total=end, desc=name, disable=silent)

    def seconds(self) -> float:
        return self.seconds_before + time.time() - self.began

    def log(self, step: int, row: dict[str, float], tell: bool = True) -> None:
        """Append a row to metrics.csv and to TensorBoard; tell: and print it."""
        if ranks.rank():
            return
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
        if tell:
            tqdm.write("  ".join(f"{k} {v:.4g}" for k, v in row.items() if not math.isnan(v)))

    def keep(self, **models: EFM) -> None:
        """Write each model's checkpoint, NAME.safetensors, atomically; all ranks call it, rank 0 writes."""
        for name, model in models.items():
            weights = ranks.full_state(trainable_state(model))
            if ranks.rank():
                continue
            if not all(bool(w.isfinite().all()) for w in weights.values()):
                raise UserError(f"{self.folder}: weights of {name} are no numbers any more; start again, smaller --lr")
            path = self.folder / f"{name}.safetensors"
            write_atomically(path, lambda p, m=model, w=weights: save_model(m, p, w))

    def checkpoint(self) -> None:
        """Replace resume.pt by the present state of all that is tracked; all ranks call it, rank 0 writes."""
        state = ranks.full_state({name: saved(thing) for name, thing in self.tracked.items()})
        if ranks.rank():
            return
        state |= {"metrics_bytes": self.metrics.tell(), "seconds": self.seconds()}
        write_atomically(self.folder / "resume.pt", lambda p: torch.save(state, p))

    def finish(self, told: dict[str, Any], evaluate: Callable[[], dict[str, Any]] = dict) -> None:
        """Evaluate on rank 0 and write and print summary.json: the mark of a finished run."""
        if ranks.rank():
            return
        summary = told | evaluate()
        try:
            git = ["git", "rev-parse", "--short", "HEAD"]
            here = Path(__file__).parent
            commit = subprocess.run(git, capture_output=True, text=True, cwd=here, check=False).stdout.strip()
        except OSError:  # no git on this machine
            commit = ""
        launcher = ["torchrun", "--nproc_per_node", str(ranks.world())] if ranks.world() > 1 else ["python"]
        command = shlex.join([*launcher, Path(sys.argv[0]).name, *sys.argv[1:]])
        summary |= {"seconds": round(self.seconds(), 1), "command": command, "commit": commit or "unknown"}
        write_json(self.folder / "summary.json", summary)
        self.metrics.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        print(describe(summary))
