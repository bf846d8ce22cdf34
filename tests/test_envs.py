"""Every domain against its contract, and pointmass against its docstring."""

from __future__ import annotations

import copy
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import envs
import pointmass
from envs.pointmass import ACTION_LIMIT, COLOURS, POINT_RADIUS, WALL, draw

MODES = ["state", "images"]
N = 6
RENDERED = {"pointmass": (256, 256, 3), "tabletop": (180, 320, 3), "bananatable": (180, 320, 3), "aloha": (256, 256, 3)}
every_domain = pytest.mark.parametrize("name", list(envs.DOMAINS))


def domain(num_envs: int = N, obs: str = "state", name: str = "pointmass", **kwargs):
    return envs.make_vec(name, num_envs, obs=obs, **kwargs)


def actions(rng: np.random.Generator, n: int = N, name: str = "pointmass") -> np.ndarray:
    space = domain(1, name=name).single_action_space
    return rng.uniform(space.low, space.high, (n, *space.shape)).astype(np.float32)


def seen(name: str, obs: str) -> set[str]:
    """The keys of an observation: nothing but these, the goal's position neither."""
    return {"instruction", obs} | ({"joints"} if (name, obs) == ("aloha", "images") else set())  # a robot's readings of itself


def same(a: dict, b: dict) -> bool:
    """Two observations of a batch, bit by bit."""
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


# --- the contract of a domain -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("obs", MODES)
@every_domain
def test_gymnasium_accepts_the_single_view(name, obs):
    env = gym.make(envs.DOMAINS[name], obs=obs, render_mode="rgb_array").unwrapped
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(infinity|-inf|inf).*")  # a state has no bounds
        check_env(env)
    assert set(env.observation_space.keys()) == seen(name, obs)
    assert env.render().shape == RENDERED[name] and env.render().dtype == np.uint8
    env.close()


@pytest.mark.parametrize("obs", MODES)
@every_domain
def test_single_view_and_batch_give_the_same_trajectories(name, obs):
    batch, rng = domain(obs=obs, name=name), np.random.default_rng(0)
    singles = [gym.make(envs.DOMAINS[name], obs=obs).unwrapped for _ in range(N)]
    ours, theirs = batch.reset(seed=100), [env.reset(seed=100 + i) for i, env in enumerate(singles)]
    for _ in range(12):
        assert set(ours[0]) == seen(name, obs)
        for i, (single, *rest, info) in enumerate(theirs):
            assert single.keys() == ours[0].keys() and single[obs].dtype == ours[0][obs].dtype
            assert all(np.array_equal(single[k], ours[0][k][i]) for k in single)
            assert rest == [x[i] for x in ours[1:-1]]  # reward, terminated, truncated, after a step
            assert info.keys() == ours[-1].keys() and all(info[k] == ours[-1][k][i] for k in info)
        a = actions(rng, name=name)
        ours, theirs = batch.step(a), [env.step(x) for env, x in zip(singles, a, strict=True)]


@pytest.mark.parametrize("obs", MODES)
@every_domain
def test_the_same_seed_gives_the_same_batch(name, obs):
    (first, _), (second, _), (other, _), (listed, _) = (
        domain(obs=obs, name=name).reset(seed=s) for s in (5, 5, 50, list(range(5, 5 + N)))
    )
    assert same(first, second) and same(first, listed) and not same(first, other)
    assert len({x.tobytes() for x in first[obs]}) == N  # and its simulations differ


@pytest.mark.parametrize("obs", MODES)
@every_domain
def test_partial_reset_leaves_the_others_untouched(name, obs):
    env, untouched, rng = domain(obs=obs, name=name), domain(obs=obs, name=name), np.random.default_rng(1)
    env.reset(seed=3), untouched.reset(seed=3)
    for _ in range(5):
        a = actions(rng, name=name)
        before, untouched_obs = env.step(a)[0], untouched.step(a)[0]
    mask = np.array([True, False, False, True, False, False])
    after, info = env.reset(options={"reset_mask": mask})
    assert np.array_equal(after[obs][~mask], before[obs][~mask]) and not np.isclose(after[obs][mask], before[obs][mask]).all()
    assert [t for t, m in zip(after["instruction"], mask, strict=True) if not m] == \
        [t for t, m in zip(before["instruction"], mask, strict=True) if not m]  # fmt: skip
    assert env.t[mask].tolist() == [0, 0] and env.t[~mask].tolist() == [5] * 4 and not info["is_success"].any()
    for _ in range(5):
        a = actions(rng, name=name)
        ours, theirs = env.step(a), untouched.step(a)
        assert np.array_equal(ours[0][obs][~mask], theirs[0][obs][~mask])
        for x, y in zip(ours[1:4], theirs[1:4], strict=True):
            assert np.array_equal(x[~mask], y[~mask])
    assert not same(ours[0], untouched_obs)


