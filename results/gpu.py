"""Stages 0 and 1 from images at a GPU's pace: the same functions, fed and launched otherwise.

A small model's update is a thousand kernels of a few microseconds, which Python launches more slowly than a GPU runs them,
and a table's frame takes longer to draw than to learn from. So here

- demonstrations and scenes are simulated by all cores without pictures, and drawn one after another by one process,
  whose second views and averages the GPU makes (`foveate`'s, number for number);
- an update of `stage1.py`, forward and backward, is captured as a CUDA graph and replayed;
- frames lie on the GPU from the start, and a run is evaluated at the end of all.

Demonstrators, seeds, objectives, optimiser and checkpoints are `stage1.py`'s, and so is what it writes; `stage2.py` and
`eval.py` go on from its runs. The order of the demonstrations, and so which are held out, is another.

    python results/gpu.py --runs runs/tabletop-images-gpu-stage1-s0 --updates 20000
    python results/gpu.py --domain tabletop,blocks=8,size=96 --episodes 6000 --scenes 400000 ...
"""

from __future__ import annotations

import contextlib
import functools
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import envs
import eval as evaluation
import model as models
import stage0
import stage1

BEGAN = time.time()
QUESTIONS = (models.QUESTION_ACTION, models.QUESTION_STEPS)


def say(*what: object) -> None:
    print(f"[{time.time() - BEGAN:6.1f} s]", *what, flush=True)


# --- without pictures, on all cores -----------------------------------------------------------------------------------
def demonstrations(domain: str, episodes: int, seed: int, first: int, every: int) -> list[tuple]:
    """What simulations first, first + every, ... of `stage1.record`'s 256 owe: (instruction, qpos per step, actions)."""
    total = min(episodes, 256)
    sims = np.arange(first, total, every)
    env = envs.make_vec(domain, len(sims), obs="state")
    owed = episodes // total + (sims < episodes % total)
    o, _ = env.reset(seed=[seed * 10**6 + int(i) for i in sims])
    kept, steps = [], [[] for _ in sims]
    while owed.any():
        action, texts = env.demonstrate(), o["instruction"]
        for i in np.flatnonzero(owed):
            steps[i].append((env.sim.qpos[i].copy(), action[i]))
        o, _, terminated, truncated, _ = env.step(action)
        for i in np.flatnonzero(terminated & (owed > 0)):
            steps[i].append((env.sim.qpos[i].copy(), np.zeros_like(action[i])))
            kept.append((texts[i], *zip(*steps[i], strict=True)))
            owed[i] -= 1
        over = terminated | truncated
        for i in np.flatnonzero(over):
            steps[i] = []
        if over.any():
            o, _ = env.reset(options={"reset_mask": over})
    return kept


def scenes(domain: str, n: int, seed: int, updates: list[int]) -> list[tuple]:
    """A domain's `scenes` for some updates, with poses in place of pictures: (qpos (n, q), texts, answers, places) each."""
    from envs.tabletop import pixels

    env, poses, all_of_them = envs.make_vec(domain, 1, obs="images"), [], []

    def views(qpos: np.ndarray, camera: np.ndarray) -> tuple:
        poses.append(qpos)
        first = np.clip(np.round(pixels(np.r_[qpos[-2:], 0], camera) * 2 * env.size).astype(int) - env.size // 2,
                        -env.size, 2 * env.size)  # fmt: skip
        return np.zeros(0), first / (2 * env.size)

    env._views = views  # `foveate` without a picture
    for update in updates:
        poses.clear()
        _, *asked = env.scenes(np.random.default_rng([seed, update]), n)
        all_of_them.append((np.array(poses), *asked))
    return all_of_them


# --- pictures ---------------------------------------------------------------------------------------------------------
def foveated(pictures: Tensor, at: Tensor) -> Tensor:
    """`tabletop.foveate` of many: pictures uint8 (n, 2 s, 2 s, 3), at float64 (n, 2) in shares -> uint8 (n, 2, s, s, 3)."""
    n, s = len(pictures), pictures.shape[1] // 2
    whole = pictures.view(n, s, 2, s, 2, 3).int().sum((2, 4)) // 4
    first = ((at * 2 * s).round().long() - s // 2).clamp(-s, 2 * s)  # (n, 2) x, y
    index = first[:, :, None] + torch.arange(s, device=at.device)  # (n, 2, s)
    inside, index = (index >= 0) & (index < 2 * s), index.clamp(0, 2 * s - 1)
    close = pictures[torch.arange(n, device=at.device)[:, None, None], index[:, 1, :, None], index[:, 0, None]]
    seen = inside[:, 1, :, None] & inside[:, 0, None]
    return torch.stack([whole.to(torch.uint8), torch.where(seen[..., None], close, 128)], 1)


def draw(domain: str, qpos: np.ndarray, device: torch.device, by: torch.device | None = None, at_once: int = 2048) -> Tensor:
    """The two views of each pose qpos (n, q), uint8 (n, 2, s, s, 3) on the device, made `by` another one."""
    from envs.tabletop import pixels

    env = envs.make_vec(domain, 1, obs="images")
    s, still = env.size, np.zeros((2, 3))
    frames = torch.empty(len(qpos), 2, s, s, 3, dtype=torch.uint8, device=device)
    for rows in np.split(np.arange(len(qpos)), range(at_once, len(qpos), at_once)):
        by = by or device
        pictures = torch.from_numpy(np.stack([env._picture(q, still, 2 * s, 2 * s) for q in qpos[rows]])).to(by)
        at = torch.from_numpy(pixels(np.c_[qpos[rows, -2:], np.zeros(len(rows))])).to(by)
        frames[rows[0] : rows[-1] + 1] = foveated(pictures, at)
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
        for p, gradient in ctx.gradients:
            p.grad = gradient
        return torch.zeros(()), None, None


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
        now = {k: v.detach() for k, v in out.items()}
        return now | {"bc": Replay.apply(self.start, now["bc"], gradients)}

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
            return now

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
    tabletop.Batch = functools.partial(tabletop.Batch, nthread=1)


def pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), alone)


