"""Demonstrations: recorded, read from Minari, kept in a file, cut into batches."""

from __future__ import annotations

import multiprocessing
import os
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import envs
import pointmass
import stage1
from common import UserError
from common.demos import (
    Demonstrations,
    Frames,
    deflate_row,
    from_minari,
    load,
    load_demonstrations,
    pack,
    record,
    split,
)
from envs.pointmass import ACTION_LIMIT, WALL
from tests.conftest import EPISODES, one_view

CPU = torch.device("cpu")


# --- demonstrations ------------------------------------------------------------------------------------
def test_pack():
    episodes = [
        ("go", ([1.0], [2.0]), ([0.1, 0.2], [0.0, 0.0])),
        ("stop", ([3.0], [4.0], [5.0]), ([0.3, 0.4],) * 3),
    ]
    arrays = []
    for text, obs, action in episodes:
        arrays.append((text, [{"state": np.array(x)} for x in obs], list(map(np.array, action))))
    data = pack(arrays, {"state": np.zeros((1, 1))})
    assert data["state"].tolist() == [[1], [2], [3], [4], [5]]
    assert data["start"].tolist() == [0, 2] and data["length"].tolist() == [2, 3]
    assert data["instruction"].tolist() == ["go", "stop"]
    assert data["action"].shape == (5, 2) and data["action"].dtype == np.float32


def test_recorded_shapes(recorded):
    obs, data = recorded
    key, env = ("state", "frames")[obs == "images"], envs.make_vec("pointmass", 1, obs=obs)
    M = data["length"].sum()
    shape, dtype = (10,), np.float32
    if obs == "images":
        shape, dtype = (2, env.size, env.size, 3), np.uint8  # two views
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
        assert not states["action"][row].any()  # no action on the final observation
        assert states["action"][row - 1].any()
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
    again, other = (record("pointmass", "state", EPISODES, seed=s) for s in (0, 1000))
    assert all(np.array_equal(states[k], again[k]) for k in states)
    assert not np.array_equal(states["state"], other["state"])


def test_runs_of_neighbouring_seeds_do_not_share_demonstrations(states):
    other = record("pointmass", "state", EPISODES, seed=1)
    starts = [{d["state"][i].tobytes() for i in d["start"]} for d in (states, other)]
    assert not starts[0] & starts[1]


def test_demonstrations_are_recorded_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = stage1.Config(domain="pointmass", obs="state", episodes=4, seed=2)
    first = load_demonstrations(cfg)
    monkeypatch.setattr("common.demos.record", None)  # it must not be needed again
    second = load_demonstrations(cfg)
    assert first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)
    (file,) = (tmp_path / "data").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=file.name):
        load_demonstrations(cfg)


def test_demonstrations_of_an_earlier_version_are_not_learnt_from(tmp_path, monkeypatch):
    """Their file has another name: here one with actions outside the action space."""
    monkeypatch.chdir(tmp_path)
    data = record("pointmass", "state", 6, seed=0)
    Path("data").mkdir()
    old = Path("data/pointmass-state-6-s0.npz")
    np.savez(old, **data | {"action": 2 * data["action"]})
    before = old.read_bytes()
    read = load_demonstrations(stage1.Config(obs="state", episodes=6))
    assert np.array_equal(read["action"], data["action"])
    assert old.read_bytes() == before and len(list(Path("data").iterdir())) == 2


def test_two_processes_may_record_the_same_demonstrations_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fork = multiprocessing.get_context("fork")
    barrier, results, replace = fork.Barrier(2), fork.Queue(), os.replace

    def replace_when_both_have_written(*paths: Path) -> None:
        barrier.wait(60)
        replace(*paths)

    monkeypatch.setattr(os, "replace", replace_when_both_have_written)
    cfg = stage1.Config(obs="state", episodes=4)
    processes = [fork.Process(target=lambda: results.put(load_demonstrations(cfg)["action"])) for _ in range(2)]
    for process in processes:
        process.start()
    first, second = results.get(timeout=120), results.get(timeout=120)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(first) > 4 and np.array_equal(first, second)
    assert len(list(Path("data").iterdir())) == 1  # and no temporary file


