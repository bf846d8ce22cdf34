"""Tabletop-v0: Google's LanguageTable in MuJoCo. BananaTable-v0: the same table with one banana.

Description
    A round tool pushes blocks over a table to do what a sentence says, as in LanguageTable (Lynch et al.,
    2022), the main domain of the paper. Geometry, camera, control, reset, grammar and success rules are those
    of google-research/language-table; the physics are MuJoCo's, in the plane (blocks slide and turn, they do
    not tip).
Action space
    Box(-0.1, 0.1, (2,), float32) [m]: (dx, dy) added to the tool's *target*, which is then clipped to the
    workspace x 0.15-0.60, y -0.3048-0.3048. x points away from the robot's base, which is down in the image;
    y points right. 10 Hz; after a first 1/240 s the tool covers 10 % of what is left to its target every
    1/240 s.
Observation space (Dict)
    instruction  text, e.g. "push the red moon to the blue cube"
    obs="state"  state float32 (4 + 4 B,): the tool (x, y from the workspace's centre, then its target from
                 the tool), each block (x, y from the tool, then cos, sin of its yaw); lengths in dm
    obs="images" images uint8 (2, size, size, 3), both of now: LanguageTable's 16:9 view of the table squeezed
                 into a square, and its part around the tool, twice as large, grey beyond the edge; with
                 `history` the paper's two, the previous and the current frame of the table
Rewards
    1 on success, else 0. Stage 2 never reads it.
Starting state
    Tool and blocks uniform in the workspace less 0.08 m a side, yaw uniform; blocks at least 0.0175 m apart
    and 0.06 m from the tool (the banana 0.12 m), then pushed apart by the physics for 200 / 240 s and
    stopped. Then an instruction is drawn that is not yet fulfilled.
Episode end
    terminated: the instruction's rule (`tabletop_language.py` for the words, `Tasks` for the rules);
    truncated: 100 steps with 4 blocks or the banana, 200 with 8. A block whose centre leaves the board,
    0.4572 x 0.6096 m, has fallen (`info["fallen"]`): it lies out of reach and sight until the next reset.
Arguments
    family   block2block | block2absolutelocation | block2relativelocation | block2block_relative_location |
             separate_blocks | mixed (a family drawn at each reset)
    blocks   4 | 8: LanguageTable's BLOCK_4, BLOCK_8
    pairs    of block2block with 4 blocks, which may be asked to move to which: prior | forward | second |
             backward | unseen | practice | both (PAIRS); any to any where it is left out. `env.pairs` has a
             name for each simulation, which may be changed before `ask` or `reset`
    obs      "state" | "images"; size, the frame's pixels (64)
    history  0 | 1: of obs="images", the previous frame in place of the second view
    look     "sim" | "real" | 0-1: a second domain for sim-to-real at our scale. "real" has duller colours, a
             browner board, light from the side, a camera moved by up to 1 cm and turned by up to 1 degree
             along each axis at each reset, friction with the table times 0.7-1.3, and a tool that covers 6 %
             instead of 10 %. A number is a share of the way from "sim", 0, to "real", 1: look=0.5
Version history
    v0: first version. Against LanguageTable: episodes end at a horizon; the action's bound is enforced;
    friction with the table is the same along each axis, not along the motion; the arm is not there, only its
    tool; blocks fall.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np

from envs import MujocoDomain, SingleView
from envs import tabletop_language as language
from envs.symmetries import Symmetries, TabletopSymmetries
from envs.tabletop_language import Meaning

LOW, HIGH = np.array([0.15, -0.3048]), np.array([0.60, 0.3048])  # the tool's workspace [m]  (constants.py)
CENTRE, INSET = (LOW + HIGH) / 2, 0.08  # where things start, less INSET a side
MARGIN = 0.03  # of a scene turned and put elsewhere [m]: what it goes on to do needs room, too
BOARD_CENTRE, BOARD_HALF = np.array([0.35, 0.0]), np.array([0.2286, 0.3048])
ACTION_LIMIT, STRIDE = (
    0.1,
    0.03,
)  # [m] a step: what the environment takes, what action tokens, and so the experts, ask of it
TOOL_RADIUS, TOOL_MASS, BLOCK_HEIGHT = 0.0127, 0.1, 0.0381  # [m], [kg], [m]
SIZES = {
    "cube": (0.0397, 0.0397),
    "moon": (0.0257, 0.0525),
    "pentagon": (0.0413, 0.0444),
    "star": (0.0408, 0.0444),
}  # x, y [m]
RGB = {"red": (1, 0.4, 0.4), "blue": (0.4, 0.4, 1), "green": (0.4, 1, 0.4), "yellow": (1, 1, 0.4)}
DULL = {
    "red": (0.7, 0.25, 0.2),
    "blue": (0.2, 0.3, 0.6),
    "green": (0.25, 0.55, 0.3),
    "yellow": (0.75, 0.65, 0.2),
}
CAMERA_POS, CAMERA_X, CAMERA_Y = (
    np.array([0.75, 0, 0.5]),
    np.array([0, 1.0, 0]),
    np.array([-0.809017, 0, 0.587785]),
)
FOCAL = 0.803  # of the frame's width, vertically and horizontally
SUBSTEPS = 24  # of 1/240 s
DISTANCES = {"near": 0.15, "far": 0.25}  # [m], of block2relativelocation
JITTER = np.array([[0.01], [np.pi / 180]])  # of the camera of look="real": [m] and [rad]
# which block to which one, of red moon 0, blue cube 1, green star 2, yellow pentagon 3, and how often
PRIOR = dict.fromkeys([(0, 1), (1, 2), (2, 3), (3, 0), (1, 3), (2, 0), (3, 1)], 1 / 7)
PAIRS = {
    "prior": PRIOR,  # every block moves and is moved to
    "forward": {(0, 3): 1.0},
    "second": {(2, 1): 1.0},
    "backward": {(0, 2): 1.0},  # undoes forward
    "unseen": {(1, 0): 0.5, (3, 2): 0.5},
    "practice": {pair: 0.98 * share for pair, share in PRIOR.items()} | {(0, 3): 0.01, (0, 2): 0.01},
    "both": {(0, 3): 0.5, (0, 2): 0.5},
}
_ARC = np.linspace(-0.75, 0.75, 6)
BANANA = 0.1 * np.stack([np.cos(_ARC), np.sin(_ARC)], 1) - [
    0.0885,
    0,
]  # its spine, 14 cm between the ends [m], (6, 2)


def outline(shape: str) -> np.ndarray:
    """A block's outline seen from above, float (n, 2) [m], counter-clockwise; as wide and long as
    LanguageTable's meshes."""
    if shape == "cube":
        points = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    elif shape == "moon":  # a crescent: half a disc, less half of a flatter ellipse
        arc = np.linspace(-np.pi / 2, np.pi / 2, 9)
        outer, inner = (np.c_[flat * np.cos(arc), np.sin(arc)] for flat in (1, 0.4))
        points = np.concatenate([outer, inner[-2:0:-1]]) - [0.6, 0]
    else:
        n, dent = {"pentagon": (5, 1), "star": (10, 0.5)}[shape]
        angle, radius = 2 * np.pi * np.arange(n) / n, np.where(np.arange(n) % 2 == 0, 1, dent)
        points = radius[:, None] * np.c_[np.cos(angle), np.sin(angle)]
    return points * SIZES[shape] / np.ptp(points, 0)


