"""The model against the reference libraries, its mask and cache against their definitions."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model as models
from common.weights import load_model, save_model
from model import EFM, EFMConfig
from tokens import N_LOC, QUESTION_ACTION, QUESTION_STEPS, SignMagnitude, StepsToGo, Tokenizer, UniformBins

INSTRUCTIONS = [
    "move to the red goal",
    "go to the blue spot",
    "push the small red block slowly to the left of the green one",
]
TINY = EFMConfig(
    width=24,
    depth=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_dim=40,
    image_size=16,
    patch_size=8,
    vit_width=16,
    vit_depth=2,
    vit_heads=2,
    vit_mlp_dim=24,
    state_names=("red", "the goal"),
    state_dim=2,
)


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Norms' weights and biases, too, away from the 0 and 1 that would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.15 * torch.randn(p.shape, generator=generator)


def tiny(seed: int = 0, **sizes) -> EFM:
    torch.manual_seed(seed)
    model = EFM(dataclasses.replace(TINY, **sizes), Tokenizer.train([*INSTRUCTIONS, *TINY.state_names]))
    randomise(model, seed)
    return model.requires_grad_(False)


def observe(B: int, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (B, 2, 16, 16, 3), generator=g, dtype=torch.uint8)
    return {"images": images, "state": torch.randn(B, 2, 2, generator=g)}


def questions(B: int) -> list[str]:
    """Prompts of different lengths, so that some are padded."""
    return [(QUESTION_ACTION, QUESTION_STEPS)[i % 2].format(INSTRUCTIONS[i % len(INSTRUCTIONS)]) for i in range(B)]


# --- the reference libraries ------------------------------------------------------------------------------------------
VIT = dataclasses.replace(TINY, image_size=32, vit_width=48, vit_depth=3, vit_heads=4, vit_mlp_dim=80)


def vit_and_images() -> tuple[models.ViT, Tensor]:
    torch.manual_seed(0)
    vit = models.ViT(VIT).requires_grad_(False)
    randomise(vit)
    return vit, torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)


def test_vit_equals_timm(torchvision_ops):
    from timm.models.vision_transformer import VisionTransformer

    vit, images = vit_and_images()
    reference = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, mlp_ratio=80 / 48, num_classes=0, global_pool="",
        class_token=False, act_layer=functools.partial(nn.GELU, approximate="tanh")).eval()  # fmt: skip
    ours, weights = vit.state_dict(), {}
    for key in ("weight", "bias"):
        weights[f"patch_embed.proj.{key}"] = ours[f"patch_embedding.{key}"]
        weights[f"norm.{key}"] = ours[f"post_layernorm.{key}"]
        for i in range(3):
            qkv = [ours[f"layers.{i}.{p}_proj.{key}"] for p in "qkv"]
            weights[f"blocks.{i}.attn.qkv.{key}"] = torch.cat(qkv)
            for theirs, name in {"attn.proj": "out_proj", "mlp.fc1": "fc1", "mlp.fc2": "fc2", "norm1": "layer_norm1",
                                 "norm2": "layer_norm2"}.items():  # fmt: skip
                weights[f"blocks.{i}.{theirs}.{key}"] = ours[f"layers.{i}.{name}.{key}"]
    weights["pos_embed"] = ours["position_embedding.weight"][None]
    reference.load_state_dict(weights)
    with torch.no_grad():
        expected = reference.forward_features(images.permute(0, 3, 1, 2) / 127.5 - 1)
    assert expected.shape == (3, 16, 48)
    torch.testing.assert_close(vit(images), expected, atol=1e-5, rtol=1e-5)


def test_vit_equals_siglip(torchvision_ops):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    vit, images = vit_and_images()
    reference = SiglipVisionModel(SiglipVisionConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8,
        attn_implementation="eager", vision_use_head=False)).eval()  # fmt: skip

    def rename(name: str) -> str:
        name = re.sub(r"^(patch|position)_embedding", r"embeddings.\1_embedding", name)
        name = re.sub(r"^layers\.(\d+)\.(.)_proj", r"encoder.layers.\1.self_attn.\2_proj", name)
        name = re.sub(r"^layers\.(\d+)\.out_proj", r"encoder.layers.\1.self_attn.out_proj", name)
        name = re.sub(r"^layers\.(\d+)\.fc", r"encoder.layers.\1.mlp.fc", name)
        return re.sub(r"^layers\.", "encoder.layers.", name)

    weights = {rename(k): v for k, v in vit.state_dict().items()}
    prefix = "vision_model." if any(k.startswith("vision_model.") for k in reference.state_dict()) else ""  # transformers < 5
    reference.load_state_dict({prefix + k: v for k, v in weights.items()})
    with torch.no_grad():
        expected = reference(pixel_values=images.permute(0, 3, 1, 2) / 127.5 - 1).last_hidden_state
    torch.testing.assert_close(vit(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_gemma_equals_transformers(torchvision_ops, kv_heads):
    from transformers import GemmaConfig, GemmaModel

    cfg = dataclasses.replace(TINY, width=32, depth=3, kv_heads=kv_heads, mlp_dim=56, vocab_size=50, rope_theta=500.0)
    torch.manual_seed(kv_heads)
    gemma = models.Gemma(cfg).requires_grad_(False)
    randomise(gemma)
    reference = GemmaModel(GemmaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=8, hidden_act="gelu_pytorch_tanh", rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, attn_implementation="eager")).eval()  # fmt: skip
    rename = functools.partial(re.sub, r"^(layers\.\d+)\.(?:(\w_proj)|((?:gate|up|down)_proj))",
                               lambda m: f"{m[1]}.self_attn.{m[2]}" if m[2] else f"{m[1]}.mlp.{m[3]}")  # fmt: skip
    reference.load_state_dict({rename(k): v for k, v in gemma.state_dict().items()})

    ids = torch.randint(0, 50, (2, 9))
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, :2] = False  # padded on the left
    mask = models.prefix_mask(valid, 3)  # (2, 1, 9, 9)
    positions = torch.cat([valid, valid.new_ones(2, 3)], 1).cumsum(1) - 1
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = reference(input_ids=ids, attention_mask=additive, position_ids=positions, use_cache=False).last_hidden_state
    hidden = gemma(gemma.embed(ids), positions, mask, keep=9)
    torch.testing.assert_close(hidden, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(gemma(gemma.embed(ids), positions, mask, keep=4), expected[:, -4:], atol=2e-5, rtol=1e-5)


# --- the mask and the padding -----------------------------------------------------------------------------------------
def test_prefix_mask_is_the_one_drawn_in_the_docstring():
    drawn = re.findall(r"^ +[PA] ([01](?: [01]){4})\b", models.__doc__, re.MULTILINE)
    drawn = torch.tensor([[int(x) for x in row.split()] for row in drawn], dtype=torch.bool)
    assert drawn.shape == (5, 5)
    mask = models.prefix_mask(torch.ones(2, 3, dtype=torch.bool), 2)
    assert torch.equal(mask, drawn.expand(2, 1, 5, 5))


def test_prefix_mask_hides_padding_from_everyone_but_itself():
    valid = torch.tensor([[False, False, True]])
    mask = models.prefix_mask(valid, 1)[0, 0]
    assert mask.int().tolist() == [[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_a_padded_prompt_gets_the_answer_of_the_unpadded_one():
    model, obs, prompts, ranges = tiny(), observe(3), questions(3), [(0, 5), (2, 9)]
    answer = torch.tensor([[1, 3], [4, 8], [0, 2]])
    ids, valid = model.tokenizer.prompts(prompts)
    assert not valid.all() and (ids[:, -1] == ids[0, -1]).all()  # some are padded, and on the left
    together = model.log_probs(obs, prompts, answer, ranges)
    for i, prompt in enumerate(prompts):
        alone = model.log_probs({k: v[i : i + 1] for k, v in obs.items()}, [prompt], answer[i : i + 1], ranges)
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a[0], b[i], atol=1e-5, rtol=1e-5)


def test_an_answer_token_does_not_influence_earlier_positions():
    model, obs, prompts, ranges = tiny(), observe(2), questions(2), [(0, 6)] * 4
    before = model.log_probs(obs, prompts, torch.tensor([[0, 1, 2, 3]] * 2), ranges)
    after = model.log_probs(obs, prompts, torch.tensor([[0, 5, 2, 3]] * 2), ranges)
    for i in (0, 1):
        torch.testing.assert_close(before[i], after[i], atol=1e-6, rtol=0)
    for i in (2, 3):
        assert (before[i] - after[i]).abs().max() > 1e-3


def test_each_part_of_the_question_matters():
    model, obs = tiny(), observe(1)
    ask = functools.partial(model.log_probs, answer=torch.zeros(1, 1, dtype=torch.long), ranges=[(0, 8)])
    base = ask(obs, [QUESTION_STEPS.format(INSTRUCTIONS[0])])[0]
    for other in (
        ask(obs, [QUESTION_ACTION.format(INSTRUCTIONS[0])]),
        ask(obs, [QUESTION_STEPS.format(INSTRUCTIONS[1])]),
        ask(obs | {"images": obs["images"].flip(1)}, [QUESTION_STEPS.format(INSTRUCTIONS[0])]),
        ask(obs | {"state": -obs["state"]}, [QUESTION_STEPS.format(INSTRUCTIONS[0])]),
    ):
        assert (base - other[0]).abs().max() > 1e-3


# --- sampling and probabilities ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_cached_sampling_equals_the_uncached_path(rng, kv_heads):
    model, obs, prompts, ranges = tiny(kv_heads=kv_heads), observe(6), questions(6), [(0, 7), (3, 9), (0, 5)]
    for greedy in (True, False):
        tokens, entropy = model.sample(obs, prompts, ranges, rng, greedy)
        log_probs = model.log_probs(obs, prompts, tokens, ranges)  # no cache here
        if greedy:
            assert torch.equal(
                tokens,
                torch.stack([lp.argmax(-1) + r[0] for lp, r in zip(log_probs, ranges, strict=True)], 1),
            )
        expected = torch.stack([torch.distributions.Categorical(logits=lp).entropy() for lp in log_probs], 1)
        torch.testing.assert_close(entropy, expected, atol=1e-5, rtol=1e-5)


def test_sinusoidal_numbers_lie_on_a_curve_and_change_no_word():
    tables = []
    for waves in (False, True):
        torch.manual_seed(0)
        model = EFM(
            dataclasses.replace(TINY, sinusoidal_numbers=waves),
            Tokenizer.train([*INSTRUCTIONS, *TINY.state_names]),
        )
        tables.append(model.language_model.embed_tokens.weight.detach())
    first = model.tokenizer.loc
    numbers = slice(first, first + N_LOC)
    assert torch.equal(tables[0][:first], tables[1][:first]) and torch.equal(tables[0][numbers.stop :], tables[1][numbers.stop :])
    plain, waves = (t[numbers] @ t[numbers].T for t in tables)  # dots of any two numbers
    torch.testing.assert_close(waves.diagonal(), torch.ones(N_LOC))
    # by hand: sines and cosines of wavelengths 4 ... 512 give the mean cosine of the distance, whatever the place
    lengths = torch.tensor([4 * 128 ** (k / 11) for k in range(12)])
    for distance in (1, 3, 40):
        expected = torch.cos(2 * torch.pi * distance / lengths).mean()
        torch.testing.assert_close(waves.diagonal(distance), expected.expand(N_LOC - distance), atol=1e-4, rtol=0)
    assert waves.diagonal(1).min() > 0.8 > 0.5 > plain.diagonal(1).mean()


def test_a_share_of_a_curve_keeps_numbers_apart():
    """Nine tenths: near numbers are alike, and yet no two are the same, as on a fine curve they nearly are."""
    torch.manual_seed(0)
    cfg = dataclasses.replace(models.PRESETS["nano"], state_names=("red",), state_dim=2)
    model = EFM(cfg, Tokenizer.train(["move to the red goal"]))
    first = model.tokenizer.loc
    numbers = model.language_model.embed_tokens.weight[first : first + N_LOC].detach()
    near, far = ((numbers[:-k] * numbers[k:]).sum(1).mean() for k in (1, 200))
    assert cfg.sinusoidal_numbers == 0.9 and 0.7 < near < 0.9 and far < 0.5


def test_state_sinusoids_by_hand():
    torch.manual_seed(0)
    names = ("red", "the goal")
    cfg = dataclasses.replace(TINY, state_names=names, state_dim=2, state_sinusoids=3)
    model = EFM(cfg, Tokenizer.train([*INSTRUCTIONS, *names]))
    state = torch.randn(5, 2, 2)
    without = model.embed_state(torch.zeros(5, 2, 2))
    seen = model.embed_state(state).detach()
    assert model.state_weight.shape == (2, 2 * (1 + 2 * 3), TINY.width)
    for k in range(2):
        by_hand = torch.zeros(5, TINY.width)
        for i in range(2):
            by_hand += state[:, k, i, None] * model.state_weight[k, i]
            for wave, length in enumerate((16, 8, 4)):
                angle = 2 * torch.pi * state[:, k, i, None] / length
                by_hand += angle.sin() * model.state_weight[k, 2 + 3 * i + wave]
                by_hand += (angle.cos() - 1) * model.state_weight[k, 8 + 3 * i + wave]
        torch.testing.assert_close(seen[:, k] - without[:, k].detach(), by_hand.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("L", [1, 2, 7])
def test_a_longer_answer_costs_no_more_gradients_of_the_whole_table(L):
    """Each use of the embeddings makes one of their size, 2 GB at 3B: the tokens' look-up and the scores, no more."""
    model, obs = tiny().requires_grad_(), {"images": observe(2)["images"]}
    loss = model.log_prob(obs, questions(2), torch.zeros(2, L, dtype=torch.long), ([(0, 6), (0, 9)] * 4)[:L]).sum()
    uses, seen, todo = 0, set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        for after, _ in node.next_functions:
            uses += getattr(after, "variable", None) is model.language_model.embed_tokens.weight
            if after is not None and after not in seen:
                seen.add(after)
                todo.append(after)
    assert uses == 2


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_answers_are_drawn_with_the_probability_that_log_prob_says(rng, temperature):
    model, ranges, n = tiny(depth=1), [(2, 5), (0, 4)], 20_000
    obs = {"state": observe(1)["state"]}
    prompt = questions(1)
    answers = torch.tensor(list(itertools.product(range(2, 5), range(4))))
    p = model.log_prob({"state": obs["state"].expand(12, 2, 2)}, prompt * 12, answers, ranges, temperature).exp()
    tokens, _ = model.sample({"state": obs["state"].expand(n, 2, 2)}, prompt * n, ranges, rng, temperature=temperature)
    counts = torch.bincount((tokens[:, 0] - 2) * 4 + tokens[:, 1], minlength=12)
    chi2 = ((counts - n * p) ** 2 / (n * p)).sum().item()
    assert p.max() - p.min() > 0.01 and chi2 < 31.3  # 11 degrees of freedom: one in a thousand seeds exceeds it


