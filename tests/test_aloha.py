"""Aloha against its contract, its docstring, and gym-aloha's own model (aloha_reference.npz, by
make_aloha_reference.py)."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import envs
from envs import aloha
from envs.aloha import (  # MuJoCo after it has chosen its GL
    CHUNK,
    CLOSED,
    JOINTS,
    OPEN,
    RATE,
    SIDES,
    START,
    Batch,
    mujoco,
)
from tokens import UniformBins, action_tokenizer

MODES = ["state", "images"]
N = 4
REFERENCE = np.load(Path(__file__).with_name("aloha_reference.npz"))
STAY = np.zeros(70)
STAY[6::7] = 1  # both arms where they are, grippers open


def domain(num_envs: int = N, obs: str = "state", **kwargs):
    return envs.make_vec("aloha", num_envs, obs=obs, **({"size": 32} if obs == "images" else {}) | kwargs)


def actions(rng: np.random.Generator, n: int = N) -> np.ndarray:
    space = gym.spaces.Box(*aloha.ranges(), dtype=np.float32)
    return rng.uniform(space.low, space.high, (n, 70)).astype(np.float32)


def same(a: dict, b: dict) -> bool:
    """Two observations of a batch, bit by bit."""
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def lift(env, decisions: int = 10) -> None:
    """Let the expert act; after 10 decisions both objects are off the table, after 12 on their way
    together."""
    for _ in range(decisions):
        env.step(env.expert())


def place(env, peg: list[float], socket: list[float], i: int = 0) -> None:
    """Peg and socket of simulation i at these positions, level, at rest."""
    env.sim.qpos[i, 16:] = [*peg, 1, 0, 0, 0, *socket, 1, 0, 0, 0]
    env.sim.qvel[i, 16:] = 0


# --- what test_envs.py does not ask of every domain ---------------------------------------------------------
def test_instructions_and_arguments():
    env = domain(300)
    grammar = env.instructions()
    assert set(env.reset(seed=0)[0]["instruction"]) == set(grammar) and len(grammar) == len(set(grammar)) == 16
    assert all(env.single_observation_space["instruction"].contains(text) for text in grammar)
    with pytest.raises(ValueError, match="pixels"):
        domain(1, obs="pixels")


@pytest.mark.parametrize("obs", MODES)
def test_a_partial_reset_leaves_the_others_hands_untouched(obs):
    env, untouched, rng = domain(obs=obs), domain(obs=obs), np.random.default_rng(1)
    env.reset(seed=3), untouched.reset(seed=3)
    for _ in range(4):
        a = env.expert()
        env.step(a), untouched.step(a)
    mask = np.array([True, False, False, True])
    _, info = env.reset(options={"reset_mask": mask})
    assert info["stage"][mask].tolist() == [0, 0]
    for _ in range(3):
        a = actions(rng)
        a[~mask] = env.expert()[~mask]
        ours, theirs = env.step(a), untouched.step(a)
        assert all(np.array_equal(ours[0][k][~mask], theirs[0][k][~mask]) for k in ours[0] if k != "instruction")


# --- the scene against its docstring ------------------------------------------------------------------------
def test_starts_are_as_documented():
    env = domain(500)
    env.reset(seed=0)
    (socket, peg), quat = env.objects[0].swapaxes(0, 1), env.objects[1]
    assert np.array_equal(env.joints[..., :6], np.broadcast_to(START, (500, 2, 6))) and not env.touch.any()
    for thing, low, high in (
        (peg, [0.1, 0.4, 0.05], [0.2, 0.6, 0.05]),
        (socket, [-0.2, 0.4, 0.05], [-0.1, 0.6, 0.05]),
    ):
        assert (thing >= low).all() and (thing <= high).all()
        assert np.allclose(thing.min(0), low, atol=0.002) and np.allclose(thing.max(0), high, atol=0.002)
    assert (quat == [1, 0, 0, 0]).all()


def test_the_state_is_the_one_in_the_docstring():
    env = domain()
    env.reset(seed=1)
    lift(env, 12)
    o = env.step(env.demonstrate())[0]
    state = dict(zip(env.state_names, o["state"].reshape(N, -1, env.state_dim).swapaxes(0, 1), strict=True))
    data = mujoco.MjData(env.model)
    for i in range(N):
        data.qpos[:] = env.sim.qpos[i]
        mujoco.mj_kinematics(env.model, data)

        def pose(thing, eye=None, half=False, data=data):
            """Of a body in another's frame, by matrices."""
            at, turn = data.body(thing).xpos, data.body(thing).xmat.reshape(3, 3)
            if half:
                turn = turn @ np.diag([-1, -1, 1])
            if eye is None:
                return (at - [0, 0.5, 0]) * 10, turn
            frame = data.body(eye).xmat.reshape(3, 3)
            origin = data.body(eye).xpos + (frame @ aloha.GRIP if "gripper" in eye else 0)
            return frame.T @ (at - origin) * 10, frame.T @ turn

        expected = {"socket": pose("socket"), "socket in left gripper": pose("socket", "left/gripper"),
                    "peg": pose("peg"), "peg in right gripper": pose("peg", "right/gripper", True),
                    "peg in socket": pose("peg", "socket")}  # fmt: skip
        for name, (at, turn) in expected.items():
            matrix = np.zeros(9)
            mujoco.mju_quat2Mat(matrix, state[name][i, 3:].astype(float))
            np.testing.assert_allclose(state[name][i, :3], at, atol=1e-5)
            np.testing.assert_allclose(matrix.reshape(3, 3), turn, atol=1e-5)
            assert state[name][i, 3] >= 0
        for side in SIDES:
            q = [data.joint(f"{side}/{j[0]}").qpos[0] for j in JOINTS]
            opening = (data.joint(f"{side}/left_finger").qpos[0] - CLOSED) / (OPEN - CLOSED)
            np.testing.assert_allclose(state[f"{side} arm"][i], [*q, opening], atol=1e-5)