def prism(name: str, points: np.ndarray) -> str:
    """A MuJoCo mesh, BLOCK_HEIGHT high. It is drawn as it is and collides as its convex hull, as in
    LanguageTable."""
    n = len(points)
    vertex = np.concatenate([np.c_[points, np.full(n, z)] for z in (0, BLOCK_HEIGHT)])
    if name == "moon":  # strips between the outer (0..8) and the inner arc (8..15, 0)
        inner = [0, *range(n - 1, 8, -1), 8]
        top = [f for i in range(8) for f in ((i, i + 1, inner[i + 1]), (i, inner[i + 1], inner[i]))]
        top = [f for f in top if len(set(f)) == 3]
    else:  # a fan around the middle, which every other outline sees whole
        vertex = np.concatenate([vertex, [[0, 0, 0], [0, 0, BLOCK_HEIGHT]]])
        top = [(i, (i + 1) % n, n + 1) for i in range(n)]
    roof = [[v + n for v in f] for f in top]
    floor = [f[::-1] if name == "moon" else (f[1], f[0], 2 * n) for f in top]
    sides = [f for i in range(n) for f in ((i, (i + 1) % n, n + (i + 1) % n), (i, n + (i + 1) % n, n + i))]
    numbers = (" ".join(f"{x:.6g}" for x in np.ravel(a)) for a in (vertex, roof + floor + sides))
    return '<mesh name="{}" vertex="{}" face="{}" inertia="exact"/>'.format(name, *numbers)


def body(name: str, geoms: str, mass: float, grip: float) -> str:
    """A thing that slides and turns in the plane; friction 0.5 with the table, `grip` [m] its mean lever
    arm."""
    force = 0.5 * 9.8 * mass  # [N]
    joints = "".join(
        f'<joint type="slide" axis="{a}" frictionloss="{force:.4g}"/>' for a in ("1 0 0", "0 1 0")
    )
    joints += f'<joint type="hinge" axis="0 0 1" frictionloss="{force * grip:.4g}"/>'
    return f'<body name="{name}">{joints}{geoms}</body>'


def read_look(look: str | float) -> float:
    """The share of the way from look="sim", 0, to look="real", 1."""
    named = {"sim": 0.0, "real": 1.0}
    try:
        share = float(named.get(str(look), look))
    except (TypeError, ValueError):
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"look {look}: choose sim, real or a number between 0 and 1")
    return share


