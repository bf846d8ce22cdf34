"""Stage 0, optional: pre-training on pictures and questions, a laptop's stand-in for web-scale pre-training.

The paper starts from PaLI, which has seen the web. A nano model starts from nothing. From pixels alone it
needs far more demonstrations to find out what "red" refers to. Here it answers questions over random scenes
of a domain, in number tokens, as PaliGemma does for detection:

    where is the red goal                   ->  <loc0042> <loc0060>      x and y in 64 bins
    from the point where is the red goal    ->  <loc0038> <loc0016>
    where was the point                     ->  <loc0024> <loc0032>      its wake, seen from it: its velocity
    near the tool where is the red moon     ->  <loc0011> <loc0047>      in the second view

Where a domain tells what every patch shows (the tabletop: its blocks are small and many), each thing's name
has to find its patch as well, in every scene: image and words in one space, as SigLIP has them before PaLI
starts. With the questions alone only the tool was found in 1,600 updates, with this everything (docs/lab.md).

No action, no goal to reach and no steps to go is in it. `stage1.py --obs images` starts from the newest Stage
0 run of its domain (the paper's PaLI variant); `--init none` is its Scratch variant.

    python stage0.py                      # pointmass, 8 minutes on one busy CPU core
    python stage0.py --domain tabletop    # 30 minutes
    python stage0.py --updates 6000 --seed 1
    python stage0.py --resume             # continue an interrupted run, exactly
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import ranks, setup
from common.cli import cli
from common.options import Count, DeviceFlags, Positive, Whole
from model import EFM
from tokens import UniformBins


@dataclass
class Config(DeviceFlags):
    domain: str = "pointmass"  # one of envs.DOMAINS, with arguments of its own: tabletop,blocks=8
    model: str = "nano-vision"  # a preset of model.PRESETS
    seed: Whole = 0  # weights and scenes
    updates: Count = 6000  # optimiser steps
    batch: Count = 128  # fresh scenes per update, one question each
    lr: Positive = 2e-3  # AdamW: a warm-up of 100 updates, then a cosine down to a tenth
    eval_every: Count = 500  # updates between two looks at 1,024 held-out scenes
    out: str | None = None  # the run's folder; None: runs/{domain}-images-stage0-s{seed}
    resume: bool = False  # continue an interrupted run


ANSWER = UniformBins(64, 0.0, 1.0, 2)  # x and y as shares of the frame, finer than its pixels


def answer_loss(model: EFM, features: Tensor, questions: list[str], answers: Tensor) -> Tensor:
    """-log p(answer | images, question), averaged; features float (B, 2, N, Dv), answers (B, 2) in [0, 1]."""
    tokens = ANSWER.encode(answers).to(features.device)  # (B, 2)
    return -model.log_prob({"features": features}, questions, tokens, ANSWER.ranges).mean()


def pointing_loss(model: EFM, features: Tensor, things: tuple[str, ...], places: Tensor) -> Tensor:
    """-log p(patch | thing), averaged over the things in view: which patch of an image shows the red moon.

    features float (B, 2, N, Dv) of `encode_images`; places (B, 2, things, 2), shares right and down.
    A patch's score is its embedding times the mean of the name's, as they enter the transformer.
    """
    names = []
    for thing in things:
        ids = model.tokenizer.tokenizer.encode(thing, add_special_tokens=False).ids
        names.append(model.language_model.embed(torch.tensor(ids, device=features.device)).mean(0))
    names = torch.stack(names)  # (things, D)
    patches = model.multi_modal_projector(features)  # (B, 2, N, D)
    scores = names @ patches.transpose(2, 3) / model.cfg.width**0.5  # (B, 2, things, N)
    side = model.cfg.image_size // model.cfg.patch_size
    cell = (places * (model.cfg.image_size / model.cfg.patch_size)).floor().long()  # column, row
    # the ViT leaves out what is less than a patch at the right and the bottom
    seen = ((cell >= 0) & (cell < side)).all(-1)
    total = F.cross_entropy(scores[seen], (cell[..., 1] * side + cell[..., 0])[seen], reduction="sum")
    return total / seen.sum().clamp(min=1)


@dataclass
class Progress:
    """What a run continues from, beside the weights."""

    update: int = 0
    error: float = math.nan  # mean distance of the answers on held-out scenes, shares of the frame


def main(cfg: Config) -> None:
    env, run, model = setup.stage0(cfg)
    if run.done:
        return
    device = ranks.device()
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.01, fused=True)
    rng = np.random.default_rng(cfg.seed)
    now = Progress()
    run.track(optimizer=optimizer, rng=rng, progress=now)

    def losses(
        images: np.ndarray, questions: list[str], answers: np.ndarray, places: np.ndarray | None
    ) -> dict[str, Tensor]:
        features = model.encode_images(torch.from_numpy(images).to(device))
        each = {"loss": answer_loss(model, features, questions, torch.from_numpy(answers))}
        if places is not None:
            places = torch.from_numpy(places).to(device)
            each["pointing"] = pointing_loss(model, features, env.state_names, places)
        return each

    held_out = env.scenes(np.random.default_rng(10**6), 1024)
    images, questions, answers, _ = held_out
    run.start()
    for update in run.steps(now.update, cfg.updates, "stage 0"):
        loss = losses(*env.scenes(rng, cfg.batch))
        for group in optimizer.param_groups:
            group["lr"] = setup.learning_rate(update, cfg.updates, cfg.lr)
        optimizer.zero_grad()
        sum(loss.values()).backward()
        optimizer.step()
        if (update + 1) % cfg.eval_every and update + 1 < cfg.updates:
            continue
        with torch.no_grad():
            valid = losses(*held_out)
        seen = {"images": torch.from_numpy(images).to(device)}
        tokens, _ = model.sample(seen, questions, ANSWER.ranges, greedy=True)
        now.update = update + 1
        now.error = float(np.abs(ANSWER.decode(tokens.cpu()).numpy() - answers).mean())
        row = {"update": update + 1} | {k: v.item() for k, v in loss.items()}
        row |= {f"valid_{k}": v.item() for k, v in valid.items()}
        row |= {"valid_error": now.error, "seconds": run.seconds()}
        run.log(update + 1, row)
        run.keep(policy=model)
        run.checkpoint()
    told = {"stage": "stage0", "domain": cfg.domain, "obs": "images", "seed": cfg.seed}
    run.finish(told | {"valid_error": now.error})


if __name__ == "__main__":
    cli(Config, main)
