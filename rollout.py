"""Rollouts: a policy acts in many simulations at once, and the frozen reward model watches.

No rule for success is here: `ends(d, truth)` is handed in, and says which episodes are over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from envs.symmetries import Symmetries
from model import EFM
from tokens import QUESTION_ACTION, SignMagnitude, StepsToGo, UniformBins, action_tokenizer


@dataclass
class Episodes:
    """One episode of each of n simulations: M tuples (o, a, g) in all, and what was seen of each simulation.

    d and truth are frozen at an episode's end, so their last column is the end of every episode.
    """

    obs: dict[str, Tensor]  # (M, ...), as the policy takes them: images as features
    tokens: Tensor  # long (M, L), the action
    goals: np.ndarray  # text (M,)
    entropy: Tensor  # float (M,), of the whole action, in nats
    row: Tensor  # long (M,), the simulation
    t: Tensor  # long (M,), the time
    last: dict[str, Tensor]  # (n, ...), each simulation's final observation
    d: Tensor  # float (n, T + 1), of every observation; infinite without a reward model
    truth: Tensor  # bool (n, T + 1), true success of every observation
    length: np.ndarray  # int (n,), steps


def encode_observation(
    model: EFM, obs: dict[str, np.ndarray], rows: np.ndarray, before: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The model's input for the simulations `rows` of a domain's observation, images encoded.

    before: the input of the last step, whose current frame is now the previous one, so its features are used
    again. None: both images are encoded, at the first step and of two views of one moment.
    """
    device = model.language_model.embed_tokens.weight.device
    if "state" in obs:
        state = torch.from_numpy(obs["state"][rows]).to(device)
        return {"state": state.unflatten(1, (-1, model.cfg.state_dim))}  # (B, S, d)
    encoded = {}
    if "joints" in obs:
        encoded["joints"] = torch.from_numpy(obs["joints"][rows]).to(device)
    frames = torch.from_numpy(obs["images"][rows]).to(device)  # (B, 2, H, W, 3)
    if before is None:
        encoded["features"] = model.encode_images(frames)  # (B, 2, N, Dv)
    else:
        encoded["features"] = torch.cat([before["features"][:, 1:], model.encode_images(frames[:, 1:])], 1)
    return encoded


