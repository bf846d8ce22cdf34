"""The domains. Importing this package registers their Gymnasium ids.

    gym.make("nanoEFM/Pointmass-v0", obs="state")                        # one simulation
    gym.make_vec("nanoEFM/Pointmass-v0", num_envs=64, obs="images")      # many at a time
    envs.make_vec("tabletop,blocks=8", 64)                               # what the scripts call

`envs.Domain` says what a domain is, docs/domains.md how to add one.
"""

from __future__ import annotations

import ctypes.util
import inspect
import os
import sys
from typing import Any

import gymnasium as gym

from envs.domain import CannotRender, Domain, MujocoDomain, SingleView

told = "MUJOCO_GL" in os.environ or "mujoco" in sys.modules  # MuJoCo listens while it is imported, not later
if not told and sys.platform == "linux" and not os.environ.get("DISPLAY"):
    # no display; and nothing of an EGL that is not there
    os.environ["MUJOCO_GL"] = "egl" if ctypes.util.find_library("EGL") else "disable"

__all__ = ["DOMAINS", "CannotRender", "Domain", "MujocoDomain", "SingleView", "make_vec", "register"]

DOMAINS: dict[str, str] = {}  # by name: the Gymnasium id


def register(name: str, classes: str) -> None:
    """Make a domain known as `--domain name` and as nanoEFM/{Class}-v0.

    classes "module:Class" stands for two: ClassVectorEnv, a `Domain`, and ClassEnv, its `SingleView`.
    """
    DOMAINS[name] = f"nanoEFM/{classes.split(':')[1]}-v0"
    gym.register(DOMAINS[name], entry_point=f"{classes}Env", vector_entry_point=f"{classes}VectorEnv")


register("pointmass", "envs.pointmass:Pointmass")
register("tabletop", "envs.tabletop:Tabletop")
register("bananatable", "envs.tabletop:BananaTable")
register("aloha", "envs.aloha:AlohaInsertion")


def make_vec(domain: str, num_envs: int, **kwargs: Any) -> Domain:
    """The domain's vector environment, unwrapped; with arguments of its own "tabletop,blocks=8,look=real".

    Raises ValueError for an unknown domain or argument, or for a value that it does not take.
    """
    name, *arguments = domain.split(",")
    if name not in DOMAINS:
        raise ValueError(f"--domain {domain}: unknown; choose one of {', '.join(DOMAINS)}")
    vector_class = gym.envs.registration.load_env_creator(gym.spec(DOMAINS[name]).vector_entry_point)
    known = set(inspect.signature(vector_class).parameters) - {"num_envs", "obs", "render_mode"}
    given: dict[str, Any] = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in kwargs or key in given or key in ("obs", "render_mode"):
            raise ValueError(f"--domain {domain}: {key} comes twice or has a flag of its own; leave it out")
        if key not in known:
            raise ValueError(f"--domain {domain}: no argument {key!r}; {name} has {', '.join(sorted(known))}")
        given[key] = int(value) if value.isdecimal() and value.isascii() else value
    try:
        env = gym.make_vec(DOMAINS[name], num_envs, "vector_entry_point", **kwargs, **given)
    except ValueError as e:
        if given and not str(e).startswith("--"):  # no flag is to blame, but what stands behind the comma
            raise ValueError(f"--domain {domain}: {e}") from None
        raise
    env.name = domain
    return env
