"""Every domain against its contract, the operator, and pointmass against its docstring.

`contract(name)` is for a domain of one's own too: register it with `envs.register` first (docs/domains.md).
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import envs
import pointmass
from envs.operator import Operator
from envs.pointmass import ACTION_LIMIT, COLOURS, POINT_RADIUS, WALL, draw

MODES = ["state", "images"]
N = 6
RENDERED = {
    "pointmass": (256, 256, 3),
    "tabletop": (180, 320, 3),
    "bananatable": (180, 320, 3),
    "aloha": (256, 256, 3),
}
every_domain = pytest.mark.parametrize("name", list(envs.DOMAINS))
every_mode = pytest.mark.parametrize("obs", MODES)


def domain(num_envs: int = N, obs: str = "state", name: str = "pointmass", **kwargs):
    return envs.make_vec(name, num_envs, obs=obs, **({"size": 32} if obs == "images" else {}) | kwargs)


def single(name: str, obs: str, **kwargs) -> envs.SingleView:
    kwargs = ({"size": 32} if obs == "images" else {}) | kwargs
    return gym.make(envs.DOMAINS[name], obs=obs, **kwargs).unwrapped


def actions(rng: np.random.Generator, n: int = N, name: str = "pointmass") -> np.ndarray:
    space = domain(1, name=name).single_action_space
    return rng.uniform(space.low, space.high, (n, *space.shape)).astype(np.float32)


def same(a, b) -> bool:
    """Two values, bit by bit, however they are nested."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    a, b = np.asarray(a), np.asarray(b)
    return np.array_equal(a, b, equal_nan=a.dtype.kind == b.dtype.kind == "f")


def go_on(env, steps: int = 4) -> list:
    """What happens next under the demonstrator, with a reset of some: all that the state and the random
    streams decide."""
    seen = []
    for t in range(steps):
        action = env.demonstrate()
        seen += [action, *env.step(action)]
        if t == 1:
            seen += env.reset(options={"reset_mask": np.arange(env.num_envs) == 0})
    return seen


# --- the contract of a domain -------------------------------------------------------------------------------
@every_domain
def test_a_domain_says_what_it_has_to(name):
    env = domain(name=name)
    assert isinstance(env, envs.Domain) and env.name == name and env.num_envs == N
    assert env.single_observation_space["state"].shape == (len(env.state_names) * env.state_dim,)
    assert np.shape(env.low) == np.shape(env.high) == env.single_action_space.shape
    assert env.steps_cap % env.steps_bins == 0 and env.horizon > 0 and 0 <= env.success_threshold < env.steps_cap
    assert env.stage1_defaults.keys() == env.stage2_defaults.keys() and env.default_obs in env.stage1_defaults
    grammar = env.instructions()
    assert grammar and len(grammar) == len(set(grammar))
    assert all(env.single_observation_space["instruction"].contains(text) for text in grammar)
    assert len(env.demonstrate()) == N if env.reset(seed=0) else False


@every_mode
@every_domain
def test_gymnasium_accepts_the_single_view(name, obs):
    env = single(name, obs, render_mode="rgb_array")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(infinity|-inf|inf).*")  # a state has no bounds
        check_env(env)
    # nothing but these, the goal's position neither; `joints` are a robot's readings of itself
    assert {"instruction", obs} <= set(env.observation_space.keys()) <= {"instruction", obs, "joints"}
    assert env.render().ndim == 3 and env.render().dtype == np.uint8
    env.close()


