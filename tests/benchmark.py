"""Speeds, side by side in one run. Not a test: nothing here depends on them.

    python -m tests.benchmark            # the domains
    python -m tests.benchmark training   # a step of the nano model and transformers' PaliGemma, two minutes
    python -m tests.benchmark slice      # for four layers of the 3B model: 12 GB of memory, eight minutes
    python -m tests.benchmark rollout    # Stage 2's loop with and without features and keys kept, minutes
    python -m tests.benchmark cores      # an update of Stage 1 with one thread and with two, five minutes
    python -m tests.benchmark commands   # the README's two commands, alone and beside a busy process, seven minutes

The last two are read off the clock on the wall, and want two cores that nothing else uses. In the others
what is compared runs in turns on one thread, and its clock is that thread's CPU time (medians), so that other
processes on the machine weigh on both sides, and little. A line ends in the ratio by the clock on the wall.
The slice keeps what memory it has freed (`keep_memory`), for both sides: else the kernel's handing it out
anew takes half of the CPU time.
"""

import contextlib
import ctypes
import io
import itertools
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import envs
import rollout as rollouts
import stage1
from common.average import Average
from common.demos import record
from common.runs import read_json
from common.weights import without_wrappers
from envs.pointmass import draw
from model import EFM, PRESETS, EFMConfig
from tests.conftest import declare_torchvision_ops
from tokens import QUESTION_ACTION, Tokenizer


def rate(function, amount: int, seconds: float = 2.0) -> float:
    """`amount` things a call, per second, over about `seconds`."""
    function()
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        function()
        calls += 1
    return calls * amount / (time.perf_counter() - start)


def aloha(seconds: float = 10.0) -> None:
    """Decisions of 0.5 s, 16 at once, while the expert moves peg and socket; its time is not counted."""
    for obs in ("state", "images"):
        env, taken, decisions = envs.make_vec("aloha", 16, obs=obs), 0.0, 0
        while taken < seconds:
            if decisions % (16 * 14) == 0:
                env.reset(seed=decisions)
            action = env.expert()
            start = time.perf_counter()
            env.step(action)
            taken, decisions = taken + time.perf_counter() - start, decisions + 16
        print(f"aloha decisions, obs={obs}, 16 at once: {decisions / taken:,.0f} /s")