@torch.no_grad()
def rollout(
    policy: EFM,
    reward_model: EFM | None,
    env: VectorEnv,
    seed: int,
    generator: torch.Generator,
    ends: Callable[[Tensor, Tensor], Tensor],
    temperature: float = 1.0,
    greedy: bool = False,
    keep: bool = True,
    watch: Callable[[], None] = lambda: None,
) -> Episodes:
    """One episode in each of the n simulations, until `ends` or the horizon.

    ends: (d float (B,), truth bool (B,)) of the present observations -> bool (B,): which episodes are over.
    keep: whether to keep the observations, which an evaluation does not need.
    watch: called after the reset and after each step.
    """
    actions = action_tokenizer(**env.action_tokens)
    steps = StepsToGo(env.steps_cap, env.steps_bins)

    def judge(encoded: dict[str, Tensor], goals: np.ndarray) -> Tensor:
        if reward_model is None:
            return torch.full((len(goals),), math.inf)
        return reward_model.steps_to_go(encoded, goals.tolist(), steps).cpu()

    n, alive = env.num_envs, np.arange(env.num_envs)  # alive: the simulations whose episode goes on
    obs, info = env.reset(seed=seed)
    goals = np.array(obs["instruction"], dtype=object)
    policy_input = encode_observation(policy, obs, alive)
    reward_input = encode_observation(reward_model, obs, alive) if reward_model else {}
    d = [judge(reward_input, goals)]
    truth = [torch.from_numpy(info["is_success"].copy())]
    length, tuples, ended = np.zeros(n, int), [], []
    watch()
    for t in range(env.horizon):
        prompts = [QUESTION_ACTION.format(g) for g in goals[alive]]
        tokens, entropy = policy.sample(policy_input, prompts, actions.ranges, generator, greedy, temperature)
        time = torch.full((len(alive),), t)
        kept = policy_input if keep else {}
        tuples.append((kept, tokens, goals[alive], entropy.sum(1), torch.from_numpy(alive), time))
        action = np.zeros(env.action_space.shape, np.float32)
        action[alive] = actions.decode(tokens.cpu()).numpy()
        obs, _, _, _, info = env.step(action)
        watch()
        if env.simultaneous:
            policy_input = reward_input = None  # no frame comes again
        policy_input = encode_observation(policy, obs, alive, policy_input)
        reward_input = encode_observation(reward_model, obs, alive, reward_input) if reward_model else {}
        d_now = judge(reward_input, goals[alive])
        truth_now = torch.from_numpy(info["is_success"][alive])
        d.append(d[-1].clone())
        truth.append(truth[-1].clone())
        d[-1][alive] = d_now
        truth[-1][alive] = truth_now
        length[alive] = t + 1
        over = ends(d_now, truth_now) | (t + 1 == env.horizon)
        if keep:
            ended.append((torch.from_numpy(alive)[over], {k: v[over] for k, v in policy_input.items()}))
        alive = alive[~over.numpy()]
        if len(alive) == 0:
            break
        policy_input = {k: v[~over] for k, v in policy_input.items()}
        reward_input = {k: v[~over] for k, v in reward_input.items()}
    kept, tokens, texts, entropy, row, time = zip(*tuples, strict=True)
    obs = {k: torch.cat([o[k] for o in kept]) for k in kept[0]}
    last = {}
    if keep:
        order = torch.cat([rows for rows, _ in ended]).argsort()
        last = {k: torch.cat([final[k] for _, final in ended])[order] for k in obs}
    tokens, texts, entropy = torch.cat(tokens), np.concatenate(texts), torch.cat(entropy)
    row, time, d, truth = torch.cat(row), torch.cat(time), torch.stack(d, 1), torch.stack(truth, 1)
    return Episodes(obs, tokens, texts, entropy, row, time, last, d, truth, length)


class Buffer:
    """The tuples (o, a, g, R) of one iteration; batches transform each by one of the symmetries, if any."""

    def __init__(self, symmetries: Symmetries | None, actions: UniformBins | SignMagnitude):
        self.symmetries, self.actions = symmetries, actions
        self.placed: list[tuple] = []

    def place(self, episodes: Episodes, returns: Tensor) -> None:
        """Put every tuple of the episodes in, with its return; returns float (n, T)."""
        of_tuples = returns[episodes.row, episodes.t].to(episodes.tokens.device)  # (M,)
        self.placed.append((episodes.obs, episodes.tokens, episodes.goals, of_tuples))

    def __len__(self) -> int:
        return sum(len(tokens) for _, tokens, _, _ in self.placed)

    def returns(self) -> Tensor:
        return torch.cat([returns for _, _, _, returns in self.placed])

    def batches(self, n: int, size: int, generator: torch.Generator) -> Iterator[tuple]:
        """(obs, prompts, tokens, returns) of n tuples, `size` at a time, none twice; the rest is dropped."""
        obs, tokens, goals, returns = zip(*self.placed, strict=True)
        obs = {k: torch.cat([o[k] for o in obs]) for k in obs[0]}
        tokens, goals, returns = torch.cat(tokens), np.concatenate(goals), torch.cat(returns)
        for i in torch.randperm(len(self), generator=generator)[:n].split(size):
            texts = goals[i.numpy()].tolist()
            i = i.to(tokens.device)
            batch = ({k: v[i] for k, v in obs.items()}, tokens[i], texts)
            if self.symmetries:
                batch = self.symmetries.of_tokens(*batch, self.actions, generator)
            chosen, answer, texts = batch
            yield chosen, [QUESTION_ACTION.format(g) for g in texts], answer, returns[i]
