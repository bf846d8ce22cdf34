"""Stage 0: answers are where things are drawn, questions are in the vocabulary, a batch can be learnt."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import envs
import stage0
import stage1
from common import UserError
from common.weights import load_model
from envs.pointmass import POINT_RADIUS, WALL
from envs.tabletop import TabletopVectorEnv
from model import EFM, PRESETS, EFMConfig
from pointmass import GOAL_RADIUS
from tokens import Tokenizer

COLOURS, N = ("red", "green", "blue"), 2000


@pytest.fixture(scope="module")
def scenes():
    env = envs.make_vec("pointmass", 1, obs="images")
    return env, *env.scenes(np.random.default_rng(0), N)[:3]


def disc(weight: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Where a disc is, in shares of the frame, y up, float (N, 2); bool (N,): it is whole and alone.

    weight float (N, H, W).
    """
    share = (np.arange(weight.shape[1]) + 0.5) / weight.shape[1]
    place = np.stack(np.broadcast_arrays(share, share[::-1, None]))  # (2, H, W)
    area = np.maximum(weight.sum((1, 2)), 1e-9)
    centre = np.einsum("nhw,chw->nc", weight, place) / area[:, None]  # (N, 2)
    square = np.einsum("nhw,chw->nc", weight, place**2) / area[:, None]  # (N, 2)
    spread = (square - centre**2).sum(1)
    radius /= 2 * WALL  # to shares of the frame
    whole = np.abs(area / weight[0].size / (np.pi * radius**2) - 1) < 0.1
    alone = np.abs(spread / (radius**2 / 2) - 1) < 0.2
    return centre, whole & alone