@every_mode
@every_domain
def test_single_view_and_batch_give_the_same_trajectories(name, obs):
    batch, rng = domain(obs=obs, name=name), np.random.default_rng(0)
    singles = [single(name, obs) for _ in range(N)]
    ours, theirs = batch.reset(seed=100), [env.reset(seed=100 + i) for i, env in enumerate(singles)]
    for t in range(9):
        for i, (alone, *rest, info) in enumerate(theirs):
            assert alone.keys() == ours[0].keys() and alone[obs].dtype == ours[0][obs].dtype
            assert all(np.array_equal(alone[k], ours[0][k][i]) for k in alone)
            assert rest == [x[i] for x in ours[1:-1]]  # reward, terminated, truncated, after a step
            assert info.keys() == ours[-1].keys() and all(info[k] == ours[-1][k][i] for k in info)
        who = ("demonstrate", "expert", "anybody")[t % 3]
        a = actions(rng, name=name) if who == "anybody" else getattr(batch, who)()
        for x, env in zip(a, singles, strict=True):
            assert who == "anybody" or np.array_equal(getattr(env.batch, who)()[0], x)
        ours, theirs = batch.step(a), [env.step(x) for env, x in zip(singles, a, strict=True)]


@every_mode
@every_domain
def test_the_same_seed_gives_the_same_batch(name, obs):
    (first, _), (second, _), (other, _), (listed, _) = (
        domain(obs=obs, name=name).reset(seed=s) for s in (5, 5, 50, list(range(5, 5 + N)))
    )
    assert same(first, second) and same(first, listed) and not same(first, other)
    assert len({x.tobytes() for x in first[obs]}) == N  # and its simulations differ


@every_mode
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
    assert env.t[mask].tolist() == [0, 0] and env.t[~mask].tolist() == [5] * 4 and not info["is_success"][mask].any()
    for _ in range(5):
        a = actions(rng, name=name)
        ours, theirs = env.step(a), untouched.step(a)
        assert all(np.array_equal(ours[0][k][~mask], theirs[0][k][~mask]) for k in ours[0] if k != "instruction")
        for x, y in zip(ours[1:4], theirs[1:4], strict=True):
            assert np.array_equal(x[~mask], y[~mask])
    assert not same(ours[0], untouched_obs)


@every_mode
@every_domain
def test_a_partial_reset_of_nobody_changes_nothing(name, obs):
    env = domain(obs=obs, name=name)
    before, _ = env.reset(seed=0)
    assert same(env.reset(options={"reset_mask": np.zeros(N, bool)})[0], before)


@every_domain
def test_nothing_resets_by_itself(name):
    env = domain(2, name=name)
    assert env.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    env.reset(seed=0)
    for t in range(env.horizon + 3):
        _, reward, terminated, truncated, info = env.step(np.zeros(env.action_space.shape))
        assert np.array_equal(terminated, info["is_success"]) and np.array_equal(reward, terminated)
        assert name not in RENDERED or not terminated.any()  # ours: at rest, and no start is in its goal
        assert truncated.all() == truncated.any() == (t + 1 >= env.horizon)
    assert env.t.tolist() == [env.horizon + 3] * 2


@every_mode
@every_domain
def test_observations_are_in_the_space_and_do_not_change_later(name, obs):
    env, rng, kept = domain(obs=obs, name=name), np.random.default_rng(2), []

    def keep(*values):
        kept.append((values, copy.deepcopy(values)))

    keep(*env.reset(seed=0))
    for t in range(8):
        keep(*env.step(actions(rng, name=name)))
        if t % 3 == 2:
            keep(*env.reset(options={"reset_mask": np.arange(N) % 2 == 0}))
    for now, then in kept:
        assert same(now, then)
        assert all(env.single_observation_space.contains({k: v[i] for k, v in now[0].items()}) for i in range(N))


@every_domain
def test_every_instruction_is_in_the_grammar(name):
    env = domain(200, name=name, **({"family": "mixed", "blocks": 8} if name == "tabletop" else {}))
    assert set(env.reset(seed=0)[0]["instruction"]) <= set(env.instructions())


