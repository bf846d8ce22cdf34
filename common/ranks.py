"""Devices, threads, precision, and processes started by torchrun: DDP for small models, FSDP2 for PaliGemma."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import UserError
from common.options import DeviceFlags, ScaleFlags, flag
from common.weights import economise
from model import EFM

# weights; a second thread in each operation hardly helps such a model, and beside a busy process it costs much
SMALL = 5 * 10**6
CORES = torch.get_num_threads()  # as PyTorch sees them or OMP_NUM_THREADS says, before any choice
TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
chosen: torch.device | None = None  # by --device
sides = 1  # threads that work at different things: `side_by_side`
helper = ThreadPoolExecutor(1)  # the second of them; to start a new one each time takes longer


# --- devices ------------------------------------------------------------------------------------------------
def device() -> torch.device:
    """--device, or a CUDA GPU where there is one, else the CPU."""
    return chosen or torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_device(name: str | None) -> None:
    """Make `device` return what --device says. Raises UserError if this machine has none of that kind."""
    global chosen
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if name in there and not there[name]():
        raise UserError(f"--device {name}: there is none here; leave it out")
    chosen = torch.device(name) if name else None


def choose_threads(cfg: DeviceFlags, weights: int) -> None:
    """Set the CPU's threads, and remember them in the configuration: another number gives other roundings.

    A small model gets two, which work at different things; of a large one all threads work at each operation.
    """
    global sides
    small = weights < SMALL
    # compiled blocks, and weights once cast to bfloat16, are shared by all threads
    shares = getattr(cfg, "compile", False) or getattr(cfg, "bf16", False)
    apart = small and world() == 1 and device().type == "cpu" and not shares
    if cfg.threads is None:
        most = 2 if apart else 1
        cfg.threads = min(most, CORES) if small else CORES
    sides = 2 if apart and cfg.threads > 1 else 1
    torch.set_num_threads(cfg.threads // sides)


def side_by_side(one: Callable[[], Any], other: Callable[[], Any]) -> tuple[Any, Any]:
    """What both return: one works in a thread of its own if `choose_threads` has said so, else they take turns."""
    if sides == 1:
        return one(), other()
    threads = torch.get_num_threads()

    def beside() -> Any:
        torch.set_num_threads(threads)  # the number is each thread's own
        return one()

    first = helper.submit(beside)
    second = other()
    return first.result(), second


def autocast(bf16: bool) -> torch.autocast:
    """Inside, matrix products are in bfloat16; the weights stay as they are."""
    return torch.autocast(device().type, torch.bfloat16, enabled=bf16)


# --- several processes --------------------------------------------------------------------------------------
def started_by_torchrun() -> bool:
    """Whether this is one of several processes. Some of torchrun's variables alone are a cluster's leftover."""
    return all(name in os.environ for name in TORCHRUN) and int(os.environ["WORLD_SIZE"]) > 1


@contextlib.contextmanager
def process_group(several: bool) -> Iterator[None]:
    """The processes that torchrun started know each other inside, and end behind it; alone, nothing happens."""
    if not started_by_torchrun():
        yield
        return
    if not several:
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
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
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


def require_divisible(cfg: Any, *fields: str) -> None:
    """Raise UserError unless the processes can share each of the configuration's fields evenly."""
    for field in fields:
        value = getattr(cfg, field)
        if value % world():
            raise UserError(f"{flag(field)} {value}: cannot be shared evenly by {world()} processes")


