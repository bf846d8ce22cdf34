"""AlohaInsertion-v0: two robot arms pick up a peg and a socket and put the one into the other, ACT's task in
MuJoCo.

Description
    The paper's second embodiment. The scene is gym-aloha's `bimanual_viperx_insertion.xml` (Zhao et al.,
    2023): two 6-joint ViperX arms, of the same joints, axes, lengths, ranges and bases, drawn with capsules
    and boxes; the same peg, socket, table, cameras and stages. `qpos` has its layout: 8 numbers for the left
    arm, 8 for the right, 7 for the peg, 7 for the socket.
Action space
    Box(low, high, (70,), float32): one decision, 0.5 s, is five targets at 10 Hz for 14 joints, flattened. Of
    each arm waist, shoulder, elbow, forearm roll, wrist angle, wrist rotate [rad], *as motions from the
    joints' positions at the decision's start* ("semi-global", Appendix B.3), then its gripper: 0 closed, 1
    open, absolute, because on an object it commands a force, not a place. `targets` adds the start. Servos
    get a straight line between targets.
Observation space (Dict)
    instruction  text, e.g. "insert the red peg into the blue socket"
    obs="state"  state float32 (49,): seven quantities of seven numbers, `state_names`. An arm: its six joints
                 [rad] and its gripper's opening, of the left finger. A pose: x, y, z [dm] and a quaternion, w
                 first and >= 0; of the socket and the peg from (0, 0.5, 0) on the table, of each in the
                 gripper of its arm from between the fingertips (the peg turned half round, it is symmetric),
                 of the peg in the socket from the socket's middle
    obs="images" images uint8 (2, size, size, 3), both of now: the cameras top over front and left over right
                 wrist, with a black gap, each camera's 4:3 view squeezed into its half; joints float32 (14,),
                 the state's first two quantities
Rewards
    1 on success, else 0. Stage 2 never reads it. `info["stage"]` is gym-aloha's reward, 0 to 4 (`stages`), of
    what touched in the last 0.1 s.
Starting state
    Arms at START; 5 cm above the table the peg, x 0.1-0.2, y 0.4-0.6, and the socket, x -0.2 - -0.1, y
    0.4-0.6 [m].
Episode end
    terminated: the peg has touched the pin, 2 cm inside the socket, at any time in this decision; truncated:
    40 decisions.
Arguments
    obs "state" | "images"; size, a frame's pixels (128).
Version history
    v0: first version. Against gym-aloha: servos are damped and carry the arms' weight (there, dry friction
    does both), a finger is two boxes in place of its mesh's hull, objects have no dry friction in the air, a
    floor lies 0.4 m below the table's top, steps are 8.3 ms (2 ms). ACT's own script takes 7 s, and so does
    our expert.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from mujoco.batch import Batch

from envs import MujocoDomain, SingleView
from envs.symmetries import AlohaSymmetries, Symmetries

SIDES = ("left", "right")  # the left arm takes the socket, the right one the peg
START = np.array([0, -0.96, 1.16, 0, -0.3, 0])  # [rad]
FINGER_START = 0.02239  # [m]; constants.py
CLOSED, OPEN = 0.01844, 0.058  # finger positions that grippers 0 and 1 stand for [m]; constants.py
CHUNK, TARGET_S, STEP_S = 5, 0.1, 0.1 / 12  # targets in a decision, time between targets, simulation step [s]
CAMERAS = ("top", "front_close", "left_wrist", "right_wrist")

# --- the scene ----------------------------------------------------------------------------------------------
# name, range [rad], servo stiffness [Nm/rad] and force limit [Nm], axis, offset from the joint before [m]
JOINTS = (
    ("waist", -3.14158, 3.14158, 800, 150, "0 0 1", "0 0 .079"),
    ("shoulder", -1.85005, 1.25664, 1600, 300, "0 1 0", "0 0 .04805"),
    ("elbow", -1.76278, 1.6057, 800, 100, "0 1 0", ".05955 0 .3"),
    ("forearm_roll", -3.14158, 3.14158, 10, 100, "1 0 0", ".2 0 0"),
    ("wrist_angle", -1.8675, 2.23402, 50, 100, "0 1 0", ".1 0 0"),
    ("wrist_rotate", -3.14158, 3.14158, 20, 100, "1 0 0", ".069744 0 0"),
)
# what hangs on each joint, between it and the next: our shapes, gym-aloha's masses [kg]
LINKS = (
    '<geom type="cylinder" size=".05 .032" pos="0 0 .03" mass=".799"/>',
    '<geom type="capsule" size=".03" fromto="0 0 0 0 0 .3" mass=".6"/>'
    '<geom type="capsule" size=".028" fromto="0 0 .3 .05955 0 .3" mass=".193"/>',
    '<geom type="capsule" size=".022" fromto="0 0 0 .2 0 0" mass=".322"/>',
    '<geom type="capsule" size=".022" fromto="0 0 0 .1 0 0" mass=".415"/>',
    '<geom type="capsule" size=".02" fromto="0 0 0 .07 0 0" mass=".115"/>',
    '<geom type="box" size=".022 .02 .02" pos=".021 0 0" mass=".13"/>'
    '<geom type="box" size=".014 .075 .012" pos=".05 0 0" mass=".13" rgba=".25 .25 .3 1"/>',
)
GRIP = np.array([0.1465, 0, 0])  # between the fingertips, 7 mm from their ends, in the gripper's frame [m]


DEFAULTS = """
    <compiler angle="radian"/>
    <default>
      <geom rgba=".45 .45 .5 1"/>
      <default class="grip"> <geom condim="4" solimp="2 1 .01" solref=".01 1" friction="1 .005 .0001"/> </default>
      <default class="object">
        <geom condim="4" solimp="2 1 .01" solref=".01 1" friction="1 .005 .0001" contype="4" conaffinity="7"/>
      </default>
    </default>"""


def arm(side: str, pos: str = "0 0 0", euler: str = "0 0 0") -> str:
    """The bodies of an arm. Its links touch the other arm, the table and the objects, not each other."""
    touch = 'contype="1" conaffinity="2"' if side == "left" else 'contype="2" conaffinity="1"'
    fingers = ""
    for finger, sign, low, high in (("left", 1, 0.021, 0.057), ("right", -1, -0.057, -0.021)):
        # the inner faces, where the mesh's hull has them: y = ∓0.02243 from tip to base
        fingers += f"""
        <body name="{side}/{finger}_finger" pos=".0687 0 0" gravcomp="1">
          <joint name="{side}/{finger}_finger" type="slide" axis="0 1 0" range="{low} {high}" armature=".05"/>
          <geom class="grip" type="box" size=".0275 .005 .006" pos=".0575 {-0.01743 * sign} 0" mass=".02" {touch}
                rgba=".2 .2 .25 1"/>
          <geom class="grip" type="box" size=".0175 .011 .018" pos=".0125 {-0.01143 * sign} 0" mass=".0148" {touch}/>
        </body>"""
    focus = f'<body name="{side}/focus" pos=".15 0 .01"/>'
    inner = fingers + focus + camera(f"{side}_wrist", "-.1 0 .16", f"{side}/focus", 20)
    for (name, low, high, _, _, axis, offset), geoms in zip(reversed(JOINTS), reversed(LINKS), strict=True):
        body = "gripper" if name == "wrist_rotate" else name
        inner = f"""
        <body name="{side}/{body}" pos="{offset}" gravcomp="1">
          <joint name="{side}/{name}" axis="{axis}" range="{low} {high}" armature=".002"/>
          {geoms.replace("<geom", f"<geom {touch}")} {inner}
        </body>"""
    base = '<geom type="box" size=".08 .06 .038" pos="-.03 0 .038" contype="0" conaffinity="0" rgba=".25 .25 .3 1"/>'
    return f'<body name="{side}" pos="{pos}" euler="{euler}"> {base} {inner} </body>'


def camera(name: str, pos: str, target: str, fovy: float) -> str:
    """A camera that looks at a body. Its view is 4:3, whatever the shape of the picture."""
    focal = 0.12 / np.tan(np.radians(fovy / 2))
    return (
        f'<camera name="{name}" pos="{pos}" mode="targetbody" target="{target}" '
        f'resolution="320 240" sensorsize=".32 .24" focal="{focal:.6g} {focal:.6g}"/>'
    )


def scene() -> str:
    """The MJCF of the table, the arms, the peg and the socket."""
    servos = ""
    for side in SIDES:
        servos += "".join(f'<position joint="{side}/{name}" ctrlrange="{low} {high}" kp="{kp}" '
                          f'forcerange="-{most} {most}" dampratio="1"/>'
                          for name, low, high, kp, most, _, _ in JOINTS)  # fmt: skip
        for finger, limits in (("left", ".021 .057"), ("right", "-.057 -.021")):
            servos += (
                f'<position joint="{side}/{finger}_finger" ctrlrange="{limits}" kp="200" dampratio="1"/>'
            )
    walls = "".join(f'<geom class="object" type="box" size=".06 {a} {b}" pos="0 {y} {z}" '
                    'friction="1 .05 .001" rgba="0 0 1 1"/>'
                    for a, b, y, z in ((0.018, 0.002, 0, -0.02), (0.018, 0.002, 0, 0.02), (0.002, 0.018, 0.02, 0),
                                       (0.002, 0.018, -0.02, 0)))  # fmt: skip
    inertial = (
        '<inertial pos="0 0 0" mass=".05" diaginertia=".002 .002 .002"/>'  # by hand, and large, in gym-aloha
    )
    # who touches whom: what the stages and the expert ask, in this order
    pairs = (("left/left_finger", "socket"), ("left/right_finger", "socket"), ("right/left_finger", "peg"),
             ("right/right_finger", "peg"), ("peg", "table"), ("socket", "table"),
             ("peg", "socket"), ("peg", "pin"))  # fmt: skip
    sensors = "".join(f'<contact body1="{a}" body2="{b}" num="1" data="found"/>' for a, b in pairs)
    # "discrete" solves contacts together with the servos. "implicitfast" damps what it has solved before: at
    # 5 ms further from the motion of tiny steps than this at 8.3, with twice the solver's iterations. At 10
    # ms the expert fails
    return f"""
    <mujoco model="aloha">
      <option timestep="{STEP_S}" jacobian="dense" integrator="discrete"/>
      <visual>
        <quality offsamples="0" shadowsize="0"/> <map znear=".02" zfar="10"/>
        <global offwidth="640" offheight="640"/>
        <headlight ambient=".4 .4 .4" diffuse=".4 .4 .4" specular="0 0 0"/>
      </visual>
      <statistic extent="1" center="0 .6 0"/>
      {DEFAULTS}
      <worldbody>
        <light pos="0 1 2" dir="0 -.3 -1" diffuse=".4 .4 .4" castshadow="false"/>
        <geom type="plane" size="3 3 .1" pos="0 .6 -.4" rgba=".8 .8 .8 1" contype="4" conaffinity="3"/>
        <body name="table" pos="0 .6 0">
          <geom type="box" size=".6096 .381 .015" pos="0 0 -.015" contype="4" conaffinity="3" rgba=".2 .2 .2 1"/>
        </body>
        {camera("top", "0 .6 .8", "table", 78)} {camera("front_close", "0 .2 .4", "left/focus", 78)}
        {camera("angle", "0 0 .6", "table", 78)}
        {arm("left", "-.469 .5 0")} {arm("right", ".469 .5 0", "0 0 3.1416")}
        <body name="peg" pos=".2 .5 .05"> <freejoint/> {inertial}
          <geom class="object" type="box" size=".06 .01 .01" rgba="1 0 0 1"/>
        </body>
        <body name="socket" pos="-.2 .5 .05"> <freejoint/> {inertial} {walls}
          <body name="pin"> <geom class="object" type="box" size=".04 .01 .01" rgba="1 0 0 1"/> </body>
        </body>
      </worldbody>
      <actuator> {servos} </actuator>
      <sensor> {sensors} </sensor>
    </mujoco>"""


# --- poses: positions float (..., 3) and quaternions float (..., 4), w first --------------------------------
def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The rotation b, then a."""
    w = a[..., :1] * b[..., :1] - (a[..., 1:] * b[..., 1:]).sum(-1, keepdims=True)
    return np.concatenate(
        [w, a[..., :1] * b[..., 1:] + b[..., :1] * a[..., 1:] + np.cross(a[..., 1:], b[..., 1:])], -1
    )