@every_domain
def test_a_partial_reset_of_nobody_changes_nothing(name):
    for obs in MODES:
        env = domain(obs=obs, name=name)
        before, _ = env.reset(seed=0)
        assert same(env.reset(options={"reset_mask": np.zeros(N, bool)})[0], before)


@every_domain
def test_nothing_resets_by_itself(name):
    env = domain(2, name=name)
    assert env.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    env.reset(seed=0)
    for t in range(env.horizon + 3):
        _, _, terminated, truncated, _ = env.step(np.zeros(env.action_space.shape))
        assert not terminated.any()  # at rest, and no start is in its goal
        assert truncated.all() == truncated.any() == (t + 1 >= env.horizon)
    assert env.t.tolist() == [env.horizon + 3] * 2


@pytest.mark.parametrize("obs", MODES)
@every_domain
def test_observations_handed_out_do_not_change_later(name, obs):
    env, rng, kept = domain(obs=obs, name=name), np.random.default_rng(2), []

    def keep(*values):
        kept.append((values, copy.deepcopy(values)))

    keep(*env.reset(seed=0))
    for t in range(8):
        keep(*env.step(actions(rng, name=name)))
        if t % 3 == 2:
            keep(*env.reset(options={"reset_mask": np.arange(N) % 2 == 0}))
    for now, then in kept:
        for x, y in zip(now, then, strict=True):
            assert same(x, y) if isinstance(x, dict) else np.array_equal(x, y)


@pytest.mark.parametrize("obs", MODES)
@every_domain
def test_observations_are_in_the_space(name, obs):
    env, rng = domain(obs=obs, name=name), np.random.default_rng(3)
    o, _ = env.reset(seed=0)
    for _ in range(4):
        for i in range(N):
            assert env.single_observation_space.contains({k: v[i] for k, v in o.items()})
        assert env.single_action_space.contains(actions(rng, name=name)[0])
        o = env.step(actions(rng, name=name))[0]
    assert len(env.demonstrate()) == N


def test_the_pointmass_asks_all_of_its_grammar():
    seen = set(domain(2000).reset(seed=0)[0]["instruction"])
    grammar = envs.make_vec("pointmass", 1).instructions()
    assert len(grammar) == len(set(grammar)) == 36
    assert seen == set(grammar)


@every_domain
def test_every_instruction_is_in_the_grammar_and_the_space(name):
    env = domain(300, name=name, **({"family": "mixed", "blocks": 8} if name == "tabletop" else {}))
    grammar, space = env.instructions(), env.single_observation_space["instruction"]
    assert len(grammar) == len(set(grammar)) and set(env.reset(seed=0)[0]["instruction"]) <= set(grammar)
    assert all(space.contains(text) for text in grammar)


def test_wrong_arguments_are_value_errors():
    with pytest.raises(ValueError, match="pixels"):
        envs.make_vec("pointmass", 1, obs="pixels")
    with pytest.raises(ValueError, match="tabel.*pointmass"):
        envs.make_vec("tabel", 1)
    with pytest.raises(ValueError, match="human"):
        gym.make(envs.DOMAINS["pointmass"]).unwrapped.__class__(render_mode="human")


# --- pointmass --------------------------------------------------------------------------------------------------------
def test_starts_are_as_documented():
    env = domain(2000)
    env.reset(seed=0)
    assert np.abs(env.pos).max() <= pointmass.START and np.abs(env.goals).max() <= pointmass.GOAL and not env.vel.any()
    assert np.abs(env.pos).max() > 0.95 and np.abs(env.goals).max() > 0.85
    assert np.linalg.norm(env.goals - env.pos[:, None], axis=-1).min() >= 0.3
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.linalg.norm(env.goals[:, i] - env.goals[:, j], axis=-1).min() >= 0.45
    assert np.bincount(env.colour, minlength=3).min() > 550  # each colour a third of the time


