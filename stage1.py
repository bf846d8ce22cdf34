"""Stage 1, supervised fine-tuning (Section 3.1): clone the demonstrations and predict the steps left.

One model learns two questions about (observation, goal) pairs from demonstrations,

    L_BC          = -E log p(a_t           | o_t, "What robot action to {g}")
    L_steps_to_go = -E log p(length(τ) - t | o_t, "How many steps to {g}")

where the domain asks for it (the paper: LanguageTable) one more, about an episode's two ends,

    L_instruction = -E log p(g | o_first, o_last, "What instruction was performed")

and two checkpoints are kept: the best at cloning on held-out episodes becomes Stage 2's policy, the best at
steps to go its reward model and detector, often of another moment. On Aloha, as in the paper, and with few
demonstrations of the tabletop the last one is the policy: its loss rises long before the policy gets worse.

    python stage1.py                          # pointmass from states, 2 minutes of a CPU
    python stage1.py --obs images --seed 1    # the same from 32 x 32 frames
    python stage1.py --resume                 # continue an interrupted run, exactly
    python stage1.py --model paligemma --weights google/paligemma-3b-pt-224 --batch 8 --lr 1e-5
    torchrun --nproc_per_node 2 stage1.py     # two processes, half of each batch each
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common import UserError, demos, ranks, setup
from common.average import Average
from common.cli import cli
from common.counting import evaluate
from common.options import Count, Positive, ScaleFlags, Share, Whole
from model import EFM
from tokens import QUESTION_ACTION, QUESTION_INSTRUCTION, QUESTION_STEPS, StepsToGo, action_tokenizer


@dataclass
class Config(ScaleFlags):
    """None means: what the domain takes; for few demonstrations see common/setup.py:FEW."""

    domain: str = "pointmass"  # one of envs.DOMAINS, with arguments of its own: tabletop,blocks=8
    obs: str | None = None  # state or images
    model: str | None = None  # a preset of model.PRESETS or, with --weights, paligemma
    weights: str | None = None  # folder or hub id of PaliGemma, or, with --vit, of Gemma
    vit: str | None = None  # timm:NAME, a vision tower of its own: the paper's Uni-PaLI
    init: str | None = None  # a run to start from; None: for images the newest Stage 0; "none": scratch
    seed: Whole = 0  # weights, demonstrations, batches
    episodes: int | None = None  # demonstrations to record with the domain's demonstrator
    data_fraction: float = 1.0  # of the demonstrations to learn from; a smaller one is a part of a larger
    dataset: str | None = None  # or the id of a Minari dataset with the domain's spaces
    updates: Count | None = None  # optimiser steps
    batch: int | None = None  # samples per update, split evenly over the objectives
    lr: Positive | None = None  # AdamW: a warm-up of 100 updates, then a cosine down to a tenth
    policy: Literal["best", "last"] | None = None  # the policy: the best at cloning, or the last
    reward: Literal["loss", "error"] | None = None  # the reward model: least in d's loss, or in d's error
    symmetries: bool | None = None  # turn tuples by the domain's symmetries; None: if not pre-trained
    turns: bool | None = None  # turn, move, rearrange scenes of states; None: if 1,000 or fewer
    average: Share | None = None  # decay of the weights' exponential average, which is kept; 0: none
    eval_every: Count = 500  # updates between two looks at the held-out episodes


# --- the objectives of Section 3.1 --------------------------------------------------------------------------
def bc_loss(model: EFM, obs: dict, goals: list[str], tokens: Tensor, ranges: list) -> Tensor:
    """-log p(a | o, Question_action(g)), summed over the action's tokens (B, L), averaged over the batch."""
    prompts = [QUESTION_ACTION.format(g) for g in goals]
    return -model.log_prob(obs, prompts, tokens, ranges).mean()  # [L_BC]