def inverse(q: np.ndarray) -> np.ndarray:
    return q * [1, -1, -1, -1]


def rotate(q: np.ndarray, v: np.ndarray) -> np.ndarray:
    twice = 2 * np.cross(q[..., 1:], v)
    return v + q[..., :1] * twice + np.cross(q[..., 1:], twice)


def from_vector(v: np.ndarray) -> np.ndarray:
    """The rotation about v by |v| [rad]."""
    angle = np.linalg.norm(v, axis=-1, keepdims=True)
    return np.concatenate([np.cos(angle / 2), np.sinc(angle / 2 / np.pi) * v / 2], -1)


def to_vector(q: np.ndarray) -> np.ndarray:
    """The inverse of `from_vector`: its axis times its angle in [0, π] [rad]."""
    q = np.where(q[..., :1] < 0, -q, q)
    sin = np.linalg.norm(q[..., 1:], axis=-1, keepdims=True)
    return q[..., 1:] * 2 * np.arctan2(sin, q[..., :1]) / np.maximum(sin, 1e-12)


def seen_from(pos: np.ndarray, quat: np.ndarray, eye: np.ndarray, eye_quat: np.ndarray) -> np.ndarray:
    """A pose in another's frame, float (..., 7): x, y, z [dm], quaternion with w >= 0."""
    q = multiply(inverse(eye_quat), quat)
    return np.concatenate([rotate(inverse(eye_quat), pos - eye) * 10, np.where(q[..., :1] < 0, -q, q)], -1)