def dense(self: models.Gemma, ids: Tensor) -> Tensor:
    """`Gemma.embed` with a gradient that a graph can hold."""
    x = F.embedding(ids, self.embed_tokens.weight)
    return x * torch.tensor(math.sqrt(self.cfg.width), dtype=x.dtype)


def begin_demonstrations(workers: ProcessPoolExecutor, domain: str, episodes: int, seed: int) -> list[Future]:
    every = min(16, episodes)
    return [workers.submit(demonstrations, domain, episodes, seed, k, every) for k in range(every)]


def drawn(domain: str, begun: list[Future]) -> dict:
    """The demonstrations that were begun, as `stage1.record` returns them, frames on the device."""
    kept = sum((b.result() for b in begun), [])
    length = np.array([len(e[2]) for e in kept])
    say(domain, "drawing", length.sum())
    frames = draw(domain, np.concatenate([np.stack(e[1]) for e in kept]), common.device())
    say(domain, len(length), "demonstrations of", length.mean() - 1, "steps")
    return {"frames": frames, "action": np.concatenate([np.stack(e[2]) for e in kept]).astype(np.float32),
            "start": np.cumsum(length) - length, "length": length, "instruction": np.array([e[0] for e in kept])}  # fmt: skip


def begin_scenes(workers: ProcessPoolExecutor, cfg: stage0.Config) -> list[Future]:
    """Every update's scenes, each with a seed of its own."""
    parts = np.array_split(np.arange(cfg.updates), 64)
    return [workers.submit(scenes, cfg.domain, cfg.batch, cfg.seed, part.tolist()) for part in parts if len(part)]


def run_stage0(cfg: stage0.Config, begun: list[Future]) -> None:
    updates = sum((b.result() for b in begun), [])
    say(cfg.domain, "drawing", len(updates) * cfg.batch, "scenes")
    frames = draw(cfg.domain, np.concatenate([u[0] for u in updates]), torch.device("cpu"), common.device()).numpy()
    drawn, make_env = zip(frames.reshape(len(updates), cfg.batch, *frames.shape[1:]), updates, strict=True), common.make_env

    def fed(*args, **kwargs):
        env = make_env(*args, **kwargs)
        draws, held_out = env.scenes, 1024

        def take(rng: np.random.Generator, n: int) -> tuple:
            if n == held_out:
                return draws(rng, n)
            images, (_, *asked) = next(drawn)
            return images, *asked

        env.scenes = take
        return env

    common.make_env = fed
    stage0.main(cfg)
    common.make_env = make_env


def run_stage1(cfg: stage1.Config, data: dict) -> None:
    """`stage1.main`, less its evaluation."""
    stage1.load_demonstrations, stage1.Demonstrations = lambda cfg: dict(data), OnGPU
    common.distribute, models.Gemma.embed = replayed, dense
    measure, evaluation.evaluate = evaluation.evaluate, lambda *args, **kwargs: {}
    stage1.main(cfg)
    evaluation.evaluate = measure


def replayed(model: models.EFM, shard: bool) -> Replayed:
    return Replayed(model)


def finish(cfg: stage1.Config, seconds: float) -> None:
    """Evaluate a run and add it to its summary."""
    began, folder = time.time(), Path(cfg.out)
    s = envs.make_vec(cfg.domain, 1).success_threshold
    summary = common.read_json(folder / "summary.json") | evaluation.evaluate(folder, cfg.eval_episodes, cfg.seed, s)
    summary["seconds"] += round(seconds + time.time() - began, 1)
    common.write_json(folder / "summary.json", summary)
    say(cfg.out, {k: summary[k] for k in ("success", "success_low", "success_high", "mean_steps", "early_detections")})


@dataclass
class Config:
    domain: str = "tabletop"  # or bananatable, or with arguments: tabletop,blocks=8,size=96; without look=real
    seed: int = 0  # as in the stages
    init: str = ""  # the Stage 0 run to start from; empty: one is made, in {out}-stage0
    scenes: int = 4000  # Stage 0's updates
    episodes: int = 16_000  # demonstrations
    data_fraction: float = 1.0  # share of them to learn from
    model: str = "nano-sight"  # of both stages
    updates: int = 20_000  # Stage 1's
    batch: int = 256  # samples per update, split evenly over the objectives
    lr: float = 1e-3  # peak of AdamW's
    eval_episodes: int = 500  # rollouts of the final policy
    out: str = "runs/tabletop-images-gpu-stage1-s0"  # Stage 1's run


def main(cfg: Config) -> None:
    with pool() as workers:
        began = begin_demonstrations(workers, cfg.domain, cfg.episodes, cfg.seed)
        if not cfg.init:
            cfg.init = f"{cfg.out}-stage0"
            first = stage0.Config(cfg.domain, cfg.model, cfg.seed, cfg.scenes, lr=1.5e-3, out=cfg.init)
            run_stage0(first, begin_scenes(workers, first))
        data = drawn(cfg.domain, began)
    kept = {k: getattr(cfg, k) for k in ("domain", "seed", "init", "episodes", "data_fraction", "model", "updates", "batch", "lr",
                                         "eval_episodes", "out")}  # fmt: skip
    run = stage1.Config(obs="images", **kept)
    before = time.time() - BEGAN
    run_stage1(run, data)
    finish(run, before)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