def steps_to_go_loss(model: EFM, obs: dict, goals: list[str], tokens: Tensor, ranges: list) -> Tensor:
    """-log p(length(τ) - t | o, Question_steps_to_go(g)), averaged over the batch; tokens long (B, 1)."""
    prompts = [QUESTION_STEPS.format(g) for g in goals]
    return -model.log_prob(obs, prompts, tokens, ranges).mean()  # [L_steps_to_go]


def instruction_loss(model: EFM, obs: dict, goals: list[str]) -> Tensor:
    """-log p(g | o_first, o_last, Question_instruction), summed over g's tokens, averaged over the batch."""
    return -model.text_log_prob(obs, [QUESTION_INSTRUCTION] * len(goals), goals).mean()  # [L_instruction]


# --- the detector of Section 3.2 ----------------------------------------------------------------------------
def calibrate(
    before: Tensor, final: Tensor, precision: float = 0.9, recall: float = 0.2
) -> tuple[float, ...]:
    """The largest s whose detections on held-out demonstrations are mostly right, and not too few.

        s = max { s : right(s) / (right(s) + wrong(s)) >= precision and right(s) / (n - wrong(s)) >= recall }
        right(s): final <= s < before;  wrong(s): before <= s

    before: the least d of each demonstration's observations but the last, float (n,); final: the last one's.
    The largest, because a missed arrival costs the rest of the horizon, an early alarm a step or two, and who
    practises arrives faster than any demonstrator. Returns s, its precision, its recall: of demonstrations
    that no alarm ended before, the share that it ends. A poor d has none: then the s with most right alarms.
    """
    candidates = torch.cat([before, final]).sort().values  # (2 n,)
    wrong = (before <= candidates[:, None]).sum(1)  # (2 n,)
    right = ((final <= candidates[:, None]) & (before > candidates[:, None])).sum(1)
    precisions = right / (right + wrong).clamp(min=1)
    recalls = right / (len(final) - wrong).clamp(min=1)
    good = ((precisions >= precision) & (recalls >= recall)).nonzero()
    k = int(good.max()) if len(good) else int(right.argmax())
    return float(candidates[k]), float(precisions[k]), float(recalls[k])


# --- training -----------------------------------------------------------------------------------------------
@dataclass
class Progress:
    """What a run continues from, beside the weights."""

    update: int = 0
    instruction_on: bool = False  # until it gets no better on held-out episodes: few are soon learnt by heart
    best: dict[str, float] = field(default_factory=dict)  # the least loss on held-out episodes, by objective

    def better(self, held_out: dict[str, float]) -> set[str]:
        """The objectives that have never been better."""
        better = {name for name, loss in held_out.items() if loss < self.best.get(name, math.inf)}
        self.best |= {name: held_out[name] for name in better}
        self.instruction_on = self.instruction_on and "instruction" in better
        return better


def measure(run: Path, valid: demos.Demonstrations, steps: StepsToGo, cfg: Config) -> dict[str, float]:
    """The threshold of a finished run's detector, and its policy's success."""
    _, _, reward_model = setup.load_run(run, 1)
    episodes = 20 if cfg.weights or cfg.vit else 300  # large models take their time
    s, precision, recall = calibrate(*demos.arrivals(reward_model, valid, steps, episodes))
    if precision == 0:
        print("no threshold of d is ever right on held-out demonstrations: practice cannot tell the goal")
    measured = {"success_threshold": s, "held_out_precision": precision, "held_out_recall": recall}
    return measured | evaluate(run, cfg.eval_episodes, cfg.seed, s)


