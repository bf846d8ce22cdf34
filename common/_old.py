"""What every script needs and no equation lives in: commands, run folders, exact resume, seeds, devices, torchrun."""

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
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium.vector import VectorEnv
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import envs
from model import EFM, add_lora, load_model, save_model, trained


class UserError(Exception):
    """Wrong input: `cli` prints it as one line on standard error and exits with code 2."""


def cli(config: type, main: Callable[[Any], Any], ranks: bool = False) -> None:
    """Parse `config` from the command line (tyro) and run `main` with it; wrong input is one line and exit code 2.

    ranks: `main` may be one of several processes, which torchrun has started.
    """
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
        with joined(ranks):
            main(cfg)
    except (UserError, envs.CannotRender) as e:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{name}: {' '.join(str(e).split())}", file=sys.stderr)
        else:  # the others of a machine have the same to say; torchrun ends all as soon as one ends, so they wait for the first
            time.sleep(2)
        sys.exit(2)


# --- several processes, started by torchrun ---------------------------------------------------------------------------
@contextlib.contextmanager
def joined(ranks: bool) -> Iterator[None]:
    """The processes that torchrun started know each other inside, and end behind it; in one process nothing happens."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if not ranks:
        raise UserError("torchrun: this script runs in one process; start it with python")
    if torch.cuda.is_available():
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus:
            raise UserError(f"torchrun: --nproc_per_node {here}, but there are {gpus} GPUs here; give each process one")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what `device` means from here on
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=6))  # rank 0 may record demonstrations meanwhile
    try:
        with contextlib.ExitStack() as stack:
            if rank():  # one voice
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            yield
    finally:
        dist.destroy_process_group()
    # not by Python's shutdown, which gloo's threads, as DDP keeps them alive, now and then abort: pytorch#190489
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank_0_first(f: Callable[..., Any], *args: Any) -> Any:
    """f(*args) on rank 0 and, when its files are written, on the others."""
    if rank():
        dist.barrier()
    result = f(*args)
    if world() > 1 and not rank():
        dist.barrier()
    return result


def evenly(cfg: Any, *fields: str) -> int:
    """The number of processes. Raises UserError unless they can share each of the configuration's fields evenly."""
    for field in fields:
        if getattr(cfg, field) % world():
            raise UserError(f"--{field.replace('_', '-')} {getattr(cfg, field)}: cannot be shared evenly by {world()} processes")
    return world()