def local_rows(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """This rank's rows, and the weight with which their mean, averaged over the ranks, is the mean over all rows."""
    mine = rows[rank() :: world()]
    if len(mine) == 0:  # fewer rows than ranks
        return rows[:1], 0.0
    return mine, len(mine) * world() / len(rows)


def all_gather(value: Any) -> list:
    """The value of each rank, small and picklable, in order."""
    values = [value]
    if world() > 1:
        values = [None] * world()
        dist.all_gather_object(values, value)
    return values


def concat_ranks(*parts: np.ndarray | Tensor) -> list:
    """Each array or CPU tensor with the other ranks' behind the first's."""
    joined = []
    for each in zip(*all_gather(parts), strict=True):
        joined.append(torch.cat(each) if isinstance(each[0], Tensor) else np.concatenate(each))
    return joined


def mean(values: dict[str, Tensor]) -> dict[str, float]:
    """Each value's mean over the ranks."""
    ranks = all_gather({k: v.item() for k, v in values.items()})
    return {k: sum(r[k] for r in ranks) / len(ranks) for k in values}


# --- models on several devices ------------------------------------------------------------------------------
def scale(model: EFM, cfg: ScaleFlags, shard: bool, judge: EFM | None = None) -> nn.Module:
    """What to call for a forward pass with gradients, `wrapped(f, *args)` for f(model, *args): `EFM.forward`.

    Activations are kept or not, blocks compiled or not, as the flags say. In one process it is the model itself. In
    several, each with other rows of a batch, backward() averages the gradients: by DDP, each rank with all of the
    model; or, to `shard`, by FSDP2, where each keeps its part of every weight and the blocks' weights are gathered one
    block at a time. judge: a frozen model that is to be compiled and sharded likewise.
    """
    economise(model, cfg.checkpointing, cfg.compile)
    wrapped = distribute(model, shard)
    if judge is not None:
        economise(judge, False, cfg.compile)
        if shard:
            distribute(judge, shard)
    return wrapped


def distribute(model: EFM, shard: bool) -> nn.Module:
    if world() == 1:
        return model
    if not shard:
        return DistributedDataParallel(model, forward_sync_buffers=False)  # they are constants
    from torch.distributed.fsdp import fully_shard  # a second to import, and in one process for nothing

    for tower in ("language_model", "vision_tower"):
        for block in getattr(model, tower).layers:
            fully_shard(block)
    return fully_shard(model)


def backward(wrapped: nn.Module, losses: Callable, data: Any, rows: list[np.ndarray], bf16: bool) -> dict[str, Tensor]:
    """losses(model, data, *rows) by name; the gradient of their sum is added to the weights' `.grad`.

    rows: of each objective; without rows it has no loss. On two sides the last one that has rows learns beside the others:
    it is the greater part where it is the instruction. The two gradients are added up, and a + b is b + a: so it does not
    matter which comes first.
    """

    def learn(*rows: np.ndarray) -> dict[str, Tensor]:
        with autocast(bf16):
            loss = wrapped(losses, data, *rows)
        sum(loss.values()).backward()
        return loss

    if sides == 1:
        return learn(*rows)
    last = max(i for i, of_one in enumerate(rows) if len(of_one))
    nothing = rows[0][:0]
    before = [*rows[:last], *[nothing] * (len(rows) - last)]
    alone = [*[nothing] * last, *rows[last:]]
    one, other = side_by_side(lambda: learn(*before), lambda: learn(*alone))
    return one | other


@contextlib.contextmanager
def unsharded(*models: EFM) -> Iterator[None]:
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


def full_state(state: Any) -> Any:
    """A state dict, or a tensor, without shards: checkpoints do not depend on the number of ranks. All ranks call it.

    Rank 0 gets what one process would have, the others None for a sharded tensor: it may be tens of gigabytes in all.
    """
    if isinstance(state, dict):
        return {k: full_state(v) for k, v in state.items()}
    if not hasattr(state, "full_tensor"):  # a DTensor, whose class takes a second to import
        return state
    state = state.full_tensor()
    return state.cpu() if rank() == 0 or state.dim() == 0 else None


def shard_like(x: Any, p: Tensor) -> Any:
    """A tensor of `full_state`, cut as the parameter p that it belongs to; other things as they are."""
    if not hasattr(p, "full_tensor") or not isinstance(x, Tensor) or x.shape != p.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(p.device), p.device_mesh, p.placements)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """`optimizer.load_state_dict` of what `full_state` made, each tensor cut as the parameter it belongs to."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {i: {k: shard_like(x, parameters[i]) for k, x in each.items()} for i, each in state["state"].items()}
    optimizer.load_state_dict({**optimizer.state_dict(), **state, "state": moments})
