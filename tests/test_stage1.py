"""Stage 1: recorded demonstrations, Minari datasets, batches, and that every objective can be learnt."""

from __future__ import annotations

import dataclasses
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import envs
import eval as evaluation
import model as models
import pointmass
import stage1
from common import UserError
from envs.pointmass import ACTION_LIMIT, WALL, PointmassVectorEnv
from model import EFM, QUESTION_INSTRUCTION, EFMConfig, StepsToGo, Tokenizer, action_tokenizer
from stage1 import Demonstrations

EPISODES = 12
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["state", "images"])
def recorded(request) -> tuple[str, dict[str, np.ndarray]]:
    return request.param, stage1.record("pointmass", request.param, EPISODES, seed=0)


@pytest.fixture(scope="module")
def states() -> dict[str, np.ndarray]:
    return stage1.record("pointmass", "state", EPISODES, seed=0)


# --- demonstrations ---------------------------------------------------------------------------------------------------
def test_pack():
    episodes = [("go", ([1.0], [2.0]), ([0.1, 0.2], [0.0, 0.0])), ("stop", ([3.0], [4.0], [5.0]), ([0.3, 0.4],) * 3)]
    arrays = [(text, [{"state": np.array(x)} for x in obs], list(map(np.array, action))) for text, obs, action in episodes]
    data = stage1.pack(arrays, {"state": np.zeros((1, 1))})
    assert data["state"].tolist() == [[1], [2], [3], [4], [5]]
    assert data["start"].tolist() == [0, 2] and data["length"].tolist() == [2, 3]
    assert data["instruction"].tolist() == ["go", "stop"]
    assert data["action"].shape == (5, 2) and data["action"].dtype == np.float32


def test_recorded_shapes(recorded):
    obs, data = recorded
    key, env = ("state", "frames")[obs == "images"], envs.make_vec("pointmass", 1, obs=obs)
    M = data["length"].sum()
    shape, dtype = ((10,), np.float32) if obs == "state" else ((2, env.size, env.size, 3), np.uint8)  # two views
    assert data.keys() == {key, "action", "start", "length", "instruction"}
    assert data[key].shape == (M, *shape) and data[key][np.arange(2)].dtype == dtype
    assert data["action"].shape == (M, 2) and data["action"].dtype == np.float32
    assert len(data["start"]) == len(data["length"]) == len(data["instruction"]) == EPISODES
    assert data["start"].tolist() == [0, *np.cumsum(data["length"])[:-1]]
    assert set(data["instruction"]) <= set(env.instructions())
    assert np.abs(data["action"]).max() <= np.float32(ACTION_LIMIT) and data["length"].max() <= env.horizon + 1


def test_states_and_images_record_the_same_episodes(recorded, states):
    _, data = recorded
    for key in ("action", "start", "length", "instruction"):
        assert np.array_equal(data[key], states[key])


def test_every_recorded_episode_ends_in_its_goal(states):
    env = envs.make_vec("pointmass", 1)
    last = states["start"] + states["length"] - 1
    state = states["state"].reshape(len(states["state"]), 5, 2)
    for episode, row in enumerate(last):
        goal = next(k for k, name in enumerate(env.state_names) if name in states["instruction"][episode].split())
        rows = slice(states["start"][episode], row + 1)
        away = np.linalg.norm(state[rows, goal], axis=1)
        assert away[-1] < pointmass.GOAL_RADIUS and (away[:-1] >= pointmass.GOAL_RADIUS - 1e-6).all()
        assert not states["action"][row].any() and states["action"][row - 1].any()  # no action on the final observation
    assert not state[states["start"], 1].any()  # starts are at rest


def test_an_action_belongs_to_the_observation_before_it(states):
    state = states["state"].reshape(len(states["state"]), 5, 2).astype(np.float64)
    first = np.zeros(len(state), bool)
    first[states["start"]] = True
    pos, vel = pointmass.step(state[:-1, 0], state[:-1, 1] / 100, states["action"][:-1])
    i = ~first[1:] & (np.abs(pos) < WALL).all(1)
    assert i.sum() > 100
    np.testing.assert_allclose(state[1:, 0][i], pos[i], atol=1e-5)
    np.testing.assert_allclose(state[1:, 1][i] / 100, vel[i], atol=1e-6)