def test_quaternions_are_mujocos():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b, v, out = rng.normal(size=4), rng.normal(size=4), rng.normal(size=3), np.zeros(4)
        a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
        mujoco.mju_mulQuat(out, a, b)
        np.testing.assert_allclose(aloha.multiply(a, b), out, atol=1e-12)
        mujoco.mju_rotVecQuat(out[:3], v, a)
        np.testing.assert_allclose(aloha.rotate(a, v), out[:3], atol=1e-12)
        mujoco.mju_quat2Vel(out[:3], a if a[0] > 0 else -a, 1.0)
        np.testing.assert_allclose(aloha.to_vector(a), out[:3], atol=1e-12)
        np.testing.assert_allclose(aloha.multiply(aloha.from_vector(aloha.to_vector(a)), aloha.inverse(a))[1:], 0, atol=1e-12)


# --- gym-aloha's model and reward ---------------------------------------------------------------------------
def test_kinematics_and_cameras_are_gym_alohas():
    """The issue's bar is 2 mm at 100 random joint positions; the numbers were copied, so they agree to
    rounding."""
    model = mujoco.MjModel.from_xml_string(aloha.scene())
    data = mujoco.MjData(model)
    links = [*(j[0] for j in JOINTS[:5]), "gripper", "left_finger", "right_finger", "focus"]
    assert REFERENCE["joints"].shape == (100, 16)
    for q, bodies, cameras in zip(*(REFERENCE[k] for k in ("joints", "bodies", "cameras")), strict=True):
        data.qpos[:16] = q
        mujoco.mj_kinematics(model, data)
        mujoco.mj_camlight(model, data)
        np.testing.assert_allclose([[data.body(f"{s}/{k}").xpos for k in links] for s in SIDES], bodies, atol=1e-6)
        for name, expected in zip((*aloha.CAMERAS, "angle"), cameras, strict=True):
            np.testing.assert_allclose(np.r_[data.camera(name).xpos, data.camera(name).xmat], expected, atol=1e-6)
    np.testing.assert_allclose(model.jnt_range[:6], [j[1:3] for j in JOINTS])


