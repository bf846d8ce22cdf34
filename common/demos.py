"""Demonstrations: recorded with the domain's demonstrator or read from Minari, cached under data/, cut into batches."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor
from tqdm import tqdm

import envs
from common import UserError, ranks
from common.runs import require_writable, write_atomically
from envs.symmetries import Symmetries
from model import EFM
from tokens import StepsToGo

FORMAT = 2  # of the cached files; in their names, so that what another version recorded is not read


class Frames:
    """Frames uint8 (M, ...), read by rows like an array, each deflated: a table's take a seventh of the space."""

    def __init__(self, streams: np.ndarray, offsets: np.ndarray, shape: np.ndarray):
        self.streams, self.offsets = streams, offsets
        self.shape = (len(offsets) - 1, *shape.tolist())
        self.ndim = len(self.shape)

    @classmethod
    def join(cls, frames: list[bytes], shape: tuple[int, ...]) -> Frames:
        return cls(np.frombuffer(b"".join(frames), np.uint8), np.cumsum([0, *map(len, frames)]), np.array(shape))

    def arrays(self) -> dict[str, np.ndarray]:
        """What a file keeps of them."""
        return {"streams": self.streams, "offsets": self.offsets, "shape": np.array(self.shape[1:])}

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows)
        inflated = bytearray()
        for begin, end in zip(self.offsets[rows].flat, self.offsets[rows + 1].flat, strict=True):
            inflated += zlib.decompress(self.streams[begin:end])
        return np.frombuffer(inflated, np.uint8).reshape(*rows.shape, *self.shape[1:])


# --- recording ----------------------------------------------------------------------------------------------
def recorded_part(env: VectorEnv, obs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a demonstration keeps of an observation: the previous frame is kept already, as the step before's."""
    if env.obs == "state":
        return {"state": obs["state"]}
    part = {"frames": obs["images"] if env.simultaneous else obs["images"][:, 1]}
    if "joints" in obs:
        part["joints"] = obs["joints"]
    return part


def deflate_row(part: dict[str, np.ndarray], i: int) -> dict[str, np.ndarray | bytes]:
    """Row i of a `recorded_part`, its frame deflated."""
    return {k: zlib.compress(v[i].tobytes(), 1) if k == "frames" else v[i].copy() for k, v in part.items()}


def record(domain: str, obs: str, episodes: int, seed: int) -> dict[str, np.ndarray | Frames]:
    """Successful demonstrations by the domain's demonstrator, final observations included, as flat arrays of M tuples.

    Returns state float32 (M, S), or `Frames` (M, H, W, 3), of a domain with two views of a moment (M, 2, H, W, 3),
    and the robot's joints float32 (M, J) where it has some; action float32 (M, A), zero on final observations;
    start, length int (episodes,), where length counts observations; instruction str (episodes,).
    """
    n = min(episodes, 256)
    env = envs.make_vec(domain, n, obs=obs)
    # each simulation owes the same number of episodes: taking the first to finish would favour the short ones
    owed = episodes // n + (np.arange(n) < episodes % n)
    kept: list[tuple] = []
    bar = tqdm(total=episodes, desc="demonstrations", leave=False, disable=None)
    o, _ = env.reset(seed=[seed * 10**6 + i for i in range(n)])
    steps: list[list] = [[] for _ in range(n)]
    while owed.any():
        action = env.demonstrate()
        texts, part = o["instruction"], recorded_part(env, o)
        for i in np.flatnonzero(owed):
            steps[i].append((deflate_row(part, i), action[i]))
        o, _, terminated, truncated, _ = env.step(action)
        final = recorded_part(env, o)
        for i in np.flatnonzero(terminated & (owed > 0)):
            steps[i].append((deflate_row(final, i), np.zeros_like(action[i])))
            kept.append((texts[i], *zip(*steps[i], strict=True)))
            owed[i] -= 1
            bar.update()
        over = terminated | truncated
        for i in np.flatnonzero(over):
            steps[i] = []
        if over.any():
            o, _ = env.reset(options={"reset_mask": over})
    bar.close()
    return pack(kept, part)


def pack(episodes: list[tuple], like: dict[str, np.ndarray]) -> dict[str, np.ndarray | Frames]:
    """(instruction, rows by `deflate_row`, actions) per episode -> `record`'s arrays; like: for shapes."""
    packed: dict[str, np.ndarray | Frames] = {}
    for key in like:
        rows = [row[key] for _, observations, _ in episodes for row in observations]
        packed[key] = Frames.join(rows, like[key].shape[1:]) if key == "frames" else np.stack(rows)
    length = np.array([len(actions) for _, _, actions in episodes])
    packed["action"] = np.concatenate([np.stack(actions) for _, _, actions in episodes]).astype(np.float32)
    packed["start"], packed["length"] = np.cumsum(length) - length, length
    packed["instruction"] = np.array([text for text, _, _ in episodes])
    return packed


def from_minari(dataset_id: str, domain: str, obs: str) -> dict[str, np.ndarray | Frames]:
    """The successful episodes of a Minari dataset with the domain's spaces and words. Raises UserError otherwise."""
    import minari

    blame = f"--dataset {dataset_id}"
    try:
        dataset = minari.load_dataset(dataset_id)
    except Exception as e:  # Minari raises many kinds here
        raise UserError(f"{blame}: cannot be loaded ({e}); `minari list local` shows what is there") from None
    env = envs.make_vec(domain, 1, obs=obs)
    spaces = (env.single_observation_space, env.single_action_space)
    if spaces != (dataset.observation_space, dataset.action_space):
        raise UserError(f"{blame}: its spaces are not those of --domain {domain} --obs {obs}; choose another")
    words = set(" ".join(env.instructions()).replace(",", " , ").split())
    episodes, part = [], {}
    for e in dataset.iterate_episodes():
        if not len(e.terminations) or not e.terminations[-1]:
            continue
        text, part = e.observations["instruction"][0], recorded_part(env, e.observations)
        if any(len(rows) != len(e.actions) + 1 for rows in part.values()):
            raise UserError(f"{blame}: episode {e.id} has no observation after its last action; record it with one")
        if unknown := set(text.replace(",", " , ").split()) - words:
            raise UserError(
                f'{blame}: "{min(unknown)}" in episode {e.id} is no word of --domain {domain}; choose another'
            )
        numbers = [e.actions, *(rows for key, rows in part.items() if key != "frames")]
        if not all(np.isfinite(x).all() for x in numbers):
            raise UserError(f"{blame}: episode {e.id} has a number that is none (NaN or infinite); leave it out")
        actions = np.concatenate([e.actions, np.zeros_like(e.actions[:1])])
        episodes.append((text, [deflate_row(part, t) for t in range(len(actions))], actions))
    if len(episodes) < 2:
        raise UserError(
            f"{blame}: {len(episodes)} of its episodes end in success, at least 2 are needed; record others"
        )
    return pack(episodes, part)


# --- caching ------------------------------------------------------------------------------------------------
def load_demonstrations(cfg: Any) -> dict[str, np.ndarray | Frames]:
    """The domain's demonstrations of a Stage 1 configuration, recorded once and cached under data/."""
    if cfg.dataset:
        return from_minari(cfg.dataset, cfg.domain, cfg.obs)
    path = Path("data") / f"{cfg.domain}-{cfg.obs}-{cfg.episodes}-s{cfg.seed}-v{FORMAT}.npz"
    if path.exists():
        print(f"demonstrations from {path}; delete it to record them again")
    else:
        require_writable(path.parent, "demonstrations are kept there; start in another folder")
        data = record(cfg.domain, cfg.obs, cfg.episodes, cfg.seed)
        if "frames" in data:
            data |= data.pop("frames").arrays()
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, write_npz(data))
        del data
    try:
        with np.load(path, allow_pickle=False) as f:
            data = dict(f)
        if "streams" in data:
            data["frames"] = Frames(data.pop("streams"), data.pop("offsets"), data.pop("shape"))
        return data | {key: data[key] for key in ("action", "start", "length", "instruction")}
    except Exception as e:  # a damaged zip raises many kinds
        raise UserError(f"{path}: damaged ({type(e).__name__}); delete it and it is recorded again") from None


