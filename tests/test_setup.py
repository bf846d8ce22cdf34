"""What a stage's setup chooses: the learning rate, the run that it starts from, the defaults of a domain."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import envs
import stage1
import stage2
from common import UserError, setup
from common.setup import learning_rate


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def finished(name: str, time: int, config: str = "{}") -> Path:
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config)
    (folder / "summary.json").write_text("{}")
    os.utime(folder / "summary.json", (time, time))
    return folder


# --- the learning rate --------------------------------------------------------------------------------
def test_learning_rate():
    assert learning_rate(0, 1000, 3.0) == pytest.approx(3.0 / 100)
    assert learning_rate(24, 10**7, 3.0) == pytest.approx(0.75)  # linear in the warm-up
    assert learning_rate(500, 1000, 3.0) == pytest.approx(0.55 * 3)  # half-way down
    assert learning_rate(1000, 1000, 3.0) == pytest.approx(0.3)  # a tenth
    assert all(0 < learning_rate(u, 4, 1.0) <= 0.04 for u in range(4))  # a run shorter than the warm-up


def test_learning_rate_warms_up_and_decays_to_a_tenth():
    rates = [learning_rate(u, 1000, 2.0) for u in range(1000)]
    assert rates[0] == pytest.approx(0.02) and rates[49] == pytest.approx(1.0, rel=0.02)
    assert max(rates) <= 2.0 and int(np.argmax(rates)) == 99
    assert rates[-1] == pytest.approx(0.2, rel=1e-3)
    assert all(a > b for a, b in zip(rates[99:], rates[100:], strict=False))


# --- which run ----------------------------------------------------------------------------------------
def test_practice_takes_the_newest_stage1_run_or_the_one_that_is_named():
    with pytest.raises(UserError, match=r"runs/.*--stage1"):
        setup.stage2(stage2.Config())
    finished("pointmass-images-stage1-s5", 10)
    finished("pointmass-images-stage0-s5", 20)
    for given, taken in ((None, "runs/pointmass-images-stage1-s5"), ("elsewhere/x", "elsewhere/x")):
        with pytest.raises(UserError, match=f"^{taken}/config.json: "):
            setup.stage2(stage2.Config(stage1=given))


def test_stage1_from_images_takes_the_newest_stage0_run_or_the_one_that_is_named(capsys):
    env = envs.make_vec("pointmass", 1, obs="images")

    def chosen(init: str | None, obs: str = "images") -> Path | None:
        return setup.starting_run(stage1.Config(init=init, obs=obs), env)

    assert chosen(None) is None and "stage0.py" in capsys.readouterr().out
    finished("pointmass-images-stage0-s1", 10)
    finished("other-images-stage0-s0", 20)
    assert chosen(None) == Path("runs/pointmass-images-stage0-s1")
    assert "runs/pointmass-images-stage0-s1" in capsys.readouterr().out  # which one, is said
    assert chosen("none") is None
    assert chosen("elsewhere/x") == Path("elsewhere/x")
    assert chosen(None, "state") is None and chosen("elsewhere/x", "state") == Path("elsewhere/x")


def test_a_model_of_states_can_start_where_only_the_images_differ():
    """The second image is another one there, and a model of states reads none."""
    folder = finished("tabletop-stage1-s0", 10, '{"domain": "tabletop,history=1"}')
    for obs in ("state", "images"):
        env = envs.make_vec("tabletop", 1, obs=obs)
        cfg = stage1.Config(domain="tabletop", init=str(folder), obs=obs)
        if obs == "state":
            assert setup.starting_run(cfg, env) == folder
        else:
            with pytest.raises(UserError, match=f"--init {folder}: its second image"):
                setup.starting_run(cfg, env)


# --- whose scenes are like whose ----------------------------------------------------------------------
@pytest.mark.parametrize(("domain", "taught", "obs", "complaint"), [
    ("bananatable", "tabletop", "images", None),  # frames of other things are frames
    ("bananatable", "tabletop", "state", "--domain bananatable: its actions or observations"),
    ("tabletop,blocks=8", "tabletop", "images", "--domain tabletop,blocks=8: its"),  # twice the horizon
    ("pointmass", "tabletop", "images", "--domain pointmass: its"),
])  # fmt: skip
def test_who_may_practise_where(domain, taught, obs, complaint):
    pair = [envs.make_vec(name, 1, obs=obs) for name in (domain, taught)]
    if complaint is None:
        setup.require_alike(*pair)
        return
    with pytest.raises(UserError, match=complaint):
        setup.require_alike(*pair)


# --- turns --------------------------------------------------------------------------------------------
def test_few_demonstrations():
    for flags, turns in (
        ({"episodes": 1000}, True),
        ({"episodes": 1001}, None),
        ({"episodes": 4000, "data_fraction": 0.25}, True),
        ({"episodes": 1000, "turns": False}, False),
        ({"episodes": 4000, "turns": True}, True),
        ({"episodes": 500, "symmetries": False}, None),
        ({"episodes": 500, "family": "block2absolutelocation"}, None),  # every sentence names a side
    ):
        family = flags.pop("family", "block2block")
        cfg = stage1.Config(domain=f"tabletop,family={family}", out="run", **flags)
        setup.stage1(cfg)
        assert cfg.turns is turns
        few = turns and cfg.episodes * cfg.data_fraction <= 1000
        assert (cfg.reward, cfg.policy) == (("error", "last") if few else ("loss", "best"))
    cfg = stage1.Config(domain="tabletop", episodes=1000, reward="loss", policy="best", out="run")
    setup.stage1(cfg)
    assert cfg.reward == "loss" and cfg.policy == "best" and cfg.turns
    cfg = stage1.Config(domain="pointmass", out="run")
    setup.stage1(cfg)
    assert cfg.episodes == 1000 and cfg.turns and (cfg.reward, cfg.policy) == ("error", "last")
    assert cfg.updates == 3000  # what is not turned takes longer
    for more in ({"turns": False}, {"episodes": 1001}, {"symmetries": False}):
        cfg = stage1.Config(domain="pointmass", out="run", **more)
        setup.stage1(cfg)
        assert cfg.updates == 9000 and not cfg.turns and (cfg.reward, cfg.policy) == ("loss", "best")
    for more in ({"domain": "aloha"}, {"domain": "pointmass", "obs": "images"}, {"domain": "tabletop", "symmetries": False}):
        with pytest.raises(UserError, match="--turns True: for pointmass and tabletop from states"):
            setup.stage1(stage1.Config(turns=True, out="run", **more))