@every_domain
def test_a_wrong_mask_is_refused_and_nothing_has_changed(name):
    env = domain(4, name=name)
    env.reset(seed=0)
    env.step(env.demonstrate())
    before = env.get_state()
    # indices, numbers for bools, too long, too short, too deep, one for all
    wrong = (
        [0, 3],
        [1, 0, 0, 1],
        np.ones(5, bool),
        np.ones(3, bool),
        np.ones((4, 1), bool),
        True,
        np.bool_(True),
    )
    for mask in wrong:
        for ask in ([env.ask] if hasattr(env, "ask") else []) + [lambda m: env.reset(options={"reset_mask": m})]:
            with pytest.raises(ValueError, match=r"mask .*bool \(4,\)"):
                ask(mask)
    with pytest.raises(ValueError, match="3 seeds for 4"):
        env.reset(seed=[1, 2, 3])
    assert same(env.get_state(), before)
    env.reset(options={"reset_mask": [True, False, False, True]})  # a list of bools is a mask
    assert env.t.tolist() == [0, 1, 1, 0]


@every_domain
def test_wrong_actions_are_refused_and_nothing_has_moved(name):
    env = domain(4, name=name)
    env.reset(seed=0)
    env.step(env.demonstrate())
    before, right = env.get_state(), actions(np.random.default_rng(0), 4, name)
    nan = right.copy()
    nan[2, -1] = np.nan
    wrong = [
        0.03,
        right[0],
        right[:, 1:],
        np.c_[right, right],
        right[:1],
        right[:3],
        right[None],
        right.ravel(),
        np.zeros((4, 0)),
    ]
    for action in wrong:
        with pytest.raises(ValueError, match=r"actions of shape .* takes \(4, "):
            env.step(action)
    with pytest.raises(ValueError, match=r"NaN in the actions of simulations \[2\]"):
        env.step(nan)
    assert same(env.get_state(), before)
    alone = single(name, "state")
    alone.reset(seed=0)
    for action in (0.03, right[:2], nan[2]):
        with pytest.raises(ValueError, match="actions"):
            alone.step(action)
    alone.step(right[0])
    env.step(right)  # and it works on
    assert env.t.tolist() == [2] * 4 and alone.batch.t.tolist() == [1]


@every_domain
def test_the_single_views_info_is_plain_python(name):
    env = single(name, "state")
    for info in (env.reset(seed=0)[1], env.step(env.action_space.sample())[-1]):
        assert json.loads(json.dumps(info)) == info and type(info["is_success"]) is bool
    many = gym.make_vec(envs.DOMAINS[name], 2, vectorization_mode="sync")
    assert many.reset(seed=0)[1]["is_success"].dtype == bool


@every_domain
def test_what_rollout_loops_of_others_ask_for(name):
    env = gym.make(envs.DOMAINS[name])
    assert env.spec.max_episode_steps == env.unwrapped.batch.horizon == env.unwrapped._max_episode_steps
    env = domain(3, name=name)
    env.reset(seed=0)
    assert env.call("_max_episode_steps") == (env.horizon,) * 3
    assert env.call("instructions") == (env.instructions(),) * 3
    assert len(env.call("render")) == 3 and same(env.call("t"), (0, 0, 0))
    with pytest.raises(AttributeError):
        env.call("nonsense")
    for make in (gym.make, lambda id, **k: gym.make_vec(id, 2, vectorization_mode="vector_entry_point", **k)):
        with pytest.raises(ValueError, match="nonsense.*rgb_array"):
            make(envs.DOMAINS[name], render_mode="nonsense")


@every_mode
@every_domain
def test_states_and_copies_go_on_exactly(name, obs):
    env, other = domain(4, obs=obs, name=name), domain(4, obs=obs, name=name)
    env.reset(seed=3), go_on(env), other.reset(seed=9)
    kept = env.get_state()
    copies = copy.deepcopy(env), pickle.loads(pickle.dumps(env))
    first = go_on(env)
    assert all(same(first, go_on(twin)) for twin in copies)
    for again in (env, other):
        again.set_state(kept)
        assert same(first, go_on(again))
    with pytest.raises(ValueError):
        domain(3, obs=obs, name=name).set_state(kept)
    with pytest.raises(ValueError, match="not one of"):
        env.set_state({"t": kept["t"]})
    alone = gym.make(envs.DOMAINS[name], obs=obs)
    alone.reset(seed=0)
    twin = copy.deepcopy(alone)
    assert same(alone.step(alone.action_space.low), twin.step(alone.action_space.low))