def write_npz(arrays: dict[str, np.ndarray]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with open(path, "wb") as f:  # a path would be given the ending .npz
            np.savez(f, **arrays)

    return write


# --- batches ------------------------------------------------------------------------------------------------
def split(episodes: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Which episodes are held out, a tenth, and which are used at all: bool (episodes,) each, nested in `fraction`.

    Raises UserError if nothing is left of either.
    """
    rank = np.random.default_rng(0).permutation(episodes)  # not the first ones: those are the short ones
    held_out, used = np.arange(episodes) % 10 == 0, rank < fraction * episodes
    if not 0 < fraction <= 1 or not (used & held_out).any() or not (used & ~held_out).any():
        raise UserError(
            f"--data-fraction {fraction}: must be above 0 and at most 1, and leave enough of {episodes} --episodes"
        )
    return held_out, used


def load(cfg: Any, env: VectorEnv) -> tuple[Demonstrations, Demonstrations]:
    """What a Stage 1 configuration learns from, and the episodes held out."""
    data = ranks.rank_0_first(load_demonstrations, cfg)
    held_out, used = split(len(data["length"]), cfg.data_fraction)
    train = Demonstrations(data, np.flatnonzero(~held_out & used), env.state_dim)
    if cfg.symmetries:
        # a run of an earlier version does not say whether it was turned
        train.symmetries = env.symmetries.turned() if getattr(cfg, "turns", None) else env.symmetries
    return train, Demonstrations(data, np.flatnonzero(held_out & used), env.state_dim)


@torch.no_grad()
def arrivals(model: EFM, demos: Demonstrations, steps: StepsToGo, episodes: int) -> tuple[Tensor, Tensor]:
    """Of the first demonstrations: the least d of all observations but the last, and d of the last; float (n,) each."""
    rows, d = np.flatnonzero(demos.episode < episodes), []
    for part in np.array_split(rows, len(rows) // 512 + 1):
        obs, _, goals, _ = demos.batch(part, model.device)
        d.append(model.steps_to_go(obs, goals, steps).cpu())
    before, final = [], []
    for episode in torch.cat(d).split(np.bincount(demos.episode[rows]).tolist()):
        before.append(episode[:-1].min())
        final.append(episode[-1])
    return torch.stack(before), torch.stack(final)


def relative_error(model: EFM, obs: dict, goals: list[str], left: Tensor, steps: StepsToGo) -> Tensor:
    """|log((d + 1) / (n + 1))|, averaged over the batch; left: n, the steps truly left, long (B,).

    How wrong d itself is, above all near the goal. The loss is of its distribution, whose certainty over-fits
    first: with few demonstrations d still gets better when its loss on held-out tuples has long been rising.
    """
    d = model.steps_to_go(obs, goals, steps)
    most = steps.edges[-1].item()  # d says no more
    return (torch.log1p(d) - torch.log1p(left.clamp(max=most).to(d.device))).abs().mean()


class Demonstrations:
    """Tuples (o, a, g, steps to go) of some episodes, ready for batches."""

    def __init__(self, data: dict[str, np.ndarray | Frames], episodes: np.ndarray, state_dim: int):
        self.data, self.state_dim, self.symmetries = data, state_dim, Symmetries()
        self.instruction = data["instruction"][episodes]
        start, length = data["start"][episodes], data["length"][episodes]
        self.episode = np.repeat(np.arange(len(episodes)), length)  # (M,)
        t = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        self.index = np.repeat(start, length) + t  # (M,) row in data
        self.previous = self.index - (t > 0)  # the frame before; the first frame is its own
        self.steps = torch.from_numpy(np.repeat(length, length) - 1 - t)  # (M,) 0 on the final observation
        self.acted = np.flatnonzero(self.steps.numpy() > 0)  # the final observation has no action
        self.ends = np.stack([start, start + length - 1], 1)  # (episodes, 2) rows in data, first and last

    def batch(self, rows: np.ndarray, device: torch.device) -> tuple[dict[str, Tensor], Tensor, list[str], Tensor]:
        """(observation, action float (B, A), goals, steps to go long (B,)) of the given rows.

        rows int (B,), or, each turned by an element of `symmetries`, (B, 2): row, element.
        """
        rows, element = rows.T if rows.ndim == 2 else (rows, np.zeros(len(rows), int))
        i = self.index[rows]
        # then the frame before is a part of the observation
        successive = "frames" in self.data and self.data["frames"].ndim == 4
        obs = self.observe(np.stack([self.previous[rows], i], 1) if successive else i, device)
        goals, action = self.instruction[self.episode[rows]].tolist(), torch.from_numpy(self.data["action"][i])
        obs, action, goals = self.symmetries(element, obs, action, goals)
        return obs, action, goals, self.steps[rows]

    def draw(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Rows int (B,) with an element of the symmetries drawn for each, int (B, 2)."""
        return np.stack([rows, rng.integers(self.symmetries.order, size=len(rows))], 1)

    def states(self) -> Tensor:
        """The states of all tuples, float (M, S d)."""
        return torch.from_numpy(self.data["state"][self.index])

    def first_and_last(self, episodes: np.ndarray, device: torch.device) -> tuple[dict[str, Tensor], list[str]]:
        """(the first and the last observation as one, goals): what L_instruction is about.

        episodes int (B,), or with the symmetries' elements (B, 2), as in `batch`.
        """
        episodes, element = episodes.T if episodes.ndim == 2 else (episodes, np.zeros(len(episodes), int))
        obs, goals = self.observe(self.ends[episodes], device), self.instruction[episodes].tolist()
        obs, _, goals = self.symmetries(element, obs, None, goals)
        return obs, goals

    def observe(self, i: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        """Rows (B,) of data -> state (B, S, d) or images (B, 2, H, W, 3) and joints (B, J), two views of a moment;
        pairs of rows (B, 2) -> state (B, 2, S, d) or images (B, 2, H, W, 3), one view of two moments."""
        if "state" in self.data:
            state = torch.from_numpy(self.data["state"][i])
            return {"state": state.unflatten(-1, (-1, self.state_dim)).to(device)}
        if i.ndim == 2 and self.data["frames"].ndim == 5:  # the first view of each, without the joints
            return {"images": torch.from_numpy(self.data["frames"][i][:, :, 0]).to(device)}
        obs = {"images": torch.from_numpy(self.data["frames"][i]).to(device)}
        if "joints" in self.data:
            obs["joints"] = torch.from_numpy(self.data["joints"][i]).to(device)
        return obs