def seen(frames: np.ndarray, zoom: float = 1) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The discs of frames uint8 (N, H, W, 3) by what they are: place and whether it is whole, as `disc`."""
    light = (frames.astype(float) - 127) / 128  # 0 on the grey table
    least, most = light.min(-1), light.max(-1)
    found = {}
    for i, colour in enumerate(COLOURS):
        found[colour] = disc((light[..., i] - least.clip(0)).clip(0), zoom * GOAL_RADIUS)
    return found | {
        "point": disc(least.clip(0), zoom * POINT_RADIUS),
        "wake": disc((-most).clip(0), zoom * POINT_RADIUS),
    }  # white, black


def test_shapes(scenes):
    env, images, questions, answers = scenes
    assert images.shape == (N, 2, env.size, env.size, 3) and images.dtype == np.uint8
    assert len(questions) == N and answers.shape == (N, 2) and answers.dtype == np.float32
    assert answers.min() >= 0 and answers.max() <= 1


def test_answers_are_where_things_are_drawn(scenes):
    env, images, questions, answers = scenes
    now, near, checked = seen(images[:, 0]), seen(images[:, 1], 2), {}
    for i, question in enumerate(questions):
        colour = next((c for c in COLOURS if c in question.split()), None)
        point, whole = now["point"][0][i], now["point"][1][i]
        if colour is None:
            kind = "wake" if "was" in question else "point"
            place, whole = (x[i] for x in (near if kind == "wake" else now)[kind])
        else:
            goal, clear = now[colour][0][i], now[colour][1][i]
            kind = "away" if "from the point" in question else "goal"
            place = {"goal": goal, "away": (goal - point) / 2 + 0.5}[kind]
            whole = clear and (whole or kind == "goal")
        if whole:
            error = np.abs(place - answers[i]).max()
            assert error <= 0.5 / env.size, question  # half a pixel
            checked[kind] = checked.get(kind, 0) + 1
    assert checked.keys() == {"goal", "away", "point", "wake"} and min(checked.values()) >= 30, checked


def test_every_question_is_asked_and_in_the_vocabulary(scenes):
    env, _, questions, _ = scenes
    assert set(questions) == set(env.questions())  # in so many scenes
    assert len(set(env.questions())) == len(env.questions())
    tokenizer = Tokenizer.train([*env.instructions(), *env.questions()])
    unknown = tokenizer.tokenizer.token_to_id("<unk>")
    texts = [*env.questions()]
    for goal in env.instructions():
        texts += ["What robot action to " + goal, "How many steps to " + goal]
    ids, _ = tokenizer.prompts(texts)
    assert unknown is not None and not (ids == unknown).any()
    assert (tokenizer.prompts(["where is the purple goal"])[0] == unknown).any()
    assert len({tuple(i) for i in ids.tolist()}) == len(texts)  # no two texts look alike


def test_no_scene_names_an_action_or_steps(scenes):
    env = scenes[0]
    words = " ".join(env.questions()).lower().split()
    assert "where" in words
    assert not {"action", "steps", "many", "move", "go", "to"} & set(words)


def test_scenes_follow_their_generator():
    env = envs.make_vec("pointmass", 1, obs="images")
    a, b, c = (env.scenes(np.random.default_rng(seed), 8) for seed in (1, 1, 2))
    assert np.array_equal(a[0], b[0]) and a[1] == b[1] and np.array_equal(a[2], b[2], equal_nan=True)
    assert not np.array_equal(a[0], c[0])


def test_answer_loss_is_that_of_the_number_tokens(scenes):
    env, images, questions, answers = scenes
    torch.manual_seed(0)
    model = small(env)
    n = 8
    tokens = (answers[:n] * 64).astype(int).clip(0, 63)
    with torch.no_grad():
        features = model.encode_images(torch.from_numpy(images[:n]))
        loss = stage0.answer_loss(model, features, questions[:n], torch.from_numpy(answers[:n]))
        shown = {"images": torch.from_numpy(images[:n])}
        x, y = model.log_probs(shown, questions[:n], torch.from_numpy(tokens), [(0, 64)] * 2)
    every = np.array([[x[i, tokens[i, 0]].item(), y[i, tokens[i, 1]].item()] for i in range(n)])
    expected = -every.sum(1).mean()
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    with torch.no_grad():  # two questions of each of four scenes, a scene's together
        loss = stage0.answer_loss(model, features[:4], questions[:n], torch.from_numpy(answers[:n]))
        shown = {"images": torch.from_numpy(images[[0, 0, 1, 1, 2, 2, 3, 3]])}
        expected = -model.log_prob(shown, questions[:n], torch.from_numpy(tokens), [(0, 64)] * 2).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def small(env) -> EFM:
    cfg = EFMConfig(width=48, depth=2, heads=4, kv_heads=2, head_dim=12, mlp_dim=96, image_size=env.size,
                    patch_size=8, vit_width=48, vit_depth=1, vit_heads=4, vit_mlp_dim=96)  # fmt: skip
    return EFM(cfg, Tokenizer.train([*env.instructions(), *env.questions()]))


def test_overfits_a_batch(scenes):
    env, images, questions, answers = scenes
    torch.manual_seed(0)
    model = small(env)
    images, questions, answers = torch.from_numpy(images[:16]), questions[:16], torch.from_numpy(answers[:16])
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(100):
        loss = stage0.answer_loss(model, model.encode_images(images), questions, answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 5  # about log 32² = 6.9 to begin with
    assert losses[-1] < 0.3
    tokens, _ = model.sample({"images": images}, questions, stage0.ANSWER.ranges, greedy=True)
    assert (stage0.ANSWER.decode(tokens) - answers).abs().nanmean() < 0.02


def test_pointing_loss_by_hand():
    """Scores are a patch's embedding times the mean of a name's words; a thing out of view does not count."""
    torch.manual_seed(0)
    env = envs.make_vec("tabletop", 1, obs="images")
    cfg = EFMConfig(width=8, depth=1, heads=2, kv_heads=2, head_dim=4, mlp_dim=16, image_size=4, patch_size=2,
                    vit_width=6, vit_depth=1, vit_heads=2, vit_mlp_dim=8)  # fmt: skip
    model = EFM(cfg, Tokenizer.train([*env.instructions(), *env.questions()]))
    features = torch.randn(2, 2, 4, 6)
    places = torch.full((2, 2, 2, 2), 1.5)  # all out of view
    places[0, 0, 0] = torch.tensor([0.9, 0.1])  # right, top: patch 1
    places[1, 1, 1] = torch.tensor([0.2, 0.7])  # left, bottom: patch 2
    places[1, 0, 1] = torch.tensor([0.2, -0.1])  # above the image
    with torch.no_grad():
        loss = stage0.pointing_loss(model, features, ("tool", "red moon"), places).item()
        patches = model.multi_modal_projector(features)
        words = [model.tokenizer.tokenizer.token_to_id(w) for w in ("tool", "red", "moon")]
        tool, red, moon = model.language_model.embed(torch.tensor(words))
        expected = []
        for patch, of, name in ((1, patches[0, 0], tool), (2, patches[1, 1], (red + moon) / 2)):
            score = [float(x @ name) / 8**0.5 for x in of]
            expected.append(np.log(np.exp(score).sum()) - score[patch])
    assert loss == pytest.approx(np.mean(expected), abs=1e-5)
    whole = EFM(replace(cfg, image_size=5), model.tokenizer)  # the ViT sees four of five pixels
    whole.load_state_dict(model.state_dict())
    with torch.no_grad():
        places[0, 0, 0], places[1, 1, 1] = torch.tensor([0.72, 0.08]), torch.tensor([0.16, 0.56])
        places[1, 1, 0] = 0.9  # in the pixel it does not see
        loss = stage0.pointing_loss(whole, features, ("tool", "red moon"), places).item()
        assert loss == pytest.approx(np.mean(expected), abs=1e-5)
        nowhere = torch.full((2, 2, 2, 2), -0.5)
        assert stage0.pointing_loss(model, features, ("tool", "red moon"), nowhere).item() == 0
    stage0.pointing_loss(model, features.requires_grad_(), ("tool", "red moon"), places).backward()
    assert features.grad[0, 0].abs().max() > 0
    assert features.grad[0, 1].abs().max() == 0  # nothing is seen in that one


@pytest.fixture
def tiny_vision(monkeypatch) -> None:
    """The models that read frames, in milliseconds."""
    cfg = EFMConfig(width=16, depth=1, heads=2, kv_heads=2, head_dim=8, mlp_dim=16,
                    vit_width=8, vit_heads=2, vit_mlp_dim=16)  # fmt: skip
    for name in ("nano-vision", "nano-view"):
        monkeypatch.setitem(PRESETS, name, cfg)


def test_the_tabletops_stage0_points_and_starts_its_own_kind_only(tmp_path, monkeypatch, tiny_vision):
    monkeypatch.chdir(tmp_path)
    stage0.main(stage0.Config(domain="tabletop", updates=2, batch=4, eval_every=1, out="stage0"))
    with open("stage0/metrics.csv") as f:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]
    assert [r["update"] for r in rows] == [1, 2]
    assert all(0 < r["valid_pointing"] < 10 and r["pointing"] > 0 for r in rows)
    config = stage1.Config(domain="tabletop,history=1", obs="images", init="stage0", episodes=2, out="stage1")
    with pytest.raises(UserError, match="--init stage0: its second image"):
        stage1.main(config)
    assert not Path("stage1").exists() and not Path("data").exists()


def test_an_odd_batch_of_the_two_towers(tmp_path, monkeypatch, tiny_vision):
    """Two questions of a scene: five are two scenes, and as many texts as questions."""
    monkeypatch.chdir(tmp_path)
    stage0.main(stage0.Config(domain="tabletop", unimodal=True, batch=5, updates=1, out="towers"))
    with open("towers/metrics.csv") as f:
        (row,) = csv.DictReader(f)
    assert float(row["words"]) > 0 and float(row["pictures"]) > 0


def test_several_domains_share_a_batch_and_a_vocabulary(tmp_path, monkeypatch, tiny_vision):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(TabletopVectorEnv, "scenes", spied(TabletopVectorEnv.scenes, asked))  # the banana's, too
    config = stage0.Config(domain="tabletop", also=("bananatable", "tabletop,look=real"), batch=7, updates=1, out="web")
    stage0.main(config)
    of_an_update = asked[3:]
    assert [env.name for env, _ in of_an_update] == ["tabletop", "bananatable", "tabletop,look=real"]
    assert [len(questions) for _, questions in of_an_update] == [2, 2, 2]  # of one scene each
    assert all("banana" in q or "tool" in q for q in of_an_update[1][1])
    words = load_model(Path("web/policy.safetensors")).tokenizer.tokenizer.get_vocab()
    assert {"banana", "moon", "push"} <= words.keys()
    config.resume = True  # a tuple and the list of config.json are the same flag
    stage0.main(config)


def test_words_of_a_domain_that_is_never_seen(tmp_path, monkeypatch, tiny_vision):
    """A model that can read of a banana, and has never seen one."""
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(TabletopVectorEnv, "scenes", spied(TabletopVectorEnv.scenes, asked))
    stage0.main(stage0.Config(domain="tabletop", words=("bananatable",), batch=4, updates=1, out="web"))
    assert {env.name for env, _ in asked} == {"tabletop"}
    words = load_model(Path("web/policy.safetensors")).tokenizer.tokenizer.get_vocab()
    assert {"banana", "moon", "table"} <= words.keys()
    with pytest.raises(UserError, match="--words nope: unknown"):
        stage0.main(stage0.Config(words=("nope",), out="other"))


def test_a_loss_counts_where_a_domain_has_it(tmp_path, monkeypatch, tiny_vision):
    """The pointmass tells no places, so only the tabletop points."""
    monkeypatch.chdir(tmp_path)
    for domain, also in (("pointmass", "tabletop,size=32"), ("tabletop,size=32", "pointmass")):
        stage0.main(stage0.Config(domain=domain, also=(also,), batch=4, updates=1, out=domain))
        with open(f"{domain}/metrics.csv") as f:
            (row,) = csv.DictReader(f)
        assert float(row["loss"]) > 0 and float(row["pointing"]) > 0


def spied(scenes, asked: list):
    def told(self, rng, n):
        made = scenes(self, rng, n)
        asked.append((self, made[1]))
        return made

    return told


@pytest.mark.parametrize(("also", "batch", "complaint"), [
    (("nope",), 4, "--also nope: unknown"),
    (("aloha",), 4, "--also aloha: has no questions"),
    (("tabletop",), 4, "--also tabletop: its pictures are not like those of pointmass"),
    (("pointmass", "pointmass"), 2, "--batch 2: must be at least 3"),
])  # fmt: skip
def test_domains_that_cannot_be_seen_together_are_refused(also, batch, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=complaint):
        stage0.main(stage0.Config(also=also, batch=batch, out="web"))
    assert list(tmp_path.iterdir()) == []
