"""results/cost.py counts what small runs measure, to 10 %: parameters, FLOPs, activations, weights, moments."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.weights import add_lora, load_model, save_base, save_model, trainable_state
from model import EFM, EFMConfig
from rollout import encode_observation
from tokens import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "results"))
import cost as costs  # noqa: E402
from cost import ALLOWED, ANSWER, PROMPT, ROWS, cost  # noqa: E402

WORDS = Tokenizer.train([" ".join(f"w{i}" for i in range(PROMPT))])
TEXT = " ".join(f"w{i}" for i in range(PROMPT - 2))  # <bos> and the newline make it PROMPT tokens
RANGES = [(0, ALLOWED)] * ANSWER
# the nano model of the table, the small one two blocks deep, and the 3B model's proportions at a hundredth of its size
SMALL = {
    "nano": ROWS["nano"][0],
    "small": replace(ROWS["small"][0], depth=2, vit_depth=2),
    "3B": EFMConfig(width=256, depth=3, heads=4, kv_heads=1, head_dim=64, mlp_dim=2048, vocab_size=1100, image_size=56,
                    patch_size=14, vit_width=144, vit_depth=3, vit_heads=2, vit_mlp_dim=538),
}  # fmt: skip


def build(cfg: EFMConfig, rank: int = 0, base: Path = Path()) -> EFM:
    torch.manual_seed(0)
    model = EFM(cfg, WORDS)
    if rank:
        add_lora(model, rank, base)
    return model


def sample(cfg: EFMConfig) -> tuple[dict[str, Tensor], list[str], Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1, 2, cfg.image_size, cfg.image_size, 3), dtype=torch.uint8, generator=generator)
    return {"images": images}, [TEXT], torch.randint(0, ALLOWED, (1, ANSWER), generator=generator)


def train(model: EFM, obs: dict[str, Tensor], prompts: list[str], answer: Tensor, L: int = ANSWER) -> None:
    model.log_prob(obs, prompts, answer[:, :L], RANGES[:L]).sum().backward()


def flops(run, *arguments) -> float:
    # the CPU's fused attention is not among what the counter counts; plain products are
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(*arguments)
    return counter.get_total_flops()


def test_the_prompt_is_as_long_as_the_table_says():
    assert WORDS.prompts([TEXT])[0].shape == (1, PROMPT)


@pytest.mark.parametrize("row", ROWS)
def test_parameters(torchvision_ops, row):
    """Exactly: every preset, and adapters on each matrix of a block."""
    cfg, rank, _ = ROWS[row]
    with torch.device("meta"):
        model = build(cfg, rank)
    for stage in (1, 2):
        c = cost(cfg, rank, stage)
        assert c.parameters == sum(p.numel() for p in model.parameters())
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad and (stage == 1 or not n.startswith("vision"))}
        assert c.trained == sum(p.numel() for p in trained.values())


@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("name", SMALL)
def test_flops(torchvision_ops, name, rank):
    cfg = SMALL[name]
    model = build(cfg, rank)
    obs, prompts, answer = sample(cfg)
    measured = (flops(train, model, obs, prompts, answer) + flops(train, model, obs, prompts, answer, 1)) / 2
    assert cost(cfg, rank, 1).flops == pytest.approx(measured, rel=0.1)

    def practice() -> None:
        """A step as stage2.rollout takes it, and its tuple's share of the updates."""
        with torch.no_grad():
            before = {"features": model.encode_images(obs["images"])}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            seen = [encode_observation(m, {"images": obs["images"].numpy()}, [0], before) for m in (model, model)]
            model.sample(seen[0], prompts, RANGES)
            model.log_probs(seen[1], prompts, answer[:, :1], RANGES[:1])
        practice.flops = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            train(model, seen[0], prompts, answer)
        practice.flops += counter.get_total_flops()

    with sdpa_kernel(SDPBackend.MATH):
        practice()
    assert cost(cfg, rank, 2).flops == pytest.approx(practice.flops, rel=0.1)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", SMALL)
def test_activations(name, stage):
    """Every storage that autograd keeps, once, but the weights and what is of their size: rows of the embeddings."""
    cfg, kept = SMALL[name], {}
    model = build(cfg)
    obs, prompts, answer = sample(cfg)
    if stage == 2:
        with torch.no_grad():
            obs = {"features": model.encode_images(obs["images"])}
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    answer = answer.repeat(2, 1)
    sizes = []
    for B in (1, 2):  # the second sample's share: what all share does not count
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model.log_prob({k: v.repeat(B, *[1] * (v.ndim - 1)) for k, v in obs.items()}, prompts * B, answer[:B], RANGES)
        sizes.append(sum(n for pointer, n in kept.items() if pointer not in ours))
        del loss
    assert cost(cfg, 0, stage).activations == pytest.approx(sizes[1] - sizes[0], rel=0.1)


@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("name", SMALL)
def test_states(torchvision_ops, name, rank, tmp_path):
    """Bytes of weights, gradients and moments after a step of each stage, with the reward model's; each once."""
    cfg = SMALL[name]
    obs, prompts, answer = sample(cfg)
    for stage in (1, 2):
        model = build(cfg, rank, tmp_path / "base.safetensors")
        if rank:
            save_base(model, model.base)
        save_model(model, tmp_path / "reward.safetensors", trainable_state(model))
        seen = obs
        if stage == 2:  # as stage2.main: frozen, fed its features
            model.vision_tower.requires_grad_(False)
            seen = {"features": model.encode_images(obs["images"]).detach()}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        train(model, seen, prompts, answer)
        optimizer.step()
        held = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
        held += [x for state in optimizer.state.values() for x in state.values()]
        if stage == 2:
            held += load_model(tmp_path / "reward.safetensors", model).parameters()
        memory = {x.data_ptr(): x.nbytes for x in held}  # what two models share is there once
        assert cost(cfg, rank, stage).states == pytest.approx(sum(memory.values()), rel=0.1)


def test_memory_falls_with_the_devices_where_they_share():
    for cfg, rank, shard in ROWS.values():
        c = cost(cfg, rank, 1)
        assert c.memory(1, shard) == c.states + c.activations
        assert c.memory(8, shard) - c.memory(64, shard) == pytest.approx(c.states * (1 / 8 - 1 / 64) if shard else 0)


def test_the_table_is_what_the_pages_show():
    assert costs.table() in (ROOT / "docs" / "scale.md").read_text()