def test_stages_are_gym_alohas_for_every_set_of_contacts():
    touch = np.zeros((64, 8), bool)
    touch[:, [0, 3, 4, 5, 6, 7]] = REFERENCE["flags"]
    assert np.array_equal(aloha.stages(touch), REFERENCE["flag_stages"]) and set(REFERENCE["flag_stages"]) == {0, 1, 2, 3, 4}


def test_stages_agree_in_situations_recorded_in_gym_aloha():
    """Six episodes of ACT's script in gym-aloha. Fingers there are hulls of meshes: their contact may differ
    by 0.1 mm."""
    model = mujoco.MjModel.from_xml_string(aloha.scene())
    sim = Batch(model, len(REFERENCE["qpos"]))
    sim.qpos[:] = REFERENCE["qpos"]
    touch = sim.bind("sensordata")
    sim.forward()
    ours, theirs = aloha.stages(touch > 0), REFERENCE["qpos_stages"]
    assert np.bincount(theirs, minlength=5).min() >= 5
    assert np.array_equal(touch[:, 4:] > 0, REFERENCE["touch"][:, 2:])  # table, walls, pin
    differ = np.flatnonzero(ours != theirs)
    assert len(differ) <= 0.01 * len(ours)
    data = mujoco.MjData(model)
    for i in differ:
        data.qpos[:] = REFERENCE["qpos"][i]
        mujoco.mj_forward(model, data)
        which = {0: "left/left_finger", 1: "right/right_finger"}
        fingers = [which[k] for k in np.flatnonzero((touch[i, [0, 3]] > 0) != REFERENCE["touch"][i, :2])]
        depth = [
            -c.dist for c in data.contact[: data.ncon] if any(model.body(model.geom_bodyid[g]).name in fingers for g in c.geom)
        ]
        assert fingers and max(depth, default=0) < 1e-4


# --- what happens in it -------------------------------------------------------------------------------------
def test_success_is_the_peg_on_the_pin():
    env = domain(3)
    env.reset(seed=0)
    for i, apart in enumerate((0.0995, 0.103, 0.121)):  # on the pin; inside the socket, short of it; outside
        place(env, [apart, 0.5, 0.3], [0, 0.5, 0.3], i)
    _, reward, terminated, _, info = env.step(np.tile(STAY, (3, 1)))  # they fall together, 30 cm in this decision
    for success in (reward, terminated, info["is_success"], info["stage"] == 4):
        assert np.asarray(success, bool).tolist() == [True, False, False]
    _, info = env.reset(options={"reset_mask": np.array([True, False, False])})
    assert not info["is_success"].any()


def test_zero_is_to_stay():
    env = domain()
    env.reset(seed=0)
    lift(env, 4)
    env.step(np.tile(STAY, (N, 1)))  # comes to rest
    before = env.joints
    tokens = action_tokenizer(**env.action_tokens)
    stay = tokens.decode(tokens.encode(torch.from_numpy(STAY).float())).numpy()
    assert np.allclose(stay.reshape(-1, 7)[:, :6], 0, atol=1e-7)
    for _ in range(5):
        env.step(np.tile(stay, (N, 1)))
    assert np.abs(env.joints - before)[..., :6].max() < 2e-3


def test_targets_are_reached_and_clipped():
    env, strong, rng = domain(), domain(), np.random.default_rng(0)
    env.reset(seed=0), strong.reset(seed=0)
    a = actions(rng)
    assert same(env.step(np.sign(a) * 9)[0], strong.step(np.where(a < 0, env.low, env.high))[0])
    for _ in range(3):
        a = np.tile(0.5 * actions(rng).reshape(N, CHUNK, 14)[:, :1], (1, CHUNK, 1)).reshape(N, 70)
        goal = env.targets(a)[:, -1].reshape(N, 2, 7)
        low, high = np.array([j[1:3] for j in JOINTS]).T
        env.step(a)  # the same target all along
        assert np.abs(env.joints[..., :6] - np.clip(goal[..., :6], low, high)).max() < 0.02  # [rad]