def keep_memory() -> None:
    """glibc's malloc takes no tensor from the kernel and gives none back: MALLOC_MMAP_MAX_=0, no trimming."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-4, 0), libc.mallopt(-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD


# --- a training step against transformers' ----------------------------------------------------------------
def clocks() -> tuple[float, float, float]:
    return time.process_time(), time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_utime


def take_turns(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, ...]]:
    """Median seconds (CPU, wall, CPU without the kernel's part), called A, B, A, B, ...; not of the first."""
    taken: dict[str, list] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = clocks()
            function()
            taken[name].append([b - a for a, b in zip(start, clocks(), strict=True)])
    return {name: tuple(statistics.median(x) for x in zip(*times[1:], strict=True)) for name, times in taken.items()}


def paligemma(cfg: EFMConfig, tokenizer: Tokenizer) -> tuple[EFM, nn.Module]:
    """Ours and transformers' with the *same* parameters: one copy in memory, one gradient, one optimiser."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": cfg.vit_width,
        "intermediate_size": cfg.vit_mlp_dim,
        "num_hidden_layers": cfg.vit_depth,
        "num_attention_heads": cfg.vit_heads,
        "image_size": cfg.image_size,
        "patch_size": cfg.patch_size,
        "vision_use_head": False,
    }
    text = {
        "model_type": "gemma",
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp_dim,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "vocab_size": cfg.vocab_size,
    }
    theirs = PaliGemmaForConditionalGeneration(PaliGemmaConfig(
        vision_config=vision, text_config=text, projection_dim=cfg.width, hidden_size=cfg.width,
        image_token_index=cfg.vocab_size)).train()  # fmt: skip
    with torch.device("meta"):
        ours = EFM(cfg, tokenizer)
    for key, p in theirs.named_parameters():
        owner, _, leaf = without_wrappers(key).rpartition(".")
        setattr(ours.get_submodule(owner), leaf, p)
    assert not any(p.is_meta for p in ours.parameters())
    return ours, theirs


def descend(p: nn.Parameter) -> None:
    p.data.add_(p.grad, alpha=-1e-9)
    p.grad = None


def training(cfg: EFMConfig, B: int, rounds: int) -> None:
    """Samples per second of one optimiser step on two frames and two action tokens of all words."""
    env = envs.make_vec("pointmass", 1)
    tokenizer = Tokenizer.train(env.instructions())
    cfg = replace(cfg, vocab_size=cfg.vocab_size or tokenizer.tokenizer.get_vocab_size())
    torch.manual_seed(0)
    ours, theirs = paligemma(cfg, tokenizer)
    prompts = [QUESTION_ACTION.format(g) for g in itertools.islice(itertools.cycle(env.instructions()), B)]
    images = torch.randint(0, 256, (B, 2, cfg.image_size, cfg.image_size, 3), dtype=torch.uint8)
    answer = torch.randint(0, 21, (B, 2)) + tokenizer.loc
    ids, valid = tokenizer.prompts(prompts)
    pictures = valid.new_ones(B, 2 * (cfg.image_size // cfg.patch_size) ** 2)
    suffix = valid.new_ones(B, 2)
    batch = {
        "input_ids": torch.cat([pictures * cfg.vocab_size, ids, answer], 1),
        "attention_mask": torch.cat([pictures, valid, suffix], 1).long(),
        "token_type_ids": torch.cat([0 * pictures, 0 * ids, suffix], 1),
        "pixel_values": images.flatten(0, 1).permute(0, 3, 1, 2) / 127.5 - 1,
        "use_cache": False,
    }

    def loss() -> Tensor:
        logits = ours.logits(ours.hidden({"images": images}, prompts, answer), None)  # (B, 2, vocabulary)
        return F.cross_entropy(logits.flatten(0, 1), answer.flatten())

    def their_loss() -> Tensor:
        return theirs(**batch, labels=batch["input_ids"].where(batch["token_type_ids"] == 1, -100)).loss

    def suffix_loss() -> Tensor:  # by hand: with `labels`, it computes the logits of the images, too
        return F.cross_entropy(theirs(**batch, logits_to_keep=3).logits[:, :-1].flatten(0, 1), answer.flatten())

    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-9, fused=True) if cfg.width < 2048 else None
    if optimizer is None:  # no room for moments or all gradients at once: descent as soon as there is one
        for p in ours.parameters():
            p.register_post_accumulate_grad_hook(descend)
    seen: dict[str, float] = {}

    def step(name: str, loss: Callable[[], Tensor]) -> None:
        value = loss()
        value.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        seen[name] = value.item()

    with FlopCounterMode(display=False) as flops:
        step("ours", loss)
    side, how = (2048, "2,048 x 2,048")
    a = torch.randn(side, side)
    names = {"ours": loss, "transformers": their_loss, "transformers, logits of the suffix only": suffix_loss}
    taken = take_turns({name: lambda name=name: step(name, names[name]) for name in names} | {how: lambda: a @ a}, rounds)
    assert max(seen.values()) - min(seen.values()) < 1e-4 * seen["ours"], seen
    cpu, wall, user = taken["ours"]
    peak = 2 * side**3 / taken[how][0]
    rate = flops.get_total_flops() / cpu  # the CPU's fused attention is not counted
    size = sum(p.numel() for p in ours.parameters()) / 1e6
    print(f"training step, {size:,.1f}M parameters, batch {B}, loss {seen['ours']:.5f}: {B / cpu:,.3g} /s")
    bare = rate * cpu / user / peak
    print(f"    {rate / 1e9:,.1f} GFLOP/s, {rate / peak:.0%} of the {peak / 1e9:,.0f} of {how} products")
    print(f"    {bare:.0%} without the time in the kernel, which fresh memory costs")
    for name in list(names)[1:]:
        theirs_cpu, theirs_wall, _ = taken[name]
        ratio, on_the_wall = theirs_cpu / cpu, theirs_wall / wall
        print(f"    {name}: {B / theirs_cpu:,.3g} samples/s, ours {ratio:.2f} times (wall {on_the_wall:.2f})")


# --- Stage 2's rollout ------------------------------------------------------------------------------------
class Uncached(EFM):
    """`sample` by the book: for each token the whole sequence again."""

    @torch.no_grad()
    def sample(self, obs, prompts, ranges, generator=None, greedy=False, temperature=1.0):
        tokens, entropies = torch.zeros(len(prompts), 0, dtype=torch.long), []
        for i, (first, _) in enumerate(ranges):
            answer = torch.cat([tokens, torch.full((len(prompts), 1), first)], 1)
            log_p = (self.log_probs(obs, prompts, answer, ranges[: i + 1])[-1] / temperature).log_softmax(-1)
            entropies.append(-(log_p.exp() * log_p).sum(-1))
            u = torch.rand(len(prompts), 1, generator=generator)
            token = (log_p.exp().cumsum(-1) < u).sum(-1, keepdim=True).clamp(max=log_p.shape[-1] - 1)
            tokens = torch.cat([tokens, token + first], 1)
        return tokens, torch.stack(entropies, 1)


encode = rollouts.encode_observation


def encode_nothing(model: EFM, obs: dict, rows: np.ndarray, before: dict | None = None) -> dict[str, Tensor]:
    """`encode_observation` without features: each model's ViT sees both frames whenever it is asked."""
    if "state" in obs:
        return encode(model, obs, rows)
    return {key: torch.from_numpy(obs[key][rows]) for key in ("images", "joints") if key in obs}


def rollout(domain: str, obs: str, steps: int, rounds: int, n: int = 16) -> None:
    """Stage 2's loop (policy, environment, d) on new models, which are equal, of `steps` steps."""
    env = envs.make_vec(domain, n, obs=obs)
    env.horizon = steps
    sizes = {"image_size": env.size} if obs == "images" else {"state_names": env.state_names, "state_dim": env.state_dim}
    cfg = replace(PRESETS[env.stage1_defaults[obs]["model"]], **sizes)
    torch.manual_seed(0)
    model = EFM(cfg, Tokenizer.train([*env.instructions(), *env.state_names]))
    slow, tokens = Uncached(cfg, model.tokenizer), {}
    slow.load_state_dict(model.state_dict())

    def never(d: Tensor, truth: Tensor) -> Tensor:
        return torch.zeros_like(truth)

    def run(name: str, model: EFM, encode: Callable = encode) -> None:
        with mock.patch.object(rollouts, "encode_observation", encode):
            episodes = rollouts.rollout(model, model, env, 0, torch.Generator().manual_seed(0), never)
        tokens[name] = episodes.tokens

    taken = take_turns({"kept": lambda: run("kept", model), "again": lambda: run("again", slow, encode_nothing)}, rounds)
    assert torch.equal(tokens["kept"], tokens["again"])
    (cpu, wall, _), (again, again_wall, _), acted = taken["kept"], taken["again"], len(tokens["kept"])
    L = tokens["kept"].shape[1]
    print(f"rollout, {domain}, obs={obs}, {L} tokens an action, {n} at once: {acted / cpu:,.0f} steps/s")
    ratio, on_the_wall = again / cpu, again_wall / wall
    print(f"    nothing kept: {acted / again:,.0f} steps/s, ours {ratio:.2f} times (wall {on_the_wall:.2f})")


class Enough(Exception):
    """Raised to end a training that has been timed."""


def update_seconds(domain: str, obs: str, threads: int, updates: int) -> float:
    """Of an update of Stage 1: the mean of `updates`, after five more."""
    ends, update = [], Average.update

    def timed(average: Average) -> None:
        update(average)
        ends.append(time.perf_counter())
        if len(ends) == updates + 6:
            raise Enough

    cfg = stage1.Config(domain=domain, obs=obs, threads=threads, episodes=60, init="none", out=f"{obs}-{threads}-{time.time()}")
    with mock.patch.object(Average, "update", timed), contextlib.suppress(Enough):
        stage1.main(cfg)
    return (ends[-1] - ends[5]) / updates


def cores(rounds: int = 3) -> None:
    for domain, obs, updates in (("pointmass", "state", 100), ("pointmass", "images", 40), ("tabletop", "state", 25)):
        took = {1: [], 2: []}
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            for _ in range(rounds):
                for threads, seconds in took.items():
                    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                        seconds.append(update_seconds(domain, obs, threads, updates))
        one, two = (1000 * statistics.median(seconds) for seconds in took.values())
        print(f"stage 1, {domain}, obs={obs}: {one:.0f} ms an update with one thread, {two:.0f} with two: {one / two:.2f} times")


def commands() -> None:
    root = Path(__file__).resolve().parents[1]
    for load in ("alone", "beside a busy process"):
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if load != "alone" else None
        took = []
        with tempfile.TemporaryDirectory() as folder:
            try:
                for script in ("stage1.py", "stage2.py"):
                    start = time.perf_counter()
                    subprocess.run([sys.executable, root / script], cwd=folder, check=True, capture_output=True)
                    took.append(time.perf_counter() - start)
            finally:
                if busy:
                    busy.kill()
            (summary,) = Path(folder).glob("runs/*stage2*/summary.json")
            told = read_json(summary)
        print(f"stage1.py and stage2.py {load}: {took[0]:.0f} s + {took[1]:.0f} s = {sum(took):.0f} s; "
              f"success {told['success']}, {told['mean_steps']:.1f} steps")  # fmt: skip


def domains() -> None:
    rng, n = np.random.default_rng(0), 256
    pos, goals = rng.uniform(-1, 1, (n, 2)), rng.uniform(-0.9, 0.9, (n, 3, 2))
    print(f"pointmass frames, 32 x 32, batches of {n}: {rate(lambda: draw(pos, pos, goals, 32), n):,.0f} /s")
    for obs in ("state", "images"):
        env = envs.make_vec("pointmass", n, obs=obs)
        env.reset(seed=0)
        action = env.action_space.sample()
        steps = rate(lambda env=env, a=action: env.step(a), n)
        print(f"pointmass steps, obs={obs}, {n} at once: {steps:,.0f} /s")
    n = 64
    for obs in ("state", "images"):  # images: two views of 64 x 64, of a picture of 128 x 128
        batch = envs.make_vec("tabletop", n, obs=obs)
        batch.reset(seed=0)
        singles = [gym.make(envs.DOMAINS["tabletop"], obs=obs).unwrapped for _ in range(n)]
        for i, env in enumerate(singles):
            env.reset(seed=i)
        # pushes there and back, so that blocks are touched but stay on the table
        actions = itertools.cycle(s * rng.uniform(-0.03, 0.03, (n, 2)).astype(np.float32) for s in (1, -1) for _ in range(50))
        together = rate(lambda batch=batch, a=actions: batch.step(next(a)), n)
        loop = rate(
            lambda singles=singles, a=actions: [env.step(x) for env, x in zip(singles, next(a), strict=True)],
            n,
        )
        print(f"tabletop control steps, obs={obs}, 4 blocks, {n} at once: {together:,.0f} /s; "
              f"{n} single environments in a loop: {loop:,.0f} /s; {together / loop:.1f} times")  # fmt: skip
    start = time.perf_counter()
    record("tabletop", "images", 512, seed=0)
    minutes = (time.perf_counter() - start) / 60
    print(f"tabletop demonstrations with frames: {512 / minutes:,.0f} episodes a minute")
    aloha()


def main(what: str = "domains") -> None:
    alone = {"domains": domains, "cores": cores, "commands": commands}
    if what in alone:
        alone[what]()
        return
    torch.set_num_threads(1)
    if what == "rollout":
        rollout("pointmass", "images", steps=20, rounds=9)
        rollout("tabletop", "images", steps=10, rounds=5)
        rollout("aloha", "state", steps=4, rounds=5)
        rollout("aloha", "images", steps=2, rounds=3)
        return
    kept = declare_torchvision_ops()  # noqa: F841 - alive until transformers has been imported
    if what == "training":
        training(replace(PRESETS["nano-vision"], image_size=32), B=128, rounds=40)
    else:
        keep_memory()
        training(replace(PRESETS["paligemma-3b"], depth=4, vit_depth=4), B=1, rounds=4)


if __name__ == "__main__":
    main(*sys.argv[1:])