def within(v: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Vectors (..., d), shortened to at most `limit` (...)."""
    return v * np.minimum(1, limit / np.maximum(np.linalg.norm(v, axis=-1), 1e-12))[..., None]


def stages(touch: np.ndarray) -> np.ndarray:
    """gym-aloha's reward (tasks/sim.py) of what touches what, bool (..., 8) as in `scene` -> int (...).

    1 the left arm's left finger touches the socket and the right arm's right finger the peg; 2 and both are
    off the table; 3 the peg touches the socket, both off the table; 4 the peg touches the pin. The last that
    holds counts.
    """
    left, _, _, right, peg_table, socket_table, walls, pin = np.moveaxis(np.asarray(touch, bool), -1, 0)
    lifted = ~peg_table & ~socket_table
    return np.select([pin, walls & lifted, left & right & lifted, left & right], [4, 3, 2, 1], 0)


# --- the domain ---------------------------------------------------------------------------------------------
BASES = np.array([[-0.469, 0.5, 0], [0.469, 0.5, 0]])  # [m]
HALF_TURN = np.array([0, 0, 0, 1.0])  # about z: the right arm faces the left one
TURNS = np.array([[1.0, 0, 0, 0], HALF_TURN])
PITCH = np.radians(75)  # how far down grippers point when they grasp
GRASP = multiply(TURNS, from_vector(np.array([0, PITCH, 0])))  # (2, 4)
# the fastest that the plan turns a joint [rad/s], as in JOINTS: how fine the bins of the actions can be
RATE = np.array([0.4, 0.425, 0.4, 0.55, 0.55, 0.65])
VERBS, PEGS, SOCKETS = ("insert", "put", "push", "plug"), ("peg", "red peg"), ("socket", "blue socket")


def ranges() -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest action, float (70,). Zero, which is to stay, is the middle of one of 256
    bins."""
    motion = RATE * TARGET_S * np.arange(1, CHUNK + 1)[:, None]  # (5, 6)
    bounds = ((-257 / 256 * motion, 0.0), (255 / 256 * motion, 1.0))  # arms, gripper
    low, high = (np.concatenate([x, np.full((CHUNK, 1), gripper)], 1) for x, gripper in bounds)
    return np.tile(low, (1, 2)).ravel().astype(np.float32), np.tile(high, (1, 2)).ravel().astype(np.float32)


class AlohaInsertionVectorEnv(MujocoDomain):
    """N tables with two arms each. See the module's docstring for spaces, success and episode end."""

    name = "aloha"
    horizon = 40  # decisions: 20 s, the time limit of ACT's environments
    low, high = ranges()
    action_tokens = {
        "kind": "uniform",
        "bins": 256,
        "low": low.tolist(),
        "high": high.tolist(),
        "dims": 14 * CHUNK,
    }
    state_names = ("left arm", "right arm", "socket", "peg",
                   "socket in left gripper", "peg in right gripper", "peg in socket")  # fmt: skip
    state_dim = 7
    steps_cap, steps_bins = 40, 40  # steps to go count decisions, as in the paper
    success_threshold = 0.25
    # the demonstrators' noise is in the policy too: drawn from at 1 it drops more; practice broadens it
    temperature = 0.5
    text_length, letters = 60, "abcdefghijklmnopqrstuvwxyz "
    stage1_defaults = {
        "state": {"model": "nano-arms", "episodes": 5000, "updates": 14_000, "batch": 32, "lr": 4e-3,
                  "policy": "last"},
        # runs, has not been trained
        "images": {"model": "nano-vision", "episodes": 2000, "updates": 24_000, "policy": "last"},
    }  # fmt: skip
    # success_bonus: the paper adds "a small constant", because the cameras do not see the insertion
    stage2_defaults = dict.fromkeys(stage1_defaults, {
        "gamma": 0.5, "temperature": 0.7, "clip_reward": 1.0, "success_bonus": 1.0,
        "batch": 72, "learns": "blocks", "num_envs": 64, "iterations": 36})  # fmt: skip
    metadata = MujocoDomain.metadata | {"render_fps": 2}
    STATE_FIELDS = (*MujocoDomain.STATE_FIELDS, "command", "touch", "stage", "miss", "drops", "bump")
    OF_THIS_PROCESS = (*MujocoDomain.OF_THIS_PROCESS, "xpos", "xquat", "sensed",
                       "arms", "arm_xpos", "arm_xquat")  # fmt: skip

    def __init__(
        self, num_envs: int = 1, obs: str = "state", size: int = 128, render_mode: str | None = None
    ):
        super().__init__(num_envs, obs, size, render_mode, scene())
        n = num_envs
        self.symmetries = (
            AlohaSymmetries() if obs == "state" else Symmetries()
        )  # no camera sees the mirror's picture
        self.gripper_ids = [self.model.body(f"{side}/gripper").id for side in SIDES]
        self.command = np.zeros((n, 16))  # the servos' targets at the end of the last decision
        self.touch = np.zeros((n, 8), bool)  # what touched what in the last 0.1 s, pairs as in `scene`
        self.stage = np.zeros(n, int)
        # the demonstrator's habits: where each hand aims amiss [m], drops to come, where the peg will be off
        # the socket [m]
        self.miss, self.drops, self.bump = np.zeros((n, 2, 3)), np.zeros((n, 2), bool), np.zeros((n, 3))

    def _spaces(self) -> dict[str, gym.Space]:
        spaces = super()._spaces()
        if self.obs == "images":
            spaces["joints"] = gym.spaces.Box(-np.inf, np.inf, (14,), np.float32)
        return spaces

    def _simulate(self) -> None:
        super()._simulate()
        self.xpos, self.xquat, self.sensed = (self.sim.bind(k) for k in ("xpos", "xquat", "sensordata"))
        # for the expert: 2 N arms alone, left and right in turn, whose kinematics it inverts
        self.arms: Batch | None = None

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self.sim.forward(stage=mujoco.mjtStage.mjSTAGE_POS.value)  # where the hands are

    def _move(self, actions: np.ndarray) -> None:
        """One decision of every simulation."""
        after = self.targets(actions).reshape(self.num_envs, CHUNK, 2, 7)
        finger = CLOSED + after[..., 6:] * (OPEN - CLOSED)
        after = np.concatenate([after[..., :6], finger, -finger], -1).reshape(self.num_envs, CHUNK, 16)
        after = np.clip(after, *self.model.actuator_ctrlrange.T)
        before = np.concatenate([self.command[:, None], after[:, :-1]], 1)
        steps = round(TARGET_S / STEP_S)
        share = (np.arange(steps)[:, None] + 1) / steps
        control = (before[:, :, None] + share * (after - before)[:, :, None]).reshape(self.num_envs, -1, 16)
        sensed = self.sim.rollout(control.shape[1], control, record=("sensordata",))[
            "sensordata"
        ]  # (N, 100, 8)
        self.sim.forward(stage=mujoco.mjtStage.mjSTAGE_POS.value)  # where the hands are now
        self.command = after[:, -1]
        self.touch = (sensed[:, -steps:] > 0).any(1)  # rigid things that press together part for single steps
        self.stage = np.where((sensed[:, :, -1] > 0).any(1), 4, stages(self.touch))

    def targets(self, actions: np.ndarray) -> np.ndarray:
        """Actions (N, 70), clipped to the action space -> absolute targets, float (N, 5, 14) [rad; gripper 0
        to 1]."""
        targets = np.clip(np.asarray(actions, float), self.low, self.high).reshape(self.num_envs, CHUNK, 2, 7)
        targets[..., :6] += self.joints[:, None, :, :6]
        return targets.reshape(self.num_envs, CHUNK, 14)

    def render(self) -> tuple[np.ndarray, ...]:
        return tuple(self._picture(i, "angle", 256, 256).copy() for i in range(self.num_envs))

    def track(self) -> np.ndarray:
        """Where the peg is, in shares of the rendered frame (x right, y down), float (N, 2); for figures."""
        eye, focus = np.array([0, 0, 0.6]), np.array([0, 0.6, 0])
        depth = (focus - eye) / np.linalg.norm(focus - eye)
        right = np.array([1.0, 0, 0])
        at = self.objects[0][:, 1] - eye
        focal = 0.5 / np.tan(np.radians(39))  # of the frame's height; its width is 4/3 of that, squeezed
        u, v = at @ right / (at @ depth) * focal * 3 / 4, at @ np.cross(right, depth) / (at @ depth) * focal
        return np.stack([0.5 + u, 0.5 - v], 1)

    def instructions(self) -> list[str]:
        return [f"{verb} the {peg} into the {socket}" for verb in VERBS for peg in PEGS for socket in SOCKETS]

    # --- the scene ------------------------------------------------------------------------------------------
    @property
    def joints(self) -> np.ndarray:
        """Readings of the arms, float (N, 2, 7): six joints [rad] and the gripper's opening, of its left
        finger."""
        q = self.sim.qpos[:, :16].reshape(self.num_envs, 2, 8)
        return np.concatenate([q[..., :6], (q[..., 6:7] - CLOSED) / (OPEN - CLOSED)], -1)

    @property
    def objects(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions float (N, 2, 3) [m] and quaternions float (N, 2, 4) of the socket and the peg."""
        poses = self.sim.qpos[:, 16:].reshape(self.num_envs, 2, 7)[:, ::-1]
        return poses[..., :3], poses[..., 3:]

    @property
    def hands(self) -> tuple[np.ndarray, np.ndarray]:
        """Points between the fingertips float (N, 2, 3) [m] and quaternions float (N, 2, 4) of the
        grippers."""
        quat = self.xquat[:, self.gripper_ids]
        return self.xpos[:, self.gripper_ids] + rotate(quat, GRIP), quat

    @property
    def held(self) -> np.ndarray:
        """Whether both fingers of an arm touch its object, bool (N, 2)."""
        return self.touch[:, :4].reshape(-1, 2, 2).all(2)

    def _place(self, rows: np.ndarray) -> None:
        self.sim.reset(rows, stage=mujoco.mjtStage.mjSTAGE_NONE.value)
        start = np.tile([*START, FINGER_START, -FINGER_START], 2)
        for i in rows:
            rng = self.rngs[i]
            peg, socket = (
                [rng.uniform(*x), rng.uniform(0.4, 0.6), 0.05, 1, 0, 0, 0] for x in ((0.1, 0.2), (-0.2, -0.1))
            )
            self.sim.qpos[i] = [*start, *peg, *socket]
            self.texts[i] = self.instructions()[rng.integers(len(VERBS) * len(PEGS) * len(SOCKETS))]
            self._acquire_habits(i, rng)
        self.command[rows] = start
        self.sim.forward(rows)
        self.touch[rows] = self.sensed[rows] > 0
        self.stage[rows] = stages(self.touch[rows])

    def _success(self) -> np.ndarray:
        return self.stage == 4

    def _info(self) -> dict[str, np.ndarray]:
        return super()._info() | {"stage": self.stage.copy()}

    def _observe(self) -> dict[str, Any]:
        seen = super()._observe()
        if self.obs == "images":
            seen["joints"] = self.joints.reshape(self.num_envs, 14).astype(np.float32)
        return seen

    def _state(self) -> np.ndarray:
        (obj, quat), (hand, hand_quat) = self.objects, self.hands
        still = np.array([1.0, 0, 0, 0])
        parts = [self.joints, seen_from(obj, quat, np.array([0, 0.5, 0]), still),
                 # the right arm sees the peg turned half round: its quaternions then stay away from w = 0
                 seen_from(obj, multiply(quat, TURNS), hand, hand_quat),
                 seen_from(obj[:, 1:], quat[:, 1:], obj[:, :1], quat[:, :1])]  # fmt: skip
        return np.concatenate(parts, 1).reshape(self.num_envs, -1).astype(np.float32)

    def _views(self, rows: np.ndarray) -> np.ndarray:
        views = np.zeros((len(rows), 2, self.size, self.size, 3), np.uint8)
        height = (self.size - self.size // 16) // 2  # the gap between two cameras stays black
        for view, i in zip(views, rows, strict=True):
            for k, name in enumerate(CAMERAS):
                top = k % 2 * (self.size - height)
                view[k // 2, top : top + height] = self._picture(i, name, height, self.size)
        return views

    def _picture(self, i: int, name: str, height: int, width: int) -> np.ndarray:
        """uint8 (height, width, 3) of simulation i, by one of the cameras."""
        return self._shoot(self._posed(self.sim.qpos[i]), name, height, width)

    # --- who shows how --------------------------------------------------------------------------------------
    def expert(self) -> np.ndarray:
        """The best we can script, actions float (N, 70)."""
        n = self.num_envs
        return self._plan(1.0, np.zeros((n, 2, 3)), np.zeros((n, 2), bool), np.zeros((n, 3)))

    def demonstrate(self) -> np.ndarray:
        """People's way, actions float (N, 70): slower, not steady, with pauses; some miss, drop or bump, and
        try again.

        What cannot be seen, a pause or a joint's unsteadiness, is decided anew every 0.5 s and lasts as long:
        were it the hand's, or the episode's, one joint's token would tell what the others' have to be by way
        of the arm's Jacobian. The peg is held beside the socket now and then because d has to see that near
        is not yet in.
        """
        held, pause = self.held, np.array([rng.uniform() < 0.1 for rng in self.rngs]) & (self.t > 0)
        self.miss[(self.joints[..., 6] < 0.3) & ~held & (self.t > 0)[:, None]] = (
            0  # closed on nothing: aim anew
        )
        drop = self.drops & held & (self.objects[0][..., 2] > 0.05) & ~pause[:, None]
        self.drops &= ~drop
        self.bump[self.touch[:, 6]] = 0  # the peg is at the socket's rim: back, and in line
        action = self._plan(0.9, self.miss, drop, self.bump).reshape(self.num_envs, CHUNK, 2, 7)
        unsteady = np.stack([rng.normal(0, 0.01, (2, 6)) for rng in self.rngs])  # [rad/s]
        action[..., :6] += unsteady[:, None] * TARGET_S * np.arange(1, CHUNK + 1)[:, None, None]
        action[pause, ..., :6] = 0
        action[pause, ..., 6] = np.round((self.command[pause, None, 6::8] - CLOSED) / (OPEN - CLOSED))
        return np.clip(action.reshape(self.num_envs, -1), self.low, self.high)

    def _acquire_habits(self, i: int, rng: np.random.Generator) -> None:
        """How simulation i's demonstrator goes about this episode: most of them miss, drop or bump something
        once."""
        self.miss[i] = (rng.uniform(size=(2, 1)) < 0.15) * [0, 0, 1] * rng.uniform(0.03, 0.05, (2, 1))
        self.drops[i] = rng.uniform(size=2) < 0.15
        way = rng.uniform(0, 2 * np.pi)
        self.bump[i] = (
            (rng.uniform() < 0.3) * rng.uniform(0.012, 0.028) * np.array([0, np.cos(way), np.sin(way)])
        )

    def _invert(self, q: np.ndarray, pos: np.ndarray, quat: np.ndarray) -> np.ndarray:
        """Joints float (N, 2, 6) near q that bring the hands to pos (N, 2, 3) [m], quat (N, 2, 4): damped
        least squares."""
        if self.arms is None:
            model = mujoco.MjModel.from_xml_string(
                f"<mujoco>{DEFAULTS}<worldbody>{arm('left')}</worldbody></mujoco>"
            )
            self.arms, self.arm_gripper = Batch(model, 2 * self.num_envs), model.body("left/gripper").id
            self.arm_xpos, self.arm_xquat = self.arms.bind("xpos"), self.arms.bind("xquat")
        shape, (low, high) = q.shape, np.array([j[1:3] for j in JOINTS]).T
        q, pos = (
            q.reshape(-1, 6),
            rotate(inverse(TURNS), pos - BASES).reshape(-1, 3),
        )  # as seen from each arm's base
        quat = multiply(inverse(TURNS), quat).reshape(-1, 4)
        for _ in range(4):  # enough from one target to the next
            self.arms.qpos[:, :6] = q
            self.arms.forward(stage=mujoco.mjtStage.mjSTAGE_POS.value)
            now = self.arm_xquat[:, self.arm_gripper]
            hand = self.arm_xpos[:, self.arm_gripper] + rotate(now, GRIP)
            error = np.concatenate([pos - hand, to_vector(multiply(quat, inverse(now)))], 1)  # (2 N, 6)
            jacobian = np.concatenate(self.arms.jac(self.arm_gripper, hand), 1)[..., :6]  # (2 N, 6, 6)
            # so damped that the forearm does not spin where the wrist is nearly straight and could not help
            # it
            square = jacobian @ jacobian.swapaxes(1, 2) + 0.01 * np.eye(6)
            q = np.clip(
                q + (jacobian.swapaxes(1, 2) @ np.linalg.solve(square, error[..., None]))[..., 0], low, high
            )
        return q.reshape(shape)

    def _plan(self, pace: float, miss: np.ndarray, drop: np.ndarray, bump: np.ndarray) -> np.ndarray:
        """Actions float (N, 70): the hands move by rules, five targets ahead in thought, and the joints
        follow.

        A hand without its object goes above it, down, and closes; one that holds it brings it, level, to the
        middle of the table; the better the two are in line, the nearer they come. pace scales the speeds; the
        hands grasp `miss` (N, 2, 3) [m] beside the object, let go where `drop` (N, 2), and bring the peg
        `bump` (N, 3) [m] beside the socket.
        """
        joints, held = self.joints, self.held & ~drop
        start, opening = joints[..., :6], joints[..., 6]
        (hand, quat), (obj, obj_quat) = self.hands, self.objects
        axis = rotate(obj_quat, np.array([1.0, 0, 0]))  # (N, 2, 3), along the peg and the socket
        # to grasp: across the axis, either end ahead; 4 mm high, not to scratch the table
        yaw = (np.arctan2(axis[..., 1], axis[..., 0]) + np.pi / 2) % np.pi - np.pi / 2
        grasp, grasp_quat = (
            obj + miss + [0, 0, 0.004],
            multiply(from_vector(yaw[..., None] * [0, 0, 1]), GRASP),
        )
        # to hold: what is in the hand stays there as it is, and the hand turns until the axis is x
        in_hand, axis_in_hand = rotate(inverse(quat), obj - hand), rotate(inverse(quat), axis)
        level_quat = multiply(from_vector(np.cross(axis, np.sign(axis[..., :1]) * [1, 0, 0])), quat)
        goal_quat, both = np.where(held[..., None], level_quat, grasp_quat), held.all(1)
        plan, q = [], start
        for _ in range(CHUNK):
            gap = (
                np.diff(hand + rotate(quat, in_hand), axis=1)[:, 0] - bump
            )  # (N, 3), from the socket's middle to the peg's
            slant = np.linalg.norm(rotate(quat, axis_in_hand)[..., 1:], axis=2).max(1)
            # how far the peg's end is beside the socket's axis [m]; there are 8 mm of play, and they touch
            # each other at 0.12, the pin at 0.10. A funnel, no threshold: who imitates one, a millimetre off,
            # waits before it for ever
            amiss = np.linalg.norm(gap[:, 1:], axis=1) + 0.06 * slant
            apart = np.where(both, 0.09 + 0.07 * np.clip((amiss - 0.004) / 0.006, 0, 1), 0.26)
            near = both & (gap[:, 0] < 0.17)
            meet = apart[:, None, None] * [[-0.5, 0, 0], [0.5, 0, 0]] + [0, 0.5, 0.15]  # (N, 2, 3)
            meet[:, 1] += bump

            off, turn = hand - grasp, to_vector(multiply(goal_quat, inverse(quat)))
            aside, turned = np.linalg.norm(off[..., :2], axis=2), np.linalg.norm(turn, axis=2)
            there = ~held & (np.linalg.norm(off, axis=2) < 0.006) & (turned < 0.1)
            over = there | (aside < 0.012) & (turned < 0.2) & (opening > 0.8)
            above = np.where(
                ((off[..., 2] < 0.05) & (aside > 0.03))[..., None], hand, grasp
            )  # from beside it: up first
            above[..., 2] = grasp[..., 2] + 0.08
            close = held | there & ~drop

            goal = np.where(over[..., None], grasp, above)
            goal = np.where(held[..., None], meet - rotate(level_quat, in_hand), goal)
            speed = np.where(held, np.where(near, 0.04, 0.1)[:, None], np.where(over, 0.08, 0.14))  # [m/s]
            step, angle = pace * speed * TARGET_S, pace * 0.55 * TARGET_S  # 0.55 rad/s
            hand, quat = hand + within(goal - hand, step), multiply(from_vector(within(turn, angle)), quat)
            opening = np.where(close, opening, np.minimum(opening + 0.5, 1))  # it opens in 0.2 s
            q = q + np.clip(self._invert(q, hand, quat) - q, -RATE * TARGET_S, RATE * TARGET_S)
            plan.append(np.concatenate([q - start, np.where(close, 0.0, 1.0)[..., None]], 2))  # (N, 2, 7)
        return np.clip(np.stack(plan, 1).reshape(self.num_envs, -1), self.low, self.high)


class AlohaInsertionEnv(SingleView):
    """One table. See the module's docstring."""

    vector_class = AlohaInsertionVectorEnv