@pytest.mark.parametrize("multiccd", ["enable", "disable"])
def test_a_grasp_holds(monkeypatch, multiccd):
    """Ten seconds in the air, with MuJoCo's MULTICCD, on by default since 3.8, and without: gym-aloha's does
    not hold."""
    original, flag = aloha.scene(), f'<flag multiccd="{multiccd}"/>'
    assert "<worldbody>" in original
    monkeypatch.setattr(aloha, "scene", lambda: original.replace("<worldbody>", f"<option>{flag}</option><worldbody>", 1))
    env = domain(8)
    assert bool(env.model.opt.disableflags & mujoco.mjtDisableBit.mjDSBL_MULTICCD) == (multiccd == "disable")
    env.reset(seed=1)
    lift(env)

    def in_hand():
        (obj, _), (hand, quat) = env.objects, env.hands
        return aloha.rotate(aloha.inverse(quat), obj - hand)

    hold = np.zeros((8, 70))  # stay, closed
    env.step(hold)
    before = in_hand()
    assert env.held.all() and (env.objects[0][..., 2] > 0.05).all() and (env.stage == 2).all()
    for _ in range(20):
        env.step(hold)
        assert env.held.all()
    assert np.abs(in_hand() - before).max() < 1e-3  # [m]


# --- actions as tokens --------------------------------------------------------------------------------------
def fingertips(targets: np.ndarray) -> np.ndarray:
    """Where the four fingertips are, float (M, 4, 3) [m], at targets float (M, 14)."""
    model = mujoco.MjModel.from_xml_string(aloha.scene())
    sim, targets = Batch(model, len(targets)), targets.reshape(-1, 2, 7)
    finger = np.clip(CLOSED + targets[..., 6:] * (OPEN - CLOSED), 0.021, 0.057)
    sim.qpos[:, :16] = np.concatenate([targets[..., :6], finger, -finger], 2).reshape(-1, 16)
    pos, quat = sim.bind("xpos"), sim.bind("xquat")
    sim.forward(stage=mujoco.mjtStage.mjSTAGE_POS.value)
    ids = [(model.body(f"{s}/{f}_finger").id, y) for s in SIDES for f, y in (("left", -0.0224), ("right", 0.0224))]
    return np.stack([pos[:, i] + aloha.rotate(quat[:, i], np.array([0.085, y, 0])) for i, y in ids], 1)


def test_256_bins_of_motions_cost_1_mm_at_the_fingertips_and_absolute_ones_12():
    env, most = domain(32), np.zeros((CHUNK, 2, 7))
    tokens = action_tokenizer(**env.action_tokens)
    assert len(tokens.ranges) == 70 and set(tokens.ranges) == {(0, 256)}
    limits = [*(j[1:3] for j in JOINTS), (0.0, 1.0)] * 2
    absolute = UniformBins(256, [x[0] for x in limits], [x[1] for x in limits], 14)
    env.reset(seed=0)
    errors, errors_absolute = [], []
    for t in range(12):
        a = (env.demonstrate() if t % 3 else env.expert()).astype(np.float32)
        assert (a >= env.low).all() and (a <= env.high).all()
        most = np.maximum(most, np.abs(a).reshape(-1, CHUNK, 2, 7).max(0))
        target = env.targets(a).reshape(-1, 14)
        coded = env.targets(tokens.decode(tokens.encode(torch.from_numpy(a))).numpy()).reshape(-1, 14)
        coded_absolute = absolute.decode(absolute.encode(torch.from_numpy(target).float())).double().numpy()
        at = fingertips(target)
        errors.append(np.linalg.norm(fingertips(coded) - at, axis=2).max())
        errors_absolute.append(np.linalg.norm(fingertips(coded_absolute) - at, axis=2).max())
        env.step(a)
    assert max(errors) <= 0.001 < 0.007 < max(errors_absolute)  # [m]
    # the bins span the demonstrations' own range: every joint uses most of it
    assert np.allclose(env.high.reshape(CHUNK, 2, 7)[-1, 0, :6], RATE * 0.5 * 255 / 256)
    assert (most.max(1)[:, :6] > 0.6 * env.high.reshape(CHUNK, 2, 7)[:, 0, :6]).all()
    # where arms reach furthest, the half bins of waist, shoulder, ... add up to more
    joints = np.random.default_rng(0).uniform(absolute.low, absolute.high, (5000, 14))
    coded = absolute.decode(absolute.encode(torch.from_numpy(joints).float())).double().numpy()
    worst = np.linalg.norm(fingertips(coded) - fingertips(joints), axis=2).max()
    assert 0.010 < worst < 0.014
    print(f"worst errors: {max(errors) * 1000:.2f} mm, absolute {max(errors_absolute) * 1000:.2f} and {worst * 1000:.2f} mm")