def main(cfg: Config) -> None:
    env, run, model = setup.stage1(cfg)
    if run.done:
        return
    device = ranks.device()
    actions = action_tokenizer(**env.action_tokens)
    steps = StepsToGo(env.steps_cap, env.steps_bins)
    wrapped = ranks.scale(model, cfg, shard=cfg.model == "paligemma" and not cfg.lora_rank)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=cfg.lr, weight_decay=0.01, fused=True)
    rng = np.random.default_rng(cfg.seed)
    average = Average(model, cfg.average)
    now = Progress(instruction_on=env.predicts_instruction)
    run.track(optimizer=optimizer, rng=rng, progress=now, average=average)
    train, valid = demos.load(cfg, env)
    if model.cfg.state_names and model.cfg.state_mlp and cfg.init == "none" and not run.resumed:
        model.fit_standardiser(train.states())

    def losses(model: EFM, data: demos.Demonstrations, bc: np.ndarray, to_go: np.ndarray, asked: np.ndarray):
        """Of rows for cloning and steps to go, of episodes for instructions: this rank's share of each."""
        each = {}
        if len(bc):
            rows, weight = ranks.local_rows(bc)
            obs, action, goals, _ = data.batch(rows, device)
            tokens = actions.encode(action).to(device)
            each["bc"] = weight * bc_loss(model, obs, goals, tokens, actions.ranges)
        if len(to_go):
            rows, weight = ranks.local_rows(to_go)
            obs, _, goals, left = data.batch(rows, device)
            tokens = steps.encode(left).to(device)
            each["steps_to_go"] = weight * steps_to_go_loss(model, obs, goals, tokens, steps.ranges)
            if not torch.is_grad_enabled():  # of what is held out
                each["error"] = weight * demos.relative_error(model, obs, goals, left, steps)
        if len(asked):
            episodes, weight = ranks.local_rows(asked)
            each["instruction"] = weight * instruction_loss(model, *data.first_and_last(episodes, device))
        return each

    run.start()
    # the same tuples at every look; of a pre-trained model no more than fit where a batch does
    n, fixed = 2 * cfg.batch if cfg.weights or cfg.vit else 2048, np.random.default_rng(0)
    held_out = [fixed.choice(valid.acted, n), fixed.integers(len(valid.index), size=n)]
    held_out.append(np.arange(len(valid.ends))[: n if env.predicts_instruction else 0])  # episodes
    for update in run.steps(now.update, cfg.updates, "stage 1"):
        third = cfg.batch // 3 if now.instruction_on else 0  # split evenly over the objectives
        half = (cfg.batch - third) // 2
        bc = train.draw(rng.choice(train.acted, half), rng)
        to_go = train.draw(rng.integers(len(train.index), size=cfg.batch - third - half), rng)
        asked = train.draw(rng.integers(len(train.ends), size=third), rng)
        for group in optimizer.param_groups:
            group["lr"] = setup.learning_rate(update, cfg.updates, cfg.lr)
        optimizer.zero_grad()
        loss = ranks.backward(wrapped, losses, train, [bc, to_go, asked], cfg.bf16)
        optimizer.step()
        average.update()
        if (update + 1) % cfg.eval_every and update + 1 < cfg.updates:
            continue
        with average.applied():  # the average is looked at and kept; training goes on from the weights
            with torch.no_grad(), ranks.autocast(cfg.bf16):
                held = ranks.mean(wrapped(losses, valid, *held_out))
            # a column for each objective; NaN where one is no longer trained
            row = {"update": update + 1} | {k: math.nan for k in held if k != "error"} | ranks.mean(loss)
            row |= {f"valid_{name}": value for name, value in held.items()} | {"seconds": run.seconds()}
            run.log(update + 1, row)
            if not all(map(math.isfinite, held.values())):
                raise UserError(f"--lr {cfg.lr}: held-out losses are no numbers any more; take a smaller one")
            now.update = update + 1
            better = now.better(held)
            if "bc" in better:
                run.keep(**{"policy" if cfg.policy == "best" else "early_policy": model})
            if {"loss": "steps_to_go", "error": "error"}[cfg.reward] in better:
                run.keep(reward=model)
            if cfg.policy == "last":  # the paper's Aloha: an over-fitted policy is the better one
                run.keep(policy=model)
        run.checkpoint()

    told = {"stage": "stage1", "domain": cfg.domain, "obs": cfg.obs, "seed": cfg.seed}
    told["episodes"] = len(train.ends) + len(valid.ends)
    run.finish(told, lambda: measure(run.folder, valid, steps, cfg))


if __name__ == "__main__":
    cli(Config, main, several=True)