def test_record_repeats_with_its_seed(states):
    again, other = (stage1.record("pointmass", "state", EPISODES, seed=s) for s in (0, 1000))
    assert all(np.array_equal(states[k], again[k]) for k in states)
    assert states["state"].shape != other["state"].shape or not np.array_equal(states["state"], other["state"])


def test_runs_of_neighbouring_seeds_do_not_share_demonstrations(states):
    other = stage1.record("pointmass", "state", EPISODES, seed=1)
    starts = [{d["state"][i].tobytes() for i in d["start"]} for d in (states, other)]
    assert not starts[0] & starts[1]


def test_demonstrations_are_recorded_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = stage1.Config(domain="pointmass", obs="state", episodes=4, seed=2)
    first = stage1.load_demonstrations(cfg)
    monkeypatch.setattr(stage1, "record", None)  # it must not be needed again
    second = stage1.load_demonstrations(cfg)
    assert first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)
    (file,) = (tmp_path / "data").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=file.name):
        stage1.load_demonstrations(cfg)


# --- Minari -----------------------------------------------------------------------------------------------------------
def write_minari(dataset_id: str, obs: str, seeds: list[int], horizon: int | None = None) -> list[tuple]:
    """Demonstrations of single simulations as a Minari dataset; returns (instruction, observations, actions) of each."""
    import minari
    from minari.data_collector.episode_buffer import EpisodeBuffer

    env, buffers, episodes = envs.make_vec("pointmass", 1, obs=obs), [], []
    for seed in seeds:
        o, _ = env.reset(seed=seed)
        shown, actions, ends = [o[obs][0]], [], []
        while not (ends and ends[-1]) and len(actions) < (horizon or env.horizon):
            actions.append(env.demonstrate()[0].astype(np.float32))
            o, _, terminated, _, _ = env.step(actions[-1][None])
            shown.append(o[obs][0])
            ends.append(bool(terminated[0]))
        text, T = o["instruction"][0], len(actions)
        buffers.append(EpisodeBuffer(
            observations={"instruction": [text] * (T + 1), obs: np.stack(shown)}, actions=np.stack(actions),
            rewards=[float(e) for e in ends], terminations=ends, truncations=[False] * (T - 1) + [not ends[-1]]))  # fmt: skip
        episodes.append((text, shown, [*actions, np.zeros(2)]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari asks for authors and links
        minari.create_dataset_from_buffers(dataset_id, buffers, action_space=env.single_action_space,
                                           observation_space=env.single_observation_space)  # fmt: skip
    return episodes


@pytest.fixture
def minari_folder(tmp_path, monkeypatch):
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))


@pytest.mark.parametrize("obs", ["state", "images"])
def test_a_minari_dataset_is_what_was_recorded(minari_folder, obs):
    episodes = write_minari("nanoefm/pointmass-v0", obs, [0, 1, 2])
    data = stage1.from_minari("nanoefm/pointmass-v0", "pointmass", obs)
    key = ("state", "frames")[obs == "images"]
    shown, actions = (np.concatenate([e[i] for e in episodes]) for i in (1, 2))
    assert data.keys() == {key, "action", "start", "length", "instruction"}
    assert np.array_equal(data[key][np.arange(len(shown))], shown) and np.array_equal(data["action"], actions.astype(np.float32))
    assert data["length"].tolist() == [len(e[2]) for e in episodes] and data["instruction"].tolist() == [e[0] for e in episodes]
    assert len(Demonstrations(data, np.arange(3), 2).steps) == data["length"].sum()


def test_minari_episodes_without_success_are_left_out(minari_folder):
    episodes = write_minari("nanoefm/pointmass-v0", "state", list(range(12)), horizon=80)
    data = stage1.from_minari("nanoefm/pointmass-v0", "pointmass", "state")
    kept = [e for e in episodes if len(e[2]) <= 80]
    assert 0 < len(kept) < 12 and data["length"].tolist() == [len(e[2]) for e in kept]


