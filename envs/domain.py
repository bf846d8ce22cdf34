"""What every domain is: `Domain`, N simulations at once; `SingleView`, one of them as a `gymnasium.Env`.

docs/domains.md builds a small domain from this page.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import threading
from abc import abstractmethod
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs.symmetries import Symmetries

BASE_FIELDS = ("t", "texts", "frames", "rngs")  # what every domain's state has


class CannotRender(ValueError):
    """This machine has nothing to draw with: the scripts print it as one line and exit with code 2."""


class Domain(VectorEnv):
    """N simulations of a task that a sentence names.

    A subclass gives a value to each attribute below that has none, calls `super().__init__`, and defines the
    abstract methods. Whatever simulation i draws comes from `self.rngs[i]`: then simulation i of
    `reset(seed=s)` is the single environment of seed s + i. Nothing resets by itself;
    `reset(options={"reset_mask": mask})` resets some. Ground truth is in `info["is_success"]`, on every step
    and reset, and nowhere in an observation.
    """

    # --- what a domain says of itself -----------------------------------------------------------------------
    name: str  # "pointmass"; `envs.make_vec` adds the arguments that it was given
    horizon: int  # steps until truncation
    low: np.ndarray  # the least action, float (A,); the docstring of the domain's file gives the units
    high: np.ndarray  # the greatest one; actions beyond are clipped
    action_tokens: dict[str, Any]  # arguments of `tokens.action_tokenizer`
    state_names: tuple[str, ...]  # the quantities of obs="state", in order
    state_dim: int  # numbers in each of them
    steps_cap: int  # the most steps to go that a token says
    steps_bins: int  # the tokens for them: bins of steps_cap / steps_bins steps
    success_threshold: float  # s: the detector fires at so many steps to go
    stage1_defaults: dict[str, dict]  # by kind of observation: what Stage 1's flags are where they are None
    stage2_defaults: dict[str, dict]  # likewise for Stage 2
    turned_defaults = {"policy": "last", "reward": "error"}  # of Stage 1 where few demonstrations are turned
    default_obs = "state"
    temperature = 1.0  # at which the policy's answers are drawn when it is evaluated
    simultaneous = True  # the two images are views of one moment; else the previous frame and the current one
    asked = 1  # questions of each scene in Stage 0
    predicts_instruction = False  # Stage 1 asks which instruction led from the first observation to the last
    text_length, letters = 200, "abcdefghijklmnopqrstuvwxyz ,"  # the longest instruction; what it is made of
    symmetries = Symmetries()  # what a tuple may be turned into: envs/symmetries.py
    metadata = {"autoreset_mode": AutoresetMode.DISABLED, "render_modes": ["rgb_array"],
                "render_fps": 10}  # fmt: skip  # steps a second
    # with BASE_FIELDS, all that the future depends on: arrays, numbers, texts, lists of them
    STATE_FIELDS: tuple[str, ...] = ()

    # --- what a domain does ---------------------------------------------------------------------------------
    @abstractmethod
    def instructions(self) -> list[str]:
        """Every text of the grammar, once."""

    @abstractmethod
    def demonstrate(self) -> np.ndarray:
        """The demonstrator's actions for the present states, float (N, A). May draw from `self.rngs`."""

    @abstractmethod
    def _place(self, rows: np.ndarray) -> None:
        """Begin an episode in the simulations `rows`, int (n,): where things are, and `self.texts[i]`."""

    @abstractmethod
    def _move(self, actions: np.ndarray) -> None:
        """One step of every simulation; actions float (N, A) within `low` and `high`."""

    @abstractmethod
    def _state(self) -> np.ndarray:
        """The quantities of obs="state", float32 (N, state_dim * len(state_names))."""

    @abstractmethod
    def _success(self) -> np.ndarray:
        """Whether each instruction is fulfilled now, bool (N,)."""

    def _views(self, rows: np.ndarray) -> np.ndarray:
        """The two images of obs="images" of simulations `rows`, uint8 (n, 2, size, size, 3).

        Where they are not `simultaneous`, the first of them is taken, as the current frame. A domain without
        this method has no images.
        """
        raise NotImplementedError

    def _info(self) -> dict[str, np.ndarray]:
        """What `reset` and `step` tell beside the observation: (N,) each."""
        return {"is_success": self._success()}

    def expert(self) -> np.ndarray:
        """Actions of the best that can be scripted, float (N, A)."""
        return self.demonstrate()

    def track(self) -> np.ndarray:
        """What moves, in shares of the rendered frame (x right, y down), float (N, 2); for figures."""
        raise NotImplementedError(f"{self.name} has no track()")

    # Some domains also have
    #   questions() -> list[str], scenes(rng, n)    Stage 0's questions; random scenes, `asked` of each, the answers
    #   ask(mask), anew, fallen                     where one goes on without a reset: envs/operator.py

    # --- the rest is the same for all -----------------------------------------------------------------------
    def __init__(self, num_envs: int, obs: str, size: int, render_mode: str | None):
        cls = type(self)
        lacks = [k for k in Domain.__annotations__ if not hasattr(self, k)]
        lacks += [f"{k}()" for k in dir(cls) if getattr(getattr(cls, k), "__isabstractmethod__", False)]
        if lacks:
            raise NotImplementedError(f"{cls.__name__} lacks {', '.join(lacks)}: see envs.Domain")
        if obs not in ("state", "images"):
            raise ValueError(f"--obs {obs}: choose state or images")
        if obs == "images" and cls._views is Domain._views:
            raise ValueError(f"--obs images: {self.name} has no images; choose state")
        if not isinstance(size, int) or not 16 <= size <= 640:
            raise ValueError(f"size {size}: choose 16 to 640 pixels")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode {render_mode!r}: only 'rgb_array' exists here")
        self.num_envs, self.obs, self.size, self.render_mode = num_envs, obs, size, render_mode
        low, high = np.float32(self.low), np.float32(self.high)
        self.single_action_space = gym.spaces.Box(low, high, dtype=np.float32)
        self.single_observation_space = gym.spaces.Dict(self._spaces())
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.rngs: list[np.random.Generator] = [np.random.default_rng() for _ in range(num_envs)]
        self.t, self.texts = np.zeros(num_envs, int), [""] * num_envs
        self.frames = np.zeros((num_envs, 2, size, size, 3), np.uint8)

    def _spaces(self) -> dict[str, gym.Space]:
        # AsyncVectorEnv loses texts on their way through shared memory; its shared_memory=False keeps them
        text = gym.spaces.Text(self.text_length, charset=frozenset(self.letters))
        spaces: dict[str, gym.Space] = {"instruction": text}
        if self.obs == "state":
            numbers = self.state_dim * len(self.state_names)
            spaces["state"] = gym.spaces.Box(-np.inf, np.inf, (numbers,), np.float32)
        else:
            spaces["images"] = gym.spaces.Box(0, 255, (2, self.size, self.size, 3), np.uint8)
        return spaces

    def reset(self, *, seed: int | list[int] | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Reset all simulations, or those of options["reset_mask"], bool (N,).

        Simulation i gets seed + i, or seed[i]. Raises ValueError for a mask or a list of seeds of another
        shape; nothing has changed then.
        """
        mask = self._require_mask((options or {}).get("reset_mask", np.ones(self.num_envs, bool)))
        if seed is not None:
            seeds = range(seed, seed + self.num_envs) if isinstance(seed, int | np.integer) else list(seed)
            if len(seeds) != self.num_envs:
                raise ValueError(f"{len(seeds)} seeds for {self.num_envs} simulations")
            given = zip(mask, seeds, self.rngs, strict=True)
            self.rngs = [rng if s is None or not m else np.random.default_rng(s) for m, s, rng in given]
        rows = np.flatnonzero(mask)
        if len(rows):
            self._place(rows)
        self.t[rows] = 0
        self._draw(rows, first=True)
        return self._observe(), self._info()

    def step(self, actions: np.ndarray) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        """One step of every simulation; actions float (N, A), clipped to `low` and `high`.

        Returns observation, reward (1 on success, else 0), terminated, truncated, info. Raises ValueError for
        actions of another shape, or that are not numbers; nothing has moved then.
        """
        actions = np.asarray(actions, float)
        if actions.shape != self.action_space.shape:
            raise ValueError(f"actions of shape {actions.shape}: {self.name} takes {self.action_space.shape}")
        nan = np.isnan(actions)
        if nan.any():
            raise ValueError(f"NaN in the actions of simulations {np.flatnonzero(nan.any(1)).tolist()}")
        self._move(np.clip(actions, self.low, self.high))
        self.t += 1
        self._draw(np.arange(self.num_envs), first=False)
        info = self._info()
        success = info["is_success"]
        return self._observe(), success.astype(float), success.copy(), self.t >= self.horizon, info

    def _require_mask(self, mask: Any) -> np.ndarray:
        mask = np.asarray(mask)
        if mask.dtype != bool or mask.shape != (self.num_envs,):
            raise ValueError(f"a mask {mask.dtype} {mask.shape}: it must be bool ({self.num_envs},)")
        return mask

    def _draw(self, rows: np.ndarray, first: bool) -> None:
        if self.obs != "images" or not len(rows):
            return
        views = self._views(rows)
        if not self.simultaneous:  # an episode's first frame is its own predecessor
            views = np.stack([views[:, 0] if first else self.frames[rows, 1], views[:, 0]], 1)
        self.frames[rows] = views

    def _observe(self) -> dict[str, Any]:
        seen = {"images": self.frames.copy()} if self.obs == "images" else {"state": self._state()}
        return {"instruction": tuple(self.texts)} | seen

    def get_state(self) -> dict[str, Any]:
        """All that `set_state` needs to go on exactly: arrays, numbers, texts, lists and dicts of them."""
        return {k: plain(getattr(self, k)) for k in (*BASE_FIELDS, *self.STATE_FIELDS)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from what `get_state` gave. Raises ValueError for a state of another domain or N."""
        if state.keys() != {*BASE_FIELDS, *self.STATE_FIELDS}:
            raise ValueError(f"a state with {', '.join(state)}: not one of {self.name}")
        for k, kept in state.items():
            setattr(self, k, restored(getattr(self, k), kept))

    @property
    def _max_episode_steps(self) -> int:
        return self.horizon

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple:
        """A method's result or an attribute for each simulation, as `SyncVectorEnv.call` gives them.

        What is one thing for all, like `horizon` or `instructions()`, comes N times.
        """
        value = getattr(self, name)
        one_each = isinstance(value, np.ndarray)
        if callable(value):
            value = value(*args, **kwargs)
            one_each = isinstance(value, np.ndarray | tuple)
        return tuple(value) if one_each and len(value) == self.num_envs else (value,) * self.num_envs


def plain(value: Any) -> Any:
    """A copy in arrays, numbers, texts, lists and dicts."""
    if isinstance(value, np.random.Generator):
        return copy.deepcopy(value.bit_generator.state)
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value.copy() if isinstance(value, np.ndarray) else value


def restored(now: Any, kept: Any) -> Any:
    """The inverse of `plain`: what `kept` stands for, written into `now` where that is possible."""
    if isinstance(now, np.random.Generator):
        now.bit_generator.state = kept
        return now
    if dataclasses.is_dataclass(now):
        return type(now)(**{k: restored(getattr(now, k), v) for k, v in kept.items()})
    if isinstance(now, list):
        return [restored(a, b) for a, b in zip(now, kept, strict=True)]
    if isinstance(now, np.ndarray):
        if np.shape(kept) != now.shape:
            raise ValueError(f"a state of {np.shape(kept)} where {now.shape} is due: of other simulations")
        now[:] = kept
        return now
    return kept


class MujocoDomain(Domain):
    """What domains on MuJoCo share: a batch of simulations, a renderer for each size of frame and thread."""

    STATE_FIELDS = ("sim_state",)
    # what `_simulate` makes, and a copy of the domain makes for itself
    OF_THIS_PROCESS: tuple[str, ...] = ("sim", "sim_state", "drawn", "_thread")

    def __init__(self, num_envs: int, obs: str, size: int, render_mode: str | None, xml: str):
        import mujoco

        super().__init__(num_envs, obs, size, render_mode)
        self.model = mujoco.MjModel.from_xml_string(xml)
        self._simulate()

    def _simulate(self) -> None:
        import mujoco
        from mujoco.batch import Batch

        self.sim = Batch(self.model, self.num_envs)
        self.sim_state = self.sim.state  # float (N, S), live: positions, velocities, where the solver begins
        self.drawn = mujoco.MjData(self.model)
        self._thread = threading.local()

    @property
    def renderers(self) -> dict[tuple[int, int], Any]:
        """By height and width. A thread has its own: what one has drawn with, no other can."""
        return vars(self._thread).setdefault("renderers", {})

    def __getstate__(self) -> dict[str, Any]:  # for copy and pickle
        own = {k: v for k, v in vars(self).items() if k not in self.OF_THIS_PROCESS}
        return own | {"state": self.get_state()}

    def __setstate__(self, own: dict[str, Any]) -> None:
        state = own.pop("state")
        vars(self).update(own)
        self._simulate()
        self.set_state(state)

    def _posed(self, qpos: np.ndarray) -> Any:
        """The scene at qpos, an mjData for `_shoot`."""
        import mujoco

        self.drawn.qpos[:] = qpos
        mujoco.mj_kinematics(self.model, self.drawn)
        mujoco.mj_camlight(self.model, self.drawn)
        return self.drawn

    def _shoot(self, data: Any, camera: str | int, height: int, width: int) -> np.ndarray:
        """uint8 (height, width, 3) of a posed scene. Raises CannotRender with the way out."""
        import mujoco

        renderers = self.renderers
        if (height, width) not in renderers:
            try:
                renderers[height, width] = mujoco.Renderer(self.model, height, width)
            except Exception as e:  # each GL backend raises its own kind
                gl = os.environ.get("MUJOCO_GL")
                way_out = (
                    "install EGL or OSMesa (Debian: libegl1, libosmesa6), set MUJOCO_GL to egl or osmesa"
                )
                if not gl and not os.environ.get("DISPLAY"):  # else `envs` has set it
                    way_out = "mujoco came first: import envs before it, or set MUJOCO_GL=egl"
                raise CannotRender(
                    f"MuJoCo cannot render here (MUJOCO_GL={gl or ''}: {e}); {way_out} "
                    "before mujoco is imported, or use --obs state"
                ) from e
        renderers[height, width].update_scene(data, camera)
        return renderers[height, width].render()

    def close(self) -> None:
        """Close this thread's renderers; they come back when something is drawn."""
        renderers = self.renderers if hasattr(self, "_thread") else {}  # a constructor may have failed
        for renderer in renderers.values():
            renderer.close()
        renderers.clear()


class SingleView(gym.Env):
    """The `gymnasium.Env` of a domain: a view of a batch of one. Subclasses name their `vector_class`."""

    vector_class: type[Domain]
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode: str | None = None, **kwargs: Any):
        self.batch = self.vector_class(num_envs=1, render_mode=render_mode, **kwargs)
        self.render_mode = render_mode
        self.observation_space = self.batch.single_observation_space
        self.action_space = self.batch.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        obs, info = self.batch.reset(seed=seed, options=options)
        return alone(obs), alone(info)

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.batch.step(np.asarray(action)[None])
        return alone(obs), float(reward[0]), bool(terminated[0]), bool(truncated[0]), alone(info)

    def render(self) -> np.ndarray:
        return self.batch.render()[0]

    def close(self) -> None:
        self.batch.close()

    @property
    def _max_episode_steps(self) -> int:
        return self.batch.horizon

    @property
    def spec(self) -> gym.envs.registration.EnvSpec | None:
        """The registered one, with the horizon, which may depend on the arguments."""
        return vars(self).get("_spec")

    @spec.setter
    def spec(self, spec: gym.envs.registration.EnvSpec | None) -> None:
        self._spec = copy.deepcopy(spec)
        if spec is not None:
            self._spec.max_episode_steps = self.batch.horizon


def alone(batched: dict[str, Any]) -> dict[str, Any]:
    """Simulation 0's part of an observation or info, with numbers as Python's own."""
    return {k: v[0].item() if isinstance(v[0], np.generic) else v[0] for k, v in batched.items()}
