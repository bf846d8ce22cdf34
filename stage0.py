"""Stage 0, optional: pre-training on pictures and questions, a laptop's stand-in for web-scale pre-training.

The paper starts from PaLI, which has seen the web. A nano model starts from nothing. From pixels alone it
needs far more demonstrations to find out what "red" refers to. Here it answers questions over random scenes
of a domain, in number tokens, as PaliGemma does for detection:

    where is the red goal                   ->  <loc0042> <loc0060>      x and y in 64 bins
    from the point where is the red goal    ->  <loc0038> <loc0016>
    where was the point                     ->  <loc0024> <loc0032>      its wake, seen from it: its velocity
    near the tool where is the red moon     ->  <loc0011> <loc0047>      in the second view
    from the red moon where is the star     ->  <loc0045> <loc0020>      one thing seen from another

Where a domain tells what every patch shows (the tabletop: its blocks are small and many), each thing's name
has to find its patch as well, in every scene: image and words in one space, as SigLIP has them before PaLI
starts. With the questions alone only the tool was found in 1,600 updates, with this everything (docs/lab.md).

No action, no goal to reach and no steps to go is in it. `stage1.py --obs images` starts from the newest Stage
0 run of its domain (the paper's PaLI variant); `--init none` is its Scratch variant.

With `--unimodal` the two never meet (the paper's Uni-PaLI): the vision tower learns from pictures alone, the
decoder from words alone, the projection between them not at all. Stage 1 takes it only by its name:
`stage1.py --obs images --init runs/pointmass-images-unimodal-stage0-s0`. See docs/pretraining.md.

    python stage0.py                      # pointmass, 8 minutes on one busy CPU core
    python stage0.py --domain tabletop    # 30 minutes
    python stage0.py --domain tabletop --also tabletop,look=real bananatable    # the scenes of all three
    python stage0.py --unimodal           # the two towers, each on its own
    python stage0.py --updates 6000 --seed 1
    python stage0.py --resume             # continue an interrupted run, exactly
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import ranks, setup
from common.cli import cli
from common.options import Count, DeviceFlags, Positive, Whole
from common.unimodal import COLOURS, picture_loss, word_loss
from model import EFM
from tokens import UniformBins


@dataclass
class Config(DeviceFlags):
    domain: str = "pointmass"  # one of envs.DOMAINS, with arguments of its own: tabletop,blocks=8
    also: tuple[str, ...] | None = None  # further domains, whose scenes and words it sees as often
    words: tuple[str, ...] | None = None  # domains whose words are in its vocabulary, and no more
    model: str | None = None  # a preset of model.PRESETS; None: what Stage 1 takes from images
    seed: Whole = 0  # weights and scenes
    updates: Count = 6000  # optimiser steps
    batch: Count = 128  # questions per update about fresh scenes: on the tabletop two of each, else one
    lr: Positive = 2e-3  # AdamW: a warm-up of 100 updates, then a cosine down to a tenth
    eval_every: Count = 500  # updates between two looks at 1,024 held-out questions
    unimodal: bool = False  # the vision tower on pictures alone, the decoder on words alone
    out: str | None = None  # the run's folder; None: runs/{domain}-images-[unimodal-]stage0-s{seed}
    resume: bool = False  # continue an interrupted run


ANSWER = UniformBins(64, 0.0, 1.0, 2)  # x and y as shares of the frame, finer than its pixels


def answer_loss(model: EFM, features: Tensor, questions: list[str], answers: Tensor) -> Tensor:
    """-log p(answer | images, question), averaged; features float (B, 2, N, Dv), answers (n, 2) in [0, 1]."""
    tokens = ANSWER.encode(answers).to(features.device)  # (B, 2)
    each = len(questions) // len(features)  # a scene's questions stand together
    features = features.repeat_interleave(each, 0)
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
    domains, run, model = setup.stage0(cfg)
    if run.done:
        return
    device = ranks.device()
    trained, head = [*model.parameters()], None
    if cfg.unimodal:  # nothing reaches the projection, and AdamW skips it
        head = nn.Linear(model.cfg.vit_width, 2 * COLOURS, device=device)
        trained += head.parameters()
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=0.01, fused=True)
    rng = np.random.default_rng(cfg.seed)
    now = Progress()
    run.track(optimizer=optimizer, rng=rng, progress=now, head=head)
    every_text = setup.all_texts(domains)

    def batch(rng: np.random.Generator, n: int) -> list[tuple]:
        """As many questions of each domain; where pictures and words do not meet, also as many texts."""
        parts = []
        for domain in domains:
            share = n // len(domains)
            scenes, texts = domain.scenes(rng, max(1, share // domain.asked)), []
            if cfg.unimodal:
                texts = [every_text[i] for i in rng.integers(len(every_text), size=len(scenes[1]))]
            parts.append((domain.state_names, *scenes, texts))
        return parts

    def losses(things, images, questions, answers, places, texts) -> dict[str, Tensor]:
        """Of a domain's part of what `batch` returns, by name."""
        images, answers = torch.from_numpy(images).to(device), torch.from_numpy(answers)
        if cfg.unimodal:
            tokens = ANSWER.encode(answers).to(device)  # (B, 2)
            words = word_loss(model, texts, questions, tokens, ANSWER.ranges)
            return {"pictures": picture_loss(model, head, images), "words": words}
        features = model.encode_images(images)
        each = {"loss": answer_loss(model, features, questions, answers)}
        if places is not None:
            places = torch.from_numpy(places).to(device)
            each["pointing"] = pointing_loss(model, features, things, places)
        return each

    def mean_losses(parts: list[tuple]) -> dict[str, Tensor]:
        """Each loss, averaged over the domains that have it."""
        every = {}
        for part in parts:
            for name, loss in losses(*part).items():
                every.setdefault(name, []).append(loss)
        return {name: torch.stack(of_domains).mean() for name, of_domains in every.items()}

    held_out = batch(np.random.default_rng(10**6), 1024)
    run.start()
    for update in run.steps(now.update, cfg.updates, "stage 0"):
        loss = mean_losses(batch(rng, cfg.batch))
        for group in optimizer.param_groups:
            group["lr"] = setup.learning_rate(update, cfg.updates, cfg.lr)
        optimizer.zero_grad()
        sum(loss.values()).backward()
        optimizer.step()
        if (update + 1) % cfg.eval_every and update + 1 < cfg.updates:
            continue
        with torch.no_grad():
            valid = mean_losses(held_out)
        errors = []
        for _, images, questions, answers, *_ in held_out:
            # what is answered without a picture is a guess
            every = np.repeat(images, len(questions) // len(images), 0)
            seen = {} if cfg.unimodal else {"images": torch.from_numpy(every).to(device)}
            tokens, _ = model.sample(seen, questions, ANSWER.ranges, greedy=True)
            errors.append(np.abs(ANSWER.decode(tokens.cpu()).numpy() - answers).mean())
        now.update = update + 1
        now.error = float(np.mean(errors))
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