def test_minari_mistakes_are_named(minari_folder):
    with pytest.raises(UserError, match="nanoefm/nothing-v0"):
        stage1.from_minari("nanoefm/nothing-v0", "pointmass", "state")
    write_minari("nanoefm/short-v0", "state", [0, 1], horizon=2)
    with pytest.raises(UserError, match="nanoefm/short-v0.*success"):
        stage1.from_minari("nanoefm/short-v0", "pointmass", "state")
    with pytest.raises(UserError, match="nanoefm/short-v0.*spaces"):
        stage1.from_minari("nanoefm/short-v0", "pointmass", "images")


# --- batches ----------------------------------------------------------------------------------------------------------
def test_labels_count_down_to_zero(recorded):
    _, data = recorded
    episodes = np.array([1, 4, 5])
    demos = Demonstrations(data, episodes, 2)
    expected = [t for e in episodes for t in range(data["length"][e] - 1, -1, -1)]
    assert demos.steps.tolist() == expected
    assert demos.index.tolist() == [data["start"][e] + t for e in episodes for t in range(data["length"][e])]
    assert demos.acted.tolist() == [m for m, steps in enumerate(expected) if steps > 0]  # the final observation has no action


def one_view(data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As if the domain had but one view: the frame before then belongs to an observation."""
    return data | ({"frames": data["frames"][np.arange(len(data["action"]))][:, 0].copy()} if "frames" in data else {})


def test_frames_are_kept_without_loss_and_small():
    """Row by row what was put in, of arrays of rows of any shape; and as np.savez gives it back."""
    shown = np.random.default_rng(0).integers(0, 256, (5, 2, 4, 3, 3), dtype=np.uint8)
    shown[3] = 7  # deflated streams differ in length
    frames = stage1.Frames.join([stage1.keep({"frames": shown}, i)["frames"] for i in range(5)], shown.shape[1:])
    assert frames.shape == shown.shape and frames.ndim == 5
    for rows in (np.arange(5), np.array([4, 0, 3, 3]), np.array([[1, 0], [3, 2]]), np.array(2), np.array([], int)):
        assert np.array_equal(frames[rows], shown[rows]) and frames[rows].dtype == np.uint8
    again = stage1.Frames(**frames.arrays())
    assert np.array_equal(again[np.arange(5)], shown)
    with pytest.raises((IndexError, zlib.error)):
        frames[np.array([-1])]
    data = stage1.record("tabletop", "images", 2, seed=0)
    assert len(data["frames"].streams) < np.prod(data["frames"].shape) / 5


def test_frames_are_the_same_from_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = stage1.Config(obs="images", episodes=3)
    recorded, kept, read = stage1.record("pointmass", "images", 3, 0), *(stage1.load_demonstrations(cfg) for _ in range(2))
    rows = np.arange(len(recorded["action"]))
    for data in (kept, read):
        assert data.keys() == recorded.keys() and np.array_equal(data["action"], recorded["action"])
        assert np.array_equal(data["frames"][rows], recorded["frames"][rows])


def test_batch_returns_the_frame_before_and_never_another_episodes():
    data = one_view(stage1.record("pointmass", "images", 3, seed=0))
    data["frames"][:, 0, 0, 0] = np.arange(len(data["frames"])) % 256  # number the frames in a pixel
    data["frames"][:, 0, 0, 1] = np.arange(len(data["frames"])) // 256
    demos = Demonstrations(data, np.array([2, 0]), 2)
    obs, action, goals, steps = demos.batch(np.arange(len(demos.index)), CPU)
    number = obs["images"][:, :, 0, 0, 0].long() + 256 * obs["images"][:, :, 0, 0, 1].long()  # (M, 2)
    expected = [[data["start"][e] + max(t - 1, 0), data["start"][e] + t] for e in (2, 0) for t in range(data["length"][e])]
    assert number.tolist() == expected
    assert torch.equal(action, torch.from_numpy(data["action"][[now for _, now in expected]]))
    assert goals == [data["instruction"][2]] * data["length"][2] + [data["instruction"][0]] * data["length"][0]
    assert torch.equal(steps, demos.steps)


@pytest.mark.parametrize("domain", ["pointmass", "tabletop", "tabletop,history=1"])  # two views of a moment; one of two moments
def test_batch_equals_what_the_environment_shows(domain):
    """The two frames a model learns from are the two it will see."""
    env = envs.make_vec(domain, 2, obs="images")
    data = stage1.record(domain, "images", 2, seed=4)
    o, _ = env.reset(seed=4 * 10**6)
    first = o["images"][0] if env.simultaneous else o["images"][0, 1]
    start = next(i for i in data["start"] if np.array_equal(data["frames"][i], first))
    episode = data["start"].tolist().index(start)
    demos = Demonstrations(data, np.array([episode]), 2)
    for t in range(5):
        obs, action, goals, _ = demos.batch(np.array([t]), CPU)
        assert np.array_equal(obs["images"][0].numpy(), o["images"][0]) and goals == [o["instruction"][0]]
        told = env.demonstrate()
        np.testing.assert_allclose(action[0], told[0], rtol=1e-6)
        o = env.step(told)[0]


def test_state_batches_are_split_into_quantities(states):
    demos = Demonstrations(states, np.arange(EPISODES), 2)
    rows = np.array([3, 0, 17])
    obs, *_ = demos.batch(rows, CPU)
    assert obs["state"].shape == (3, 5, 2)
    assert np.array_equal(obs["state"].flatten(1).numpy(), states["state"][rows])


@pytest.mark.parametrize("views", [1, 2])
def test_first_and_last_observations_of_an_episode(recorded, views):
    """Of two views of a moment the first, the whole scene."""
    obs, data = recorded[0], one_view(recorded[1])
    shows = recorded[1] if views == 2 else data
    chosen = np.array([7, 2, 9, 4])
    demos, asked = Demonstrations(shows, chosen, 2), np.array([3, 0, 0])
    ends, goals = demos.first_and_last(asked, CPU)
    key, shape = ("state", (3, 2, 5, 2)) if obs == "state" else ("frames", (3, 2, *data.get("frames", np.zeros(1)).shape[1:]))
    (shown,) = ends.values()
    assert list(ends) == [obs] and shown.shape == shape
    for i, e in enumerate(chosen[asked]):
        first, last = data["start"][e], data["start"][e] + data["length"][e] - 1
        assert np.array_equal(shown[i, 0].numpy().reshape(data[key][0].shape), data[key][first])
        assert np.array_equal(shown[i, 1].numpy().reshape(data[key][0].shape), data[key][last])
        assert goals[i] == data["instruction"][e]


# --- learning ---------------------------------------------------------------------------------------------------------
def test_learning_rate_warms_up_and_decays_to_a_tenth():
    rates = [common.learning_rate(u, 1000, 2.0) for u in range(1000)]
    assert rates[0] == pytest.approx(0.02) and rates[49] == pytest.approx(1.0, rel=0.02)
    assert max(rates) <= 2.0 and int(np.argmax(rates)) == 99
    assert rates[-1] == pytest.approx(0.2, rel=1e-3) and all(a > b for a, b in zip(rates[99:], rates[100:], strict=False))


def test_losses_are_those_of_the_two_questions(states):
    env, demos = envs.make_vec("pointmass", 1), Demonstrations(states, np.arange(EPISODES), 2)
    model, actions, steps = small("state"), action_tokenizer(**env.action_tokens), StepsToGo(env.steps_cap, env.steps_bins)
    obs, action, goals, to_go = demos.batch(np.array([0, 5, 60]), CPU)
    with torch.no_grad():
        for loss, question, tokens, ranges in (
                (stage1.bc_loss, "What robot action to {}", actions.encode(action), actions.ranges),
                (stage1.steps_to_go_loss, "How many steps to {}", steps.encode(to_go), steps.ranges)):  # fmt: skip
            log_probs = model.log_probs(obs, [question.format(g) for g in goals], tokens, ranges)
            expected = -sum(lp[torch.arange(3), tokens[:, i]] for i, lp in enumerate(log_probs)).mean()
            torch.testing.assert_close(loss(model, obs, goals, tokens, ranges), expected, atol=1e-5, rtol=1e-5)


def small(obs: str, *texts: str) -> EFM:
    env = envs.make_vec("pointmass", 1, obs=obs)
    sizes = {"state_names": env.state_names, "state_dim": env.state_dim} if obs == "state" else {"image_size": env.size}
    cfg = EFMConfig(width=48, depth=2, heads=4, kv_heads=2, head_dim=12, mlp_dim=96, patch_size=8, vit_width=48, vit_depth=1,
                    vit_heads=4, vit_mlp_dim=96, **sizes)  # fmt: skip
    torch.manual_seed(0)
    return EFM(cfg, Tokenizer.train([*env.instructions(), *env.state_names, *texts]))


def test_overfits_a_batch(recorded):
    obs_mode, data = recorded
    env = envs.make_vec("pointmass", 1, obs=obs_mode)
    model, actions, steps = small(obs_mode), action_tokenizer(**env.action_tokens), StepsToGo(env.steps_cap, env.steps_bins)
    demos = Demonstrations(data, np.arange(EPISODES), 2)
    rows = np.random.default_rng(0).choice(demos.acted, 16, replace=False)
    obs, action, goals, to_go = demos.batch(rows, CPU)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(150):
        bc = stage1.bc_loss(model, obs, goals, actions.encode(action), actions.ranges)
        distance = stage1.steps_to_go_loss(model, obs, goals, steps.encode(to_go), steps.ranges)
        optimizer.zero_grad()
        (bc + distance).backward()
        optimizer.step()
        losses.append((bc.item(), distance.item()))
    assert losses[0][0] > 4 and losses[0][1] > 3  # about log 21² and log 140 to begin with
    assert losses[-1][0] < 0.2 and losses[-1][1] < 0.2
    prompts = ["What robot action to " + g for g in goals]
    assert torch.equal(model.sample(obs, prompts, actions.ranges, greedy=True)[0], actions.encode(action))
    assert (model.steps_to_go(obs, goals, steps) - to_go).abs().max() < 15


def test_instructions_can_be_predicted_from_first_and_last_observations(recorded):
    obs_mode, data = recorded[0], one_view(recorded[1])
    model, demos = small(obs_mode, QUESTION_INSTRUCTION), Demonstrations(data, np.arange(EPISODES), 2)
    obs, goals = demos.first_and_last(np.arange(EPISODES), CPU)
    assert len(set(goals)) > 5
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(150):
        loss = stage1.instruction_loss(model, obs, goals)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 20 and losses[-1] < 0.2  # six tokens of a vocabulary of a thousand to begin with
    prompts = ["What instruction was performed"] * EPISODES
    torch.testing.assert_close(stage1.instruction_loss(model, obs, goals), -model.text_log_prob(obs, prompts, goals).mean())
    assert model.generate_text(obs, prompts) == goals


def test_a_state_mlp_is_told_the_demonstrations_mean_and_spread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = dict(width=32, depth=1, mlp_dim=32, state_mlp=8, state_hints=2)
    monkeypatch.setitem(models.PRESETS, "nano", dataclasses.replace(models.PRESETS["nano"], **sizes))
    cfg = stage1.Config(episodes=20, updates=2, eval_every=2, eval_episodes=2, out="run")
    stage1.main(cfg)
    data = stage1.load_demonstrations(dataclasses.replace(cfg, obs="state"))
    held_out, _ = stage1.split(20, 1.0)
    states = np.concatenate([data["state"][a : a + n] for a, n in zip(data["start"], data["length"], strict=True)
                             if not held_out[list(data["start"]).index(a)]])  # fmt: skip
    model = models.load_model(Path("run/policy.safetensors"))
    np.testing.assert_allclose(model.state_mean, states.mean(0), atol=1e-5)
    np.testing.assert_allclose(model.state_scale, states.std(0, ddof=1) + 1e-2, rtol=1e-4)


def test_a_domain_that_predicts_instructions_has_a_third_objective(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PointmassVectorEnv, "predicts_instruction", True)
    monkeypatch.setitem(models.PRESETS, "nano", dataclasses.replace(models.PRESETS["nano"], width=32, depth=1, mlp_dim=32))
    asked = []
    for name in ("bc_loss", "steps_to_go_loss", "instruction_loss"):
        loss = getattr(stage1, name)
        monkeypatch.setattr(
            stage1, name, lambda m, obs, goals, *a, f=loss, n=name: asked.append((n, len(goals))) or f(m, obs, goals, *a)
        )
    cfg = stage1.Config(episodes=20, updates=20, eval_every=10, eval_episodes=2, out="run")
    stage1.main(cfg)
    assert asked[:3] == [("bc_loss", 43), ("steps_to_go_loss", 43), ("instruction_loss", 42)]
    rows = np.genfromtxt("run/metrics.csv", delimiter=",", names=True)
    assert rows.dtype.names == ("update", "bc", "steps_to_go", "instruction",
                                "valid_bc", "valid_steps_to_go", "valid_instruction", "seconds")  # fmt: skip
    assert rows["valid_instruction"][1] < rows["valid_instruction"][0] < 60
    tokenizer = models.load_model(Path("run/policy.safetensors")).tokenizer.tokenizer
    assert "<unk>" not in tokenizer.encode(QUESTION_INSTRUCTION, add_special_tokens=False).tokens
    with pytest.raises(UserError, match="--batch 2"):
        stage1.main(dataclasses.replace(cfg, batch=2, out="other"))


def test_the_third_objective_ends_when_the_held_out_answers_get_worse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PointmassVectorEnv, "predicts_instruction", True)
    monkeypatch.setitem(models.PRESETS, "nano", dataclasses.replace(models.PRESETS["nano"], width=32, depth=1, mlp_dim=32))
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: {})
    cfg = stage1.Config(episodes=11, updates=120, eval_every=10, lr=1e-2, out="run")  # nine episodes are soon learnt by heart
    stage1.main(cfg)
    rows = np.genfromtxt("run/metrics.csv", delimiter=",", names=True)
    worse = np.flatnonzero(np.diff(rows["valid_instruction"]) >= 0)
    assert len(worse) and worse[0] + 2 < len(rows)
    asked = np.isfinite(rows["instruction"])
    assert asked[: worse[0] + 2].all() and not asked[worse[0] + 2 :].any() and np.isfinite(rows["valid_instruction"]).all()

    class Killed(Exception):
        pass

    def kill(*_, **__):
        raise Killed

    cut = dataclasses.replace(cfg, out="cut")
    log, looks = common.Run.log, []
    monkeypatch.setattr(common.Run, "log", lambda self, *a: kill() if len(looks) > worse[0] + 2 else looks.append(log(self, *a)))
    with pytest.raises(Killed):
        stage1.main(cut)
    monkeypatch.setattr(common.Run, "log", log)
    stage1.main(dataclasses.replace(cut, resume=True))
    again = np.genfromtxt("cut/metrics.csv", delimiter=",", names=True)
    for name in rows.dtype.names[:-1]:  # all but the seconds
        np.testing.assert_array_equal(rows[name], again[name])


def test_data_fractions_are_nested_and_not_the_short_episodes():
    n, parts = 1000, [stage1.split(1000, f) for f in (0.1, 0.2, 0.8, 1.0)]
    assert [used.sum() for _, used in parts] == [100, 200, 800, n]
    for (held, small), (held_too, large) in zip(parts, parts[1:], strict=False):
        assert not (small & ~large).any() and np.array_equal(held, held_too)
    held, used = parts[0]
    assert held.sum() == n // 10 and 3 <= (held & used).sum() <= 20  # a tenth of each part is held out
    assert 350 < np.flatnonzero(used).mean() < 650  # `record` keeps the short episodes first


def test_a_fraction_without_episodes_to_hold_out_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--data-fraction 0.05.*--episodes"):
        stage1.main(stage1.Config(episodes=12, data_fraction=0.05, updates=1, out="run"))
    assert not Path("run").exists()


def test_a_short_run_writes_what_stage2_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = dataclasses.replace(models.PRESETS["nano"], width=32, depth=1, heads=2, kv_heads=1, mlp_dim=32)
    monkeypatch.setitem(models.PRESETS, "nano", tiny)
    cfg = stage1.Config(domain="pointmass", obs="state", seed=0, episodes=20, updates=20, batch=16, eval_every=10,
                        eval_episodes=2, out="run")  # fmt: skip
    stage1.main(cfg)
    for name in ("config.json", "policy.safetensors", "reward.safetensors", "summary.json"):
        assert (Path("run") / name).stat().st_size > 0
    rows = np.genfromtxt("run/metrics.csv", delimiter=",", names=True)
    assert rows.dtype.names == ("update", "bc", "steps_to_go", "valid_bc", "valid_steps_to_go", "seconds")
    assert rows["update"].tolist() == [10, 20] and rows["valid_bc"][1] < rows["valid_bc"][0]
    assert models.load_model(Path("run/policy.safetensors")).cfg.width == 32
    with pytest.raises(UserError, match="run"):
        stage1.main(cfg)  # it exists: nothing is overwritten


def test_the_last_policy_is_kept_beside_the_best_where_the_domain_takes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "learning_rate", lambda update, *_: 1e-2 if update < 8 else 1.0)  # it gets worse at the end
    tiny = dataclasses.replace(models.PRESETS["nano"], width=32, depth=1, heads=2, kv_heads=1, mlp_dim=32)
    monkeypatch.setitem(models.PRESETS, "nano", tiny)
    cfg = stage1.Config(episodes=20, updates=12, batch=16, eval_every=2, eval_episodes=2)
    for name in ("best", "last"):
        stage1.main(dataclasses.replace(cfg, policy=name, out=name))
    held = np.genfromtxt("last/metrics.csv", delimiter=",", names=True)["valid_bc"]
    assert held[-1] > held.min()
    best, early, last = (
        models.load_model(Path(p)).state_dict() for p in ("best/policy.safetensors", "last/early_policy.safetensors",
                                                          "last/policy.safetensors"))  # fmt: skip
    final = common.load_state(Path("last/resume.pt"))["model"]
    assert not Path("best/early_policy.safetensors").exists()
    assert all(torch.equal(best[k], early[k]) and torch.equal(last[k], final[k]) for k in best)
    assert any(not torch.equal(early[k], last[k]) for k in best)
    for name, weights in (("early_policy", early), ("policy", last)):  # eval.py --policy
        acts = evaluation.load_run(Path("last"), 1, name)[1].state_dict()
        assert all(torch.equal(acts[k], weights[k]) for k in weights)


def test_a_run_that_diverges_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--lr 1000000"):
        stage1.main(stage1.Config(episodes=20, updates=4, batch=8, eval_every=2, eval_episodes=2, lr=1e6, out="run"))


def test_actions_of_an_earlier_version_are_not_learnt_from(tmp_path, monkeypatch):
    """Outside the action space they would all go to the outermost bins."""
    monkeypatch.chdir(tmp_path)
    cfg = stage1.Config(episodes=6, updates=1, batch=8, eval_every=1, eval_episodes=2, out="run")
    data = stage1.record("pointmass", "state", 6, seed=0)
    Path("data").mkdir()
    np.savez("data/pointmass-state-6-s0.npz", **data | {"action": 2 * data["action"]})
    with pytest.raises(UserError, match="earlier version"):
        stage1.main(cfg)
    assert not Path("run").exists()
    np.savez("data/pointmass-state-6-s0.npz", **data)
    stage1.main(cfg)


def test_frames_of_an_earlier_version_are_not_learnt_from(tmp_path, monkeypatch):
    """One view where the domain now shows two: a previous frame would be taken for the second view."""
    monkeypatch.chdir(tmp_path)
    cfg = stage1.Config(obs="images", init="none", episodes=6, updates=1, batch=8, eval_episodes=2, out="run")
    data = one_view(stage1.record("pointmass", "images", 6, seed=0))
    Path("data").mkdir()
    np.savez("data/pointmass-images-6-s0.npz", **data)
    with pytest.raises(UserError, match="earlier version"):
        stage1.main(cfg)
    assert not Path("run").exists()
