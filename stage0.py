"""Stage 0, optional: pre-training on pictures and questions, the stand-in for web-scale pre-training at laptop size.

The paper starts from PaLI, which has seen the web; a nano model starts from nothing and, from pixels alone, needs far
more demonstrations to find out what "red" refers to (results/README.md has the numbers). Here it answers questions over
random scenes of a domain, in number tokens as PaliGemma does for detection:

    where is the red goal                   ->  <loc0042> <loc0060>      x and y in 64 bins
    from the point where is the red goal    ->  <loc0038> <loc0016>
    where was the point                     ->  <loc0024> <loc0032>      its wake, seen from it: its velocity
    near the tool where is the red moon     ->  <loc0011> <loc0047>      in the second view

Where a domain tells what every patch shows (the tabletop: its blocks are small and many), each thing's name has to
find its patch as well, in every scene: image and words in one space, as SigLIP has them before PaLI starts. With the
questions alone only the tool was found in 1,600 updates, with this everything in as many (results/README.md).

No action, no goal to reach and no steps to go is in it. `stage1.py --obs images` starts from the newest Stage 0 run of
its domain (the paper's PaLI variant); `--init none` is its Scratch variant.

    python stage0.py                      # pointmass, 8 minutes on one busy CPU core
    python stage0.py --domain tabletop    # 30 minutes
    python stage0.py --updates 6000 --seed 1
    python stage0.py --resume             # continue an interrupted run, exactly
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import common
import model as models
from common import UserError
from model import EFM, QUESTION_INSTRUCTION, Tokenizer, UniformBins


@dataclass
class Config:
    domain: str = "pointmass"  # one of envs.DOMAINS, with arguments of its own: tabletop,blocks=8
    model: str = "nano-vision"  # a preset of model.PRESETS
    seed: int = 0  # weights and scenes
    updates: int = 6000  # optimiser steps
    batch: int = 128  # fresh scenes per update, one question each
    lr: float = 2e-3  # AdamW, after a linear warm-up of 100 updates decaying to a tenth (cosine)
    eval_every: int = 500  # updates between two looks at 1,024 held-out scenes
    out: str = ""  # the run's folder; empty: runs/{domain}-images-stage0-s{seed}
    resume: bool = False  # continue an interrupted run


ANSWER = UniformBins(64, 0.0, 1.0, 2)  # x and y as shares of the frame, finer than its pixels


def answer_loss(model: EFM, features: Tensor, questions: list[str], answers: Tensor) -> Tensor:
    """-log p(answer | images, question), averaged; features float (B, 2, N, Dv), answers float (B, 2) in [0, 1]."""
    return -model.log_prob({"features": features}, questions, ANSWER.encode(answers).to(features.device), ANSWER.ranges).mean()


def pointing_loss(model: EFM, features: Tensor, things: tuple[str, ...], places: Tensor) -> Tensor:
    """-log p(patch | thing), averaged over the things in view: which patch of an image shows the red moon.

    features float (B, 2, N, Dv) of `encode_images`; places float (B, 2, things, 2), shares of each image, right and down.
    A patch's score is its embedding times the mean of the name's, as they enter the transformer.
    """
    words = [model.tokenizer.tokenizer.encode(thing, add_special_tokens=False).ids for thing in things]
    names = torch.stack([model.language_model.embed(torch.tensor(ids, device=features.device)).mean(0) for ids in words])
    scores = names @ model.multi_modal_projector(features).transpose(2, 3) / model.cfg.width**0.5  # (B, 2, things, N)
    side = model.cfg.image_size // model.cfg.patch_size
    cell = (places * (model.cfg.image_size / model.cfg.patch_size)).floor().long()  # column, row
    seen = ((cell >= 0) & (cell < side)).all(-1)  # the ViT leaves out what is less than a patch at the right and the bottom
    total = F.cross_entropy(scores[seen], (cell[..., 1] * side + cell[..., 0])[seen], reduction="sum")
    return total / seen.sum().clamp(min=1)


def main(cfg: Config) -> None:
    device = common.device()
    if cfg.model not in models.PRESETS:
        raise UserError(f"--model {cfg.model}: unknown; choose one of {', '.join(models.PRESETS)}")
    common.require(cfg, 0, "seed")
    common.require(cfg, 1, "updates", "batch", "eval_every")
    common.require(cfg, 1e-9, "lr")
    env = common.make_env(cfg.domain, 1, obs="images")
    if not hasattr(env, "scenes"):
        raise UserError(f"--domain {cfg.domain}: has no questions for Stage 0; choose pointmass, tabletop or bananatable")
    run = common.open_run(cfg, env, "stage0")
    if run.done:
        return
    folder = run.folder

    torch.manual_seed(cfg.seed)
    tokenizer = Tokenizer.train([*env.instructions(), *env.questions()] + [QUESTION_INSTRUCTION] * env.predicts_instruction)
    model = EFM(models.replace(models.PRESETS[cfg.model], image_size=env.size), tokenizer).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=0.01, fused=True)
    rng, first, error = np.random.default_rng(cfg.seed), 0, float("nan")
    if run.state:
        model.load_state_dict(run.state["model"])
        optimizer.load_state_dict(run.state["optimizer"])
        rng.bit_generator.state, first, error = run.state["rng"], run.state["update"], run.state["error"]

    def losses(images: np.ndarray, questions: list[str], answers: np.ndarray, places: np.ndarray | None) -> dict[str, Tensor]:
        features = model.encode_images(torch.from_numpy(images).to(device))
        each = {"loss": answer_loss(model, features, questions, torch.from_numpy(answers))}
        if places is not None:
            each["pointing"] = pointing_loss(model, features, env.state_names, torch.from_numpy(places).to(device))
        return each

    held_out = env.scenes(np.random.default_rng(10**6), 1024)
    run.start()
    for update in tqdm(range(first, cfg.updates), initial=first, total=cfg.updates, desc="stage 0", disable=None):
        now = losses(*env.scenes(rng, cfg.batch))
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(update, cfg.updates, cfg.lr)
        optimizer.zero_grad()
        sum(now.values()).backward()
        optimizer.step()
        if (update + 1) % cfg.eval_every == 0 or update + 1 == cfg.updates:
            images, questions, answers, _ = held_out
            with torch.no_grad():
                valid = losses(*held_out)
            tokens, _ = model.sample({"images": torch.from_numpy(images).to(device)}, questions, ANSWER.ranges, greedy=True)
            error = float(np.abs(ANSWER.decode(tokens.cpu()).numpy() - answers).mean())
            row = {"update": update + 1} | {k: v.item() for k, v in now.items()}
            row |= {f"valid_{k}": v.item() for k, v in valid.items()} | {"valid_error": error, "seconds": run.seconds()}
            run.log(update + 1, row)
            tqdm.write("  ".join(f"{k} {v:.4g}" for k, v in row.items()))
            common.save(model, folder / "policy.safetensors")
            run.checkpoint(model=model.state_dict(), optimizer=optimizer.state_dict(), rng=rng.bit_generator.state,
                           update=update + 1, error=error)  # fmt: skip
    summary = {"stage": "stage0", "domain": cfg.domain, "obs": "images", "seed": cfg.seed, "valid_error": error}
    print("\n".join(f"{k:12} {v}" for k, v in run.finish(summary).items()))


if __name__ == "__main__":
    common.cli(Config, main)
