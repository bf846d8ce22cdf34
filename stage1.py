"""Stage 1, supervised fine-tuning (Section 3.1): clone the demonstrations and predict the steps left.

One model learns two questions about (observation, goal) pairs from demonstrations,

    L_BC          = -E log p(a_t          | o_t, "What robot action to {g}")
    L_steps_to_go = -E log p(length(τ) - t | o_t, "How many steps to {g}")

where the domain asks for it (the paper: LanguageTable) a third about the first and the last observation of an episode,

    L_instruction = -E log p(g | o_first, o_last, "What instruction was performed")

and two checkpoints are kept: the best at cloning on held-out episodes becomes Stage 2's policy, the best at steps to
go its reward model and success detector. They need not be the same moment of training. On Aloha the last one, over-fitted,
is the policy, and the best at cloning is kept beside it.

    python stage1.py                          # pointmass from states, 3 minutes on two CPU cores
    python stage1.py --obs images --seed 1    # the same from 32 x 32 frames
    python stage1.py --resume                 # continue an interrupted run, exactly
    python stage1.py --model paligemma --weights google/paligemma-3b-pt-224 --batch 8 --lr 1e-5
    torchrun --nproc_per_node 2 stage1.py     # two processes, half of each batch each
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor
from tqdm import tqdm

import common
import envs
import model as models
from common import UserError
from model import EFM, QUESTION_ACTION, QUESTION_INSTRUCTION, QUESTION_STEPS, EFMConfig, StepsToGo, Tokenizer, action_tokenizer


@dataclass
class Config:
    domain: str = "pointmass"  # one of envs.DOMAINS, with arguments of its own: tabletop,blocks=8
    obs: str = ""  # state or images; empty: the domain's default
    model: str = ""  # a preset of model.PRESETS or, with --weights, paligemma; empty: the domain's
    weights: str = ""  # folder or hub id of PaliGemma, or, with --vit, of Gemma
    vit: str = ""  # timm:NAME, a vision tower of its own: the paper's Uni-PaLI; without --weights the decoder is random
    init: str = ""  # a Stage 0 run, or an earlier Stage 1, to start from; empty: the newest Stage 0 for images; "none": scratch
    seed: int = 0  # weights, demonstrations, batches
    episodes: int = 0  # demonstrations to record with the domain's demonstrator; 0: what the domain takes
    data_fraction: float = 1.0  # share of the demonstrations to learn from; smaller shares are parts of larger ones
    dataset: str = ""  # or the id of a Minari dataset with the domain's spaces
    updates: int = 0  # optimiser steps; 0: what the domain takes
    batch: int = 0  # samples per update, split evenly over the objectives; 0: 128, or the domain's for its model
    policy: Literal["", "best", "last"] = ""  # which becomes the policy: the best at cloning held-out episodes, or the last
    lr: float = 0.0  # AdamW, after a linear warm-up of 100 updates decaying to a tenth (cosine); 0: 1e-3, or likewise
    lora_rank: int = 0  # train LoRA adapters of this rank in place of the pre-trained weights; 0: all weights
    bf16: bool = False  # matrix products in bfloat16; weights, scores and d(o, g) stay in float32
    checkpointing: bool = False  # keep no activations inside the blocks: less memory, a third more time
    compile: bool = False  # torch.compile the blocks: minutes at first, faster after
    eval_every: int = 500  # updates between two looks at the held-out episodes
    eval_episodes: int = 500  # rollouts of the final policy, for summary.json
    out: str = ""  # the run's folder; empty: runs/{domain}-stage1-s{seed}
    resume: bool = False  # continue an interrupted run


# --- demonstrations ---------------------------------------------------------------------------------------------------
class Frames:
    """Frames uint8 (M, ...), read by rows like an array, each deflated: a table's take a seventh of the space, without loss."""

    def __init__(self, streams: np.ndarray, offsets: np.ndarray, shape: np.ndarray):
        self.streams, self.offsets, self.shape = streams, offsets, (len(offsets) - 1, *shape.tolist())
        self.ndim = len(self.shape)

    @classmethod
    def join(cls, frames: list[bytes], shape: tuple[int, ...]) -> Frames:
        return cls(np.frombuffer(b"".join(frames), np.uint8), np.cumsum([0, *map(len, frames)]), np.array(shape))

    def arrays(self) -> dict[str, np.ndarray]:
        """What a file keeps of them."""
        return {"streams": self.streams, "offsets": self.offsets, "shape": np.array(self.shape[1:])}

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows)
        spans = zip(self.offsets[rows].flat, self.offsets[rows + 1].flat, strict=True)
        inflated = bytearray().join(zlib.decompress(self.streams[a:b]) for a, b in spans)
        return np.frombuffer(inflated, np.uint8).reshape(*rows.shape, *self.shape[1:])