def scene(things: tuple[str, ...], real: float) -> str:
    """The MJCF of a table with these things: blocks ("red moon") or "banana". real: `read_look`."""

    def between(sim: tuple[float, ...], other: tuple[float, ...]) -> str:
        """Some numbers of look="sim" on the way to those of look="real"."""
        return " ".join(f"{(1 - real) * a + real * b:.6g}" for a, b in zip(sim, other, strict=True))

    bodies = ""
    for name in things:
        if name == "banana":  # five capsules, 120 g
            ends, fat = [f"{x:.4f} {y:.4f} .019" for x, y in BANANA], (0.012, 0.016, 0.018, 0.016, 0.012)
            geoms = "".join(
                f'<geom type="capsule" fromto="{p} {q}" size="{r}" mass=".024" rgba=".95 .85 .2 1"/>'
                for p, q, r in zip(ends[:-1], ends[1:], fat, strict=True)
            )
            bodies += body(name, geoms, 0.12, 0.045)
        else:
            colour, shape = name.split()
            bodies += body(
                name,
                f'<geom type="mesh" mesh="{shape}" mass=".01" rgba="{between(RGB[colour], DULL[colour])} 1"/>',
                0.01,
                0.015,
            )
    # LanguageTable's tool is one substep late, then covers 10 % (6 %) of what is left in each:
    # e_n = slow^(n-1). A spring and a damper on a mass have e_n = A slow^n + B fast^n; this `fast` makes
    # A = 1 / slow
    slow = 0.9 + 0.04 * real
    fast = slow / (1 + slow)
    stiff = 240**2 * TOOL_MASS * (1 - slow) * (1 - fast) / (slow * fast)
    tool = "".join(
        f'<joint name="tool {k}" type="slide" axis="{a}" damping="{240 * TOOL_MASS * (1 / (slow * fast) - 1):.6g}"/>'
        for k, a in zip("xy", ("1 0 0", "0 1 0"), strict=True)
    )
    light = f'pos="{between((0.4, 0, 2), (0.4, 1, 1))}" dir="{between((0, 0, -1), (0, -0.7, -0.7))}"'
    light += f' diffuse="{between((0.7, 0.7, 0.7), (0.8, 0.75, 0.6))}"'
    ground = between((0.9, 0.9, 0.9), (0.75, 0.7, 0.6))
    board = between((0.2, 0.2, 0.2), (0.35, 0.27, 0.2))
    return f"""
    <mujoco model="tabletop">
      <option timestep="{1 / 240}" jacobian="dense" gravity="0 0 0" cone="pyramidal"/>
      <visual>
        <quality offsamples="0" shadowsize="0"/> <map znear=".01" zfar="10"/>
        <global offwidth="1280" offheight="1280"/>
        <headlight ambient=".35 .35 .35" diffuse=".3 .3 .3" specular="0 0 0"/>
      </visual>
      <statistic extent="1" center=".35 0 0"/>
      <default> <geom friction=".25 0 0" solref=".01 1"/> </default>
      <asset> {"".join(prism(s, outline(s)) for s in ("cube", "moon", "pentagon", "star"))} </asset>
      <worldbody>
        <light {light} castshadow="false"/>
        <camera name="front" pos="{" ".join(map(str, CAMERA_POS))}"
                xyaxes="{" ".join(map(str, [*CAMERA_X, *CAMERA_Y]))}"
                resolution="320 180" sensorsize=".32 .18" focal="{0.32 * FOCAL} {0.32 * FOCAL}"/>
        <geom type="plane" size="2 2 .1" pos="0 0 -.002" contype="0" conaffinity="0"
              rgba="{ground} 1"/>
        <geom type="box" size="{BOARD_HALF[0]} {BOARD_HALF[1]} .001" pos="{BOARD_CENTRE[0]} 0 -.001"
              rgba="{board} 1" contype="0" conaffinity="0"/>
        {bodies}
        <body name="tool"> {tool}
          <geom type="cylinder" size="{TOOL_RADIUS} .0675" pos="0 0 .0755" mass="{TOOL_MASS}" friction=".5 0 0"
                rgba=".5 .5 .5 1"/>
        </body>
      </worldbody>
      <actuator>
        <position joint="tool x" kp="{stiff:.6g}"/> <position joint="tool y" kp="{stiff:.6g}"/>
      </actuator>
    </mujoco>"""


def rotation(vector: np.ndarray) -> np.ndarray:
    """The matrix float (3, 3) of a small rotation vector float (3,) [rad]."""
    quaternion, matrix = np.concatenate([[1.0], vector / 2]), np.zeros(9)
    mujoco.mju_quat2Mat(matrix, quaternion / np.linalg.norm(quaternion))
    return matrix.reshape(3, 3)


def pixels(points: np.ndarray, camera: np.ndarray = np.zeros((2, 3))) -> np.ndarray:  # noqa: B008 - read only
    """Points float (..., 3) [m] -> (u right, v down) in shares of the frame's width and height,
    float (..., 2).

    camera float (2, 3): what is added to the camera's position [m] and orientation [rad].
    """
    rel, turn = points - (CAMERA_POS + camera[0]), rotation(camera[1])
    right, up, depth = (rel @ (turn @ axis) for axis in (CAMERA_X, CAMERA_Y, np.cross(CAMERA_Y, CAMERA_X)))
    return np.stack([0.5 + FOCAL * right / depth, 0.5 - FOCAL * 16 / 9 * up / depth], -1)