# --- who shows how ------------------------------------------------------------------------------------------
def steps_to_success(env, act, seed: int = 0) -> np.ndarray:
    """Decisions until success of one episode each, float (n,); nan where it fails."""
    env.reset(seed=seed)
    steps = np.full(env.num_envs, np.nan)
    for t in range(env.horizon):
        terminated = env.step(act())[2]
        steps[terminated & np.isnan(steps)] = t + 1
        if not np.isnan(steps).any():
            break
    return steps


def test_inverse_kinematics_invert_kinematics():
    env = domain(30)
    env.reset(seed=0)
    lift(env, 6)
    q, (hand, quat) = env.joints[..., :6].copy(), [x.copy() for x in env.hands]
    start = q + np.random.default_rng(0).normal(0, 0.05, q.shape)
    found = env._invert(start, hand, quat)
    env.sim.qpos[:, :16].reshape(30, 2, 8)[..., :6] = found
    env.sim.forward()
    assert np.linalg.norm(env.hands[0] - hand, axis=2).max() < 1e-3  # [m]
    assert np.linalg.norm(aloha.to_vector(aloha.multiply(env.hands[1], aloha.inverse(quat))), axis=2).max() < 0.02  # [rad]


def test_the_expert_inserts_and_demonstrations_take_longer():
    env = domain(24)
    best, shown = steps_to_success(env, env.expert), steps_to_success(env, env.demonstrate)
    assert np.isfinite(best).mean() >= 0.95 and np.nanmax(best) <= 16
    assert np.isfinite(shown).mean() >= 0.9 and np.nanmean(shown) > 1.3 * np.nanmean(best)


def test_who_drops_misses_or_bumps_tries_again():
    env = domain(8)
    env.reset(seed=0)
    # left arms drop, right ones close above the peg, and then hold it against the socket's upper rim
    env.drops[:], env.miss[:], env.bump[:] = [True, False], [[0, 0, 0], [0, 0, 0.04]], [0, 0, 0.02]
    held, closed, opened, done = [], [], np.zeros(8, bool), np.zeros(8, bool)
    bumped = np.zeros(8, bool)
    for _ in range(env.horizon):
        done |= env.step(env.demonstrate())[2]
        bumped |= env.touch[:, 6] & env.bump.any(1)
        opened |= env.joints[:, 1, 6] > 0.9
        held.append(env.held), closed.append(opened & (env.joints[:, 1, 6] < 0.1))
        if done.all():
            break
    held = np.array(held)  # (T, 8, 2)
    assert (held[:-1, :, 0] & ~held[1:, :, 0]).any(0).all() and np.any(closed, 0).all()
    assert done.sum() >= 7 and not env.drops.any() and not env.miss.any()
    assert bumped.sum() >= 7 and not env.bump[bumped].any()


@pytest.mark.slow
def test_the_expert_inserts_in_500_episodes():
    env = domain(500)
    best, shown = steps_to_success(env, env.expert, 10**6), steps_to_success(env, env.demonstrate, 2 * 10**6)
    print(f"expert {np.isfinite(best).mean():.3f}, {np.nanmean(best):.2f} decisions; "
          f"demonstrator {np.isfinite(shown).mean():.3f}, {np.nanmean(shown):.2f}")  # fmt: skip
    assert np.isfinite(best).mean() >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("obs", MODES)
