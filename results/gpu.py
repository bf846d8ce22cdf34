"""Stages 0 and 1 from images at a GPU's pace, for the tabletop: the same functions, fed and launched otherwise.

A small model's update is a thousand kernels of a few microseconds, which Python launches more slowly than a GPU runs them,
and a table's frame takes longer to draw than to learn from. So here

- demonstrations and scenes are simulated by many processes without pictures, and drawn one after another by this one,
  whose second views and averages the GPU makes (`foveate`'s, number for number);
- an update of `stage1.py`, forward and backward, is captured as a CUDA graph and replayed, its frames on the GPU.

Demonstrators, their seeds, objectives, optimiser and checkpoints are the stages', and so is what is written; `stage2.py` and
`eval.py` go on from there. The order of the demonstrations, and so which are held out, is another, and so are Stage 0's
scenes and its learning rate. A run cannot be resumed.

    python results/gpu.py --updates 5000
    python results/gpu.py --domain tabletop,blocks=8,size=96 --episodes 5000 --out runs/tabletop8-images-gpu-stage1-s0
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import sys
import time
import unittest.mock as mock
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.vector import VectorEnv
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import envs
import model as models
import stage0
import stage1
from common import UserError
from envs.tabletop import TabletopVectorEnv, corner, pixels

BEGAN = time.time()
QUESTIONS = (models.QUESTION_ACTION, models.QUESTION_STEPS)


def say(*what: object) -> None:
    print(f"[{time.time() - BEGAN:6.1f} s]", *what, flush=True)


# --- without pictures, on all cores -----------------------------------------------------------------------------------
def demonstrations(domain: str, episodes: int, seed: int, part: slice) -> dict[str, np.ndarray]:
    """`stage1.record` of a part of its simulations, with poses for states: float (M, q)."""
    with mock.patch.object(stage1, "seen", lambda env, o: {"state": env.sim.qpos.copy()}):
        return stage1.record(domain, "state", episodes, seed, part)


def scenes(domain: str, n: int, seed: int, updates: list[int]) -> list[tuple]:
    """A domain's `scenes` for some updates, with poses in place of pictures: (qpos (n, q), texts, answers, places) each."""
    env, poses, all_of_them = envs.make_vec(domain, 1, obs="images"), [], []

    def views(qpos: np.ndarray, camera: np.ndarray) -> tuple:
        poses.append(qpos)
        return np.zeros(0), corner(pixels(np.r_[qpos[-2:], 0], camera), env.size) / (2 * env.size)

    env._views = views  # `foveate` without a picture
    for update in updates:
        poses.clear()
        _, *asked = env.scenes(np.random.default_rng([seed, update]), n)
        all_of_them.append((np.array(poses), *asked))
    return all_of_them


# --- pictures ---------------------------------------------------------------------------------------------------------
def foveated(pictures: Tensor, first: Tensor) -> Tensor:
    """`tabletop.foveate` of many: pictures uint8 (n, 2 s, 2 s, 3), their `corner`s long (n, 2) -> uint8 (n, 2, s, s, 3)."""
    n, s = len(pictures), pictures.shape[1] // 2
    whole = pictures.view(n, s, 2, s, 2, 3).int().sum((2, 4)) // 4
    index = first[:, :, None] + torch.arange(s, device=first.device)  # (n, 2, s), right and down
    inside, index = (index >= 0) & (index < 2 * s), index.clamp(0, 2 * s - 1)
    close = pictures[torch.arange(n, device=first.device)[:, None, None], index[:, 1, :, None], index[:, 0, None]]
    seen = inside[:, 1, :, None] & inside[:, 0, None]
    return torch.stack([whole.to(torch.uint8), torch.where(seen[..., None], close, 128)], 1)


def draw(domain: str, qpos: np.ndarray, device: torch.device, by: torch.device | None = None, at_once: int = 2048) -> Tensor:
    """The two views of each pose qpos (n, q), uint8 (n, 2, s, s, 3) on the device, made `by` another one."""
    env = envs.make_vec(domain, 1, obs="images")
    s, still, by = env.size, np.zeros((2, 3)), by or device
    frames = torch.empty(len(qpos), 2, s, s, 3, dtype=torch.uint8, device=device)
    for rows in np.split(np.arange(len(qpos)), range(at_once, len(qpos), at_once)):
        pictures = torch.from_numpy(np.stack([env._picture(q, still, 2 * s, 2 * s) for q in qpos[rows]])).to(by)
        first = torch.from_numpy(corner(pixels(np.c_[qpos[rows, -2:], np.zeros(len(rows))]), s)).to(by)
        frames[rows[0] : rows[-1] + 1] = foveated(pictures, first)
    env.close()
    return frames


# --- updates as CUDA graphs -------------------------------------------------------------------------------------------
class Replay(torch.autograd.Function):
    """Losses whose backward hands out gradients that are there already."""

    @staticmethod
    def forward(ctx, start: Tensor, losses: Tensor, gradients: list) -> Tensor:
        ctx.gradients = gradients
        return losses.clone()

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple:
        for p, gradient in ctx.gradients:  # the optimiser has set p.grad to None since the replay
            p.grad = gradient
        return None, None, None