def corner(at: np.ndarray, s: int) -> np.ndarray:
    """Where the second view begins in a picture of side 2 s, int (..., 2) [pixels] (right, down); at (..., 2)
    in shares."""
    return np.clip(np.round(at * 2 * s).astype(int) - s // 2, -s, 2 * s)


def foveate(picture: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A picture uint8 (2 s, 2 s, 3) at half its fineness, and as it is around `at`, (2,) in shares:
    uint8 (2, s, s, 3).

    Also where the second view begins in the picture, in shares of it, float (2,): (right, down).
    """
    s = len(picture) // 2
    first = corner(at, s)
    rows = picture[::2].astype(np.uint16) + picture[1::2]
    whole = (rows[:, ::2] + rows[:, 1::2]) // 4
    padded = np.full((4 * s, 4 * s, 3), 128, np.uint8)
    padded[s : 3 * s, s : 3 * s] = picture
    x, y = first + s
    return np.stack([whole.astype(np.uint8), padded[y : y + s, x : x + s]]), first / (2 * s)


def offset_beside(direction: str) -> np.ndarray:
    """From a block to the place beside it in a direction, float (2,) [m]: 8 cm along an axis, 4 cm along
    both."""
    return np.multiply(language.DIRECTIONS[direction], 0.08 if len(direction.split()) == 1 else 0.04 * 2**0.5)


@dataclass
class Tasks:
    """What each of N simulations is asked, as one rule: *a block is near one of ten points*.

    The points are fixed + Σ_k weights_k pos_k + scale · offset + away · (unit vector from there to the
    block), and where they hang on another block, that one has moved by at most `drift` since the reset. Radii
    from LanguageTable's rewards/*.py.
    """

    block: np.ndarray  # int (N,)
    fixed: np.ndarray  # float (N, 2) [m]
    weights: np.ndarray  # float (N, B)
    offset: np.ndarray  # float (N, 2) [m]
    away: np.ndarray  # float (N,) [m]
    radius: np.ndarray  # float (N,) [m]
    drift: np.ndarray  # float (N,) [m]
    anchor: np.ndarray  # float (N, 2) [m]: Σ weights pos at the reset

    SCALES = np.linspace(0.5, 1.1, 10)

    @classmethod
    def empty(cls, n: int, blocks: int) -> Tasks:
        shapes = ((n,), (n, 2), (n, blocks), (n, 2), (n,), (n,), (n,), (n, 2))
        return cls(*(np.zeros(s, int if i == 0 else float) for i, s in enumerate(shapes)))

    def assign(self, i: int, meaning: Meaning, pos: np.ndarray) -> None:
        """Simulation i is asked `meaning`; pos float (B, 2) [m] now."""
        for array in (self.fixed, self.weights, self.offset, self.away):
            array[i] = 0
        self.block[i], self.drift[i] = meaning.block, np.inf
        match meaning.family:
            case "block2block":
                self.weights[i, meaning.target], self.radius[i] = 1, 0.05
            case "block2absolutelocation":
                self.fixed[i] = language.PLACES[meaning.target]
                self.radius[i] = 0.10 if meaning.target == "center" else 0.115
            case "block2relativelocation":
                direction, distance = meaning.target
                self.fixed[i] = pos[meaning.block] + np.multiply(
                    language.DIRECTIONS[direction], DISTANCES[distance]
                )
                self.radius[i] = 0.10
            case "block2block_relative_location":
                direction, other = meaning.target
                self.weights[i, other], self.offset[i] = 1, offset_beside(direction)
                self.radius[i], self.drift[i] = 0.04, 0.05
            case "separate_blocks":
                self.weights[i, list(meaning.target)], self.away[i], self.radius[i] = (
                    1 / len(meaning.target),
                    0.10,
                    0.025,
                )
        self.anchor[i] = self.weights[i] @ pos

    def points(self, pos: np.ndarray) -> np.ndarray:
        """The ten points, float (N, 10, 2) [m], for blocks at pos float (N, B, 2)."""
        anchor = np.einsum("nb,nbd->nd", self.weights, pos)
        gap = pos[np.arange(len(pos)), self.block] - anchor
        unit = gap / np.maximum(np.linalg.norm(gap, axis=1, keepdims=True), 1e-9)
        point = self.fixed + anchor + self.away[:, None] * unit
        return point[:, None] + self.SCALES[:, None] * self.offset[:, None]

    def solved(self, pos: np.ndarray) -> np.ndarray:
        """The rule, bool (N,), for blocks at pos float (N, B, 2)."""
        block = pos[np.arange(len(pos)), self.block]
        near = np.linalg.norm(self.points(pos) - block[:, None], axis=2).min(1) < self.radius
        moved = np.linalg.norm(np.einsum("nb,nbd->nd", self.weights, pos) - self.anchor, axis=1)
        return near & (moved <= self.drift)


def detour(start: np.ndarray, goal: np.ndarray, obstacles: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """The next point of a way from start to goal past round obstacles, all float (N, 2);
    (N, K, 2) and (N, K) [m].

    The nearest obstacle in the way is passed on the side on which it lies less; a start inside one leaves it
    first.
    """
    way = goal - start
    length = np.maximum(np.linalg.norm(way, axis=1), 1e-9)
    unit = way / length[:, None]
    left = np.stack([-unit[:, 1], unit[:, 0]], 1)
    rel = obstacles - start[:, None]  # (N, K, 2)
    along, across = np.einsum("nkd,nd->nk", rel, unit), np.einsum("nkd,nd->nk", rel, left)
    blocking = (along > 0) & (along < length[:, None]) & (np.abs(across) < radius)
    first = np.where(blocking, along, np.inf).argmin(1)
    rows = np.arange(len(start))
    side = -np.sign(across[rows, first] + 1e-12)
    corner = obstacles[rows, first] + (side * radius[rows, first] * 1.15)[:, None] * left
    return np.where(blocking.any(1)[:, None], corner, goal)


class TabletopVectorEnv(MujocoDomain):
    """N tables at once. See the module's docstring for spaces, success and episode end."""

    name = "tabletop"
    low, high = np.full(2, -ACTION_LIMIT), np.full(2, ACTION_LIMIT)
    action_tokens = {"kind": "sign-magnitude", "limit": STRIDE, "dims": 2}
    state_dim = 4
    steps_cap, steps_bins = (
        100,
        100,
    )  # a bin is a step: the paper's two cannot tell the last step from the one before
    success_threshold = 3.0
    predicts_instruction = True
    asked = 2
    stage1_defaults = {
        "state": {"model": "nano-deep", "episodes": 4000, "updates": 6000, "lr": 2e-3, "policy": "best"},
        "images": {"model": "nano-view", "episodes": 8000, "updates": 12_000, "lr": 2e-3, "policy": "best"},
    }
    stage2_defaults = {"state": {"iterations": 120}, "images": {"iterations": 300}}
    # [m] between the tool and a thing's middle: at the start, when passing, before a push
    clearance, girth, reach = 0.06, 0.045, 0.05
    STATE_FIELDS = (*MujocoDomain.STATE_FIELDS, "friction", "camera", "target", "tasks", "meanings", "fallen",
                    "pairs", "speed", "wobble", "pause", "pass_by")  # fmt: skip
    OF_THIS_PROCESS = (*MujocoDomain.OF_THIS_PROCESS, "friction")

    def __init__(self, num_envs: int = 1, family: str = "block2block", blocks: int = 4, obs: str = "state",
                 size: int = 64, look: str | float = "sim", history: bool = False, pairs: str = "",
                 render_mode: str | None = None):  # fmt: skip
        if family not in (*language.FAMILIES, "mixed"):
            raise ValueError(f"family {family}: choose one of {', '.join(language.FAMILIES)} or mixed")
        if blocks not in language.BLOCK_SETS:
            raise ValueError(f"blocks {blocks}: choose 4 or 8")
        require_pairs(pairs)
        if pairs and (family, blocks) != ("block2block", 4):
            raise ValueError(f"pairs {pairs}: for family block2block with 4 blocks only; leave it out")
        self.families = language.FAMILIES if family == "mixed" else (family,)
        self.things = language.BLOCK_SETS[blocks]
        self.horizon = 100 if blocks == 4 else 200
        self.pairs = [pairs] * num_envs  # which tasks a simulation may be asked; for the caller to change
        self._build(num_envs, obs, size, look, history, render_mode)

    def _build(
        self, n: int, obs: str, size: int, look: str | float, history: bool, render_mode: str | None
    ) -> None:
        self.real = read_look(look)
        if history not in (0, 1):
            raise ValueError(f"history {history}: choose 0 or 1")
        self.simultaneous = obs == "state" or not history  # both images are of now; states always are
        self.state_names = ("tool", *self.things)
        super().__init__(n, obs, size, render_mode, scene(self.things, self.real))
        B = len(self.things)
        # frames tie names to colours and shapes; where some pairs are left out, others would tell of them
        permute = obs == "state" and not any(getattr(self, "pairs", ()))
        on_board = BOARD_CENTRE - BOARD_HALF, BOARD_CENTRE + BOARD_HALF
        low, high = np.maximum(LOW, on_board[0]) + MARGIN, np.minimum(HIGH, on_board[1]) - MARGIN
        within = 10 * (np.stack([low, high]) - CENTRE)
        names = [self._names(k) for k in range(B)]
        turnable = obs == "state" and {"block2block", "separate_blocks"} & {*self.families}  # name no side
        two_named = self.families == ("block2block",)
        self.symmetries = TabletopSymmetries(names, permute, within if turnable else None, two_named)
        if obs == "images" and self.real:  # its light is from one side
            self.symmetries = Symmetries()
        self.target = np.zeros((n, 2))
        # what "real" adds to the camera's position [m] and orientation [rad]
        self.camera = np.zeros((n, 2, 3))
        self.tasks, self.fallen = Tasks.empty(n, B), np.zeros((n, B), bool)
        self.meanings: list[Meaning | None] = [None] * n
        # the demonstrator's habits: speed, wobble now [m/step], steps of pause left, where to pass by
        # first [m]
        self.speed, self.wobble, self.pause = np.zeros(n), np.zeros((n, 2)), np.zeros(n, int)
        self.pass_by = np.zeros((n, 2))

    def _simulate(self) -> None:
        super()._simulate()
        self.friction = self.sim.expand("dof_frictionloss") if self.real else None

    # --- Gymnasium ------------------------------------------------------------------------------------------
    def _place(self, rows: np.ndarray) -> None:
        asked = {i: self._family(i) for i in rows}  # once: else rare ones, like separate_blocks, get rarer
        while len(rows):  # until every simulation has an instruction
            self._scatter(rows)
            rows = rows[[not self._ask(i, asked[i]) for i in rows]]

    def ask(self, mask: np.ndarray) -> tuple[dict, dict]:
        """A new instruction where `mask` (bool (N,)) says so and everything stays where it is: practice
        without resets.

        Where nothing can be asked of the present scene, all is placed anew (`anew` says where). Returns what
        `reset` does.
        """
        mask = self._require_mask(mask)
        # a draw may be fulfilled already, so there are twenty
        stuck = np.array(
            [m and not any(self._ask(i, self._family(i)) for _ in range(20)) for i, m in enumerate(mask)]
        )
        self.anew = stuck
        if stuck.any():
            self.reset(options={"reset_mask": stuck})
        self.t[mask] = 0
        if not self.simultaneous:
            self.frames[mask, 0] = self.frames[mask, 1]  # an episode's first frame is its own predecessor
        return self._observe(), self._info()

    def _move(self, actions: np.ndarray) -> None:
        self.target = np.clip(self.target + actions, LOW, HIGH)
        self.sim.ctrl = self.target
        self.sim.step(nstep=SUBSTEPS)
        self._drop(np.arange(self.num_envs))

    def render(self) -> tuple[np.ndarray, ...]:
        return tuple(self._render(i, 180, 320) for i in range(self.num_envs))

    def track(self) -> np.ndarray:
        """Where the tool meets the table, in shares of the rendered frame (x right, y down), float (N, 2);
        for figures."""
        return np.stack(
            [pixels(np.r_[tool, 0], camera) for tool, camera in zip(self.tool, self.camera, strict=True)]
        )

    def instructions(self) -> list[str]:
        return language.instructions(self.families, len(self.things))

    # --- Stage 0 --------------------------------------------------------------------------------------------
    def _names(self, k: int) -> list[str]:
        return language.names(k, len(self.things))

    def questions(self) -> list[str]:
        """What Stage 0 asks of a scene: each thing by each of its names, in three ways, and from each other; the tool."""
        called = [self._names(k) for k in range(len(self.things))]
        asked = [f"{way} the {name}" for way in self._ways() for names in called for name in names]
        asked.append("where is the tool")
        for ours, others in itertools.permutations(called, 2):
            asked += [f"from the {one} where is the {other}" for one in ours for other in others]
        return asked

    def _ways(self) -> list[str]:
        return ["where is", "from the tool where is"] + ["near the tool where is"] * self.simultaneous

    def scenes(
        self, rng: np.random.Generator, n: int
    ) -> tuple[np.ndarray, list[str], np.ndarray, np.ndarray]:
        """Random scenes for Stage 0: images uint8 (n, 2, size, size, 3), `asked` questions of each, a scene's
        together, answers float (asked n, 2) in [0, 1], and where `state_names`, the tool first, stand in each
        image, float (n, 2, B + 1, 2), in shares, outside [0, 1) if unseen.
        """
        B, images, texts = len(self.things), [], []
        answers, places = [], np.zeros((n, 2, B + 1, 2), np.float32)
        for i in range(n):
            while True:
                at = rng.uniform(LOW, HIGH, (B + 1, 2))  # [m]; the tool is the last
                gap = np.linalg.norm(at[:, None] - at[None], axis=2) + np.eye(B + 1)
                if gap.min() > 0.03:
                    break
            yaw, camera = (
                rng.uniform(0, 2 * np.pi, B),
                rng.uniform(-1, 1, (2, 3)) * JITTER * self.real,
            )
            views, first = self._foveated(np.r_[np.c_[at[:-1], yaw].ravel(), at[-1]], camera)
            seen = pixels(np.c_[at, np.zeros(B + 1)], camera)
            close = 2 * (seen - first)
            places[i] = np.roll(seen, 1, 0), np.roll(close, 1, 0)  # the tool is the first
            hidden = ((places[i, 0] < 0) | (places[i, 0] >= 1)).any(-1)
            places[i, 1, hidden] = -1  # beyond the picture's edge the second view is grey
            if not self.simultaneous:
                before = at[-1] + rng.uniform(-0.02, 0.02, 2)
                then, _ = self._foveated(np.r_[np.c_[at[:-1], yaw].ravel(), before], camera)
                views, places[i, 1] = np.stack([then[0], views[0]]), places[i, 0]
                places[i, 0, 0] = pixels(np.r_[before, 0], camera)
            images.append(views)
            in_view = np.flatnonzero(((places[i, 1, 1:] >= 0) & (places[i, 1, 1:] < 1)).all(1))
            for _ in range(self.asked):
                text, answer = self._question(rng, seen, close, in_view)
                texts.append(text)
                answers.append(answer)
        answers = np.clip(np.array(answers, np.float32).reshape(-1, 2), 0, 1)
        return np.array(images), texts, answers, places

    def _question(
        self, rng: np.random.Generator, seen: np.ndarray, close: np.ndarray, in_view: np.ndarray
    ) -> tuple[str, np.ndarray]:
        """One of `questions` and its answer (2,), from where things stand in either view (B + 1, 2), the tool last.

        A place is where a thing stands in the view of the table, "near the tool" in the other one; "from the
        tool", or from another thing, is half the way from there, plus a half. Answers out of range are clipped
        later: where nothing is `in_view` near the tool, to a direction.
        """
        B, ways = len(self.things), self._ways()
        kinds = len(ways) + (B > 1)  # the last one is of two things
        k = rng.integers(B * kinds + 1)
        if k == B * kinds:
            return "where is the tool", seen[-1]
        way, k = divmod(k, B)
        if way == len(ways):
            other = (k + rng.integers(1, B)) % B
            text = f"from the {rng.choice(self._names(other))} where is the {rng.choice(self._names(k))}"
            return text, (seen[k] - seen[other]) / 2 + 0.5
        if way == 2 and len(in_view):
            k = rng.choice(in_view)
        answer = (seen[k], (seen[k] - seen[-1]) / 2 + 0.5, close[k])[way]
        return f"{ways[way]} the {rng.choice(self._names(k))}", answer

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        for i, kept in enumerate(self.meanings):  # lists by now
            if kept is not None:
                *asked, target = kept
                self.meanings[i] = Meaning(*asked, tuple(target) if isinstance(target, list) else target)

    # --- the scene ------------------------------------------------------------------------------------------
    @property
    def pos(self) -> np.ndarray:
        """The blocks' centres, float (N, B, 2) [m]."""
        return self.sim.qpos[:, :-2].reshape(self.num_envs, -1, 3)[:, :, :2]

    @property
    def yaw(self) -> np.ndarray:
        return self.sim.qpos[:, 2:-2:3]  # (N, B) [rad]

    @property
    def tool(self) -> np.ndarray:
        return self.sim.qpos[:, -2:]  # (N, 2) [m]

    def _scatter(self, rows: np.ndarray) -> None:
        """Tool and blocks of the simulations `rows` at random, then 200 settling steps of 1/240 s."""
        low, high = LOW + INSET, HIGH - INSET
        self.sim.reset(rows, stage=mujoco.mjtStage.mjSTAGE_NONE.value)
        for i in rows:
            rng, tool, placed = self.rngs[i], None, []
            while len(placed) < len(self.things):
                if tool is None:
                    tool = rng.uniform(low, high)
                at = next((p for p in rng.uniform(low, high, (21, 2)) if np.linalg.norm(p - tool) > self.clearance
                           and all(np.linalg.norm(p - q) > 0.0175 for q in placed)), None)  # fmt: skip
                if at is None:  # LanguageTable gives up here; we start again
                    tool, placed = None, []
                else:
                    placed.append(at)
            yaw = rng.uniform(0, 2 * np.pi, len(placed))
            self.sim.qpos[i] = [*np.c_[placed, yaw].ravel(), *tool]
            self.target[i] = tool
            if self.real:
                self.friction[i] = self.model.dof_frictionloss * rng.uniform(
                    1 - 0.3 * self.real, 1 + 0.3 * self.real
                )
                self.camera[i] = rng.uniform(-1, 1, (2, 3)) * JITTER * self.real
            self.speed[i], self.wobble[i], self.pause[i] = STRIDE * rng.uniform(0.3, 0.9), 0, 0
            self.pass_by[i] = rng.uniform(low, high) if rng.uniform() < 0.25 else np.nan
        self.sim.ctrl = self.target
        self.sim.step(rows, nstep=200)
        self.sim.qvel[rows] = 0
        self.fallen[rows] = False
        self._drop(rows)

    def _drop(self, rows: np.ndarray) -> None:
        """Blocks whose centre has left the board lie where no camera sees and no tool reaches them."""
        off = (np.abs(self.pos[rows] - BOARD_CENTRE) > BOARD_HALF).any(2)
        for i, k in zip(*np.nonzero(off & ~self.fallen[rows]), strict=True):
            self.fallen[rows[i], k] = True
            self.pos[rows[i], k] = -0.4, 0.1 * (k - len(self.things) / 2)
            self.sim.qvel[rows[i], 3 * k : 3 * k + 3] = 0

    def _family(self, i: int) -> str:
        return self.families[self.rngs[i].integers(len(self.families))]

    def _ask(self, i: int, family: str) -> bool:
        """Draw an instruction for simulation i; False, and all as before, if its scene has none or already
        fulfils it."""
        rng, pos, trial = self.rngs[i], self.pos[i], Tasks.empty(1, len(self.things))
        meaning = propose(family, pos, ~self.fallen[i], self.things, rng, self.pairs[i])
        if meaning is None:
            return False
        trial.assign(0, meaning, pos)
        if trial.solved(pos[None])[0]:
            return False
        self.tasks.assign(i, meaning, pos)
        self.meanings[i], self.texts[i] = meaning, self._say(meaning, rng)
        return True

    def _say(self, meaning: Meaning, rng: np.random.Generator) -> str:
        return language.sample(meaning, len(self.things), rng)

    def _success(self) -> np.ndarray:
        part = self.tasks.weights > 0  # in the rule: where a fallen block lies must not fulfil it either
        part[np.arange(self.num_envs), self.tasks.block] = True
        return self.tasks.solved(self.pos) & ~(part & self.fallen).any(1)

    def _info(self) -> dict[str, np.ndarray]:
        return super()._info() | {"fallen": self.fallen.any(1)}

    def _state(self) -> np.ndarray:
        tool = np.concatenate([self.tool - CENTRE, self.target - self.tool], 1)[:, None] * 10
        yaw = self.yaw[..., None]
        blocks = np.concatenate([(self.pos - self.tool[:, None]) * 10, np.cos(yaw), np.sin(yaw)], 2)
        return np.concatenate([tool, blocks], 1).reshape(self.num_envs, -1).astype(np.float32)

    def _views(self, rows: np.ndarray) -> np.ndarray:
        return np.array([self._foveated(self.sim.qpos[i], self.camera[i])[0] for i in rows])

    def _foveated(self, qpos: np.ndarray, camera: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What `foveate` makes of a scene: the table, and what is around the tool."""
        return foveate(
            self._picture(qpos, camera, 2 * self.size, 2 * self.size), pixels(np.r_[qpos[-2:], 0], camera)
        )

    def _render(self, i: int, height: int, width: int) -> np.ndarray:
        return self._picture(self.sim.qpos[i], self.camera[i], height, width)

    def _picture(self, qpos: np.ndarray, camera: np.ndarray, height: int, width: int) -> np.ndarray:
        """uint8 (height, width, 3) of a scene."""
        data = self._posed(qpos)
        data.cam_xpos[0] += camera[0]
        data.cam_xmat[0] = (rotation(camera[1]) @ data.cam_xmat[0].reshape(3, 3)).ravel()
        return self._shoot(data, 0, height, width)

    # --- who shows how --------------------------------------------------------------------------------------
    def expert(self) -> np.ndarray:
        """The best we can script, actions float (N, 2) [m]: straight and as fast as action tokens go."""
        return np.clip(self._push(np.full(self.num_envs, STRIDE)), -STRIDE, STRIDE)

    def demonstrate(self) -> np.ndarray:
        """People's way, actions float (N, 2) [m]: each at a pace of its own, unsteady, with pauses, a quarter
        by a detour."""
        action = self._push(self.speed)
        to_there = self.pass_by - self.target
        far = np.linalg.norm(to_there, axis=1)
        self.pass_by[far < 0.03] = np.nan
        action = np.where((far > 0.03)[:, None], self._free(self.pass_by, self.speed), action)
        for i, rng in enumerate(self.rngs):
            self.wobble[i] = 0.8 * self.wobble[i] + 0.15 * self.speed[i] * rng.normal(size=2)
            if self.pause[i] == 0 and rng.uniform() < 0.02:
                self.pause[i] = rng.integers(2, 9)
        still = self.pause > 0
        self.pause = np.maximum(self.pause - 1, 0)
        return np.clip(np.where(still[:, None], 0.0, action + self.wobble), -STRIDE, STRIDE)

    def _free(self, to: np.ndarray, speed: np.ndarray) -> np.ndarray:
        """Actions (N, 2) that move the tool towards `to` without touching a block where there is a way."""
        clear = np.full(self.pos.shape[:2], self.girth)
        way = detour(self.target, np.clip(to, LOW, HIGH), self.pos, clear) - self.target
        return way * np.minimum(1, speed / np.maximum(np.linalg.norm(way, axis=1), 1e-9))[:, None]

    def _push(self, speed: np.ndarray) -> np.ndarray:
        """Actions (N, 2) of going round the block and pushing it from behind, at most `speed` (N,) [m]
        long."""
        rows, tasks = np.arange(self.num_envs), self.tasks
        p, goal = self.pos[rows, tasks.block], tasks.points(self.pos)[:, 6]  # 0.9 of the offset
        goal = BOARD_CENTRE + np.clip(
            goal - BOARD_CENTRE, 0.05 - BOARD_HALF, BOARD_HALF - 0.05
        )  # not over the edge
        # what the block's own way avoids: the others, except those it is to meet or to leave
        clear = np.full(self.pos.shape[:2], 0.055)
        clear[rows, tasks.block] = 0
        clear[(tasks.weights > 0) & ~tasks.offset.any(1)[:, None]] = 0
        way = detour(p, goal, self.pos, clear) - p
        left = np.linalg.norm(way, axis=1)
        u = way / np.maximum(left, 1e-9)[:, None]
        side = np.stack([-u[:, 1], u[:, 0]], 1)
        rel = self.target - p
        along, across = (rel * u).sum(1), (rel * side).sum(1)
        behind = (along < 0) & (along > -self.reach - 0.025) & (np.abs(across) < 0.015)
        pace = np.clip(0.4 * left, 0.006, speed)
        push = u * pace[:, None] - side * np.clip(0.7 * across, -0.01, 0.01)[:, None]
        return np.where(behind[:, None], push, self._free(p - self.reach * u, speed))


def require_pairs(pairs: str) -> None:
    if pairs and pairs not in PAIRS:
        raise ValueError(f"pairs {pairs}: choose one of {', '.join(PAIRS)}")


def draw_pair(pairs: str, there: np.ndarray, rng: np.random.Generator) -> tuple[int, int] | None:
    """One of PAIRS[pairs], as likely as it says, of blocks that are there, bool (4,); None without any."""
    require_pairs(pairs)
    left = {(a, b): share for (a, b), share in PAIRS[pairs].items() if there[a] and there[b]}
    if not left:
        return None
    share = np.array(list(left.values()))
    return list(left)[rng.choice(len(left), p=share / share.sum())]


def propose(family: str, pos: np.ndarray, there: np.ndarray, things: tuple[str, ...],
            rng: np.random.Generator, pairs: str = "") -> Meaning | None:  # fmt: skip
    """A task of the family for blocks at pos float (B, 2), as LanguageTable draws it; None where it finds
    none.

    there bool (B,): which blocks have not fallen. pairs: what block2block may ask, a name in PAIRS or "".
    """
    low, high = LOW + INSET, HIGH - INSET
    blocks = np.flatnonzero(there)
    inside = lambda p: bool(((p >= low) & (p <= high)).all())  # noqa: E731
    if len(blocks) < (1 if len(things) == 1 else 2):
        return None
    match family:
        case "block2block":
            for _ in range(11):
                pair = draw_pair(pairs, there, rng) if pairs else rng.choice(blocks, 2, replace=False)
                if pair is None:
                    return None
                a, b = pair
                if np.linalg.norm(pos[a] - pos[b]) >= 0.06:
                    return Meaning(family, int(a), int(b))
        case "block2absolutelocation":
            return Meaning(family, int(rng.choice(blocks)), str(rng.choice(list(language.PLACES))))
        case "block2relativelocation" | "block2block_relative_location":
            for _ in range(101):
                direction = str(rng.choice(list(language.DIRECTIONS)))
                if family == "block2relativelocation":
                    a, distance = rng.choice(blocks), str(rng.choice(["near", "far"]))
                    if inside(pos[a] + np.multiply(language.DIRECTIONS[direction], DISTANCES[distance])):
                        return Meaning(family, int(a), (direction, distance))
                else:
                    a, b = rng.choice(blocks, 2, replace=False)
                    if inside(pos[b] + offset_beside(direction)):
                        return Meaning(family, int(a), (direction, int(b)))
        case "separate_blocks":
            gap = np.linalg.norm(pos[blocks, None] - pos[None, blocks], axis=2)
            close = (gap < 0.08) & ~np.eye(len(blocks), dtype=bool)
            mean = np.where(close.any(1), (gap * close).sum(1) / np.maximum(close.sum(1), 1), np.inf)
            k = int(mean.argmin())
            if np.isfinite(mean[k]):
                centroid = pos[blocks[close[k]]].mean(0)
                away = pos[blocks[k]] - centroid
                if inside(centroid + 0.10 * away / max(np.linalg.norm(away), 1e-9)):
                    return Meaning(
                        family, int(blocks[k]), tuple(int(blocks[b]) for b in gap[k].argsort() if close[k, b])
                    )
    return None


class TabletopEnv(SingleView):
    """One table. See the module's docstring."""

    vector_class = TabletopVectorEnv


class BananaTableVectorEnv(TabletopVectorEnv):
    """N tables with a banana each: "push the banana to the top left of the table". Rules as for
    block2absolutelocation."""

    name, things, families, horizon = "bananatable", ("banana",), ("block2absolutelocation",), 100
    clearance, girth, reach = 0.12, 0.085, 0.095

    def __init__(self, num_envs: int = 1, obs: str = "state", size: int = 64, look: str | float = "sim", history: bool = False,
                 render_mode: str | None = None):  # fmt: skip
        self.pairs = [""] * num_envs
        self._build(num_envs, obs, size, look, history, render_mode)

    def instructions(self) -> list[str]:
        return [
            f"{verb} banana to the {place} of the table"
            for verb in language.PUSH
            for place in BANANA_PLACES.values()
        ]

    def _names(self, k: int) -> list[str]:
        return ["banana"]

    def _say(self, meaning: Meaning, rng: np.random.Generator) -> str:
        verb, place = language.PUSH[rng.integers(len(language.PUSH))], BANANA_PLACES[meaning.target]
        return f"{verb} banana to the {place} of the table"


BANANA_PLACES = {
    p: "center" if p == "center" else p.replace("center_", "").replace("_", " ") for p in language.PLACES
}


class BananaTableEnv(SingleView):
    """One table with a banana. See BananaTableVectorEnv."""

    vector_class = BananaTableVectorEnv