# --- Minari --------------------------------------------------------------------------------------------
def write_minari(
    dataset_id: str,
    obs: str,
    seeds: list[int],
    horizon: int | None = None,
    spoil: Callable[[dict], None] = lambda episode: None,
) -> list[tuple]:
    """Demonstrations of single simulations as a Minari dataset; (instruction, observations, actions) of each.

    spoil: changes what is written of the second episode.
    """
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
        episode = {
            "observations": {"instruction": [text] * (T + 1), obs: np.stack(shown)},
            "actions": np.stack(actions),
            "rewards": [float(e) for e in ends],
            "terminations": ends,
            "truncations": [False] * (T - 1) + [not ends[-1]],
        }
        if len(buffers) == 1:
            spoil(episode)
        buffers.append(EpisodeBuffer(**episode))
        episodes.append((text, shown, [*actions, np.zeros(2)]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari asks for authors and links
        spaces = {"action_space": env.single_action_space, "observation_space": env.single_observation_space}
        minari.create_dataset_from_buffers(dataset_id, buffers, **spaces)
    return episodes


@pytest.fixture
def minari_folder(tmp_path, monkeypatch):
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))


@pytest.mark.parametrize("obs", ["state", "images"])
def test_a_minari_dataset_is_what_was_recorded(minari_folder, obs):
    episodes = write_minari("nanoefm/pointmass-v0", obs, [0, 1, 2])
    data = from_minari("nanoefm/pointmass-v0", "pointmass", obs)
    key = ("state", "frames")[obs == "images"]
    shown, actions = (np.concatenate([e[i] for e in episodes]) for i in (1, 2))
    assert data.keys() == {key, "action", "start", "length", "instruction"}
    assert np.array_equal(data[key][np.arange(len(shown))], shown)
    assert np.array_equal(data["action"], actions.astype(np.float32))
    assert data["length"].tolist() == [len(e[2]) for e in episodes]
    assert data["instruction"].tolist() == [e[0] for e in episodes]
    assert len(Demonstrations(data, np.arange(3), 2).steps) == data["length"].sum()


def test_minari_episodes_without_success_are_left_out(minari_folder):
    episodes = write_minari("nanoefm/pointmass-v0", "state", list(range(12)), horizon=80)
    data = from_minari("nanoefm/pointmass-v0", "pointmass", "state")
    kept = [e for e in episodes if len(e[2]) <= 80]
    assert 0 < len(kept) < 12 and data["length"].tolist() == [len(e[2]) for e in kept]


def test_minari_mistakes_are_named(minari_folder):
    with pytest.raises(UserError, match="nanoefm/nothing-v0"):
        from_minari("nanoefm/nothing-v0", "pointmass", "state")
    write_minari("nanoefm/short-v0", "state", [0, 1], horizon=2)
    with pytest.raises(UserError, match="nanoefm/short-v0.*success"):
        from_minari("nanoefm/short-v0", "pointmass", "state")
    with pytest.raises(UserError, match="nanoefm/short-v0.*spaces"):
        from_minari("nanoefm/short-v0", "pointmass", "images")


def other_words(episode: dict) -> None:
    instructions = episode["observations"]["instruction"]
    instructions[:] = ["move to the purple goal"] * len(instructions)


def no_last_observation(episode: dict) -> None:
    episode["observations"] = {key: rows[:-1] for key, rows in episode["observations"].items()}


def nan_in_a_state(episode: dict) -> None:
    episode["observations"]["state"][2, 3] = np.nan


def infinite_action(episode: dict) -> None:
    episode["actions"][1, 0] = np.inf


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (other_words, '"purple" in episode 1 is no word of --domain pointmass'),
        (no_last_observation, "episode 1 has no observation after its last action"),
        (nan_in_a_state, "episode 1 has a number that is none"),
        (infinite_action, "episode 1 has a number that is none"),
    ],
)
def test_a_minari_episode_that_cannot_be_learnt_from_is_named(minari_folder, spoil, complaint):
    write_minari("nanoefm/spoilt-v0", "state", [0, 1, 2], spoil=spoil)
    with pytest.raises(UserError, match=f"^--dataset nanoefm/spoilt-v0: {complaint}.*; "):
        from_minari("nanoefm/spoilt-v0", "pointmass", "state")


# --- batches -------------------------------------------------------------------------------------------
def test_labels_count_down_to_zero(recorded):
    _, data = recorded
    episodes = np.array([1, 4, 5])
    demos = Demonstrations(data, episodes, 2)
    expected = [t for e in episodes for t in range(data["length"][e] - 1, -1, -1)]
    assert demos.steps.tolist() == expected
    assert demos.index.tolist() == [data["start"][e] + t for e in episodes for t in range(data["length"][e])]
    acted = [m for m, steps in enumerate(expected) if steps > 0]  # the final observation has no action
    assert demos.acted.tolist() == acted