@every_mode
@every_domain
def test_a_thread_of_its_own_draws_the_same(name, obs):
    env, frames = domain(2, obs, name), []
    env.reset(seed=0)
    here = env.render()
    thread = threading.Thread(target=lambda: frames.append((env.render(), env.reset(seed=1)[0])))
    thread.start(), thread.join()
    assert same(frames[0], (here, env.reset(seed=1)[0]))


CONTRACT = [check for check_name, check in list(globals().items()) if check_name.startswith("test_")]  # all of the above


def contract(name: str, modes: tuple[str, ...] = ("state", "images")) -> None:
    """All that a registered domain has to do, as one assertion after the other."""
    for check in CONTRACT:
        if "obs" in check.__code__.co_varnames[: check.__code__.co_argcount]:
            for obs in modes:
                check(name, obs)
        else:
            check(name)


def test_a_domain_that_lacks_something_says_what():
    class Half(envs.Domain):
        name, horizon, low, high = "half", 3, -np.ones(1), np.ones(1)

        def instructions(self):
            return ["go"]

    with pytest.raises(NotImplementedError, match=r"Half lacks .*state_names.*demonstrate\(\).*envs\.Domain") as error:
        Half(2, "state", 32, None)
    assert "horizon" not in str(error.value) and "instructions" not in str(error.value)


def test_without_images_a_domain_says_so(monkeypatch):
    monkeypatch.delattr("envs.pointmass.PointmassVectorEnv._views")
    with pytest.raises(ValueError, match="--obs images: pointmass has no images; choose state"):
        domain(obs="images")
    domain(obs="state").reset(seed=0)


@pytest.mark.parametrize(("name", "shape"), RENDERED.items())
def test_rendered_frames_have_the_documented_size(name, shape):
    env = domain(1, name=name, render_mode="rgb_array")
    env.reset(seed=0)
    assert env.render()[0].shape == shape


def test_the_pointmass_asks_all_of_its_grammar():
    seen = set(domain(2000).reset(seed=0)[0]["instruction"])
    grammar = envs.make_vec("pointmass", 1).instructions()
    assert len(grammar) == len(set(grammar)) == 36
    assert seen == set(grammar)


def test_an_unknown_domain_names_the_known_ones():
    with pytest.raises(ValueError, match="--domain tabel: unknown.*pointmass.*aloha"):
        envs.make_vec("tabel", 1)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("size=5", "--domain {}: size 5: choose 16 to 640 pixels"),
        ("size=", "--domain {}: size : choose 16 to 640 pixels"),
        ("colour=3", "--domain {}: no argument 'colour'; {name} has .*size"),
        ("num_envs=3", "--domain {}: no argument 'num_envs'"),
        ("obs=state", "--domain {}: obs comes twice or has a flag of its own"),
        ("size=32,size=32", "--domain {}: size comes twice"),
        ("", "--domain {}: no argument ''"),
    ],
)
@every_domain
def test_what_stands_behind_the_comma_is_blamed_on_the_domain(name, given, told):
    text = f"{name},{given}"
    with pytest.raises(ValueError, match="^" + told.format(text, name=name)):
        envs.make_vec(text, 1, obs="state")
    with pytest.raises(ValueError, match="^--obs pixels: choose state or images$"):
        envs.make_vec(f"{name},size=32", 1, obs="pixels")


# --- docs/domains.md ----------------------------------------------------------------------------------------
PAGE = (Path(__file__).resolve().parents[1] / "docs" / "domains.md").read_text()
BLOCKS = [block.split("```")[0] for block in PAGE.split("```python\n")[1:]]


