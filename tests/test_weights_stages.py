"""Both stages from PaliGemma's weights, another run as reward model, what is wrong on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import envs
import stage1
import stage2
from common import demos, setup
from common.weights import load_model, load_paligemma, save_model
from model import EFM, PRESETS, EFMConfig
from tests.test_cli import call
from tests.test_weights import cut, make_oracle, make_timm_models  # noqa: F401
from tokens import Tokenizer

ONE = ["--episodes", "20", "--updates", "2", "--batch", "4", "--eval-every", "1", "--eval-episodes", "2"]
TWO = ["--iterations", "1", "--updates", "1", "--batch", "4", "--num-envs", "2", "--first-look", "2", "--eval-episodes", "2"]
FIRST = Path("runs/pointmass-images-stage1-s0")


@pytest.fixture(scope="module")
def finished(oracle, tmp_path_factory):
    """The present folder of a finished `stage1.py --model paligemma`; episodes have eight steps at most."""
    with pytest.MonkeyPatch.context() as m:
        m.chdir(tmp_path_factory.mktemp("here"))
        demos.load_demonstrations(stage1.Config(obs="images", episodes=20))
        m.setattr("envs.pointmass.PointmassVectorEnv.horizon", 8)
        call(stage1, [*ONE, "--model", "paligemma", "--weights", str(oracle("grouped")[1])])
        yield


def test_both_stages_run_from_paligemma(finished, oracle):
    start, policy = load_paligemma(oracle("grouped")[1]), load_model(FIRST / "policy.safetensors")
    assert policy.cfg == start.cfg and policy.cfg.resize
    changed = [name for name, p in policy.named_parameters() if not torch.equal(p, start.get_parameter(name))]
    assert len(changed) == len(list(policy.parameters()))  # nothing is frozen in Stage 1
    call(stage2, TWO)
    second = Path("runs/pointmass-images-stage2-s0")
    assert json.loads((second / "summary.json").read_text())["eval_episodes"] == 2
    assert (second / "reward.safetensors").read_bytes() == (FIRST / "reward.safetensors").read_bytes()


def test_another_run_as_reward_model(finished, capsys):
    """Figure 4's ablation: the policy of one Stage 1 run, judged by another, here of other weights, size and words."""
    env = envs.make_vec("pointmass", 1, obs="images")
    other = Path("runs/other")
    other.mkdir()
    judge = EFM(EFMConfig(image_size=env.size), Tokenizer.train(env.instructions()))
    save_model(judge, other / "reward.safetensors")
    command = [*TWO, "--stage1", str(FIRST), "--reward-run", str(other), "--out"]
    for domain, obs in (("tabletop", "images"), ("pointmass", "state"), ("pointmass", None)):
        (other / "config.json").write_text(json.dumps({"domain": domain, "obs": obs}))
        with pytest.raises(SystemExit) as end:
            call(stage2, [*command, "runs/new"])
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1 and "--reward-run runs/other: not a Stage 1 run" in error
    (other / "config.json").write_text(json.dumps({"domain": "pointmass", "obs": "images"}))
    call(stage2, [*command, "runs/ablation"])
    assert Path("runs/ablation/reward.safetensors").read_bytes() == (other / "reward.safetensors").read_bytes()
    assert load_model(Path("runs/ablation/policy.safetensors")).cfg.image_size == 28
    assert not Path("runs/new").exists()


def test_stage1_starts_from_a_vit_of_timm(timm_models, tmp_path):
    env = envs.make_vec("pointmass", 1, obs="images")
    model = setup.initial_model(stage1.Config(obs="images", model="small", vit="timm:vit_base_patch32_siglip_256"), env, None)
    assert (model.cfg.image_size, model.cfg.vit_width, model.cfg.width) == (256, 48, PRESETS["small"].width)
    save_model(model, tmp_path / "policy.safetensors")
    assert setup.load_checkpoint(tmp_path / "policy.safetensors", env).cfg == model.cfg  # of another size, but it scales frames


@pytest.mark.parametrize(
    ("args", "culprit"),
    [
        ("--model paligemma", "--weights"),
        ("--weights W", "--model paligemma"),
        ("--model nano-vision --weights W", "--model"),
        ("--model paligemma --weights W --obs state", "--obs state"),
        ("--vit timm:vit_base_patch16_siglip_224 --obs state", "--obs"),
        ("--model paligemma --weights W --init runs/x", "--init runs/x"),
        ("--model paligemma --weights nothing", "nothing"),
        (
            "--model paligemma --weights google/paligemma-3b-pt-224",
            "huggingface.co/google/paligemma-3b-pt-224",
        ),
        ("--model paligemma --weights W --vit clip", "clip: not a vision tower"),
        ("--vit timm:nope", "timm:nope"),
        ("--model paligemma --weights W --vit timm:vit_base_patch32_siglip_256", "of a paligemma model"),
        ("--model paligemma --weights DAMAGED", "model.safetensors"),
    ],
)
def test_wrong_weights_are_one_line_and_nothing_is_written(oracle, timm_models, tmp_path, monkeypatch, capsys, args, culprit):
    folder = oracle("grouped")[1]
    shutil.copytree(folder, tmp_path / "damaged")
    cut(tmp_path / "damaged" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    given = args.replace("DAMAGED", "damaged").replace(" W", f" {folder}").split()
    with pytest.raises(SystemExit) as end:
        call(stage1, [*ONE, *given])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and error.startswith("stage1.py: ") and culprit in error, error
    assert sorted(tmp_path.rglob("*")) == before
