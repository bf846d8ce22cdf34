"""What test_scale.py has torchrun start on two CPU processes: both stages, and sharded weights."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import envs.pointmass
import stage1
import stage2
from common import ranks, runs
from common.weights import trainable_state
from model import EFM, EFMConfig
from tests.conftest import declare_torchvision_ops
from tests.tiny import SIZES, tiny_presets
from tokens import StepsToGo, Tokenizer

STAGES = {"stage1": stage1, "stage2": stage2}


def short(patch) -> None:
    """patch(object, name, value): short episodes, no evaluation; here and in the test's own process."""
    patch(envs.pointmass.PointmassVectorEnv, "horizon", 8)
    for stage in STAGES.values():
        patch(stage, "evaluate", lambda *_, **__: {})
    patch(stage2, "first_look", lambda *_: [1000.0, 0.0])  # a few updates are better than that


def run(stage: str, out: str, cut: int = 0, **settings) -> None:
    """A stage's main; "OUT-cut" is its folder as a kill after `cut` checkpoints would leave it (0: none)."""
    checkpoint, calls = runs.Run.checkpoint, []

    def copies(self):
        checkpoint(self)
        calls.append(self)
        if len(calls) == cut and ranks.rank() == 0:
            shutil.copytree(out, f"{out}-cut")

    runs.Run.checkpoint = copies
    try:
        STAGES[stage].main(STAGES[stage].Config(out=out, **settings))
    finally:
        runs.Run.checkpoint = checkpoint


def sharded_is_whole() -> None:
    """Updates by FSDP2 on halves of a batch are one process's on all of it; each rank rolls out between."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["move to the red goal"])
    model = EFM(EFMConfig(**SIZES | {"depth": 2}, image_size=32), tokenizer)
    reference = copy.deepcopy(model)
    wrapped = ranks.distribute(model, shard=True)
    images, answer = torch.randint(0, 256, (4, 2, 32, 32, 3), dtype=torch.uint8), torch.randint(0, 21, (4, 2))
    half, ranges, steps = slice(2 * ranks.rank(), 2 * ranks.rank() + 2), [(0, 21)] * 2, StepsToGo(140, 140)
    both = [(m, torch.optim.SGD(m.parameters(), lr=0.1)) for m in (model, reference)]
    for _ in range(3):
        with ranks.unsharded(model), torch.no_grad():
            for _ in range(1 + 2 * ranks.rank()):  # without waiting for the other rank, who is done sooner
                features = model.encode_images(images)
                torch.testing.assert_close(features, reference.encode_images(images))
                obs, goals = {"features": features}, ["the red goal"] * 4
                torch.testing.assert_close(model.steps_to_go(obs, goals, steps), reference.steps_to_go(obs, goals, steps))
                drawn = [m.sample(obs, goals, ranges, torch.Generator().manual_seed(0))[0] for m, _ in both]
                assert torch.equal(*drawn)
        losses = [-wrapped(EFM.log_prob, {"images": images[half]}, ["go"] * 2, answer[half], ranges).mean(),
                  -reference.log_prob({"images": images}, ["go"] * 4, answer, ranges).mean()]  # fmt: skip
        assert abs(ranks.mean({"loss": losses[0]})["loss"] - losses[1].item()) < 1e-5
        for loss, (m, optimizer) in zip(losses, both, strict=True):
            optimizer.zero_grad()
            loss.backward()
            norm = ranks.full_state(torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0))
            optimizer.step()
        assert abs(norm.item() - ranks.full_state(norm).item()) < 1e-5
    weights = ranks.full_state(trainable_state(model))
    if ranks.rank() == 0:
        assert weights.keys() == reference.state_dict().keys()
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-5)


if __name__ == "__main__":
    ops = declare_torchvision_ops()  # peft imports transformers
    short(setattr)
    with tiny_presets(), ranks.process_group(several=True):
        sharded_is_whole()
        for job in json.loads(sys.argv[1]):
            run(**job)