def test_the_first_snippet_runs(capsys):
    exec(BLOCKS[0], {})
    told = capsys.readouterr().out.splitlines()
    assert "(4, 36)" in told[0] and told[1].count("False") + told[1].count("True") == 4
    assert len(BLOCKS[0].splitlines()) <= 12


def test_the_page_names_all_that_a_domain_must_have():
    tables = " ".join(line for line in PAGE.splitlines() if line.startswith("| `"))
    required = [k for k in envs.Domain.__annotations__ if not hasattr(envs.Domain, k)]
    required += [k for k, v in vars(envs.Domain).items() if getattr(v, "__isabstractmethod__", False)]
    assert len(required) == 18
    assert all(f"`{k}" in tables for k in required)


@pytest.fixture
def corridor(tmp_path, monkeypatch):
    """The page's own domain, registered as the page says."""
    (code,) = (block for block in BLOCKS if block.startswith("# envs/corridor.py"))
    assert len(code.splitlines()) <= 150
    (tmp_path / "corridor.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    (call,) = (block for block in BLOCKS if block.startswith("envs.register"))
    exec(call.replace("envs.corridor:", "corridor:"), {"envs": envs})
    yield "corridor"
    gym.registry.pop(envs.DOMAINS.pop("corridor"))
    sys.modules.pop("corridor")


def test_the_pages_domain_keeps_the_contract(corridor):
    (check,) = (block for block in BLOCKS if "contract(" in block)
    exec(check, {})
    env = domain(100, name=corridor)
    env.reset(seed=0)
    for _ in range(20):
        last = env.step(env.expert())[2]
    assert last.all()


# --- beside others' code: what docs/domains.md says ---------------------------------------------------------
@every_domain
def test_stable_baselines_wrappers_make_it_a_box(name):
    env = gym.wrappers.FlattenObservation(gym.wrappers.FilterObservation(gym.make(envs.DOMAINS[name]), ["state"]))
    assert isinstance(env.observation_space, gym.spaces.Box) and env.observation_space.contains(env.reset(seed=0)[0])


def test_texts_arrive_from_other_processes_without_shared_memory():
    kwargs = {"shared_memory": False}
    many = gym.make_vec(envs.DOMAINS["pointmass"], 2, vectorization_mode="async", vector_kwargs=kwargs)
    assert many.reset(seed=0)[0]["instruction"] == domain(2).reset(seed=0)[0]["instruction"]
    many.close()


def run_alone(code: str) -> subprocess.CompletedProcess:
    """In a process that has imported nothing of ours, on a machine without a display."""
    environ = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MUJOCO_GL", "PYOPENGL_PLATFORM")}
    root = Path(__file__).resolve().parents[1]
    return subprocess.run([sys.executable, "-c", code], env=environ, cwd=root, capture_output=True, text=True, timeout=120)


def test_a_spawned_child_needs_the_prefix_only():
    out = run_alone("import gymnasium as gym; print(gym.make('envs:nanoEFM/Pointmass-v0').reset(seed=0)[0]['instruction'])")
    assert out.stdout.strip() == domain(1).reset(seed=0)[0]["instruction"][0], out.stderr


def test_mujoco_imported_first_is_told_the_way_out():
    out = run_alone("import mujoco, envs; envs.make_vec('tabletop', 1, obs='images').reset(seed=0)")
    told = out.stderr.strip().splitlines()[-1]
    assert "CannotRender" in told and "MUJOCO_GL=:" in told and "import envs before it, or set MUJOCO_GL=egl" in told


# --- the operator -------------------------------------------------------------------------------------------
def practise(env: Operator, episodes: int = 4) -> list:
    """What happens in some episodes of 20 of the expert's steps that count as 600."""
    seen = []
    for k in range(episodes):
        seen += env.reset(seed=1000 + k)
        for _ in range(20):
            seen += env.step(env.expert())
        env.steps += np.full(env.num_envs, 600)
    return [*seen, env.interventions, env.steps.copy(), env.due.copy()]


def test_the_operator_resets_only_what_has_fallen_or_is_overdue():
    domain = envs.make_vec("tabletop", 6)
    env = Operator(domain, seed=0)
    assert ((env.due >= 1800) & (env.due <= 3000)).all()  # 3-5 minutes at 10 Hz
    env.reset(seed=0)
    assert env.interventions == 0 and (env.steps == 0).all()  # setting up is nobody's intervention
    for _ in range(5):
        env.step(env.expert())
    env.steps += np.array([5, 5, 5, 2999, 1799, 5])  # 3 and 4: overdue or not, as the operator feels
    overdue = env.steps > env.due
    domain.fallen[1, 2] = True
    before, texts = domain.pos.copy(), list(domain.texts)
    obs, info = env.reset(seed=100)
    moved = (domain.pos != before).any((1, 2))
    assert moved.tolist() == [False, True, False, bool(overdue[3]), False, False] and overdue[3] and not overdue[4]
    assert env.interventions == 2 and env.steps.tolist() == [5, 0, 5, 0, 1799, 5]
    assert not env.fallen.any() and not info["is_success"].any() and tuple(obs["instruction"]) == tuple(domain.texts)
    assert sum(a != b for a, b in zip(texts, domain.texts, strict=True)) >= 5  # new ones where nothing moved as well
    assert (domain.t == 0).all()


def test_the_operator_is_the_domain_in_all_else():
    domain = envs.make_vec("tabletop,look=real", 3)
    env = Operator(domain, seed=0, every=(100, 100))
    assert isinstance(env, gym.vector.VectorWrapper) and env.unwrapped is domain and env.num_envs == 3
    for name in (
        "name",
        "horizon",
        "obs",
        "size",
        "action_tokens",
        "steps_cap",
        "stage2_defaults",
        "simultaneous",
        "metadata",
    ):
        assert getattr(env, name) == getattr(domain, name)
    assert env.due.tolist() == [1000] * 3 and env.call("_max_episode_steps") == (100,) * 3
    with pytest.raises(AttributeError):
        env.nonsense  # noqa: B018
    with pytest.raises(ValueError, match="reset_mask.*operator decides"):
        env.reset(options={"reset_mask": np.ones(3, bool)})
    with pytest.raises(ValueError, match="--operator: pointmass cannot go on without a reset"):
        Operator(envs.make_vec("pointmass", 2), seed=0)


@pytest.mark.parametrize("name", ["tabletop,family=mixed,look=real", "tabletop,pairs=both", "bananatable"])
def test_an_operators_state_is_data_and_goes_on_exactly(name):
    env = Operator(envs.make_vec(name, 4), seed=3)
    practise(env, 6)
    assert env.interventions > 0
    file = io.BytesIO()
    torch.save(env.state_dict(), file)
    other = Operator(envs.make_vec(name, 4), seed=9)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    twins = other, copy.deepcopy(env), pickle.loads(pickle.dumps(env))
    first = practise(env)
    assert all(same(first, practise(twin)) for twin in twins)


# --- pointmass ----------------------------------------------------------------------------------------------
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
        for env, n, act in (
            (straight, length[0], straight.expert),
            (wandering, length[1], wandering.demonstrate),
        ):
            a = act()
            assert np.abs(a).max() <= ACTION_LIMIT
            terminated = env.step(a)[2]
            n[terminated] = np.minimum(n[terminated], t + 1)
    assert length[0].max() < straight.horizon  # straight always arrives
    assert (length[1] < straight.horizon).mean() > 0.9 and length[1].mean() > 3 * length[0].mean()


# --- its images ---------------------------------------------------------------------------------------------
def test_the_images_show_the_state_and_nothing_of_what_was_before():
    """Two points at the same place with the same velocity look alike, whatever they did; another velocity
    shows."""
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