def test_the_state_is_the_one_in_the_docstring():
    env, rng = domain(), np.random.default_rng(0)
    env.reset(seed=1)
    for _ in range(3):
        o = env.step(actions(rng))[0]
    state = o["state"].reshape(N, -1, env.state_dim)
    assert state.shape[1] == len(env.state_names) == 5
    np.testing.assert_allclose(state[:, 0], env.pos, atol=1e-6)
    np.testing.assert_allclose(state[:, 1], env.vel * 100, atol=1e-6)
    for k, colour in enumerate(COLOURS):
        np.testing.assert_allclose(state[:, env.state_names.index(colour)], env.goals[:, k] - env.pos, atol=1e-6)


def test_the_dynamics_are_the_papers():
    env, rng = domain(), np.random.default_rng(0)
    env.reset(seed=1)
    for _ in range(3):
        pos, vel, a = env.pos.copy(), env.vel.copy(), actions(rng)
        env.step(a)
        for _ in range(10):
            vel = vel + a
            pos = pos + vel
        np.testing.assert_allclose(env.pos, pos, atol=1e-7)
        np.testing.assert_allclose(env.vel, vel, atol=1e-9)


def test_actions_are_clipped_to_the_limit():
    strong, limit = domain(), domain()
    strong.reset(seed=0), limit.reset(seed=0)
    direction = np.sign(actions(np.random.default_rng(0)))
    assert same(strong.step(direction * 7)[0], limit.step(direction * ACTION_LIMIT)[0])
    assert np.abs(strong.vel).max() == pytest.approx(10 * ACTION_LIMIT)


def test_the_point_stops_at_the_walls():
    env = domain(4)
    env.reset(seed=0)
    env.goals[:] = 0.5 * np.array([[1, 1], [-1, 1], [1, -1]])
    env.pos[:] = 0
    push = ACTION_LIMIT * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]])
    sideways = push[:, ::-1] * 0.02
    for _ in range(40):
        env.step(push + sideways)
    for i, (axis, sign) in enumerate(((0, 1), (0, -1), (1, 1), (1, -1))):
        assert env.pos[i, axis] == sign * WALL and env.vel[i, axis] == 0
        assert env.vel[i, 1 - axis] != 0  # it slides along the wall
    env.step(-push)
    assert (np.abs(env.pos).max(1) < WALL).all()  # and comes off again


def test_success_is_the_goal_named_in_the_instruction():
    env = domain(300)
    o, info = env.reset(seed=0)
    assert not info["is_success"].any()
    for k, colour in enumerate(COLOURS):
        env.pos, env.vel = env.goals[:, k] + np.array([0.149, 0]), np.zeros((300, 2))
        _, reward, terminated, truncated, info = env.step(np.zeros((300, 2)))
        named = np.array([colour in text.split() for text in o["instruction"]])
        assert 50 < named.sum() < 150
        for success in (reward, terminated, info["is_success"]):
            assert np.array_equal(np.asarray(success, bool), named)
        assert not truncated.any()
        env.pos = env.goals[:, k] + np.array([0, 0.151])
        assert not env.step(np.zeros((300, 2)))[2].any()


def test_success_is_reported_on_reset_too():
    env = domain()
    env.reset(seed=0)
    env.pos = env._goal()
    _, info = env.reset(options={"reset_mask": np.arange(N) < 2})
    assert info["is_success"].tolist() == [False] * 2 + [True] * 4


def test_experts_reach_the_goal():
    straight, wandering = domain(200), domain(200)
    straight.reset(seed=0), wandering.reset(seed=0)
    length = np.full((2, 200), straight.horizon)
    for t in range(straight.horizon):
        for env, n, act in ((straight, length[0], straight.expert), (wandering, length[1], wandering.demonstrate)):
            a = act()
            assert np.abs(a).max() <= ACTION_LIMIT
            terminated = env.step(a)[2]
            n[terminated] = np.minimum(n[terminated], t + 1)
    assert length[0].max() < straight.horizon  # straight always arrives
    assert (length[1] < straight.horizon).mean() > 0.9 and length[1].mean() > 3 * length[0].mean()


# --- its images -------------------------------------------------------------------------------------------------------
def test_the_images_show_the_state_and_nothing_of_what_was_before():
    """Two points at the same place with the same velocity look alike, whatever they did; another velocity shows."""
    env, rng = domain(obs="images"), np.random.default_rng(0)
    env.reset(seed=0)
    for _ in range(5):
        env.step(np.sign(actions(rng)) * ACTION_LIMIT)
    one, two, faster, other = range(4)
    env.goals[:] = env.goals[one]
    env.pos[[two, faster]], env.vel[two], env.vel[faster] = env.pos[one], env.vel[one], 1.5 * env.vel[one]
    o = env.step(np.zeros((N, 2)))[0]["images"]
    assert np.array_equal(o[one], o[two])
    assert (o[one] != o[faster]).any((1, 2, 3)).all() and (o[one] != o[other]).any((1, 2, 3)).all()
    again = env.reset(options={"reset_mask": np.arange(N) == two})[0]["images"]
    assert np.array_equal(again[one], o[one]) and not np.array_equal(again[two], o[two])


