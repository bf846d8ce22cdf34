"""Stage 2, online self-improvement (Section 3.2, Algorithm 1): the policy practises alone.

The frozen Stage 1 model says how many steps are left, d(o, g), and that is all the supervision there is:

    r(o_t, a_t, o_t+1, g) = d(o_t, g) - d(o_t+1, g)      reward, Eq. 2
    success(o, g)         = 1[d(o, g) <= s]              ends an episode

REINFORCE on Monte Carlo returns improves the policy. The domain's ground truth is logged, and learnt from only where
`--success-bonus` says so: on Aloha, as in the paper.

    python stage2.py                                    # continues the newest Stage 1 run, 2 minutes on two CPU cores
    python stage2.py --stage1 runs/pointmass-stage1-s1  # a given one
    python stage2.py --success ground-truth --gamma 0   # an ablation
    python stage2.py --domain tabletop,look=real        # practice where the demonstrations were not: Real2Sim the other way
    torchrun --nproc_per_node 2 stage2.py               # two processes, half of the simulations and batches each
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor
from tqdm import tqdm

import common
import model as models
from common import UserError
from model import EFM, QUESTION_ACTION, StepsToGo, action_tokenizer


@dataclass
class Config:
    stage1: str = ""  # folder of the Stage 1 run; empty: the newest finished one
    reward_run: str = ""  # folder of another Stage 1 run whose reward model judges (Figure 4's ablation); empty: the same run
    domain: str = ""  # practise in another domain with the same observations, as in Real2Sim; empty: Stage 1's
    seed: int = -1  # rollouts and batches; -1: Stage 1's
    gamma: float | None = None  # discount of the Monte Carlo returns; None: the domain's, 0.9 but on aloha
    c: float = 0.05  # scale of the REINFORCE loss
    s: float | None = None  # success threshold: the detector fires when d(o, g) <= s; None: the domain's
    success: Literal["detector", "ground-truth"] = "detector"  # what ends a practice episode
    temperature: float | None = None  # the practising policy is softmax(scores / temperature); None: the domain's, 1 but on aloha
    clip_reward: float | None = None  # rewards are cut off at -this and +this; 0: nowhere; None: the domain's, 0 but on aloha
    success_bonus: float | None = None  # added to the last reward on ground-truth success; None: the domain's, 0 but on aloha
    updates: int = 16  # N, optimiser steps per iteration
    batch: int | None = None  # B, tuples per optimiser step; None: the domain's, 64 but on aloha
    lr: float = 1e-4  # AdamW
    lora_rank: int = 0  # train LoRA adapters of this rank; 0: Stage 1's adapters where it has some, else all weights
    learns: Literal["all", "blocks"] | None = None  # all weights, or the transformer's blocks alone; None: all but on aloha
    bf16: bool = False  # matrix products in bfloat16; weights, scores and d(o, g) stay in float32
    checkpointing: bool = False  # keep no activations inside the blocks: less memory, a third more time
    compile: bool = False  # torch.compile the blocks: minutes at first, faster after
    keep_optimizer: bool = False  # go on with Stage 1's last AdamW moments, as the authors' notebook does
    num_envs: int | None = None  # simulations that practise at once; None: the domain's, 16 but on aloha
    operator: bool = False  # practise without resets, but for an operator's: the paper's protocol on real robots
    iterations: int | None = None  # of Algorithm 1's loop, at most; None: the domain's
    patience: int = 100  # stop after so many iterations without a better policy, as far as the model can see
    eval_episodes: int = 500  # rollouts of the best policy, for summary.json
    out: str = ""  # the run's folder; empty: runs/{domain}-stage2-s{seed}
    resume: bool = False  # continue an interrupted run


# what a domain that says nothing else in `practice` takes
USUAL = {"gamma": 0.9, "temperature": 1.0, "clip_reward": 0.0, "success_bonus": 0.0, "batch": 64, "learns": "all",
         "num_envs": 16}  # fmt: skip


def practice(env: VectorEnv) -> dict[str, Any]:
    """What the fields of Config that are None take in a domain."""
    return USUAL | {"s": env.success_threshold} | env.practice[env.obs]


# --- the equations ----------------------------------------------------------------------------------------------------
def rewards(d: Tensor) -> Tensor:
    """r_t = d(o_t, g) - d(o_t+1, g): float (n, T + 1) -> (n, T), the last step included."""
    return d[:, :-1] - d[:, 1:]  # [Eq. 2]


def monte_carlo_returns(reward: Tensor, gamma: float) -> Tensor:
    """R_t = Σ_{i>=t} γ^(i-t) r_i, float (n, T) -> (n, T); rewards after an episode's end must be 0."""
    returns = reward.clone()
    for t in reversed(range(reward.shape[1] - 1)):
        returns[:, t] += gamma * returns[:, t + 1]
    return returns


