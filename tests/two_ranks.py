"""What test_scale.py has torchrun start on two processes: runs of the stages, sharded weights and whole ones."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import envs.pointmass
import stage1
import stage2
from common import ranks, setup
from common.runs import Run
from common.weights import trainable_state
from model import EFM, PRESETS, EFMConfig
from tests.conftest import declare_torchvision_ops
from tokens import StepsToGo, Tokenizer

SIZES = {"width": 16, "depth": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp_dim": 16,
         "vit_width": 16, "vit_heads": 2, "vit_mlp_dim": 16}  # fmt: skip
STAGES = {"stage1": stage1, "stage2": stage2}


def small_and_short(patch) -> None:
    """patch(object, name, value): tiny models, short episodes, no evaluation; here and in the test's own process."""
    patch(setup, "PRESETS", PRESETS | {"nano": dataclasses.replace(PRESETS["nano"], **SIZES)})
    patch(envs.pointmass.PointmassVectorEnv, "horizon", 8)
    for script in STAGES.values():
        patch(script, "evaluate", lambda *_, **__: {})


def run(stage: str, out: str, cut: int = 0, **settings) -> None:
    """A stage's main; "OUT-cut" is the run's folder as a kill after `cut` checkpoints would have left it (0: none)."""
    checkpoint, calls = Run.checkpoint, []

    def copies(self):
        checkpoint(self)
        calls.append(self)
        if len(calls) == cut and ranks.rank() == 0:
            shutil.copytree(out, f"{out}-cut")

    Run.checkpoint = copies
    try:
        STAGES[stage].main(STAGES[stage].Config(out=out, **settings))
    finally:
        Run.checkpoint = checkpoint


def sharded_is_whole() -> None:
    """Updates by FSDP2 on halves of a batch are those of one process on all of it; between them ranks roll out."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["move to the red goal"])
    model = EFM(EFMConfig(**SIZES | {"depth": 2}, image_size=32), tokenizer)
    reference = copy.deepcopy(model)
    wrapped = ranks.distribute(model, shard=True)
    images = torch.randint(0, 256, (4, 2, 32, 32, 3), dtype=torch.uint8)
    answer = torch.randint(0, 21, (4, 2))
    half, allowed, steps = slice(2 * ranks.rank(), 2 * ranks.rank() + 2), [(0, 21)] * 2, StepsToGo(140, 140)
    both = [(m, torch.optim.SGD(m.parameters(), lr=0.1)) for m in (model, reference)]
    for _ in range(3):
        with ranks.unsharded(model), torch.no_grad():
            for _ in range(1 + 2 * ranks.rank()):  # without waiting for the other rank, who is done sooner
                features = model.encode_images(images)
                torch.testing.assert_close(features, reference.encode_images(images))
                obs, goals = {"features": features}, ["the red goal"] * 4
                d, expected = (m.steps_to_go(obs, goals, steps) for m in (model, reference))
                torch.testing.assert_close(d, expected)
                seeds = [torch.Generator().manual_seed(0) for _ in both]
                pairs = zip(both, seeds, strict=True)
                drawn = [m.sample(obs, goals, allowed, seed)[0] for (m, _), seed in pairs]
                assert torch.equal(*drawn)
        part = wrapped(EFM.log_prob, {"images": images[half]}, ["go"] * 2, answer[half], allowed)
        whole = reference.log_prob({"images": images}, ["go"] * 4, answer, allowed)
        losses = [-part.mean(), -whole.mean()]
        assert abs(ranks.mean({"loss": losses[0]})["loss"] - losses[1].item()) < 1e-5
        norms = []
        for loss, (m, optimizer) in zip(losses, both, strict=True):
            optimizer.zero_grad()
            loss.backward()
            norm = ranks.full_state(torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0))
            optimizer.step()
            norms.append(norm.item())
        assert abs(norms[0] - norms[1]) < 1e-5 and norms[0] > 0
    weights = ranks.full_state(trainable_state(model))
    if ranks.rank() == 0:
        assert weights.keys() == reference.state_dict().keys()
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-5)


if __name__ == "__main__":
    ops = declare_torchvision_ops()  # peft imports transformers
    small_and_short(setattr)
    with ranks.process_group(several=True):
        sharded_is_whole()
        for job in json.loads(sys.argv[1]):
            run(**job)