def test_the_second_view_is_what_is_around_the_point():
    env = domain(200, obs="images", size=64)
    env.reset(seed=0)
    env.vel[:] = np.random.default_rng(0).uniform(-0.006, 0.006, (200, 2))
    near = discs(env.step(np.zeros((200, 2)))[0]["images"][:, 1])
    for k in range(3):
        away = env.goals[:, k] - env.pos
        whole = np.abs(away).max(1) < WALL / 2 - pointmass.GOAL_RADIUS  # in the frame, and not behind the wake
        whole &= np.linalg.norm(away + 30 * env.vel, axis=1) > pointmass.GOAL_RADIUS + POINT_RADIUS + 0.05
        assert whole.sum() > 10
        np.testing.assert_allclose(centroid(near[..., k])[whole] / 2, away[whole], atol=0.1 * WALL / 64)
    env.goals[:] = env.pos[:, None] + 10  # out of sight
    black = 127 - env.step(np.zeros((200, 2)))[0]["images"][:, 1].min(-1).astype(float)
    np.testing.assert_allclose(centroid(black.clip(0)) / 2, -30 * env.vel, atol=0.1 * WALL / 64)  # three steps of ten substeps


def discs(frames: np.ndarray) -> np.ndarray:
    """Frames (N, H, W, 3) as float in [0, 1], the table 0, whatever its colour."""
    table = np.median(frames, (1, 2), keepdims=True)
    return np.clip((frames - table) / (255 - table), 0, 1)


def centroid(disc: np.ndarray) -> np.ndarray:
    """(N, size, size) -> (N, 2): x and y in lengths; row 0 is up."""
    size = disc.shape[1]
    axis = ((np.arange(size) + 0.5) / size * 2 - 1) * WALL
    return np.stack([disc.sum(1) @ axis, -disc.sum(2) @ axis], 1) / np.maximum(disc.sum((1, 2)), 1e-9)[:, None]


@pytest.mark.parametrize("size", [32, 48])
def test_the_drawn_point_is_where_the_point_is(size):
    env, rng = domain(200, obs="images", size=size), np.random.default_rng(0)
    env.reset(seed=0)
    for _ in range(3):
        images = env.step(np.sign(actions(rng, 200)) * ACTION_LIMIT)[0]["images"]
    assert images.shape == (200, 2, size, size, 3)
    pixel = 2 * WALL / size
    white = discs(draw(env.pos, env.pos, env.goals, size)).min(-1)  # without a wake only the point is in all channels
    inside = np.abs(env.pos).max(1) < WALL - POINT_RADIUS - pixel
    assert inside.sum() > 150
    assert np.abs(centroid(white) - env.pos)[inside].max() < 0.1 * pixel
    np.testing.assert_allclose(white.sum((1, 2))[inside] * pixel**2, np.pi * POINT_RADIUS**2, rtol=0.1)


def test_each_goal_has_its_colour():
    env = domain(100, obs="images", size=64)
    env.reset(seed=0)
    env.pos[:], env.vel[:] = WALL, 0  # out of the way, in the upper right corner
    frame = discs(env.step(np.zeros((100, 2)))[0]["images"][:, 0])
    frame[:, :6, -6:] = 0  # without the point
    for k in range(3):
        clear = (env.goals[:, k] < 0.9 - pointmass.GOAL_RADIUS).any(1)  # a goal that the cut did not touch
        assert clear.sum() > 50
        np.testing.assert_allclose(centroid(frame[..., k])[clear], env.goals[clear, k], atol=0.1 * 2 * WALL / 64)


def test_render_is_one_picture_per_simulation():
    env = domain(3, render_mode="rgb_array")
    env.reset(seed=0)
    pictures = env.render()
    assert len(pictures) == 3 and all(p.shape == (256, 256, 3) and p.dtype == np.uint8 for p in pictures)
    assert not np.array_equal(pictures[0], pictures[1]) and pictures[0].max() == 255