class OnGPU(stage1.Demonstrations):
    """Demonstrations whose frames are a tensor."""

    def observe(self, i: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        images = self.data["frames"][torch.from_numpy(i).to(device)]
        return {"images": images[:, :, 0] if i.ndim == 2 else images}  # of pairs of rows the first view


class Still:
    """Stands for demonstrations, whose answers lie where a graph reads them, and for the tokenizer's words of them."""

    def __init__(self, batches: list, last: tuple | None, prompts: list, answers: tuple | None):
        self.batches, self.last, self.texts, self.answer = batches, last, prompts, answers

    @contextlib.contextmanager
    def read_by(self, tokenizer: models.Tokenizer) -> Iterator[None]:
        batches, texts = iter(self.batches), iter(self.texts)
        self.batch = lambda rows, device: next(batches)
        self.first_and_last = lambda episodes, device: self.last
        tokenizer.prompts, tokenizer.answers = lambda texts_: next(texts), lambda texts_: self.answer
        yield
        del tokenizer.prompts, tokenizer.answers


def fill_up(ids: Tensor, valid: Tensor, length: int, left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Words of (B, T) padded to (B, length): a graph has one shape."""
    pad = (length - ids.shape[1], 0) if left else (0, length - ids.shape[1])
    return F.pad(ids, pad).to(device), F.pad(valid, pad).to(device)


class Replayed:
    """What `common.distribute` returns: an update's forward and backward pass, captured once and then replayed.

    On a CPU, for tests, the same functions are called on the same tensors in place of a replay.
    """

    def __init__(self, model: models.EFM):
        self.model, self.device, self.captured = model, common.device(), {}
        self.start = torch.zeros((), device=self.device, requires_grad=True)

    def __call__(self, losses: Callable, demos: stage1.Demonstrations, *rows: np.ndarray) -> dict[str, Tensor]:
        if not torch.is_grad_enabled():  # validation
            return losses(self.model, demos, *rows)
        inputs = self.inputs(demos, rows)
        leaves, _ = tree_flatten(inputs)
        sizes = tuple(map(len, rows))
        if sizes not in self.captured:
            self.captured[sizes] = self.capture(losses, inputs, rows)
        static, replay, out, gradients = self.captured[sizes]
        for here, new in zip(static, leaves, strict=True):
            if isinstance(here, Tensor):
                here.copy_(new)
        replay()
        return out | {"bc": Replay.apply(self.start, out["bc"], gradients)}

    def inputs(self, demos: stage1.Demonstrations, rows: tuple) -> tuple:
        """All that an update reads, as tensors: what `Still` takes."""
        tokenizer, device = self.model.tokenizer, self.device
        if not self.captured:
            goals = sorted(set(demos.instruction.tolist()))
            self.longest = [tokenizer.prompts([q.format(g) for g in goals])[0].shape[1] for q in QUESTIONS]
            self.answer = tokenizer.answers(goals)[0].shape[1]
        batches, prompts = [], []
        for r, question, longest in zip(rows, QUESTIONS, self.longest, strict=False):
            obs, action, goals, steps = demos.batch(r, device)
            batches.append((obs, action.to(device), [""] * len(goals), steps.to(device)))
            prompts.append(fill_up(*tokenizer.prompts([question.format(g) for g in goals]), longest, True, device))
        if not len(rows[2]):
            return batches, None, prompts, None
        obs, goals = demos.first_and_last(rows[2], device)
        prompts.append(tuple(x.to(device) for x in tokenizer.prompts([models.QUESTION_INSTRUCTION] * len(goals))))
        answers = fill_up(*tokenizer.answers(goals), self.answer, False, device)
        return batches, (obs, [""] * len(goals)), prompts, answers

    def capture(self, losses: Callable, inputs: tuple, rows: tuple) -> tuple:
        still = Still(*tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs))
        static, _ = tree_flatten((still.batches, still.last, still.texts, still.answer))
        parameters = [p for p in self.model.parameters() if p.requires_grad]

        def update() -> dict[str, Tensor]:
            with still.read_by(self.model.tokenizer):
                now = losses(self.model, still, *rows)
            sum(now.values()).backward()
            return {k: v.detach() for k, v in now.items()}

        def forget() -> None:
            for p in parameters:
                p.grad = None

        if self.device.type != "cuda":
            out, gradients = {}, []

            def again() -> None:
                forget()
                out.update(update())
                gradients[:] = [(p, p.grad) for p in parameters]

            return static, again, out, gradients
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels choose themselves and allocate what they keep
            for _ in range(3):
                forget()
                update()
        torch.cuda.current_stream().wait_stream(stream)
        forget()  # so that the graph's backward pass makes its own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = update()
        return static, graph.replay, out, [(p, p.grad) for p in parameters if p.grad is not None]


# --- runs -------------------------------------------------------------------------------------------------------------
def alone() -> None:
    """Simulations of this process take one thread, there are as many processes as cores, and leave room for who trains."""
    from envs import tabletop

    os.nice(10)
    sys.stderr = open(os.devnull, "w")  # many progress bars are none
    tabletop.Batch = functools.partial(tabletop.Batch, nthread=1)


def drawn(domain: str, begun: list[Future]) -> dict:
    """The demonstrations that were begun, as `stage1.record` returns them, frames on the device."""
    parts = [b.result() for b in begun]
    data = {k: np.concatenate([p[k] for p in parts]) for k in ("state", "action", "length", "instruction")}
    say("drawing the frames of", len(data["length"]), "demonstrations")
    frames = draw(domain, data.pop("state"), common.device())
    return data | {"frames": frames, "start": np.cumsum(data["length"]) - data["length"]}


def run_stage0(cfg: stage0.Config, begun: list[Future]) -> None:
    """`stage0.main` with the scenes that were begun."""
    updates = sum((b.result() for b in begun), [])
    say("drawing", len(updates) * cfg.batch, "scenes")
    frames = draw(cfg.domain, np.concatenate([u[0] for u in updates]), torch.device("cpu"), common.device()).numpy()
    frames, make_env = frames.reshape(len(updates), cfg.batch, *frames.shape[1:]), common.make_env

    def fed(*args: Any, **kwargs: Any) -> VectorEnv:
        env = make_env(*args, **kwargs)
        held_out = env.scenes  # what is asked for first
        feed = itertools.chain([None], zip(frames, updates, strict=True))

        def scenes(rng: np.random.Generator, n: int) -> tuple:
            if (update := next(feed)) is None:
                return held_out(rng, n)
            return update[0], *update[1][1:]

        env.scenes = scenes
        return env

    with mock.patch.object(common, "make_env", fed):
        stage0.main(cfg)


def run_stage1(cfg: stage1.Config, data: dict) -> None:
    """`stage1.main` with these demonstrations, frames a tensor, and replayed updates."""
    with (
        mock.patch.object(stage1, "load_demonstrations", lambda _: data),
        mock.patch.object(stage1, "Demonstrations", OnGPU),
        mock.patch.object(common, "distribute", lambda model, shard: Replayed(model)),
        mock.patch.object(models.Gemma, "sparse", False),  # a graph's gradients have one shape
    ):
        stage1.main(cfg)


@dataclass
class Config:
    domain: str = "tabletop"  # or bananatable, or with arguments: tabletop,blocks=8,size=96; neither look=real nor history=1
    seed: int = 0  # as in the stages
    init: str = ""  # the Stage 0 run to start from; empty: one is made, beside `out`
    stage0_updates: int = 3000  # Stage 0's, of 128 scenes each
    episodes: int = 16_000  # demonstrations
    data_fraction: float = 1.0  # share of them to learn from
    model: str = "nano-sight"  # of both stages
    updates: int = 5000  # Stage 1's
    batch: int = 256  # samples per update, split evenly over the objectives
    lr: float = 1e-3  # peak of AdamW's
    eval_every: int = 1000  # updates between two looks at the held-out episodes
    eval_episodes: int = 500  # rollouts of the final policy
    out: str = "runs/tabletop-images-gpu-stage1-s0"  # Stage 1's run; Stage 0's has a 0 in place of the last "stage1"'s 1


def main(cfg: Config) -> None:
    env = common.make_env(cfg.domain, 1, obs="images")
    if not isinstance(env, TabletopVectorEnv) or env.look != "sim" or not env.simultaneous:
        raise UserError(f"--domain {cfg.domain}: only tabletop and bananatable, without look=real and history=1; use stage1.py")
    common.require(cfg, 1, "stage0_updates", "updates", "batch", "eval_every", "eval_episodes")
    common.require(cfg, 2, "episodes")
    stage1.split(cfg.episodes, cfg.data_fraction)
    if cfg.model not in models.PRESETS:
        raise UserError(f"--model {cfg.model}: unknown; choose one of {', '.join(models.PRESETS)}")
    if cfg.init:
        common.load(Path(cfg.init) / "policy.safetensors", env)
    before = "stage0".join(cfg.out.rsplit("stage1", 1))
    if before == cfg.out:
        raise UserError(f"--out {cfg.out}: a Stage 1 run's name has stage1 in it")
    for folder in (cfg.out, *[before] * (not cfg.init)):
        if Path(folder).exists():
            raise UserError(f"{folder}: this run exists; choose another --out")
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), alone) as workers:
        first = stage0.Config(cfg.domain, cfg.model, cfg.seed, cfg.stage0_updates, lr=1.5e-3, out=before)
        parts = np.array_split(np.arange(first.updates * (not cfg.init)), 64)  # the first to be waited for
        asked = [workers.submit(scenes, cfg.domain, first.batch, cfg.seed, part.tolist()) for part in parts if len(part)]
        every = min(16, cfg.episodes)
        shown = [workers.submit(demonstrations, cfg.domain, cfg.episodes, cfg.seed, slice(k, None, every)) for k in range(every)]
        if not cfg.init:
            run_stage0(first, asked)
            cfg.init = before
        data = drawn(cfg.domain, shown)
    run_stage1(stage1.Config(obs="images", **{k: v for k, v in vars(cfg).items() if k != "stage0_updates"}), data)


if __name__ == "__main__":
    common.cli(Config, main)
