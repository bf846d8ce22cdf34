"""Figure 4: pictures and words on their own in Stage 0, another run's d in Stage 2, one command for the whole."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import envs
import stage0
import stage1
import stage2
from common import UserError, setup
from common.runs import Run
from common.unimodal import cell_colours, picture_loss, word_loss
from common.weights import load_model
from model import EFM, EFMConfig
from tests import tiny
from tests.runs import train
from tests.test_three_ways import script
from tokens import Tokenizer

figure4 = script("figure4")
measuring = sys.modules["measuring"]
UNIMODAL = "runs/pointmass-images-unimodal-stage0-s0"


def small(image_size: int) -> EFM:
    env = envs.make_vec("pointmass", 1, obs="images")
    cfg = EFMConfig(width=8, depth=1, heads=2, kv_heads=2, head_dim=4, mlp_dim=16, image_size=image_size,
                    patch_size=4, vit_width=6, vit_depth=1, vit_heads=2, vit_mlp_dim=8)  # fmt: skip
    torch.manual_seed(0)
    return EFM(cfg, Tokenizer.train([*env.instructions(), *env.questions()]))


# --- the equations ----------------------------------------------------------------------------------------
def test_cell_colours_by_hand():
    images = np.random.default_rng(0).integers(0, 256, (2, 2, 17, 17, 3), dtype=np.uint8)  # one pixel too many
    told = cell_colours(torch.from_numpy(images), 8)
    assert told.shape == (2, 2, 4, 48)
    part = images[1, 0, 8:16, 0:8]  # patch 2: below, left
    for row, column, colour in ((0, 0, 0), (3, 1, 2), (2, 3, 1)):
        cell = part[2 * row : 2 * row + 2, 2 * column : 2 * column + 2, colour] / 127.5 - 1
        assert told[1, 0, 2, 16 * colour + 4 * row + column].item() == pytest.approx(cell.mean(), abs=1e-5)


def test_picture_loss_by_hand():
    model, head = small(8), nn.Linear(6, 96)
    images = torch.randint(0, 256, (1, 2, 8, 8, 3), dtype=torch.uint8)
    with torch.no_grad():
        loss = picture_loss(model, head, images).item()
        f = model.encode_images(images)
        c = images.float() / 127.5 - 1  # a cell is a pixel here
        errors = []
        for view in range(2):
            for n, (row, column) in enumerate(((0, 0), (0, 4), (4, 0), (4, 4))):
                cells = [c[0, v, row : row + 4, column : column + 4].permute(2, 0, 1).flatten() for v in (view, 1 - view)]
                errors.append((head.weight @ f[0, view, n] + head.bias - torch.cat(cells)) ** 2)
    assert loss == pytest.approx(torch.stack(errors).mean().item(), abs=1e-5)


def test_word_loss_by_hand():
    model, text, question = small(8), "move to the red goal", "where is the point"
    tokens = stage0.ANSWER.encode(torch.tensor([[0.5, 0.25]]))
    assert tokens.tolist() == [[32, 16]]
    ids = model.tokenizer.answers([text])[0]  # five words and <eos>
    with torch.no_grad():
        loss = word_loss(model, [text], [question], tokens, [(0, 64)] * 2).item()
        scores = model.logits(model.hidden({}, [""], ids), None)[0]
        written = sum(scores[i].log_softmax(-1)[ids[0, i]].item() for i in range(6))
        x, y = model.log_probs({}, [question], tokens, [(0, 64)] * 2)
    assert ids.shape == (1, 6)
    assert loss == pytest.approx(-written - x[0, 32].item() - y[0, 16].item(), abs=1e-4)


def test_words_never_reach_the_vision_tower_nor_pictures_the_decoder():
    model, head = small(8), nn.Linear(6, 96)
    images = torch.randint(0, 256, (2, 2, 8, 8, 3), dtype=torch.uint8)
    answers = torch.randint(0, 64, (2, 2))

    def reached(loss: torch.Tensor) -> set[str]:
        model.zero_grad()
        loss.backward()
        return {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}

    words = ["move to the red goal", "where is the blue spot"], ["where is the point"] * 2, answers, [(0, 64)] * 2
    assert reached(word_loss(model, *words)) == {"language_model"}
    assert all(p.grad is not None for p in model.language_model.parameters())
    assert reached(picture_loss(model, head, images)) == {"vision_tower"}
    assert all(p.grad is not None for p in model.vision_tower.parameters())


# --- a run ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def unimodal(tmp_path_factory):
    """A folder with a tiny unimodal Stage 0 in its usual place, interrupted once, and one that was not."""
    folder, checkpoint = tmp_path_factory.mktemp("unimodal"), Run.checkpoint

    def stop(run):
        checkpoint(run)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train("stage0", folder / "runs/uninterrupted", unimodal=True)
        with patch.context() as inner, pytest.raises(KeyboardInterrupt):
            inner.setattr(Run, "checkpoint", stop)
            train("stage0", folder / UNIMODAL, unimodal=True)
        train("stage0", folder / UNIMODAL, unimodal=True, resume=True)
        yield folder


def test_a_resumed_run_ends_in_the_same_bytes(unimodal):
    run, reference = unimodal / UNIMODAL, unimodal / "runs/uninterrupted"
    assert (run / "policy.safetensors").read_bytes() == (reference / "policy.safetensors").read_bytes()
    assert tiny.metrics(run) == tiny.metrics(reference)
    (head, *_) = tiny.metrics(run)
    assert head == ["update", "pictures", "words", "valid_pictures", "valid_words", "valid_error"]


def test_both_towers_learn_and_the_projection_is_fresh(unimodal, monkeypatch):
    before = []
    monkeypatch.setattr(Run, "track", lambda run, **things: before.append(things["model"]))
    with tiny.tiny_presets():
        setup.stage0(stage0.Config(unimodal=True, out=str(unimodal / "runs/new")))
    after = load_model(unimodal / "runs/uninterrupted/policy.safetensors").state_dict()
    same = {name for name, weights in before[0].state_dict().items() if torch.equal(weights, after[name])}
    assert same == {"multi_modal_projector.weight", "multi_modal_projector.bias"}


def test_stage1_starts_from_it_where_it_is_named(unimodal):
    assert (unimodal / UNIMODAL / "summary.json").exists()
    with tiny.tiny_presets():
        env = envs.make_vec("pointmass", 1, obs="images")
        assert setup.starting_run(stage1.Config(obs="images"), env) is None  # it is no "newest Stage 0 run"
        _, _, model = setup.stage1(stage1.Config(obs="images", init=UNIMODAL, out=str(unimodal / "runs/one")))
    told = load_model(unimodal / UNIMODAL / "policy.safetensors").state_dict()
    assert all(torch.equal(weights, told[name]) for name, weights in model.state_dict().items())


def test_a_resume_without_the_flag_is_refused(unimodal):
    with pytest.raises(UserError, match="--unimodal True, this is False"):
        train("stage0", unimodal / UNIMODAL, resume=True)


# --- whose threshold --------------------------------------------------------------------------------------
def test_the_threshold_is_that_of_the_reward_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, s in (("policy", 7.0), ("judge", 2.0)):
        tiny.stage1_run(Path(f"runs/{name}"), "images")
        (Path("runs") / name / "summary.json").write_text(json.dumps({"success_threshold": s}))
    for judge, s in (("runs/judge", 2.0), (None, 7.0)):
        cfg = stage2.Config(stage1="runs/policy", reward_run=judge, out="runs/new")
        setup.stage2(cfg)
        assert cfg.success_threshold == s
    assert not Path("runs/new").exists()


# --- what is measured -------------------------------------------------------------------------------------
def test_rank_correlation_by_hand():
    assert measuring.ranking(np.array([3.0, 1.0, 3.0, 9.0])).tolist() == [2.5, 1, 2.5, 4]
    a = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert measuring.rank_correlation(a, np.exp(a)) == pytest.approx(1)
    assert measuring.rank_correlation(a, -a) == pytest.approx(-1)
    # without equal ones it is 1 - 6 Σ (difference of ranks)² / (n (n² - 1))
    assert measuring.rank_correlation(a, np.array([2.0, 1.0, 4.0, 3.0, 5.0])) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert np.isnan(measuring.rank_correlation(a, np.ones(5)))


def test_the_detector_by_hand():
    """Of ten episodes each: 4 detected, 1 of them wrongly, 5 truly there; then 8, 1 and 9."""
    practice = [{"detected": 0.4, "false_positives": 0.1, "true_at_end": 0.5},
                {"detected": 0.8, "false_positives": 0.1, "true_at_end": 0.9}]  # fmt: skip
    told = figure4.detector(practice)
    assert told["precision"] == pytest.approx(10 / 12) and told["recall"] == pytest.approx(10 / 14)
    never = figure4.detector([dict.fromkeys(practice[0], 0.0)])
    assert np.isnan(never["precision"]) and np.isnan(never["recall"])


@pytest.mark.slow
def test_the_pilot(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tiny.pilot_twice(figure4, "figure4", monkeypatch)
    with open(folder / "figure4.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(r["share"], r["start"]) for r in rows] == [("0.5", start) for start in figure4.STARTS]
    assert len({r["stage1_success"] for r in rows}) == 1  # always the whole one's policy
    assert (folder / "figure4.png").stat().st_size > 10_000
    for row in rows:
        reward = folder / f"{row['start']}-0.5-stage1-s0"
        told = json.loads((folder / f"{row['start']}-0.5-stage2-s0/config.json").read_text())
        assert told["stage1"] == str(folder / "whole-0.5-stage1-s0")
        assert told["reward_run"] == str(reward)
        measured = json.loads((reward / "summary.json").read_text())["success_threshold"]
        assert told["success_threshold"] == measured == pytest.approx(float(row["success_threshold"]), rel=1e-5)
    assert "| 50% | whole |" in capsys.readouterr().out


@pytest.mark.parametrize(("shares", "complaint"), [((), "--shares: name"), ((0.1, 2.0), "--shares 2.0: must")])
def test_wrong_shares_are_refused_before_anything_is_trained(shares, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=complaint):
        figure4.main(figure4.Config(shares=shares, updates=(9,) * len(shares)))
    assert list(tmp_path.iterdir()) == []


def test_updates_are_told_for_each_share(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--updates: 2 numbers for 1 --shares"):
        figure4.main(figure4.Config(shares=(0.1,)))
    with pytest.raises(UserError, match="--updates: must be at least 1"):
        figure4.main(figure4.Config(shares=(0.1,), updates=(0,)))
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_other_flags_is_refused(unimodal):
    with pytest.raises(UserError, match=f"{UNIMODAL}: was started with --updates 5, this is 7"):
        figure4.finish(stage0.main, stage0.Config(updates=7, batch=4, eval_every=2, unimodal=True, out=UNIMODAL))


# --- the page ---------------------------------------------------------------------------------------------
def test_the_page_has_the_defaults():
    page = (Path(stage0.__file__).parent / "docs/pretraining.md").read_text()
    defaults = figure4.Config()
    assert defaults.updates == (3000, 9000) and "| `--updates` | 3,000 9,000 |" in page
    for flag, default in (("seeds", 3), ("episodes", 6000), ("iterations", 300)):
        assert getattr(defaults, flag) == default and f"| `--{flag}` | {default:,} |" in page