def reinforce_loss(log_prob: Tensor, returns: Tensor, c: float) -> Tensor:
    """-c · R_t · log p(a_t | o_t, Question_action(g)), averaged over the batch; log_prob, returns float (B,)."""
    return -(c * returns * log_prob).mean()


def detect_success(d: Tensor, s: float) -> Tensor:
    """success(o, g) = 1[d(o, g) <= s], bool like d (Section 3.2)."""
    return d <= s


# --- rollouts ---------------------------------------------------------------------------------------------------------
def look(model: EFM, obs: dict, rows: np.ndarray, before: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The model's input for the simulations `rows` of a domain's observation, images encoded.

    Each frame passes through the ViT once: the previous frame's features come from `before`, the last step's input,
    or None where there is none, at first and in a domain with two views of the same moment.
    """
    device = model.language_model.embed_tokens.weight.device
    if "state" in obs:
        return {"state": torch.from_numpy(obs["state"][rows]).to(device).unflatten(1, (-1, model.cfg.state_dim))}
    sees = {"joints": torch.from_numpy(obs["joints"][rows]).to(device)} if "joints" in obs else {}
    frames = torch.from_numpy(obs["images"][rows]).to(device)  # (B, 2, H, W, 3)
    if before is None:
        return sees | {"features": model.encode_images(frames)}  # (B, 2, N, Dv)
    return sees | {"features": torch.cat([before["features"][:, 1:], model.encode_images(frames[:, 1:])], 1)}


class Operator:
    """Who looks after the stations (Section 5.2): resets one when something has fallen or nothing is left to do, or
    3-5 minutes after the last time.

    Every other episode begins where the one before it ended, with a new instruction. A robot-hour is one station's hour
    of practice. The state is what an exact resume needs.
    """

    def __init__(self, env: VectorEnv, seed: int):
        self.env, self.rng = env, np.random.default_rng(seed)
        self.interventions = -env.num_envs  # setting the stations up is none
        self.steps = np.full(env.num_envs, 10**9)  # since the station's last reset: at first all are overdue
        self.due = self.rng.uniform(180, 300, env.num_envs) * env.metadata["render_fps"]  # [steps]

    def begin(self, seed: int) -> tuple[dict, dict]:
        """The observation and info that an episode begins with in every station; a drop-in for `env.reset`."""
        needs = self.env.fallen.any(1) | (self.steps > self.due)
        self.interventions += int(needs.sum())
        self.steps[needs] = 0
        self.due[needs] = self.rng.uniform(180, 300, int(needs.sum())) * self.env.metadata["render_fps"]
        if needs.any():
            self.env.reset(seed=seed, options={"reset_mask": needs})
        begun = self.env.ask(~needs)
        self.interventions += int(self.env.anew.sum())
        self.steps[self.env.anew] = 0
        return begun

    def state_dict(self) -> dict:
        return {k: v for k, v in vars(self).items() if k != "env"} | {"env": self.env.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.env.set_state(state["env"])
        vars(self).update({k: v for k, v in state.items() if k != "env"})


@torch.no_grad()
def rollout(policy: EFM, reward_model: EFM, env: VectorEnv, seed: int, generator: torch.Generator, end: str = "detector",
            s: float = 3.0, greedy: bool = False, watch: Callable[[], None] = lambda: None,
            begin: Callable[..., tuple[dict, dict]] | None = None, temperature: float = 1.0) -> dict:  # fmt: skip
    """One episode in each of the n simulations, ended by `end` ("detector" or "ground-truth") or the horizon.

    Returns, over M tuples in all: obs (dict of tensors (M, ...)), tokens long (M, L), entropy (M,) in nats, goals (M),
    row and t long (M,): simulation and time; and per simulation: d float (n, T + 1), truth bool (n, T + 1) of every
    observation, both frozen at the episode's end, length int (n,), detected bool (n,): the episode ended in d <= s.
    `watch` is called after the reset and after each step; `begin(seed=...)` stands in for `env.reset`.
    """
    actions, steps = action_tokenizer(**env.action_tokens), StepsToGo(env.steps_cap, env.steps_bins)
    n, alive = env.num_envs, np.arange(env.num_envs)  # alive: the simulations whose episode goes on
    obs, info = (begin or env.reset)(seed=seed)
    goals = np.array(obs["instruction"], dtype=object)
    sees, reward_sees = look(policy, obs, alive, None), look(reward_model, obs, alive, None)
    d, truth = [reward_model.steps_to_go(reward_sees, goals.tolist(), steps).cpu()], [torch.from_numpy(info["is_success"].copy())]
    watch()
    tuples, length, detected = [], np.zeros(n, int), np.zeros(n, bool)
    for t in range(env.horizon):
        prompts = [QUESTION_ACTION.format(g) for g in goals[alive]]
        tokens, entropy = policy.sample(sees, prompts, actions.ranges, generator, greedy, temperature)
        tuples.append((sees, tokens, entropy.sum(1), goals[alive], torch.from_numpy(alive), torch.full((len(alive),), t)))
        action = np.zeros(env.action_space.shape, np.float32)
        action[alive] = actions.decode(tokens.cpu()).numpy()
        obs, _, _, _, info = env.step(action)
        watch()
        if env.simultaneous:
            sees = reward_sees = None  # no frame comes again
        sees, reward_sees = look(policy, obs, alive, sees), look(reward_model, obs, alive, reward_sees)
        d.append(d[-1].clone())
        truth.append(truth[-1].clone())
        d[-1][alive] = reward_model.steps_to_go(reward_sees, goals[alive].tolist(), steps).cpu()
        truth[-1][alive] = torch.from_numpy(info["is_success"][alive])
        length[alive] = t + 1
        fired = detect_success(d[-1][alive], s).numpy()
        detected[alive] = fired
        going = ~(fired if end == "detector" else truth[-1][alive].numpy())
        alive, going = alive[going], torch.from_numpy(going)
        sees, reward_sees = ({k: v[going] for k, v in x.items()} for x in (sees, reward_sees))
        if len(alive) == 0:
            break
    obs, tokens, entropy, who, row, time = zip(*tuples, strict=True)
    return {"obs": {k: torch.cat([o[k] for o in obs]) for k in obs[0]}, "tokens": torch.cat(tokens), "goals": np.concatenate(who),
            "entropy": torch.cat(entropy), "row": torch.cat(row), "t": torch.cat(time), "d": torch.stack(d, 1),
            "truth": torch.stack(truth, 1), "length": length, "detected": detected}  # fmt: skip


# --- Algorithm 1 ------------------------------------------------------------------------------------------------------
def main(cfg: Config) -> None:
    device = common.device()
    stage1 = common.stage1_run(cfg.stage1)
    cfg.stage1 = str(stage1)
    settings = common.read_json(stage1 / "config.json")
    if not {"domain", "obs", "seed"} <= settings.keys():
        raise UserError(f"{stage1}/config.json: not the configuration of a Stage 1 run; name another --stage1")
    cfg.seed = settings["seed"] if cfg.seed < 0 else cfg.seed
    domain, obs_mode = cfg.domain or settings["domain"], settings["obs"]
    env = common.make_env(domain, 1, obs=obs_mode)
    for field, value in practice(env).items():
        if getattr(cfg, field) is None:
            setattr(cfg, field, value)
    common.require(cfg, 1, "updates", "batch", "num_envs", "iterations", "patience", "eval_episodes")
    common.require(cfg, 1e-9, "lr", "c", "temperature")
    common.require(cfg, 0, "s", "lora_rank", "clip_reward", "success_bonus")
    if not 0 <= cfg.gamma <= 1:
        raise UserError(f"--gamma {cfg.gamma}: must be between 0 and 1")
    ranks = common.evenly(cfg, "batch", "num_envs")
    if cfg.learns == "blocks" and cfg.keep_optimizer:
        raise UserError("--keep-optimizer: the moments are of all weights, not of the blocks'; leave it out or add --learns all")
    if cfg.operator and ranks > 1:
        raise UserError("--operator: one operator looks after the stations of one process; leave torchrun out")
    env = common.make_env(domain, cfg.num_envs // ranks, obs=obs_mode)
    if cfg.operator and not hasattr(env, "ask"):
        raise UserError(f"--operator: {domain} cannot go on without a reset; practise on tabletop or bananatable")
    judge = Path(cfg.reward_run) if cfg.reward_run else stage1
    trained = common.read_json(judge / "config.json")
    if trained.get("domain") not in (settings["domain"], domain) or trained.get("obs") != obs_mode:
        raise UserError(f"--reward-run {judge}: not a Stage 1 run of --domain {domain} --obs {obs_mode}; name another")
    if cfg.domain:
        taught = common.make_env(settings["domain"], 1, obs=obs_mode)
        alike = ("state_names", "state_dim", "action_tokens", "steps_cap", "steps_bins", "simultaneous")
        if any(getattr(env, k) != getattr(taught, k) for k in alike):
            raise UserError(f"--domain {domain}: its actions or observations are not those of {settings['domain']}; leave it out")
    policy = common.load(stage1 / "policy.safetensors", env)
    reward_model = common.load(judge / "reward.safetensors", env, policy)
    reward_model.requires_grad_(False)
    if cfg.lora_rank and policy.lora_rank and cfg.lora_rank != policy.lora_rank:
        raise UserError(f"--lora-rank {cfg.lora_rank}: {stage1} has adapters of rank {policy.lora_rank}; leave it out")
    fresh = cfg.lora_rank > policy.lora_rank  # adapters on weights that Stage 1 has trained
    if fresh and cfg.keep_optimizer:
        raise UserError("--keep-optimizer: the moments are of Stage 1's weights, not of --lora-rank's; leave one of them out")
    cfg.lora_rank = cfg.lora_rank or policy.lora_rank
    run = common.open_run(cfg, env, "stage2")
    if run.done:
        return
    folder = run.folder

    ranges = action_tokenizer(**env.action_tokens).ranges
    if cfg.learns == "blocks":  # the others' gradient is hardly more than noise, and AdamW takes as long a step along noise
        for name, p in policy.named_parameters():
            p.requires_grad_(p.requires_grad and ".layers." in name)
    if fresh:
        torch.manual_seed(cfg.seed)
        policy = common.adapt(policy, cfg.lora_rank, stage1 / "policy.safetensors")
    if run.state:
        policy.load_state_dict(run.state["policy"], strict=not cfg.lora_rank)
    shard = settings.get("model") == "paligemma" and not cfg.lora_rank
    learnt = [name for name, p in policy.named_parameters() if p.requires_grad]
    if policy.cfg.image_size:  # frozen, as it is fed its features; AdamW skips it
        policy.vision_tower.requires_grad_(False)
    models.economise(policy, cfg.checkpointing, cfg.compile)
    models.economise(reward_model, False, cfg.compile)
    wrapped = common.distribute(policy, shard)
    if shard:
        common.distribute(reward_model, shard)
    optimizer = torch.optim.AdamW([policy.get_parameter(name) for name in learnt], lr=cfg.lr, weight_decay=0.0)
    if cfg.keep_optimizer:
        common.load_optimizer(optimizer, {"state": common.load_state(stage1 / "resume.pt")["optimizer"]["state"]})
    run.start()
    generator = torch.Generator().manual_seed(cfg.seed)
    operator = Operator(env, cfg.seed) if cfg.operator else None
    recent: deque[float] = deque(maxlen=5)
    first, env_steps, episodes, best, best_at = 0, 0, 0, float("inf"), recent.maxlen
    if run.state:
        common.load_optimizer(optimizer, run.state["optimizer"])
        generator.set_state(run.state["generator"].cpu())
        if operator:
            operator.load_state_dict(run.state["operator"])
        first, env_steps, episodes, best, best_at = (
            run.state[k] for k in ("iteration", "env_steps", "episodes", "best", "best_at")
        )
        recent.extend(run.state["recent"])
        run.state = None  # at 3B tens of gigabytes
    else:
        for name, m in (("policy", policy), ("reward", reward_model)):  # until practice finds a better policy
            common.save(m, folder / f"{name}.safetensors")

    silent = common.rank() > 0 or None
    bar = tqdm(range(first, cfg.iterations), initial=first, total=cfg.iterations, desc="stage 2", disable=silent)
    for iteration in bar:  # [Alg. 1, line 1]
        if iteration - best_at > cfg.patience:
            tqdm.write(f"no better policy for {cfg.patience} iterations: a plateau")
            break
        rollouts, buffer, collected = [], [], 0
        if common.rank():  # the first rank's generator is in the checkpoint, the others' need not be
            generator.manual_seed(10**9 * (cfg.seed + 1) + 10**4 * iteration + common.rank())
        while min(common.gather(collected)) < cfg.updates * cfg.batch // ranks:  # [Alg. 1, line 2]
            seed = 10**9 * (cfg.seed + 1) + episodes + common.rank() * env.num_envs
            with common.gathered(policy, reward_model), common.autocast(cfg.bf16):
                r = rollout(policy, reward_model, env, seed, generator, cfg.success, cfg.s, begin=operator and operator.begin,
                            temperature=cfg.temperature)  # fmt: skip
            if operator:
                operator.steps += r["length"]
            reward = rewards(r["d"])
            if cfg.clip_reward:  # a leap of d is its error more often than the policy's merit
                reward = reward.clamp(-cfg.clip_reward, cfg.clip_reward)
            reward[range(env.num_envs), r["length"] - 1] += cfg.success_bonus * r["truth"][:, -1]  # where d cannot see it
            returns = monte_carlo_returns(reward, cfg.gamma)  # [Alg. 1, line 4]
            buffer.append((r["obs"], r["tokens"], r["goals"], returns[r["row"], r["t"]].to(device)))  # [Alg. 1, line 5]
            rollouts.append(r)
            collected, episodes = collected + len(r["tokens"]), episodes + cfg.num_envs
        obs, tokens, goals, returns = zip(*buffer, strict=True)
        obs = {k: torch.cat([o[k] for o in obs]) for k in obs[0]}
        tokens, goals, returns = torch.cat(tokens), np.concatenate(goals), torch.cat(returns)
        shuffled = torch.randperm(collected, generator=generator)
        for i in shuffled[: cfg.updates * cfg.batch // ranks].split(cfg.batch // ranks):  # drops leftovers  [Alg. 1, line 8]
            prompts = [QUESTION_ACTION.format(g) for g in goals[i.numpy()]]
            i = i.to(device)
            with common.autocast(cfg.bf16):
                log_prob = wrapped(EFM.log_prob, {k: v[i] for k, v in obs.items()}, prompts, tokens[i], ranges, cfg.temperature)
            loss = reinforce_loss(log_prob, returns[i], cfg.c)  # [Alg. 1, line 7]
            optimizer.zero_grad()
            loss.backward()
            grad_norm = common.whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0))
            optimizer.step()

        length, detected = (np.concatenate([r[k] for r in rollouts]) for k in ("length", "detected"))
        truth = np.concatenate([r["truth"][:, -1].numpy() for r in rollouts])
        entropy = torch.cat([r["entropy"] for r in rollouts])
        length, detected, truth, entropy, returns = common.join(length, detected, truth, entropy.cpu(), returns.cpu())
        env_steps += len(returns)
        recent.append(float(length.mean()))  # all that the model itself can see: how soon it believes to be there
        row = {"iteration": iteration + 1, "env_steps": env_steps, "episodes": episodes, "success": float(truth.mean()),
               "detected": float(detected.mean()), "false_positives": float((detected & ~truth).mean()),
               "mean_steps": float(length.mean()), "return_mean": returns.mean().item(),
               "return_std": returns.std().item(), "return_negative": (returns < 0).float().mean().item(),
               "entropy": entropy.mean().item(), "grad_norm": grad_norm.item(), "seconds": run.seconds()}  # fmt: skip
        if operator:
            hours = env_steps / env.metadata["render_fps"] / 3600
            row |= {"interventions": operator.interventions, "robot_hours": hours}
        run.log(iteration + 1, row)
        if iteration % 10 == 9:
            tqdm.write("  ".join(f"{k} {v:.4g}" for k, v in row.items()))
        score = float(np.mean(recent))
        if len(recent) == recent.maxlen and score < 0.99 * best:  # best so far; saved with the updates since
            best, best_at = score, iteration
            common.save(policy, folder / "policy.safetensors")
        run.checkpoint(policy=models.trained(policy), optimizer=optimizer.state_dict(), generator=generator.get_state(),
                       iteration=iteration + 1, env_steps=env_steps, episodes=episodes, best=best, best_at=best_at,
                       recent=list(recent), operator=operator and operator.state_dict())  # fmt: skip

    if common.rank():
        return
    import eval as evaluation  # it imports the stages

    summary = {"stage": "stage2", "domain": domain, "obs": obs_mode, "seed": cfg.seed, "stage1": cfg.stage1,
               "episodes": episodes, "env_steps": env_steps}  # fmt: skip
    summary |= evaluation.evaluate(folder, episodes=cfg.eval_episodes, seed=cfg.seed, s=cfg.s)
    print(evaluation.describe(run.finish(summary)))


if __name__ == "__main__":
    common.cli(Config, main, ranks=True)
