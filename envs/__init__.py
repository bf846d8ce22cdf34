"""The domains. Importing this package registers their Gymnasium ids.

    gym.make("nanoEFM/Pointmass-v0", obs="state")                        # one simulation
    gym.make_vec("nanoEFM/Pointmass-v0", num_envs=64, obs="images")      # many at a time

A domain is a `gymnasium.vector.VectorEnv` (autoreset disabled; `reset(options={"reset_mask": mask})` resets some) with

    name, default_obs        "pointmass" (with its arguments, see `make_vec`), "state"
    horizon                  steps until truncation
    recipes                  what Stage 1 takes, by kind of observation: model, demonstrations, updates, batch, ...
    practice                 what Stage 2 takes, likewise: iterations, and what is not as in `stage2.USUAL`
    steps_cap, steps_bins    the steps-to-go tokens: bins of steps_cap / steps_bins steps
    success_threshold        s, the steps to go at which the detector fires
    temperature              at which the policy's answers are drawn when it is evaluated
    action_tokens            arguments of `model.action_tokenizer`
    state_names, state_dim   the quantities of obs="state", by name, and the numbers in each
    simultaneous             whether the two images are views of one moment; else the previous frame and the current one
    predicts_instruction     whether Stage 1 also asks which instruction led from the first observation to the last
    size                     pixels of a side of a frame of obs="images"; a robot's `joints` may come with them
    instructions()           every text of its grammar
    demonstrate(), expert()  actions for the present states: of the demonstrator, and of the best we can script
    questions(), scenes()    Stage 0's questions, and random scenes, each with a question, its answer and where things are
    ask(), anew, fallen, get_state(), set_state()   where a domain can go on without a reset: `stage2.py --operator`
    track()                  what moves, in shares of the rendered frame; for figures

Ground truth is in `info["is_success"]`, on every step and reset, and nowhere in an observation.
"""

from __future__ import annotations

import ctypes.util
import os
import sys
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv

if "MUJOCO_GL" not in os.environ and sys.platform == "linux" and not os.environ.get("DISPLAY"):
    # no display: MuJoCo must be told before it is imported, and not of an EGL that is not there
    os.environ["MUJOCO_GL"] = "egl" if ctypes.util.find_library("EGL") else "disable"


def require_size(size: int) -> None:
    """Raises ValueError unless frames can have sides of so many pixels."""
    if not isinstance(size, int) or not 16 <= size <= 640:
        raise ValueError(f"size {size}: choose 16 to 640 pixels")


class CannotRender(ValueError):
    """This machine has nothing to draw with: `common.cli` prints it as one line and exits with code 2."""


def reseed(env: VectorEnv, seed: int | list[int] | None, options: dict | None) -> np.ndarray:
    """The simulations that a domain's `reset` is to reset, bool (N,); with a seed, simulation i of them gets seed + i."""
    mask = np.asarray((options or {}).get("reset_mask", np.ones(env.num_envs, bool)))
    if seed is not None:
        seeds = range(seed, seed + env.num_envs) if isinstance(seed, int | np.integer) else seed
        env.rngs = [np.random.default_rng(s) if m else r for s, r, m in zip(seeds, env.rngs, mask, strict=True)]
    return mask


