"""Pointmass-v0: three coloured goals on a table; the instruction says to which of them the point must go.

Description
    The paper's toy task (Appendix E) for the foundation model: dynamics and PD expert of `pointmass.py`, made
    a domain by three goals, language, a speed limit that walls impose, and actions that are tokens.
Action space
    Box(-A, A, (2,), float32), the acceleration added at each of 10 substeps [length / substep²], A = 3e-4.
Observation space (Dict)
    instruction  text, e.g. "move to the red goal"
    obs="state"  state float32 (10,): position, velocity [0.01 length / substep], and the red,
                 the green and the blue goal as seen from the point; x then y of each
    obs="images" images uint8 (2, size, size, 3), two views of now, y up: the table, 2.8 x 2.8 lengths, the
                 point white; and what is around the point, 1.4 x 1.4 lengths, without it. Black, the wake:
                 where the point was three steps before, if it has moved as it moves now. An observation is
                 the state and nothing of what was before
Rewards
    1 on success, else 0. Stage 2 never reads it.
Starting state
    position ~ U[-1, 1]², at rest, at least 0.3 from every goal; goals ~ U[-0.9, 0.9]², at least 0.45 apart.
Episode end
    terminated: within 0.15 (`pointmass.GOAL_RADIUS`) of the goal named in the instruction; truncated: 140
    steps.
Arguments
    obs "state" | "images"; size, the frame's pixels (32).
Version history
    v0: first version. Against `pointmass.py`: walls at ±1.4 (the point stops there), bounded actions.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

import pointmass
from envs import Domain, SingleView
from envs.symmetries import PointmassSymmetries

COLOURS = ("red", "green", "blue")
VERBS, NOUNS = ("move", "go", "drive", "steer"), ("goal", "target", "spot")
WALL = 1.4  # half the side of the table, and of the frame
POINT_RADIUS = 0.12
WAKE = 3  # steps between the point and its wake in a frame
ZOOM = 2  # of the second view
ACTION_LIMIT = 3e-4  # the expert's own accelerations stay below 5e-4, 99 % of them below this


def instruction(colour: int, rng: np.random.Generator) -> str:
    return f"{VERBS[rng.integers(4)]} to the {COLOURS[colour]} {NOUNS[rng.integers(3)]}"


def instructions() -> list[str]:
    """Every instruction of the grammar: 4 verbs x 3 colours x 3 nouns."""
    return [f"{v} to the {c} {n}" for v, c, n in itertools.product(VERBS, COLOURS, NOUNS)]


def questions() -> list[str]:
    """What Stage 0 asks of a scene: each goal by each of its names, in the frame and from the point; the
    point; its wake.

    A goal's name comes last, as in an instruction: what is learnt about it here is found again there.
    """
    forms, names = ("where is", "from the point where is"), itertools.product(COLOURS, NOUNS)
    goals = [f"{form} the {c} {n}" for form, (c, n) in itertools.product(forms, names)]
    return [*goals, "where is the point", "where was the point"]


def draw(pos: np.ndarray, wake: np.ndarray, goals: np.ndarray, size: int, zoom: float = 1) -> np.ndarray:
    """Frames uint8 (N, size, size, 3) of anti-aliased discs: goals (N, 3, 2), the point in white, its wake in
    black.

    pos, wake float (N, 2): a step moves the point by half a pixel, so the wake is what shows its velocity.
    Each goal brightens one channel of a grey table, and a batch is one distance computation. With a zoom the
    frame is centred on the point, and the point is not drawn.
    """
    if zoom != 1:
        goals, wake, pos = (goals - pos[:, None]) * zoom, (wake - pos) * zoom, np.full_like(pos, 100 * WALL)
    pixel = 2 * WALL / size
    axis = (torch.arange(size) + 0.5) * pixel - WALL
    centres = torch.as_tensor(
        np.concatenate([goals, pos[:, None], wake[:, None]], 1), dtype=torch.float32
    )  # (N, 5, 2)
    dx2, dy2 = (
        (axis - centres[..., :1]) ** 2,
        (axis.flip(0) - centres[..., 1:]) ** 2,
    )  # (N, 5, size): row 0 is y = +WALL
    radius = zoom * torch.tensor([pointmass.GOAL_RADIUS] * 3 + [POINT_RADIUS] * 2)[:, None]
    # coverage of a pixel ~ (r² - dist²) / (2 r pixel) + 1/2: linear in the squared distance, which is
    # separable
    scale = 255 / (2 * radius * pixel)
    rows, columns = (radius**2 - dy2) * scale + 127.5, dx2 * scale  # (N, 5, size)
    discs = (rows[..., :, None] - columns[..., None, :]).clamp_(0, 255)  # (N, 5, size, size)
    point, shadow = discs[:, 3:4], (discs[:, 4:] - discs[:, 3:4]).clamp_(min=0)
    # a grey table is 0 to the model: what stands on it is then all that a patch embedding sees
    frames = (torch.maximum(discs[:, :3], point).sub_(shadow).mul_(0.5).add_(127.5)).to(torch.uint8)
    return frames.permute(0, 2, 3, 1).contiguous().numpy()


class PointmassVectorEnv(Domain):
    """N pointmasses at once. See the module's docstring for spaces, success and episode end."""

    name = "pointmass"
    horizon = pointmass.HORIZON
    low, high = np.full(2, -ACTION_LIMIT), np.full(2, ACTION_LIMIT)
    action_tokens = {"kind": "uniform", "bins": 21, "low": -ACTION_LIMIT, "high": ACTION_LIMIT, "dims": 2}
    state_names, state_dim = ("position", "velocity", *COLOURS), 2
    steps_cap, steps_bins = 140, 140  # a bin is a step: near the goal, where the detector decides, d is sharp
    success_threshold = 3.0
    text_length, letters = 40, "abcdefghijklmnopqrstuvwxyz "
    stage1_defaults = {
        "state": {"model": "nano", "episodes": 1000, "updates": 9000, "lr": 3e-3, "policy": "best"},
        "images": {"model": "nano-vision", "episodes": 6000, "updates": 18_000, "policy": "best"},
    }
    turned_defaults = Domain.turned_defaults | {"updates": 3000}
    stage2_defaults = {
        "state": {"iterations": 40, "lr": 2.5e-4, "gamma": 0.5, "symmetries": True},
        "images": {"iterations": 300},
    }
    STATE_FIELDS = ("pos", "vel", "goals", "colour", "waypoints", "waypoint")
    instructions, questions = staticmethod(instructions), staticmethod(questions)

    def __init__(self, num_envs: int = 1, obs: str = "state", size: int = 32, render_mode: str | None = None):
        super().__init__(num_envs, obs, size, render_mode)
        self.symmetries = PointmassSymmetries(COLOURS, turnable=obs == "state")
        self.pos, self.vel = np.zeros((num_envs, 2)), np.zeros((num_envs, 2))
        self.goals, self.colour = np.zeros((num_envs, 3, 2)), np.zeros(num_envs, int)
        # the demonstrator's way: five places to pass by, and the one that is next
        self.waypoints = np.zeros((num_envs, pointmass.N_WAYPOINTS, 2))
        self.waypoint = np.zeros(num_envs, int)

    def _place(self, rows: np.ndarray) -> None:
        for i in rows:
            rng = self.rngs[i]
            while True:
                pos = rng.uniform(-pointmass.START, pointmass.START, 2)
                goals = rng.uniform(-pointmass.GOAL, pointmass.GOAL, (3, 2))
                apart = np.linalg.norm(goals - np.roll(goals, 1, 0), axis=1).min()
                if apart >= 0.45 and np.linalg.norm(goals - pos, axis=1).min() >= 0.3:
                    break
            self.pos[i], self.vel[i], self.goals[i] = pos, 0, goals
            self.colour[i] = rng.integers(3)
            self.texts[i] = instruction(self.colour[i], rng)
            self.waypoints[i] = rng.uniform(-pointmass.GOAL, pointmass.GOAL, (pointmass.N_WAYPOINTS, 2))
        self.waypoint[rows] = 0

    def _move(self, actions: np.ndarray) -> None:
        pos, vel = pointmass.step(self.pos, self.vel, actions)
        self.vel = np.where(np.abs(pos) > WALL, 0.0, vel)
        self.pos = np.clip(pos, -WALL, WALL)
        passed = np.linalg.norm(self.pos - self._target(), axis=1) < pointmass.GOAL_RADIUS
        self.waypoint = np.minimum(self.waypoint + passed, pointmass.N_WAYPOINTS)

    def demonstrate(self) -> np.ndarray:
        """The demonstrator's actions, float (N, 2): the PD expert by way of five random waypoints, then the
        goal."""
        return np.clip(pointmass.expert(self.pos, self.vel, self._target()), -ACTION_LIMIT, ACTION_LIMIT)

    def expert(self) -> np.ndarray:
        """The PD expert's actions straight to the goal, float (N, 2): the yardstick."""
        return np.clip(pointmass.expert(self.pos, self.vel, self._goal()), -ACTION_LIMIT, ACTION_LIMIT)

    def scenes(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, list[str], np.ndarray, None]:
        """Random scenes for Stage 0: images uint8 (n, 2, size, size, 3), a question each, answers
        float (n, 2) in [0, 1]. Where everything is (None) is not told: the questions are enough here.

        Positions are shares of the first view, "from the point" of two of them; "was" is the wake, in the
        second view.
        """
        pos, goals = rng.uniform(-WALL, WALL, (n, 2)), rng.uniform(-pointmass.GOAL, pointmass.GOAL, (n, 3, 2))
        wake = pos - np.clip(rng.normal(0, 0.06 * WAKE, (n, 2)), -WALL / ZOOM, WALL / ZOOM)
        images = self._pictures(pos, wake, goals)
        asked, names = rng.integers(8, size=n), rng.integers(len(NOUNS), size=n)
        every = np.concatenate(
            [goals, (goals - pos[:, None]) / 2, pos[:, None], ZOOM * (wake - pos)[:, None]], 1
        )  # (n, 8, 2)
        places = every[np.arange(n), asked]  # (n, 2)
        texts = [questions()[3 * a + b if a < 6 else 12 + a] for a, b in zip(asked, names, strict=True)]
        return images, texts, np.clip(places / (2 * WALL) + 0.5, 0, 1).astype(np.float32), None

    def render(self) -> tuple[np.ndarray, ...]:
        return tuple(draw(self.pos, self._wake(), self.goals, 256))

    def track(self) -> np.ndarray:
        """What moves, in shares of the rendered frame (x right, y down), float (N, 2); for figures."""
        return np.stack([0.5 + self.pos[:, 0] / (2 * WALL), 0.5 - self.pos[:, 1] / (2 * WALL)], 1)

    def _goal(self) -> np.ndarray:
        return self.goals[np.arange(self.num_envs), self.colour]

    def _target(self) -> np.ndarray:
        every = np.concatenate([self.waypoints, self._goal()[:, None]], 1)  # (N, 6, 2)
        return every[np.arange(self.num_envs), self.waypoint]

    def _success(self) -> np.ndarray:
        return np.linalg.norm(self.pos - self._goal(), axis=1) < pointmass.GOAL_RADIUS

    def _wake(self) -> np.ndarray:
        return self.pos - WAKE * 10 * self.vel  # ten substeps a step

    def _pictures(self, pos: np.ndarray, wake: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """uint8 (N, 2, size, size, 3): the table, and what is around the point."""
        return np.stack([draw(pos, wake, goals, self.size, zoom) for zoom in (1, ZOOM)], 1)

    def _views(self, rows: np.ndarray) -> np.ndarray:
        return self._pictures(self.pos[rows], self._wake()[rows], self.goals[rows])

    def _state(self) -> np.ndarray:
        quantities = [self.pos[:, None], self.vel[:, None] * 100, self.goals - self.pos[:, None]]
        return np.concatenate(quantities, 1).reshape(self.num_envs, 10).astype(np.float32)


class PointmassEnv(SingleView):
    """One pointmass, as a `gymnasium.Env`."""

    vector_class = PointmassVectorEnv
