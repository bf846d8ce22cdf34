"""Writes tests/aloha_reference.npz: what gym-aloha's own model says, for tests/test_aloha.py.

Run once, in an environment of its own, because gym-aloha needs an older MuJoCo (ours: gym-aloha 0.1.5, mujoco 3.8.1):

    python -m venv venv_aloha && venv_aloha/bin/pip install gym-aloha
    venv_aloha/bin/python tests/make_aloha_reference.py

    joints (100, 16) -> bodies (100, 2, 9, 3), cameras (100, 5, 12)   kinematics at random joint positions
    flags (64, 6) -> flag_stages (64,)                                the reward of every set of contacts
    qpos (M, 30) -> touch (M, 6), qpos_stages (M,)                    situations of ACT's scripts, and their contacts

The contacts: left arm's left finger - socket, right arm's right finger - peg, peg - table, socket - table, peg -
socket's walls, peg - pin.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import gym_aloha
import mujoco
import numpy as np
from gym_aloha.constants import START_ARM_POSE
from gym_aloha.tasks.sim import InsertionTask
from gym_aloha.utils import sample_insertion_pose

ASSETS = Path(gym_aloha.__file__).parent / "assets"
LINKS = ("shoulder_link", "upper_arm_link", "upper_forearm_link", "lower_forearm_link", "wrist_link", "gripper_link",
         "left_finger_link", "right_finger_link", "camera_focus")  # fmt: skip
CAMERAS = ("top", "front_close", "left_wrist", "right_wrist", "angle")
WALLS = [f"socket-{k}" for k in (1, 2, 3, 4)]
# the pairs of geoms behind each of the six contacts, in the order in which the reward names them
LEFT, RIGHT = "vx300s_left/10_left_gripper_finger", "vx300s_right/10_right_gripper_finger"
PAIRS = ([(w, LEFT) for w in WALLS], [("red_peg", RIGHT)], [("red_peg", "table")], [(w, "table") for w in WALLS],
         [("red_peg", w) for w in WALLS], [("red_peg", "pin")])  # fmt: skip


def stage(pairs: list[tuple[str, str]]) -> int:
    """gym-aloha's reward where these pairs of geoms touch."""
    names = sorted({name for pair in pairs for name in pair})
    contact = [SimpleNamespace(geom1=names.index(a), geom2=names.index(b)) for a, b in pairs]
    physics = SimpleNamespace(
        data=SimpleNamespace(ncon=len(pairs), contact=contact),
        model=SimpleNamespace(id2name=lambda i, kind: names[i]),
    )
    return InsertionTask().get_reward(physics)


def kinematics(rng: np.random.Generator) -> dict[str, np.ndarray]:
    model = mujoco.MjModel.from_xml_path(str(ASSETS / "bimanual_viperx_insertion.xml"))
    data = mujoco.MjData(model)
    joints, bodies, cameras = rng.uniform(*model.jnt_range[:16].T, (100, 16)), [], []
    for q in joints:
        data.qpos[:16] = q
        mujoco.mj_forward(model, data)
        bodies.append([[data.body(f"vx300s_{side}/{link}").xpos.copy() for link in LINKS] for side in ("left", "right")])
        cameras.append([np.concatenate([data.camera(c).xpos, data.camera(c).xmat]) for c in CAMERAS])
    return {"joints": joints, "bodies": np.array(bodies), "cameras": np.array(cameras)}


def waypoints(peg: np.ndarray, socket: np.ndarray, amiss: float) -> tuple[list, list]:
    """ACT's scripted insertion (scripted_policy.py), left and right.

    Each point: time [20 ms], position, rotation about y [rad], gripper. The peg comes `amiss` [m] too high.
    """
    sides = []
    for thing, side, lift in ((socket, -1, 0.0), (peg, 1, 0.00715 + amiss)):
        start, pitch, meet = (
            np.array([side * 0.31718881, 0.5, 0.29525084]),
            -side * np.pi / 3,
            np.array([0, 0.5, 0.15 + lift]),
        )
        sides.append(
            [
                (0, start, 0, 0),
                (120, thing + [0, 0, 0.08], pitch, 1),
                (170, thing + [0, 0, -0.03], pitch, 1),
                (220, thing + [0, 0, -0.03], pitch, 0),
                (285, meet + [side * 0.1, 0, 0], pitch, 0),
                (340, meet + [side * 0.05, 0, 0], pitch, 0),
                (400, meet + [side * 0.05, 0, 0], pitch, 0),
            ]
        )
    return tuple(sides)


def situations(seeds: range, every: int) -> dict[str, np.ndarray]:
    """States of scripted episodes. Since MuJoCo 3 the script needs stiffened welds, and MULTICCD off."""
    model = mujoco.MjModel.from_xml_path(str(ASSETS / "bimanual_viperx_end_effector_insertion.xml"))
    model.eq_solimp[:, :2] = 0.99
    model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_MULTICCD)
    data, qpos, touch, rewards = mujoco.MjData(model), [], [], []
    for seed in seeds:
        mujoco.mj_resetData(model, data)
        peg, socket = sample_insertion_pose(seed)
        data.qpos[:] = [*START_ARM_POSE, *peg, *socket]
        plans = waypoints(peg[:3], socket[:3], 0.012 * (seed % 2))  # every other one scrapes a wall
        for t in range(401):
            for k, plan in enumerate(plans):
                i = min(sum(w[0] <= t for w in plan) - 1, len(plan) - 2)
                (t0, p0, a0, g0), (t1, p1, a1, g1) = plan[i], plan[i + 1]
                share = (t - t0) / (t1 - t0)
                data.mocap_pos[k] = p0 + share * (p1 - p0)
                angle = a0 + share * (a1 - a0)
                data.mocap_quat[k] = [np.cos(angle / 2), 0, np.sin(angle / 2), 0]
                finger = 0.01844 + (g0 + share * (g1 - g0)) * (0.058 - 0.01844)
                data.ctrl[2 * k : 2 * k + 2] = finger, -finger
            mujoco.mj_step(model, data, 10)
            mujoco.mj_forward(model, data)
            pairs = [tuple(model.geom(g).name for g in c.geom) for c in data.contact[: data.ncon]]
            if t % every == 0:
                qpos.append(data.qpos.copy())
                touch.append([any(p in pairs for p in group) for group in PAIRS])
                rewards.append(stage(pairs))
        print(f"seed {seed}: stages {sorted(set(rewards[-len(range(0, 401, every)) :]))}")
    return {"qpos": np.array(qpos), "touch": np.array(touch), "qpos_stages": np.array(rewards, np.int8)}


def main() -> None:
    flags = np.array(list(itertools.product((False, True), repeat=6)))
    flag_stages = [stage([group[i % len(group)] for group, on in zip(PAIRS, row, strict=True) if on])
                   for i, row in enumerate(flags)]  # fmt: skip
    file = Path(__file__).with_name("aloha_reference.npz")
    np.savez_compressed(
        file,
        flags=flags,
        flag_stages=np.array(flag_stages, np.int8),
        **kinematics(np.random.default_rng(0)),
        **situations(range(6), 8),
    )
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