class MujocoVectorEnv(VectorEnv):
    """What domains on MuJoCo draw with: `self.model` from any of its cameras, a renderer for each size of frame."""

    def _posed(self, qpos: np.ndarray) -> Any:
        """The scene at qpos, an mjData for `_shoot`."""
        import mujoco

        if self.drawn is None:
            self.drawn = mujoco.MjData(self.model)
        self.drawn.qpos[:] = qpos
        mujoco.mj_kinematics(self.model, self.drawn)
        mujoco.mj_camlight(self.model, self.drawn)
        return self.drawn

    def _shoot(self, data: Any, camera: str | int, height: int, width: int) -> np.ndarray:
        """uint8 (height, width, 3) of a posed scene. Raises CannotRender with the way out."""
        import mujoco

        if (height, width) not in self.renderers:
            try:
                self.renderers[height, width] = mujoco.Renderer(self.model, height, width)
            except Exception as e:  # each GL backend raises its own kind
                raise CannotRender(
                    f"MuJoCo cannot render here (MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}: {e}); install EGL or OSMesa "
                    "(Debian: libegl1 or libosmesa6) and set MUJOCO_GL to egl or osmesa before mujoco is imported, "
                    "or use --obs state"
                ) from e
        self.renderers[height, width].update_scene(data, camera)
        return self.renderers[height, width].render()

    def close(self) -> None:
        for renderer in self.renderers.values():
            renderer.close()
        self.renderers = {}


class SingleView(gym.Env):
    """The `gymnasium.Env` of a domain: a view of a batch of one. Subclasses name their `vector_class`."""

    vector_class: type[VectorEnv]
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode: str | None = None, **kwargs: Any):
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode {render_mode!r}: only 'rgb_array' exists here")
        self.batch = self.vector_class(num_envs=1, **kwargs)
        self.render_mode = render_mode
        self.observation_space, self.action_space = self.batch.single_observation_space, self.batch.single_action_space
        self._max_episode_steps = self.batch.horizon

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        obs, info = self.batch.reset(seed=seed, options=options)
        return {k: v[0] for k, v in obs.items()}, {k: v[0] for k, v in info.items()}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.batch.step(np.asarray(action)[None])
        first = {k: v[0] for k, v in obs.items()}, float(reward[0]), bool(terminated[0]), bool(truncated[0])
        return *first, {k: v[0] for k, v in info.items()}

    def render(self) -> np.ndarray:
        return self.batch.render()[0]

    def close(self) -> None:
        self.batch.close()


gym.register(
    "nanoEFM/Pointmass-v0",
    entry_point="envs.pointmass:PointmassEnv",
    vector_entry_point="envs.pointmass:PointmassVectorEnv",
)
gym.register(
    "nanoEFM/Tabletop-v0",
    entry_point="envs.tabletop:TabletopEnv",
    vector_entry_point="envs.tabletop:TabletopVectorEnv",
)
gym.register(
    "nanoEFM/BananaTable-v0",
    entry_point="envs.tabletop:BananaTableEnv",
    vector_entry_point="envs.tabletop:BananaTableVectorEnv",
)
gym.register(
    "nanoEFM/AlohaInsertion-v0",
    entry_point="envs.aloha:AlohaInsertionEnv",
    vector_entry_point="envs.aloha:AlohaInsertionVectorEnv",
)
DOMAINS = {
    "pointmass": "nanoEFM/Pointmass-v0",
    "tabletop": "nanoEFM/Tabletop-v0",
    "bananatable": "nanoEFM/BananaTable-v0",
    "aloha": "nanoEFM/AlohaInsertion-v0",
}


def make_vec(domain: str, num_envs: int, **kwargs: Any) -> VectorEnv:
    """The domain's vector environment, unwrapped: "tabletop", or with arguments of its own "tabletop,blocks=8,look=real".

    Raises ValueError for an unknown domain or argument.
    """
    name, *arguments = domain.split(",")
    if name not in DOMAINS:
        raise ValueError(f"--domain {domain}: unknown; choose one of {', '.join(DOMAINS)}")
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in kwargs or key in ("obs", "render_mode"):
            raise ValueError(f"--domain {domain}: {key} has a flag of its own, or comes twice; leave it out")
        kwargs[key] = int(value) if value.isdecimal() and value.isascii() else value
    try:
        env = gym.make_vec(DOMAINS[name], num_envs=num_envs, vectorization_mode="vector_entry_point", **kwargs)
    except TypeError as e:  # an argument that it does not have
        raise ValueError(f"--domain {domain}: {e}; the domain's file in envs/ lists its arguments") from None
    env.name = domain
    return env