def test_both_stages_run(tmp_path, monkeypatch, obs):
    import stage1
    import stage2

    monkeypatch.chdir(tmp_path)
    make_vec = envs.make_vec
    size = {"size": 32} if obs == "images" else {}
    monkeypatch.setattr(envs, "make_vec", lambda domain, n, **kwargs: make_vec(domain, n, **kwargs | size))
    few = {"episodes": 12, "updates": 4, "batch": 16, "eval_every": 2, "eval_episodes": 2}
    stage1.main(stage1.Config(domain="aloha", obs=obs, **few))
    stage2.main(stage2.Config(iterations=1, updates=1, batch=16, num_envs=4, first_look=4, eval_episodes=2))
    for stage in ("stage1", "stage2"):
        assert next(Path("runs").glob(f"aloha*-{stage}-s0/summary.json")).exists()


# --- its images ---------------------------------------------------------------------------------------------
def test_four_cameras_are_stacked_in_pairs_with_a_black_gap():
    env = domain(2, obs="images", size=64)
    o, _ = env.reset(seed=0)
    frames = o["images"]  # (2, 2, 64, 64, 3)
    assert not frames[:, :, 30:34].any() and frames[:, :, [29, 34]].any((2, 3, 4)).all()
    assert o["joints"].shape == (2, 14) and np.allclose(o["joints"][:, 7:13], START)
    top = frames[:, 0, :30].astype(int)
    red = (top[..., 0] > 100) & (top[..., 1:].max(-1) < 60)
    blue = (top[..., 2] > 100) & (top[..., :2].max(-1) < 60)
    for i in range(2):  # seen from above: the socket left, the peg right, further up the larger their y
        for mask, k in ((blue[i], 0), (red[i], 1)):
            v, u = np.argwhere(mask).mean(0)
            x, y, z = env.objects[0][i, k]
            # half a view [pixels] spans the tangent of half its angle; its width 4/3 of that
            expected = np.array([32 + 32 * x / (0.8 - z) / np.tan(np.radians(39)) * 3 / 4,
                                 15 - 15 * (y - 0.6) / (0.8 - z) / np.tan(np.radians(39))])  # fmt: skip
            np.testing.assert_allclose([u + 0.5, v + 0.5], expected, atol=1)
    later = env.step(env.expert())[0]["images"]
    assert (later != frames).any((2, 3, 4)).all()


def test_a_demonstration_keeps_both_views_of_a_moment_and_the_joints(monkeypatch):
    """Batches show what the domain showed: two views of one moment, not a frame and the one before it."""
    from common import demos

    make_vec, shown = envs.make_vec, []

    def watched(*args, **kwargs):
        env = make_vec(*args, **kwargs, size=32)
        observe = env._observe
        env._observe = lambda: shown.append(observe()) or shown[-1]
        return env

    monkeypatch.setattr(envs, "make_vec", watched)
    data = demos.record("aloha", "images", 1, seed=0)
    length = int(data["length"][0])
    assert data["frames"].shape == (length, 2, 32, 32, 3) and data["joints"].shape == (length, 14)
    obs, _, _, steps = demos.Demonstrations(data, np.array([0]), 7).batch(np.array([0, 3, length - 1]), torch.device("cpu"))
    assert obs["images"].shape == (3, 2, 32, 32, 3) and steps.tolist() == [length - 1, length - 4, 0]
    episode = shown[-length - 1 : -1]  # a failed one is started again; after the last there was a reset
    for k, t in enumerate((0, 3, length - 1)):
        assert all(np.array_equal(obs[key][k], episode[t][key][0]) for key in ("images", "joints"))


def test_the_track_is_the_peg_in_the_picture():
    env = domain(3, render_mode="rgb_array")
    env.reset(seed=0)
    pictures = np.stack(env.render()).astype(int)
    assert pictures.shape == (3, 256, 256, 3)
    for picture, at in zip(pictures, env.track(), strict=True):
        red = (picture[..., 0] > 100) & (picture[..., 1:].max(-1) < 60)
        np.testing.assert_allclose((np.argwhere(red).mean(0)[::-1] + 0.5) / 256, at, atol=0.01)