def test_frames_are_kept_without_loss_and_small():
    """Row by row what was put in, of arrays of rows of any shape; and as np.savez gives it back."""
    shown = np.random.default_rng(0).integers(0, 256, (5, 2, 4, 3, 3), dtype=np.uint8)
    shown[3] = 7  # deflated streams differ in length
    frames = Frames.join([deflate_row({"frames": shown}, i)["frames"] for i in range(5)], shown.shape[1:])
    assert frames.shape == shown.shape and frames.ndim == 5
    for rows in (
        np.arange(5),
        np.array([4, 0, 3, 3]),
        np.array([[1, 0], [3, 2]]),
        np.array(2),
        np.array([], int),
    ):
        assert np.array_equal(frames[rows], shown[rows]) and frames[rows].dtype == np.uint8
    again = Frames(**frames.arrays())
    assert np.array_equal(again[np.arange(5)], shown)
    with pytest.raises((IndexError, zlib.error)):
        frames[np.array([-1])]
    data = record("tabletop", "images", 2, seed=0)
    assert len(data["frames"].streams) < np.prod(data["frames"].shape) / 5


def test_frames_are_the_same_from_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = stage1.Config(obs="images", episodes=3)
    recorded, kept, read = record("pointmass", "images", 3, 0), *(load_demonstrations(cfg) for _ in range(2))
    rows = np.arange(len(recorded["action"]))
    for data in (kept, read):
        assert data.keys() == recorded.keys() and np.array_equal(data["action"], recorded["action"])
        assert np.array_equal(data["frames"][rows], recorded["frames"][rows])


def test_batch_returns_the_frame_before_and_never_another_episodes():
    data = one_view(record("pointmass", "images", 3, seed=0))
    data["frames"][:, 0, 0, 0] = np.arange(len(data["frames"])) % 256  # number the frames in a pixel
    data["frames"][:, 0, 0, 1] = np.arange(len(data["frames"])) // 256
    demos = Demonstrations(data, np.array([2, 0]), 2)
    obs, action, goals, steps = demos.batch(np.arange(len(demos.index)), CPU)
    number = obs["images"][:, :, 0, 0, 0].long() + 256 * obs["images"][:, :, 0, 0, 1].long()  # (M, 2)
    expected = []
    for e in (2, 0):
        first = data["start"][e]
        expected += [[first + max(t - 1, 0), first + t] for t in range(data["length"][e])]
    assert number.tolist() == expected
    assert torch.equal(action, torch.from_numpy(data["action"][[now for _, now in expected]]))
    text, length = data["instruction"], data["length"]
    assert goals == [text[2]] * length[2] + [text[0]] * length[0]
    assert torch.equal(steps, demos.steps)


# two views of a moment; one of two moments
@pytest.mark.parametrize("domain", ["pointmass", "tabletop", "tabletop,history=1"])
def test_batch_equals_what_the_environment_shows(domain):
    """The two frames a model learns from are the two it will see."""
    env = envs.make_vec(domain, 2, obs="images")
    data = record(domain, "images", 2, seed=4)
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
    key = "state" if obs == "state" else "frames"
    shape = (3, 2, 5, 2) if obs == "state" else (3, 2, *data["frames"].shape[1:])
    (shown,) = ends.values()
    assert list(ends) == [obs] and shown.shape == shape
    for i, e in enumerate(chosen[asked]):
        first, last = data["start"][e], data["start"][e] + data["length"][e] - 1
        assert np.array_equal(shown[i, 0].numpy().reshape(data[key][0].shape), data[key][first])
        assert np.array_equal(shown[i, 1].numpy().reshape(data[key][0].shape), data[key][last])
        assert goals[i] == data["instruction"][e]


def test_data_fractions_are_nested_and_not_the_short_episodes():
    n, parts = 1000, [split(1000, f) for f in (0.1, 0.2, 0.8, 1.0)]
    assert [used.sum() for _, used in parts] == [100, 200, 800, n]
    for (held, small), (held_too, large) in zip(parts, parts[1:], strict=False):
        assert not (small & ~large).any() and np.array_equal(held, held_too)
    held, used = parts[0]
    assert held.sum() == n // 10 and 3 <= (held & used).sum() <= 20  # a tenth of each part is held out
    assert 350 < np.flatnonzero(used).mean() < 650  # `record` keeps the short episodes first


def test_turns_are_of_the_run_that_asks_for_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = envs.make_vec("tabletop", 1, obs="state")
    settings = {"domain": "tabletop", "obs": "state", "episodes": 4, "seed": 0, "data_fraction": 1.0, "dataset": None}
    for symmetries, turns, order in ((True, True, 48 * 36 * 16**2 * 1024), (True, None, 48), (False, None, 1)):
        train, valid = load(SimpleNamespace(**settings, symmetries=symmetries, turns=turns), env)
        assert train.symmetries.order == order and valid.symmetries.order == 1
    earlier, _ = load(SimpleNamespace(**settings, symmetries=True), env)  # before there were turns
    assert earlier.symmetries.order == 48