def seen(env: VectorEnv, o: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a demonstration keeps of an observation: the previous frame is kept already, as the step before's."""
    if env.obs == "state":
        return {"state": o["state"]}
    return {"frames": o["images"] if env.simultaneous else o["images"][:, 1]} | {k: o[k] for k in ("joints",) if k in o}


def keep(o: dict[str, np.ndarray], i: int) -> dict[str, np.ndarray | bytes]:
    """Row i of what was seen, its frame deflated."""
    return {k: zlib.compress(v[i].tobytes(), 1) if k == "frames" else v[i].copy() for k, v in o.items()}


def record(domain: str, obs: str, episodes: int, seed: int, part: slice = slice(None)) -> dict[str, np.ndarray]:
    """Successful demonstrations by the domain's demonstrator, the final observation included, as flat arrays of M tuples.

    part: of the simulations, for several processes that share the work.

    Returns state float32 (M, S), or `Frames` (M, H, W, 3), of a domain with two views of the same moment (M, 2, H, W, 3),
    and the robot's joints float32 (M, J) where it has some; action float32 (M, A), zero on final observations;
    start, length int (episodes,), where length counts observations; instruction str (episodes,).
    """
    n = min(episodes, 256)
    simulations = np.arange(n)[part]
    env = envs.make_vec(domain, len(simulations), obs=obs)
    # each simulation owes the same number of episodes: taking the first to finish would favour the short ones
    owed = episodes // n + (simulations < episodes % n)
    kept: list[tuple] = []
    bar = tqdm(total=int(owed.sum()), desc="demonstrations", leave=False, disable=None)
    o, _ = env.reset(seed=[seed * 10**6 + int(i) for i in simulations])
    steps: list[list] = [[] for _ in simulations]
    while owed.any():
        action = env.demonstrate()
        texts, now = o["instruction"], seen(env, o)
        for i in np.flatnonzero(owed):
            steps[i].append((keep(now, i), action[i]))
        o, _, terminated, truncated, _ = env.step(action)
        final = seen(env, o)
        for i in np.flatnonzero(terminated & (owed > 0)):
            steps[i].append((keep(final, i), np.zeros_like(action[i])))
            kept.append((texts[i], *zip(*steps[i], strict=True)))
            owed[i] -= 1
            bar.update()
        over = terminated | truncated
        for i in np.flatnonzero(over):
            steps[i] = []
        if over.any():
            o, _ = env.reset(options={"reset_mask": over})
    bar.close()
    return pack(kept, now)


def pack(episodes: list[tuple], like: dict[str, np.ndarray]) -> dict[str, np.ndarray | Frames]:
    """(instruction, observations by `keep`, actions) per episode -> the arrays of `record`; like: what `seen` returned once."""
    length = np.array([len(e[2]) for e in episodes])
    rows = {k: [o[k] for e in episodes for o in e[1]] for k in like}
    return {**{k: Frames.join(x, like[k].shape[1:]) if k == "frames" else np.stack(x) for k, x in rows.items()},
            "action": np.concatenate([np.stack(e[2]) for e in episodes]).astype(np.float32),
            "start": np.cumsum(length) - length, "length": length, "instruction": np.array([e[0] for e in episodes])}  # fmt: skip


def from_minari(dataset_id: str, domain: str, obs: str) -> dict[str, np.ndarray]:
    """The successful episodes of a Minari dataset whose spaces are the domain's. Raises UserError if they are not."""
    import minari

    try:
        dataset = minari.load_dataset(dataset_id)
    except Exception as e:  # Minari raises many kinds here
        raise UserError(f"--dataset {dataset_id}: cannot be loaded ({e}); `minari list local` shows what is there") from None
    env = envs.make_vec(domain, 1, obs=obs)
    if (env.single_observation_space, env.single_action_space) != (dataset.observation_space, dataset.action_space):
        raise UserError(f"--dataset {dataset_id}: its spaces are not those of --domain {domain} --obs {obs}; choose another")
    episodes = []
    for e in dataset.iterate_episodes():
        if e.terminations[-1]:
            o, actions = seen(env, e.observations), np.concatenate([e.actions, np.zeros_like(e.actions[:1])])
            episodes.append((e.observations["instruction"][0], [keep(o, t) for t in range(len(actions))], actions))
    if len(episodes) < 2:
        raise UserError(
            f"--dataset {dataset_id}: {len(episodes)} of its episodes end in success, at least 2 are needed; record others"
        )
    return pack(episodes, o)


def load_demonstrations(cfg: Config) -> dict[str, np.ndarray]:
    """The domain's demonstrations, recorded once and cached under data/."""
    if cfg.dataset:
        return from_minari(cfg.dataset, cfg.domain, cfg.obs)
    path = Path("data") / f"{cfg.domain}-{cfg.obs}-{cfg.episodes}-s{cfg.seed}.npz"
    if not path.exists():
        data = record(cfg.domain, cfg.obs, cfg.episodes, cfg.seed)
        if "frames" in data:
            data |= data.pop("frames").arrays()
        path.parent.mkdir(exist_ok=True)

        def write(p: Path) -> None:
            with open(p, "wb") as f:
                np.savez(f, **data)

        common.write_atomically(path, write)
        del data
    else:
        print(f"demonstrations from {path}; delete it to record them again")
    try:
        with np.load(path) as f:
            data = dict(f)
            if "streams" in data:
                data["frames"] = Frames(*(data.pop(key) for key in ("streams", "offsets", "shape")))
            return data | {key: data[key] for key in ("action", "start", "length", "instruction")}
    except Exception as e:  # a damaged zip raises many kinds
        raise UserError(f"{path}: damaged ({type(e).__name__}); delete it and it is recorded again") from None


def split(episodes: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Which episodes are held out, a tenth, and which are used at all: bool (episodes,) each, nested in `fraction`.

    Raises UserError if nothing is left of either.
    """
    rank = np.random.default_rng(0).permutation(episodes)  # not the first ones: those are the short ones
    held_out, used = np.arange(episodes) % 10 == 0, rank < fraction * episodes
    if not 0 < fraction <= 1 or not (used & held_out).any() or not (used & ~held_out).any():
        raise UserError(f"--data-fraction {fraction}: must be above 0 and at most 1, and leave enough of {episodes} --episodes")
    return held_out, used


class Demonstrations:
    """Tuples (o, a, g, steps to go) of some episodes, ready for batches."""

    def __init__(self, data: dict[str, np.ndarray], episodes: np.ndarray, state_dim: int):
        start, length = data["start"][episodes], data["length"][episodes]
        self.episode = np.repeat(np.arange(len(episodes)), length)  # (M,)
        t = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        self.index = np.repeat(start, length) + t  # (M,) row in data
        self.previous = self.index - (t > 0)  # the frame before; the first frame is its own
        self.steps = torch.from_numpy(np.repeat(length, length) - 1 - t)  # (M,) 0 on the final observation
        self.acted = np.flatnonzero(self.steps.numpy() > 0)  # the final observation has no action
        self.ends = np.stack([start, start + length - 1], 1)  # (episodes, 2) rows in data, first and last
        self.instruction, self.data, self.state_dim = data["instruction"][episodes], data, state_dim

    def batch(self, rows: np.ndarray, device: torch.device) -> tuple[dict[str, Tensor], Tensor, list[str], Tensor]:
        """(observation, action float (B, A), goals, steps to go long (B,)) of the given rows."""
        i = self.index[rows]
        successive = "frames" in self.data and self.data["frames"].ndim == 4  # the frame before belongs to an observation
        obs = self.observe(np.stack([self.previous[rows], i], 1) if successive else i, device)
        return obs, torch.from_numpy(self.data["action"][i]), self.instruction[self.episode[rows]].tolist(), self.steps[rows]

    def first_and_last(self, episodes: np.ndarray, device: torch.device) -> tuple[dict[str, Tensor], list[str]]:
        """(the first and the last observation as one, goals) of the given episodes: what L_instruction is about."""
        return self.observe(self.ends[episodes], device), self.instruction[episodes].tolist()

    def observe(self, i: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        """Rows (B,) of data -> state (B, S, d) or images (B, 2, H, W, 3) and joints (B, J), two views of a moment; pairs of
        rows (B, 2) -> state (B, 2, S, d) or images (B, 2, H, W, 3), one view of two moments."""
        if "state" in self.data:
            return {"state": torch.from_numpy(self.data["state"][i]).unflatten(-1, (-1, self.state_dim)).to(device)}
        if i.ndim == 2 and self.data["frames"].ndim == 5:  # the first view of each, without the joints
            return {"images": torch.from_numpy(self.data["frames"][i][:, :, 0]).to(device)}
        names = {"images": "frames", "joints": "joints"}
        return {k: torch.from_numpy(self.data[v][i]).to(device) for k, v in names.items() if v in self.data}


# --- the objectives of Section 3.1 ------------------------------------------------------------------------------------
def bc_loss(model: EFM, obs: dict[str, Tensor], goals: list[str], tokens: Tensor, ranges: list) -> Tensor:
    """-log p(a | o, Question_action(g)), summed over the action's tokens (B, L), averaged over the batch."""
    prompts = [QUESTION_ACTION.format(g) for g in goals]
    return -model.log_prob(obs, prompts, tokens, ranges).mean()  # [L_BC]


def steps_to_go_loss(model: EFM, obs: dict[str, Tensor], goals: list[str], tokens: Tensor, ranges: list) -> Tensor:
    """-log p(length(τ) - t | o, Question_steps_to_go(g)), averaged over the batch."""
    prompts = [QUESTION_STEPS.format(g) for g in goals]
    return -model.log_prob(obs, prompts, tokens, ranges).mean()  # [L_steps_to_go]


def instruction_loss(model: EFM, obs: dict[str, Tensor], goals: list[str]) -> Tensor:
    """-log p(g | o_first, o_last, Question_instruction), summed over the instruction's tokens, averaged over the batch."""
    return -model.text_log_prob(obs, [QUESTION_INSTRUCTION] * len(goals), goals).mean()  # [L_instruction]


# --- training ---------------------------------------------------------------------------------------------------------
def initial_model(cfg: Config, env: VectorEnv, init: Path | None) -> EFM:
    """From a Stage 0 run, from pre-trained weights or from scratch: the paper's PaLI, Uni-PaLI and Scratch variants."""
    if init:
        return models.merge_lora(common.load(init / "policy.safetensors", env))
    tokenizer = Tokenizer.train([*env.instructions(), *env.state_names] + [QUESTION_INSTRUCTION] * env.predicts_instruction)
    try:
        if cfg.vit:
            sizes = models.PRESETS.get(cfg.model, EFMConfig())
            return models.load_unimodal(cfg.vit, cfg.weights, sizes, tokenizer).to(common.device())
        if cfg.weights:
            return models.load_paligemma(cfg.weights).to(common.device())
    except ValueError as e:
        raise UserError(e) from None
    sizes = {"image_size": env.size} if cfg.obs == "images" else {"state_names": env.state_names, "state_dim": env.state_dim}
    return EFM(models.replace(models.PRESETS[cfg.model], **sizes), tokenizer).to(common.device())


def main(cfg: Config) -> None:
    device = common.device()
    env = common.make_env(cfg.domain, 1)
    pretrained = bool(cfg.weights or cfg.vit)
    cfg.obs = cfg.obs or ("images" if pretrained else env.default_obs)
    env = common.make_env(cfg.domain, 1, obs=cfg.obs)
    recipe, usual = env.recipes[cfg.obs], {"batch": 128, "lr": 1e-3}
    own = (cfg.model or recipe["model"]) == recipe["model"]  # a domain's batch and learning rate are for its model
    recipe = usual | recipe if own else recipe | usual
    for field in ("model", "episodes", "updates", "policy", "batch", "lr"):
        setattr(cfg, field, getattr(cfg, field) or recipe[field])
    if cfg.model not in (*models.PRESETS, "paligemma"):
        raise UserError(f"--model {cfg.model}: unknown; choose paligemma or one of {', '.join(models.PRESETS)}")
    if (cfg.model == "paligemma") != bool(cfg.weights):
        raise UserError("--model paligemma and --weights FOLDER_OR_HUB_ID go together: give both or neither")
    if pretrained and cfg.obs == "state":
        raise UserError("--obs state: a pre-trained model reads images; leave it out")
    if pretrained and cfg.init not in ("", "none"):
        raise UserError(f"--init {cfg.init}: the model starts from --weights or --vit; leave one of them out")
    common.require(cfg, 0, "seed", "lora_rank")
    common.require(cfg, 1, "updates", "eval_every", "eval_episodes")
    common.require(cfg, 2, "episodes")
    common.require(cfg, 2 + env.predicts_instruction, "batch")
    common.require(cfg, 1e-9, "lr")
    if not cfg.dataset:
        split(cfg.episodes, cfg.data_fraction)  # its complaints, before anything is recorded
    if cfg.init not in ("", "none") and cfg.obs == "state":
        raise UserError(f"--init {cfg.init}: Stage 0 is for --obs images; leave it out")
    init = common.stage0_run(cfg.init, cfg.domain) if cfg.obs == "images" and not pretrained else None
    if init and (init / "config.json").exists():
        seen_before = common.make_env(common.read_json(init / "config.json").get("domain", cfg.domain), 1, obs="images")
        if seen_before.simultaneous != env.simultaneous:  # the second image means something else
            raise UserError(f"--init {init}: its second image is not that of --domain {cfg.domain}; name another run")
    cfg.init = str(init or "none")
    if cfg.lora_rank and (cfg.vit or not (cfg.weights or init)):  # adapters cannot make up for a random projection
        raise UserError(f"--lora-rank {cfg.lora_rank}: needs a model pre-trained as a whole; name --weights or --init alone")
    run = common.open_run(cfg, env, "stage1")
    if run.done:
        return
    folder = run.folder

    torch.manual_seed(cfg.seed)
    model = initial_model(cfg, env, init)
    if cfg.lora_rank:
        model = common.adapt(model, cfg.lora_rank, folder / "base.safetensors")
    if run.state:
        model.load_state_dict(run.state["model"], strict=not cfg.lora_rank)  # adapters alone are kept
    models.economise(model, cfg.checkpointing, cfg.compile)
    wrapped = common.distribute(model, shard=cfg.model == "paligemma" and not cfg.lora_rank)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=cfg.lr, weight_decay=0.01, fused=True)
    rng, first = np.random.default_rng(cfg.seed), 0
    best = dict.fromkeys(("valid_bc", "valid_steps_to_go", "instruction"), float("inf"))
    # until the answers on held-out episodes get no better: a few thousand are soon learnt by heart
    asks = env.predicts_instruction
    if run.state:
        common.load_optimizer(optimizer, run.state["optimizer"])
        rng.bit_generator.state, first, best, asks = (run.state[k] for k in ("rng", "update", "best", "asks"))

    data = common.rank_0_first(load_demonstrations, cfg)
    low, high = env.single_action_space.low, env.single_action_space.high
    beyond = np.abs(data["action"] - np.clip(data["action"], low, high)) > 0.01 * (high - low)
    if ("frames" in data and (data["frames"].ndim == 5) != env.simultaneous) or (beyond.any() and not cfg.dataset):
        raise UserError("data/: these demonstrations are of an earlier version; delete them, they are recorded again")
    held_out, used = split(len(data["length"]), cfg.data_fraction)
    train, valid = (Demonstrations(data, np.flatnonzero(m & used), env.state_dim) for m in (~held_out, held_out))
    actions, steps = action_tokenizer(**env.action_tokens), StepsToGo(env.steps_cap, env.steps_bins)
    if model.cfg.state_names and model.cfg.state_mlp and not run.state:
        model.standardise(torch.from_numpy(data["state"][train.index]))

    def losses(model: EFM, demos: Demonstrations, *rows: np.ndarray) -> dict[str, Tensor]:
        """Rows for cloning and for steps to go, and episodes for instructions; of each this rank's share."""
        (bc_rows, bc_weight), (steps_rows, steps_weight) = map(common.share, rows[:2])
        obs, action, goals, _ = demos.batch(bc_rows, device)
        each = {"bc": bc_weight * bc_loss(model, obs, goals, actions.encode(action).to(device), actions.ranges)}
        obs, _, goals, to_go = demos.batch(steps_rows, device)
        to_go = steps.encode(to_go).to(device)
        each["steps_to_go"] = steps_weight * steps_to_go_loss(model, obs, goals, to_go, steps.ranges)
        if len(rows[2]):
            episodes, weight = common.share(rows[2])
            each["instruction"] = weight * instruction_loss(model, *demos.first_and_last(episodes, device))
        return each

    run.start()
    run.state = None  # at 3B tens of gigabytes
    if cfg.lora_rank and common.rank() == 0 and not model.base.exists():  # once; the checkpoints name it
        common.write_atomically(model.base, lambda p: models.save_base(model, p))
    # the same tuples at every look; of a pre-trained model no more than fit where a batch does
    n, validation = 2 * cfg.batch if pretrained else 2048, np.random.default_rng(0)
    look = validation.choice(valid.acted, n), validation.integers(len(valid.index), size=n)
    look += (np.arange(len(valid.ends))[: n * env.predicts_instruction],)
    silent = common.rank() > 0 or None
    for update in tqdm(range(first, cfg.updates), initial=first, total=cfg.updates, desc="stage 1", disable=silent):
        third = cfg.batch // 3 if asks else 0  # split evenly over the objectives
        half = (cfg.batch - third) // 2
        rows = rng.choice(train.acted, half), rng.integers(len(train.index), size=cfg.batch - third - half)
        with common.autocast(cfg.bf16):
            now = wrapped(losses, train, *rows, rng.integers(len(train.ends), size=third))
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(update, cfg.updates, cfg.lr)
        optimizer.zero_grad()
        sum(now.values()).backward()
        optimizer.step()
        if (update + 1) % cfg.eval_every == 0 or update + 1 == cfg.updates:
            with torch.no_grad(), common.autocast(cfg.bf16):
                held = common.mean(wrapped(losses, valid, *look))
            row = {"update": update + 1} | dict.fromkeys(held, float("nan")) | common.mean(now)
            row |= {f"valid_{k}": v for k, v in held.items()} | {"seconds": run.seconds()}
            run.log(update + 1, row)
            tqdm.write("  ".join(f"{k} {v:.4g}" for k, v in row.items()))
            if not all(map(math.isfinite, held.values())):
                raise UserError(f"--lr {cfg.lr}: the held-out losses are no numbers any more; start again with a smaller one")
            late = cfg.policy == "last"  # the paper's Aloha: an over-fitted policy is the better one; both are kept
            for name, key in (("early_policy" if late else "policy", "valid_bc"), ("reward", "valid_steps_to_go")):
                if row[key] < best[key]:  # best at cloning, at steps to go
                    best[key] = row[key]
                    common.save(model, folder / f"{name}.safetensors")
            if late:
                common.save(model, folder / "policy.safetensors")
            asks = asks and held["instruction"] < best["instruction"]
            best["instruction"] = min(best["instruction"], held.get("instruction", 0.0))
            run.checkpoint(model=models.trained(model), optimizer=optimizer.state_dict(), rng=rng.bit_generator.state,
                           update=update + 1, best=best, asks=asks)  # fmt: skip

    if common.rank():
        return
    import eval as evaluation  # it imports the stages

    summary = evaluation.evaluate(folder, episodes=cfg.eval_episodes, seed=cfg.seed, s=env.success_threshold)
    print(evaluation.describe(run.finish({"stage": "stage1", "domain": cfg.domain, "obs": cfg.obs, "seed": cfg.seed,
                                          "episodes": int(used.sum())} | summary)))  # fmt: skip


if __name__ == "__main__":
    common.cli(Config, main, ranks=True)