def test_half_the_temperature_squares_each_tokens_probability():
    model, obs, prompt = tiny(), {"state": observe(1)["state"].expand(3, 2, 2)}, questions(1) * 3
    answers, ranges = torch.tensor([[2], [3], [4]]), [(2, 5)]
    p = model.log_prob(obs, prompt, answers, ranges).exp()
    torch.testing.assert_close(model.log_prob(obs, prompt, answers, ranges, 0.5).exp(), p**2 / (p**2).sum())


def test_the_same_generator_gives_the_same_answers():
    model, obs, prompts, ranges = tiny(), observe(6), questions(6), [(0, 200), (0, 200)]
    first, second, other = (model.sample(obs, prompts, ranges, torch.Generator().manual_seed(s))[0] for s in (3, 3, 4))
    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize("greedy", [False, True])
def test_constrained_sampling_returns_allowed_numbers_only(rng, greedy):
    model, n = tiny(), 512
    ranges = [(11, 13), (0, 11), (1000, 1024), (5, 6)]
    obs = {k: v.repeat(n // 4, *[1] * (v.ndim - 1)) for k, v in observe(4).items()}
    tokens, entropy = model.sample(obs, questions(n), ranges, rng, greedy)
    assert tokens.shape == entropy.shape == (n, 4)
    for i, (first, end) in enumerate(ranges):
        assert tokens[:, i].min() >= first and tokens[:, i].max() < end
    assert torch.equal(entropy[:, 3], torch.zeros(n))  # one number allowed: nothing to choose


@pytest.mark.parametrize("ranges", [[(0, 3), (1, 5), (0, 2)], SignMagnitude(1.0, 2).ranges[:3], UniformBins(6, -1, 1, 2).ranges])
def test_log_prob_sums_to_one_over_all_answers(ranges):
    model = tiny()
    answers = torch.tensor(list(itertools.product(*(range(*r) for r in ranges))))
    obs = {k: v.expand(len(answers), *v.shape[1:]) for k, v in observe(1).items()}
    log_prob = model.log_prob(obs, questions(1) * len(answers), answers, ranges)
    assert log_prob.shape == (len(answers),)
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_features_passed_in_equal_images_passed_in():
    model, obs, prompts, ranges = tiny(), observe(3), questions(3), [(0, 5), (0, 5)]
    answer = torch.tensor([[1, 2], [3, 4], [0, 1]])
    features = {"features": model.encode_images(obs["images"]), "state": obs["state"]}
    assert features["features"].shape == (3, 2, 4, 16)
    expected, got = (model.log_prob(o, prompts, answer, ranges) for o in (obs, features))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    frame = model.vision_tower(obs["images"][1, 1][None])[0]  # each frame is encoded on its own
    torch.testing.assert_close(features["features"][1, 1], frame, atol=1e-6, rtol=0)


def test_steps_to_go_is_the_expectation_over_the_steps_tokens(monkeypatch):
    model, steps = tiny(), StepsToGo(cap=12, bins=4)  # edges 0 3 6 9
    table, loc = model.language_model.embed_tokens.weight, model.tokenizer.loc
    table.zero_()
    table[:, 0] = 50.0  # would win, were any other token allowed
    table[loc : loc + 4, 0] = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()

    def hidden(x, positions, mask, keep, caches=None):
        return torch.eye(1, x.shape[-1]).expand(len(x), keep, -1)

    monkeypatch.setattr(model.language_model, "forward", hidden)
    d = model.steps_to_go(observe(2), INSTRUCTIONS[:2], steps)
    assert d.tolist() == pytest.approx([0.25 * 3 + 0.125 * 6 + 0.125 * 9] * 2)  # 2.625


def test_steps_to_go_asks_the_steps_question():
    model, obs, steps = tiny(), observe(2), StepsToGo(20, 10)
    d = model.steps_to_go(obs, INSTRUCTIONS[:2], steps)
    prompts = [QUESTION_STEPS.format(g) for g in INSTRUCTIONS[:2]]
    log_p = model.log_probs(obs, prompts, torch.zeros(2, 1, dtype=torch.long), [(0, 10)])[0].tolist()
    assert d.tolist() == pytest.approx([sum(2 * k * math.exp(lp) for k, lp in enumerate(row)) for row in log_p], rel=1e-5)


# --- the action head --------------------------------------------------------------------------------------------------
def with_head(model: EFM, width: int = 10) -> EFM:
    """The same weights, and an action head as a new model has it."""
    torch.manual_seed(0)
    headed = EFM(dataclasses.replace(model.cfg, action_head=width), model.tokenizer)
    assert headed.load_state_dict(model.state_dict(), strict=False).missing_keys == [
        "action_head.0.weight", "action_head.0.bias", "action_head.2.weight", "action_head.2.bias"]  # fmt: skip
    return headed


def test_a_new_action_head_changes_nothing():
    plain, obs, prompts, ranges = tiny(), observe(3), questions(3), [(0, 7), (3, 9)]
    headed = with_head(plain).requires_grad_(False)
    answer = torch.tensor([[1, 3], [4, 8], [0, 5]])
    for a, b in zip(
        plain.log_probs(obs, prompts, answer, ranges),
        headed.log_probs(obs, prompts, answer, ranges),
        strict=True,
    ):
        assert torch.equal(a, b)
    drawn = (m.sample(obs, prompts, ranges, torch.Generator().manual_seed(0)) for m in (plain, headed))
    for a, b in zip(*drawn, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(*(m.text_log_prob(obs, prompts, INSTRUCTIONS) for m in (plain, headed)))
    assert headed.action_head[0].weight.abs().max() > 0  # so that its last layer gets a gradient


def test_models_of_one_seed_differ_by_the_action_head_only():
    states = []
    for width in (0, 10):
        torch.manual_seed(5)
        model = EFM(dataclasses.replace(TINY, action_head=width), Tokenizer.train([*INSTRUCTIONS, *TINY.state_names]))
        states.append(model.state_dict())
    plain, headed = states
    assert {k for k in headed if k not in plain} == {k for k in headed if k.startswith("action_head.")} != set()
    assert all(torch.equal(v, headed[k]) for k, v in plain.items())


def test_the_action_head_learns_numbers_and_leaves_text_alone():
    headed, obs, prompts, ranges = (
        with_head(tiny()).requires_grad_(False),
        observe(3),
        questions(3),
        [(0, 7), (3, 9)],
    )
    answer = torch.tensor([[1, 3], [4, 8], [0, 5]])
    before, said = (
        headed.log_prob(obs, prompts, answer, ranges),
        headed.text_log_prob(obs, prompts, INSTRUCTIONS),
    )
    headed.action_head.requires_grad_(True)
    optimizer = torch.optim.SGD(headed.action_head.parameters(), lr=0.1)
    for _ in range(3):  # from the second step on, the first layer learns, too
        optimizer.zero_grad()
        (-headed.log_prob(obs, prompts, answer, ranges).mean()).backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in headed.action_head.parameters())
    assert headed.log_prob(obs, prompts, answer, ranges).mean() > before.mean() + 0.1
    assert torch.equal(headed.text_log_prob(obs, prompts, INSTRUCTIONS), said)
    # by hand: the scores are of h + W2 gelu(W1 h + b1) + b2
    hidden, ids = headed.hidden(obs, prompts, answer + headed.tokenizer.loc), headed.number_ids(3, 9)
    a, b = headed.action_head[0], headed.action_head[2]
    moved = hidden + F.gelu(hidden @ a.weight.T + a.bias) @ b.weight.T + b.bias
    torch.testing.assert_close(headed.logits(hidden, ids), moved @ headed.language_model.embed_tokens.weight[ids].T)
    # what is drawn with the cache has the probability that training gives it
    tokens, entropy = headed.sample(obs, prompts, ranges, torch.Generator().manual_seed(0))
    log_probs = headed.log_probs(obs, prompts, tokens, ranges)
    torch.testing.assert_close(torch.stack([-(x.exp() * x).sum(1) for x in log_probs], 1), entropy)


# --- text as an answer ------------------------------------------------------------------------------------------------
def next_token(model: EFM, obs: dict[str, Tensor], prompt: str, ids: list[int]) -> Tensor:
    """log p of every token after the answer `ids`, of one row, alone: no padding, its own mask, no cache."""
    x, valid = model.prefix(obs, [prompt])
    assert valid.all()
    table, P, T = model.language_model.embed_tokens.weight, x.shape[1], x.shape[1] + len(ids)
    x = torch.cat([x, table[ids][None] * math.sqrt(model.cfg.width)], 1)
    mask = torch.tensor([[key < P or key <= query for key in range(T)] for query in range(T)])
    scores = model.language_model(x, torch.arange(T)[None], mask[None, None], keep=1)[0, 0] @ table.T
    return scores - scores.exp().sum().log()


def row(obs: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {k: v[i : i + 1] for k, v in obs.items()}


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_text_log_prob_is_the_sum_over_the_tokens_and_eos(kv_heads):
    model, obs, prompts, texts = (
        tiny(kv_heads=kv_heads),
        observe(4),
        questions(4),
        [*INSTRUCTIONS[::-1], "blue"],
    )
    got = model.text_log_prob(obs, prompts, texts)
    assert got.shape == (4,) and got.dtype == torch.float32
    for i, text in enumerate(texts):  # prompts and texts of different lengths: some are padded, but not alone
        ids = [model.tokenizer.tokenizer.token_to_id(word) for word in (*text.split(), "<eos>")]
        expected = sum(next_token(model, row(obs, i), prompts[i], ids[:n])[t] for n, t in enumerate(ids))
        torch.testing.assert_close(got[i], expected, atol=1e-4, rtol=1e-5)
        alone = model.text_log_prob(row(obs, i), [prompts[i]], [text])[0]
        torch.testing.assert_close(alone, got[i], atol=1e-4, rtol=1e-5)


def test_generated_text_is_the_argmax_at_every_step():
    model, obs, prompts = tiny(), observe(6), questions(6)
    tokenizer, words = (
        model.tokenizer,
        functools.partial(model.tokenizer.tokenizer.encode, add_special_tokens=False),
    )
    for layer in model.language_model.layers:  # tied embeddings say the last token again and again if the blocks say little
        layer.o_proj.weight.mul_(4), layer.down_proj.weight.mul_(4)
    said = words(model.generate_text(obs, prompts, longest=8)[0]).ids
    tokenizer.eos = said[3]  # from now on at least this answer has an end
    texts = model.generate_text(obs, prompts, longest=8)
    for i, text in enumerate(texts):
        ids = []
        while len(ids) < 8 and tokenizer.eos not in ids:
            ids.append(next_token(model, row(obs, i), prompts[i], ids).argmax().item())
        assert words(text).ids == ids[: ids.index(tokenizer.eos) if tokenizer.eos in ids else None]
        assert [text] == model.generate_text(row(obs, i), prompts[i : i + 1], longest=8)
    assert len(set(said)) > 2 and len(words(texts[0]).ids) < 4


def test_state_mlp_adds_to_where_the_first_tokens_of_an_answer_are_predicted(tmp_path):
    model, plain = tiny(state_mlp=10, state_bias_tokens=3), tiny()
    states = 5 + 3 * torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    states[:, 3] = 7  # constant
    model.fit_standardiser(states)
    seen = torch.cat([states[:1], torch.tensor([[5.0, 1e4, -1e4, 8]])])  # and where no state has been
    obs, prompts = {"state": seen.view(2, 2, 2)}, questions(2)
    z = (seen - states.mean(0)) / (states.std(0) + 1e-2)
    assert z[0, 3] == 0 and z[0].abs().max() < 3
    z = torch.cat([z[:1], torch.tensor([[z[1, 0], 3, -3, 3]])])
    a, b, c = (model.state_mlp[i] for i in (0, 2, 4))
    gelu = torch.nn.functional.gelu
    bias = (gelu(gelu(z @ a.weight.T + a.bias) @ b.weight.T + b.bias) @ c.weight.T + c.bias).view(2, 3, -1)
    torch.testing.assert_close(model.state_bias(obs), bias)
    torch.testing.assert_close(model.state_bias({"state": torch.stack([obs["state"] - 1, obs["state"]], 1)}), bias)  # of now
    names = torch.stack([model.language_model.embed(torch.tensor(model.tokenizer.tokenizer.encode(n).ids)).mean(0)
                         for n in TINY.state_names])  # fmt: skip
    expected = torch.einsum("bsd,sdw->bsw", z.view(2, 2, 2), model.state_weight) + names
    ids, _ = model.tokenizer.prompts(prompts)
    asked = model.language_model.embed(ids)
    asked[:, -1] += bias[:, 0]
    torch.testing.assert_close(model.prefix(obs, prompts)[0], torch.cat([expected, asked], 1))
    for n in (1, 4):  # tokens of an answer, and one more to predict
        answer = torch.randint(0, 9, (2, n)) + model.tokenizer.loc
        asked = model.language_model.embed(torch.cat([ids, answer], 1))
        for k in range(min(3, n + 1)):
            asked[:, ids.shape[1] - 1 + k] += bias[:, k]
        torch.testing.assert_close(model.prefix(obs, prompts, answer)[0], torch.cat([expected, asked], 1))
    # what is sampled with the cache has the probability that training gives it
    tokens, entropy = model.sample(obs, prompts, [(0, 8)] * 5, torch.Generator().manual_seed(0))
    log_probs = model.log_probs(obs, prompts, tokens, [(0, 8)] * 5)
    torch.testing.assert_close(torch.stack([-(x.exp() * x).sum(1) for x in log_probs], 1), entropy)
    assert not any("state_m" in key or "scale" in key for key in plain.state_dict())  # and without it nothing is new
    save_model(model, tmp_path / "m.safetensors")
    again = load_model(tmp_path / "m.safetensors")
    assert torch.equal(again.prefix(obs, prompts)[0], model.prefix(obs, prompts)[0])


def test_a_state_at_two_moments():
    model, prompts, texts = tiny(), questions(3), INSTRUCTIONS
    first, last = observe(3)["state"], observe(3, seed=1)["state"]
    both = torch.stack([first, last], 1)  # (B, 2, S, d)
    x, valid = model.prefix({"state": both}, prompts)
    one, other = (model.prefix({"state": s}, prompts)[0] for s in (first, last))
    torch.testing.assert_close(x, torch.cat([one[:, :2], other], 1), atol=1e-6, rtol=0)  # one moment after the other
    assert valid.shape == x.shape[:2]
    assert torch.equal(x, model.prefix({"state": both.flatten(1, 2)}, prompts)[0])  # (B, 2 S, d)
    assert torch.equal(one, model.prefix({"state": both[:, :1]}, prompts)[0])  # (B, 1, S, d)
    before, after = (model.text_log_prob({"state": s}, prompts, texts) for s in (both, both.flip(1)))
    assert (before - after).abs().min() > 1e-3  # which is first, and which last, is seen


# --- learning ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("answer", ["numbers", "text"])
def test_every_weight_gets_a_gradient(answer):
    model, obs, prompts = tiny().requires_grad_(True), observe(4), questions(4)
    log_prob = (model.log_prob(obs, prompts, torch.tensor([[1, 2]] * 4), [(0, 5), (0, 5)]) if answer == "numbers" else
                model.text_log_prob(obs, prompts, [*INSTRUCTIONS, INSTRUCTIONS[0]]))  # fmt: skip
    (-log_prob.mean()).backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    # a key's bias shifts all scores of a query alike: its gradient is rounding error at most
    assert [n for n in dead if not n.endswith("k_proj.bias")] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_log_prob_is_the_cross_entropy_over_the_allowed_numbers():
    model, obs, prompts, ranges = tiny(), observe(3), questions(3), [(2, 9)]
    answer = torch.tensor([[2], [5], [8]])
    x, valid = model.prefix(obs, prompts)
    hidden = model.language_model(x, valid.cumsum(1) - 1, models.prefix_mask(valid, 0), keep=1)
    scores = model.logits(hidden[:, 0], None)  # over the whole vocabulary
    allowed = scores[:, model.tokenizer.loc + 2 : model.tokenizer.loc + 9]
    expected = -F.cross_entropy(allowed, answer[:, 0] - 2, reduction="none")
    torch.testing.assert_close(model.log_prob(obs, prompts, answer, ranges), expected)