def share(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """This rank's rows, and the weight with which their mean, averaged over the ranks, is the mean over all rows."""
    mine = rows[rank() :: world()]
    return (mine, len(mine) * world() / len(rows)) if len(mine) else (rows[:1], 0.0)  # fewer rows than ranks


def gather(value: Any) -> list:
    """The value of each rank, small and picklable, in order."""
    values = [value]
    if world() > 1:
        values = [None] * world()
        dist.all_gather_object(values, value)
    return values


def join(*parts: np.ndarray | Tensor) -> list:
    """Each array or CPU tensor with the other ranks' behind the first's."""
    return [torch.cat(x) if isinstance(x[0], Tensor) else np.concatenate(x) for x in zip(*gather(parts), strict=True)]


def mean(values: dict[str, Tensor]) -> dict[str, float]:
    """Each value's mean over the ranks."""
    ranks = gather({k: v.item() for k, v in values.items()})
    return {k: sum(r[k] for r in ranks) / len(ranks) for k in values}


def distribute(model: EFM, shard: bool) -> nn.Module:
    """What to call for a forward pass with gradients, `wrapped(f, *args)` for f(model, *args): `EFM.forward`.

    In one process the model itself. In several, each with other rows of a batch, backward() averages the gradients:
    by DDP, each rank with all of the model; or, to `shard`, by FSDP2, where each keeps its part of every weight and
    the blocks' weights are gathered one block at a time.
    """
    if world() == 1:
        return model
    from torch.distributed.fsdp import fully_shard  # a second to import, and in one process for nothing

    if not shard:
        return DistributedDataParallel(model, forward_sync_buffers=False)  # they are constants
    for tower in ("language_model", "vision_tower"):
        for block in getattr(model, tower).layers:
            fully_shard(block)
    return fully_shard(model)


@contextlib.contextmanager
def gathered(*models: EFM) -> Iterator[None]:
    """Inside, sharded models are whole on each rank: rollouts take their own time, and need not wait for each other."""
    if world() == 1:
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    shards = [m for model in models for m in model.modules() if isinstance(m, FSDPModule)]
    for model in models:
        model(lambda _: None)  # a first forward pass tells FSDP2 which module is the root
    for m in shards:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    yield
    for m in shards:
        m.reshard()
        m.set_reshard_after_forward(True, recurse=False)


def whole(state: Any) -> Any:
    """A state dict, or a tensor, without shards: checkpoints do not depend on the number of ranks. All ranks have to call it.

    Rank 0 gets what one process would have, the others None for a sharded tensor: it may be tens of gigabytes in all.
    """
    if isinstance(state, dict):
        return {k: whole(v) for k, v in state.items()}
    if not hasattr(state, "full_tensor"):  # a DTensor, whose class takes a second to import
        return state
    state = state.full_tensor()
    return state.cpu() if rank() == 0 or state.dim() == 0 else None


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """`optimizer.load_state_dict` of what `whole` made, each tensor cut as the parameter it belongs to."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def cut(x: Any, p: nn.Parameter) -> Any:
        if not hasattr(p, "full_tensor") or not isinstance(x, Tensor) or x.shape != p.shape:
            return x
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(x.to(p.device), p.device_mesh, p.placements)

    moments = {i: {k: cut(x, parameters[i]) for k, x in each.items()} for i, each in state["state"].items()}
    optimizer.load_state_dict({**optimizer.state_dict(), **state, "state": moments})


def save(model: EFM, path: Path) -> None:
    """`model.save_model`, atomically; all ranks call it, rank 0 writes."""
    weights = whole(trained(model))
    if rank() == 0:
        write_atomically(path, lambda p: save_model(model, p, weights))


# --- runs -------------------------------------------------------------------------------------------------------------
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


def autocast(bf16: bool) -> torch.autocast:
    """Inside, matrix products are in bfloat16; the weights stay as they are."""
    return torch.autocast(device().type, torch.bfloat16, enabled=bf16)


def load(path: Path, env: VectorEnv, beside: EFM | None = None) -> EFM:
    """`model.load_model` onto the device; a missing or damaged file, or one of another domain, is a UserError."""
    try:
        model = load_model(path, beside).to(device())
    except ValueError as e:
        raise UserError(e) from None
    needs = (env.size, ()) if env.obs == "images" else (0, env.state_names)
    reads = env.size if model.cfg.resize else model.cfg.image_size
    words = model.tokenizer.tokenizer.encode(" ".join(env.instructions()), add_special_tokens=False).tokens
    if (reads, model.cfg.state_names) != needs or "<unk>" in words:
        raise UserError(f"{path}: this model is not for --domain {env.name} --obs {env.obs}; name another run")
    return model


def adapt(model: EFM, rank: int, base: Path) -> EFM:
    """`model.add_lora`; without peft a UserError."""
    try:
        return add_lora(model, rank, base)
    except ValueError as e:
        raise UserError(e) from None


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
        state = torch.load(path, weights_only=False, map_location="cpu")  # of sharded weights a GPU holds a part only
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
            for key in self.config | before:
                was, now = before.get(key), self.config.get(key)
                if was != now:
                    flag = key.replace("_", "-")
                    raise UserError(f"{folder}: was started with --{flag} {was}, this is {now}; resume with the same flags and "
                                    "version, or choose another --out")  # fmt: skip
        if (folder / "resume.pt").exists():
            self.state = load_state(folder / "resume.pt")
        self.done = (folder / "summary.json").exists()
        self.seconds_before = self.state["seconds"] if self.state else 0.0

    def start(self) -> None:
        """Create the folder, or cut metrics.csv back to what resume.pt knows. Until here nothing has been written."""
        gather(None)  # every rank has looked at the folder as it was
        if rank():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "config.json", self.config)
        self.metrics = open(self.folder / "metrics.csv", "a+b")
        self.metrics.truncate(self.state["metrics_bytes"] if self.state else 0)
        self.metrics.seek(0, os.SEEK_END)

    def seconds(self) -> float:
        return self.seconds_before + time.time() - self.began

    def log(self, step: int, row: dict[str, float]) -> None:
        """Append a row to metrics.csv and to TensorBoard."""
        if rank():
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

    def checkpoint(self, **state: Any) -> None:
        """Replace resume.pt: what `resume` continues from, exactly."""
        state = whole(state)
        if rank():
            return
        state |= {"metrics_bytes": self.metrics.tell(), "seconds": self.seconds()}
        write_atomically(self.folder / "resume.pt", lambda p: torch.save(state, p))

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write summary.json: the mark of a finished run."""
        try:
            commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                                    cwd=Path(__file__).parent, check=False).stdout.strip()  # fmt: skip
        except OSError:  # no git on this machine
            commit = ""
        launcher = ["torchrun", "--nproc_per_node", str(world())] if world() > 1 else ["python"]
        command = shlex.join([*launcher, Path(sys.argv[0]).name, *sys.argv[1:]])
        summary |= {"seconds": round(self.seconds(), 1), "command": command, "commit": commit or "unknown"}
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
