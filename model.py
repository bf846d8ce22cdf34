"""EFM, a compact embodied foundation model: a ViT and a prefix-LM transformer that answers questions in tokens.

The layout is PaliGemma's (Beyer et al., 2024) at every size, and `load_paligemma` reads its weights: a SigLIP vision
tower (Zhai et al., 2023), one linear projection, and a Gemma decoder (Gemma Team, 2024) used as a prefix LM. A question is

    <image 1> <image 2> [state or joints] <bos> What robot action to move to the red goal \\n   -> <loc0007> <loc0012>
    <image 1> <image 2> [state or joints] <bos> How many steps to move to the red goal \\n      -> <loc0031>

and the attention mask lets the prefix (P) see itself and each answer token (A) see the prefix and what came before it:

         P P P A A        Symbols in the shape comments: B batch, T tokens, D width, H query heads, G key/value heads,
       P 1 1 1 0 0        C head width, K number tokens allowed at a position, L answer tokens, N image tokens.
       P 1 1 1 0 0
       P 1 1 1 0 0
       A 1 1 1 1 0
       A 1 1 1 1 1

Numbers are tokens `<loc0000>` ... `<loc1023>` (they exist in PaliGemma's vocabulary): actions, joints, steps to go.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

N_LOC = 1024  # number tokens in PaliGemma's vocabulary
QUESTION_ACTION = "What robot action to {}"  # Question_action(g), Section 3.1
QUESTION_STEPS = "How many steps to {}"  # Question_steps_to_go(g), Section 3.1
QUESTION_INSTRUCTION = "What instruction was performed"  # of the first and last observation; Section 3.1 gives no wording


@dataclass(frozen=True)
class EFMConfig:
    """Sizes of the model; names as in the SigLIP and Gemma papers."""

    # transformer (Gemma layout)
    width: int = 64
    depth: int = 2
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 16
    mlp_dim: int = 256
    vocab_size: int = 0  # set from the tokenizer
    number_waves: bool = False  # number tokens start on a curve, neighbours close to each other, and not at random
    rope_theta: float = 10_000.0
    # vision tower (SigLIP layout); image_size 0: no images, the model reads states
    image_size: int = 0
    patch_size: int = 16
    vit_width: int = 64
    vit_depth: int = 1
    vit_heads: int = 4
    vit_mlp_dim: int = 256
    resize: bool = False  # frames of another size are scaled to image_size: pretrained towers
    # state: the names of its quantities, one token each, and the numbers in each quantity; (): no state
    state_names: tuple[str, ...] = ()
    state_dim: int = 0
    state_mlp: int = 0  # width of an MLP that reads the whole state, standardised, ...
    state_hints: int = 0  # ... and adds to where the first so many tokens of an answer are predicted, at least one


PRESETS = {
    "nano": EFMConfig(),  # reads states
    "nano-vision": EFMConfig(depth=3),  # reads frames: one block more, to relate what it sees
    "nano-deep": EFMConfig(depth=4),  # a table's geometry takes more blocks in a row
    # 70 tokens of 256 bins, the first target's 14 joints in all of their accuracy: an MLP costs little beside them
    "nano-arms": EFMConfig(depth=4, number_waves=True, state_mlp=512, state_hints=14),
    "nano-wide": EFMConfig(width=128, depth=3, head_dim=32, mlp_dim=512),  # Figure 3's smaller shares
    "nano-sight": EFMConfig(depth=5, vit_width=128, vit_depth=2, vit_mlp_dim=512),  # a table's, from frames, on a GPU
    "small": EFMConfig(width=512, depth=8, heads=8, kv_heads=2, head_dim=64, mlp_dim=2048,
                       vit_width=384, vit_depth=12, vit_heads=6, vit_mlp_dim=1536),
    "paligemma-3b": EFMConfig(width=2048, depth=18, heads=8, kv_heads=1, head_dim=256, mlp_dim=16_384,
                              vocab_size=257_216, image_size=224, patch_size=14,
                              vit_width=1152, vit_depth=27, vit_heads=16, vit_mlp_dim=4304),
}  # fmt: skip


# --- numbers as tokens (Appendix A) ---------------------------------------------------------------------------------
class UniformBins:
    """Each action dimension in `bins` equal bins over [low, high], one token each (Aloha: 256 bins, Appendix A.2)."""

    def __init__(self, bins: int, low: float | list[float], high: float | list[float], dims: int):
        self.bins, self.dims = bins, dims
        self.low, self.high = (torch.as_tensor(x, dtype=torch.float32).expand(dims) for x in (low, high))
        self.ranges = [(0, bins)] * dims  # number tokens allowed at each position: [first, last + 1)

    def encode(self, action: Tensor) -> Tensor:
        """float (..., dims) -> long (..., dims); values outside [low, high] go to the outermost bins."""
        unit = (action - self.low) / (self.high - self.low)
        return (unit * self.bins).floor().long().clamp(0, self.bins - 1)

    def decode(self, tokens: Tensor) -> Tensor:
        """long (..., dims) -> float (..., dims), the centres of the bins."""
        return self.low + (tokens + 0.5) / self.bins * (self.high - self.low)


class SignMagnitude:
    """Each dimension as a sign and a magnitude 0-10, two tokens (LanguageTable, Appendix A.1). Zero is +0."""

    PLUS = 11  # the sign tokens follow the eleven magnitudes: 11 is +, 12 is -

    def __init__(self, limit: float, dims: int):
        self.limit, self.dims = limit, dims
        self.ranges = [(self.PLUS, self.PLUS + 2), (0, 11)] * dims

    def encode(self, action: Tensor) -> Tensor:
        """float (..., dims) in [-limit, limit] -> long (..., 2 dims)."""
        magnitude = (action.abs() / self.limit * 10).round().clamp(max=10).long()
        sign = self.PLUS + ((action < 0) & (magnitude > 0)).long()
        return torch.stack([sign, magnitude], -1).flatten(-2)

    def decode(self, tokens: Tensor) -> Tensor:
        """long (..., 2 dims) -> float (..., dims)."""
        sign, magnitude = tokens.unflatten(-1, (self.dims, 2)).unbind(-1)
        return torch.where(sign == self.PLUS, 1.0, -1.0) * magnitude / 10 * self.limit


def action_tokenizer(kind: str, **settings) -> UniformBins | SignMagnitude:
    """The tokeniser a domain asks for: kind "uniform" or "sign-magnitude" (`envs/*.py`, `action_tokens`)."""
    return {"uniform": UniformBins, "sign-magnitude": SignMagnitude}[kind](**settings)


class StepsToGo:
    """Steps to go, capped at `cap`, in `bins` equal bins, one token; a bin's value is its left edge, so d can be 0."""

    def __init__(self, cap: int, bins: int):
        self.width = cap / bins
        self.ranges = [(0, bins)]
        self.edges = torch.arange(bins) * self.width  # (K,)

    def encode(self, steps: Tensor) -> Tensor:
        """long (...) -> long (..., 1)."""
        return (steps / self.width).long().clamp(max=len(self.edges) - 1)[..., None]


# --- words as tokens ------------------------------------------------------------------------------------------------
class Tokenizer:
    """Prompts to ids, by a `tokenizers` tokenizer that has <pad>, <bos>, <eos> and the number tokens in order."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self.tokenizer, self._ids = tokenizer, {}
        self.pad, self.bos, self.eos, self.loc = (tokenizer.token_to_id(t) for t in ("<pad>", "<bos>", "<eos>", "<loc0000>"))
        if None in (self.pad, self.bos, self.eos, self.loc) or tokenizer.token_to_id("<loc1023>") != self.loc + N_LOC - 1:
            raise ValueError("the tokenizer lacks <pad>, <bos>, <eos> or the number tokens <loc0000> ... <loc1023>")

    @classmethod
    def train(cls, texts: list[str] | tuple[str, ...]) -> Tokenizer:
        """A word-level tokenizer on a domain's instructions: the vocabulary of the nano models."""
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
        split = tokenizers.pre_tokenizers.Split
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [split(tokenizers.Regex("[\n,]"), "isolated"), split(" ", "removed")]
        )
        # the two questions are one token each: short prompts, fast nano models
        questions = [q.removesuffix(" {}") for q in (QUESTION_ACTION, QUESTION_STEPS)]
        special = ["<pad>", "<bos>", "<eos>", "<unk>", *questions] + [f"<loc{i:04d}>" for i in range(N_LOC)]
        trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=special, vocab_size=10**6)
        tokenizer.train_from_iterator([t + "\n" for t in texts], trainer)
        return cls(tokenizer)

    def prompts(self, texts: list[str] | tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Padded on the left, so that the last token is every prompt's newline: ids long (B, T), valid bool (B, T)."""
        for text in set(texts) - self._ids.keys():
            self._ids[text] = [self.bos] + self.tokenizer.encode(text + "\n", add_special_tokens=False).ids
        ids = [self._ids[t] for t in texts]
        longest = max(map(len, ids))
        ids = torch.tensor([[self.pad] * (longest - len(i)) + i for i in ids])
        return ids, ids != self.pad

    def answers(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ended by <eos>, padded on the right, where no earlier token sees it: ids long (B, L), valid bool (B, L)."""
        ids = [self.tokenizer.encode(t, add_special_tokens=False).ids + [self.eos] for t in texts]
        longest = max(map(len, ids))
        ids = torch.tensor([i + [self.pad] * (longest - len(i)) for i in ids])
        return ids, ids != self.pad

    def text(self, ids: list[int]) -> str:
        """An answer's ids up to <eos> -> its text."""
        ids = ids[: ids.index(self.eos)] if self.eos in ids else ids
        return self.tokenizer.decode(ids, skip_special_tokens=False).replace(" ,", ",")


# --- vision tower (SigLIP layout) -----------------------------------------------------------------------------------
class ViTBlock(nn.Module):
    def __init__(self, cfg: EFMConfig):
        super().__init__()
        self.heads, D = cfg.vit_heads, cfg.vit_width
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(D, eps=1e-6), nn.LayerNorm(D, eps=1e-6)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(D, D) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(D, cfg.vit_mlp_dim), nn.Linear(cfg.vit_mlp_dim, D)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D)
        h = self.layer_norm1(x)
        q, k, v = (p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, N, D)
        x = x + self.out_proj(h)
        return x + self.fc2(F.gelu(self.fc1(self.layer_norm2(x)), approximate="tanh"))


class ViT(nn.Module):
    """Patch embedding with bias, learned positions, pre-LayerNorm blocks, no class token."""

    def __init__(self, cfg: EFMConfig):
        super().__init__()
        D, n = cfg.vit_width, (cfg.image_size // cfg.patch_size) ** 2
        self.resize_to = cfg.image_size if cfg.resize else None
        self.patch_embedding = nn.Conv2d(3, D, cfg.patch_size, cfg.patch_size)
        self.position_embedding = nn.Embedding(n, D)
        self.layers = nn.ModuleList(ViTBlock(cfg) for _ in range(cfg.vit_depth))
        self.post_layernorm = nn.LayerNorm(D, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) -> float (B, N, D)."""
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1  # bfloat16 would blur the pixels
        if self.resize_to and x.shape[-2:] != (self.resize_to, self.resize_to):  # bicubic, as SigLIP's own preprocessing
            x = F.interpolate(x, (self.resize_to, self.resize_to), mode="bicubic", antialias=True).clamp(-1, 1)
        x = self.patch_embedding(x.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        x = x + self.position_embedding.weight  # (B, N, D)
        for layer in self.layers:
            x = layer(x)
        return self.post_layernorm(x)


# --- transformer (Gemma layout) -------------------------------------------------------------------------------------
class RMSNorm(nn.Module):
    def __init__(self, D: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:  # in float32, and multiplied by 1 + weight: Gemma's convention
        return F.rms_norm(x.float(), (x.shape[-1],), 1 + self.weight.float(), 1e-6).to(x.dtype)


def rotary(cfg: EFMConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin float (B, 1, T, C) of rotary positions (Su et al., 2021), halves not interleaved, as in Gemma."""
    frequency = cfg.rope_theta ** (-torch.arange(0, cfg.head_dim, 2, device=positions.device) / cfg.head_dim)  # (C/2,)
    angle = (positions[..., None].float() * frequency).repeat(1, 1, 2)[:, None]  # (B, 1, T, C)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


class GemmaBlock(nn.Module):
    def __init__(self, cfg: EFMConfig):
        super().__init__()
        D, self.C = cfg.width, cfg.head_dim
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(D), RMSNorm(D)
        self.q_proj = nn.Linear(D, cfg.heads * self.C, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(D, cfg.kv_heads * self.C, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(cfg.heads * self.C, D, bias=False)
        self.gate_proj, self.up_proj = (nn.Linear(D, cfg.mlp_dim, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(cfg.mlp_dim, D, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: Tensor | None, keep: int) -> Tensor:
        """The block's output at the last `keep` of T positions, float (B, keep, D).

        x float (B, T, D), mask bool (B, 1, T, keys); a cache float (2, B, G, keys or more, C) has the keys and values of
        what came before x, and is given x's own.
        """
        h, T, keys = self.input_layernorm(x), x.shape[1], mask.shape[-1]
        k, v = (p(h).unflatten(-1, (-1, self.C)).transpose(1, 2) for p in (self.k_proj, self.v_proj))  # (B, G, T, C)
        x, mask = x[:, -keep:], mask[:, :, -keep:]
        q = self.q_proj(h[:, -keep:]).unflatten(-1, (-1, self.C)).transpose(1, 2)  # (B, H, keep, C)
        q, k = rotate(q, *(r[:, :, -keep:] for r in rope)), rotate(k, *rope)
        if cache is not None:
            cache[0, :, :, keys - T : keys], cache[1, :, :, keys - T : keys] = k, v
            k, v = cache[:, :, :, :keys]
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        x = x + self.o_proj(h.transpose(1, 2).flatten(2))  # (B, keep, D)
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(F.gelu(self.gate_proj(h), approximate="tanh") * self.up_proj(h))


class Gemma(nn.Module):
    """The decoder's blocks, between embeddings that its caller makes and a final norm."""

    def __init__(self, cfg: EFMConfig):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.width)
        self.layers = nn.ModuleList(GemmaBlock(cfg) for _ in range(cfg.depth))
        self.norm = RMSNorm(cfg.width)

    # the embeddings' gradient: a dense one is as large as the table, at 3B 2 GB to fill, and `logits` makes one already
    sparse = True

    def embed(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.embed_tokens.weight, sparse=self.sparse)
        return x * torch.tensor(math.sqrt(self.cfg.width), dtype=x.dtype)  # (B, T, D); Gemma rounds the factor to x's dtype

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor, keep: int, caches: Tensor | None = None) -> Tensor:
        """Hidden states of the last `keep` positions, float (B, keep, D): the last block computes no others."""
        rope, T = rotary(self.cfg, positions), x.shape[1]
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, mask, None if caches is None else caches[i], keep if i == len(self.layers) - 1 else T)
        return self.norm(x)


def prefix_mask(valid: Tensor, answers: int) -> Tensor:
    """The mask of the module's docstring: valid bool (B, P) of the prefix -> bool (B, 1, P + answers, P + answers)."""
    B, P = valid.shape
    mask = torch.ones(P + answers, P + answers, dtype=torch.bool, device=valid.device).tril()
    mask[:P, :P] = True
    keys = torch.cat([valid, valid.new_ones(B, answers)], 1)
    mask = mask & keys[:, None]  # (B, T, T)
    return (mask | torch.eye(P + answers, dtype=torch.bool, device=valid.device))[:, None]  # a padding row sees itself: no NaN


def no_autocast(x: Tensor) -> torch.autocast:
    """Where bfloat16, with 8 bits for a number, would blur what is measured: states, scores and d(o, g)."""
    return torch.autocast(x.device.type, enabled=False)


# --- the model ------------------------------------------------------------------------------------------------------
class EFM(nn.Module):
    """p(answer | observation, question). One module is policy and steps-to-go predictor: the question tells which.

    An observation is a dict of tensors: `images` uint8 (B, 2, H, W, 3) or, already encoded, `features` float
    (B, 2, N, Dv); `state` float (B, S, d), S quantities of d numbers, or (B, F, S, d) at F moments; `joints` float
    (B, J) [rad], as number tokens in 256 bins over a turn (Appendix A.2); any of them may be missing. A goal is known
    only through the prompt's text.
    """

    lora_rank, base = 0, Path()  # of a model that `add_lora` gave adapters: their rank, the file of the weights below them

    def __init__(self, cfg: EFMConfig, tokenizer: Tokenizer):
        super().__init__()
        self.cfg = cfg = replace(cfg, vocab_size=cfg.vocab_size or tokenizer.tokenizer.get_vocab_size())
        self.tokenizer = tokenizer
        self.language_model = Gemma(cfg)
        if cfg.image_size:
            self.vision_tower = ViT(cfg)
            self.multi_modal_projector = nn.Linear(cfg.vit_width, cfg.width)
        if cfg.state_names:
            self.state_weight = nn.Parameter(
                torch.randn(len(cfg.state_names), cfg.state_dim, cfg.width) / math.sqrt(cfg.state_dim)
            )
            words = [tokenizer.tokenizer.encode(name, add_special_tokens=False).ids for name in cfg.state_names]
            # on the CPU even where the weights are made on the meta device: no file brings these two
            self.register_buffer("state_words", torch.tensor(sum(words, []), device="cpu"), persistent=False)
            average = torch.block_diag(*(torch.full((1, len(w)), 1 / len(w), device="cpu") for w in words))  # (S, words)
            self.register_buffer("state_average", average, persistent=False)
            if W := cfg.state_mlp:
                n = len(cfg.state_names) * cfg.state_dim
                self.register_buffer("state_mean", torch.zeros(n)), self.register_buffer("state_scale", torch.ones(n))
                self.state_mlp = nn.Sequential(nn.Linear(n, W), nn.GELU(), nn.Linear(W, W), nn.GELU(),
                                               nn.Linear(W, cfg.state_hints * cfg.width))  # fmt: skip
        self.apply(self._init)
        if cfg.number_waves:  # as sines and cosines, of 4 to 512 tokens: input and, tied, output know which numbers are alike
            length = torch.logspace(math.log10(4), math.log10(512), (cfg.width + 1) // 2)
            angle = 2 * math.pi * torch.arange(N_LOC)[:, None] / length
            waves = torch.cat([angle.cos(), angle.sin()], 1)[:, : cfg.width] * (2 / cfg.width) ** 0.5  # (N_LOC, D), of norm 1
            self.language_model.embed_tokens.weight.data[tokenizer.loc : tokenizer.loc + N_LOC] = waves
        for name, p in self.named_parameters():  # residual branches start small (GPT-2)
            if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
                p.data /= math.sqrt(2 * (cfg.depth if "language" in name else cfg.vit_depth))

    def _init(self, m: nn.Module) -> None:
        if isinstance(m, nn.Linear | nn.Conv2d):
            nn.init.normal_(m.weight, std=m.weight[0].numel() ** -0.5)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Embedding):  # tied: inputs are scaled by sqrt(D), outputs are not
            nn.init.normal_(m.weight, std=m.embedding_dim**-0.5 if m is self.language_model.embed_tokens else 0.02)

    def forward(self, f: Callable[..., Any], *args: Any) -> Any:
        """f(model, *args), a method or a function of several: what DDP and FSDP take for one forward pass."""
        return f(self, *args)

    def standardise(self, states: Tensor) -> None:
        """Take mean and standard deviation of the state's numbers from states float (M, S d), for a model with `state_mlp`."""
        self.state_mean.copy_(states.mean(0)), self.state_scale.copy_(states.std(0) + 1e-2)  # some hardly vary

    def standardised(self, flat: Tensor) -> Tensor:
        """States float (..., S d) in standard deviations, cut off at three, beyond which few or no demonstrations have been.

        The quaternion of a socket that has fallen over is some hundred away: an MLP says anything there, d = 0 among it.
        """
        return ((flat - self.state_mean) / self.state_scale).clamp(-3, 3)

    def hints(self, obs: dict[str, Tensor]) -> Tensor | None:
        """What the MLP adds to the positions that predict an answer's first tokens, float (B, H, D); None without one."""
        if not self.cfg.state_mlp or "state" not in obs:
            return None
        now = obs["state"].flatten(1)[:, -len(self.state_mean) :]  # of the last moment
        with no_autocast(now):
            return self.state_mlp(self.standardised(now)).unflatten(1, (-1, self.cfg.width))

    def encode_images(self, images: Tensor) -> Tensor:
        """uint8 (B, 2, H, W, 3) -> float (B, 2, N, Dv). Each image on its own, so that features can be kept."""
        return self.vision_tower(images.flatten(0, 1)).unflatten(0, images.shape[:2])

    def prefix(self, obs: dict[str, Tensor], prompts: list[str], answer: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embeddings float (B, P, D) and valid bool (B, P): images, state or joints, the prompt, an answer; with hints."""
        device = self.language_model.embed_tokens.weight.device
        ids, valid = (x.to(device) for x in self.tokenizer.prompts(prompts))
        if answer is not None:
            ids, valid = torch.cat([ids, answer], 1), torch.cat([valid, torch.ones_like(answer, dtype=torch.bool)], 1)
        parts = [self.language_model.embed(ids)]
        if "state" in obs:
            # a quantity enters by its name, in the prompt's own words: this is how "red" in the prompt finds the red goal
            names = self.state_average @ self.language_model.embed(self.state_words)  # (S, D)
            state = obs["state"].flatten(1, -2).unflatten(1, (-1, len(names)))  # (B, F, S, d); rotary positions tell F apart
            with no_autocast(state):
                if self.cfg.state_mlp:
                    state = self.standardised(state.flatten(2)).view_as(state)
                state = torch.einsum("bfsd,sdw->bfsw", state, self.state_weight) + names
            parts.insert(0, state.flatten(1, 2))  # (B, F S, D)
        if "joints" in obs:
            joints = UniformBins(256, -math.pi, math.pi, obs["joints"].shape[1]).encode(obs["joints"].cpu()).to(device)
            parts.insert(0, self.language_model.embed(joints + self.tokenizer.loc))  # (B, J, D)
        if "features" in obs or "images" in obs:
            features = obs["features"] if "features" in obs else self.encode_images(obs["images"])  # (B, 2, N, Dv)
            parts.insert(0, self.multi_modal_projector(features).flatten(1, 2))  # (B, 2 N, D)
        x = torch.cat(parts, 1)
        if (hints := self.hints(obs)) is not None:
            place = x[:, x.shape[1] - 1 - (0 if answer is None else answer.shape[1]) :][:, : hints.shape[1]]
            place += hints[:, : place.shape[1]]
        return x, torch.cat([valid.new_ones(len(x), x.shape[1] - valid.shape[1]), valid], 1)

    def logits(self, hidden: Tensor, ids: Tensor | None) -> Tensor:
        """Scores of the tokens `ids` (of all of them if None), by the tied embeddings: (B, L, D) -> (B, L, K)."""
        table = self.language_model.embed_tokens.weight
        with no_autocast(hidden):
            return hidden.to(table.dtype) @ (table if ids is None else table[ids]).T

    def number_ids(self, allowed: tuple[int, int]) -> Tensor:
        first, end = allowed
        return torch.arange(first, end, device=self.language_model.embed_tokens.weight.device) + self.tokenizer.loc

    def hidden(self, obs: dict[str, Tensor], prompts: list[str], ids: Tensor) -> Tensor:
        """What predicts each token of an answer long (B, L), given those before it: float (B, L, D)."""
        x, valid = self.prefix(obs, prompts, ids[:, :-1])  # (B, P + L - 1, D)
        L = ids.shape[1]
        positions = valid.cumsum(1) - 1  # padding takes no position
        return self.language_model(x, positions, prefix_mask(valid[:, : x.shape[1] - L + 1], L - 1), keep=L)

    def log_probs(
        self, obs: dict[str, Tensor], prompts: list[str], answer: Tensor, ranges: list[tuple[int, int]]
    ) -> list[Tensor]:
        """log p of every allowed number at every answer position, given the answer before it: L x float (B, K)."""
        hidden = self.hidden(obs, prompts, answer + self.tokenizer.loc)  # (B, L, D)
        least, most = min(r[0] for r in ranges), max(r[1] for r in ranges)
        logits = self.logits(hidden, self.number_ids((least, most))).float()  # one product for all positions, allowed or not
        # unbound, not indexed: each index would cost a gradient of the size of all positions
        return [x[:, a - least : b - least].log_softmax(-1) for x, (a, b) in zip(logits.unbind(1), ranges, strict=True)]

    def log_prob(self, obs: dict[str, Tensor], prompts: list[str], answer: Tensor, ranges: list[tuple[int, int]],
                 temperature: float = 1.0) -> Tensor:  # fmt: skip
        """log p(answer | o, question): the sum over the answer's tokens, float (B,).

        answer: number tokens long (B, L); ranges: the numbers allowed at each position, over which p is normalised,
        so that this is the probability with which `sample` draws the answer at the same temperature.
        """
        log_probs = self.log_probs(obs, prompts, answer, ranges)
        if temperature != 1:
            log_probs = [(lp / temperature).log_softmax(-1) for lp in log_probs]
        return sum(
            lp.gather(1, (answer[:, i] - r[0])[:, None])[:, 0] for i, (lp, r) in enumerate(zip(log_probs, ranges, strict=True))
        )

    @torch.no_grad()
    def sample(self, obs: dict[str, Tensor], prompts: list[str], ranges: list[tuple[int, int]],
               generator: torch.Generator | None = None, greedy: bool = False,
               temperature: float = 1.0) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Draw an answer token by token, only from the allowed numbers; the prefix is computed once (KV cache).

        Returns number tokens long (B, L) and the entropy in nats of each position's distribution, float (B, L).
        """
        (x, valid), hints = self.prefix(obs, prompts), self.hints(obs)
        (B, P, _), L, cfg = x.shape, len(ranges), self.cfg
        mask, keys = prefix_mask(valid, 0), F.pad(valid, (0, L - 1), value=True)  # keys bool (B, P + L - 1)
        positions, tokens, entropies = keys.cumsum(1) - 1, [], []
        caches = x.new_empty(cfg.depth, 2, B, cfg.kv_heads, P + L - 1, cfg.head_dim)
        for n, (first, end) in enumerate(ranges, P):  # n keys are known
            hidden = self.language_model(x, positions[:, n - x.shape[1] : n], mask, 1, caches)[:, -1]  # (B, D)
            log_p = (self.logits(hidden, self.number_ids((first, end))).float() / temperature).log_softmax(-1)  # (B, K)
            entropies.append(-(log_p.exp() * log_p).sum(-1))
            # inverse-CDF sampling from one uniform number a row: the same draw on every device
            u = torch.rand(B, 1, generator=generator).to(log_p.device)
            token = log_p.argmax(-1) if greedy else (log_p.exp().cumsum(-1) < u).sum(-1).clamp(max=log_p.shape[-1] - 1)
            tokens.append(token + first)
            x, mask = self.language_model.embed(tokens[-1][:, None] + self.tokenizer.loc), keys[:, None, None, : n + 1]
            if hints is not None and len(tokens) < hints.shape[1]:
                x = x + hints[:, len(tokens), None]
        return torch.stack(tokens, 1), torch.stack(entropies, 1)

    def text_log_prob(self, obs: dict[str, Tensor], prompts: list[str], texts: list[str]) -> Tensor:
        """log p(text | o, question): the sum over its tokens and <eos>, among the whole vocabulary, float (B,)."""
        ids, valid = (x.to(self.language_model.embed_tokens.weight.device) for x in self.tokenizer.answers(texts))  # (B, L)
        log_p = self.logits(self.hidden(obs, prompts, ids), None).float().log_softmax(-1)  # (B, L, vocabulary)
        return (log_p.gather(2, ids[..., None])[..., 0] * valid).sum(1)

    @torch.no_grad()
    def generate_text(self, obs: dict[str, Tensor], prompts: list[str], longest: int = 64) -> list[str]:
        """The most probable token again and again, up to <eos> or `longest` of them; for a look now and then: no cache."""
        ids = torch.zeros(len(prompts), 0, dtype=torch.long, device=self.language_model.embed_tokens.weight.device)
        while ids.shape[1] < longest and not (ids == self.tokenizer.eos).any(1).all():
            hidden = self.hidden(obs, prompts, F.pad(ids, (0, 1)))[:, -1]  # (B, D); the added token is the one asked for
            ids = torch.cat([ids, self.logits(hidden, None).argmax(-1, keepdim=True)], 1)
        return [self.tokenizer.text(row) for row in ids.tolist()]

    def steps_to_go(self, obs: dict[str, Tensor], goals: list[str], steps: StepsToGo) -> Tensor:
        """d(o, g) = E_p(steps to go | o, Question_steps_to_go(g)) [steps to go], over the steps tokens only, float (B,)."""
        prompts = [QUESTION_STEPS.format(g) for g in goals]
        answer = torch.zeros(len(goals), 1, dtype=torch.long, device=self.language_model.embed_tokens.weight.device)
        p = self.log_probs(obs, prompts, answer, steps.ranges)[0].exp()  # (B, K)
        with no_autocast(p):
            return p @ steps.edges.to(p)  # [Eq. 1]


# --- weights in and out ---------------------------------------------------------------------------------------------
WRAPPERS = {"model", "vision_model", "embeddings", "encoder", "self_attn", "mlp", "linear"}  # modules of transformers, not ours
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# what a config.json leaves out has the defaults of transformers' GemmaConfig and SiglipVisionConfig
DECODER = {"width": ("hidden_size", 3072), "depth": ("num_hidden_layers", 28), "heads": ("num_attention_heads", 16),
           "kv_heads": ("num_key_value_heads", 16), "head_dim": ("head_dim", 256), "mlp_dim": ("intermediate_size", 24_576),
           "vocab_size": ("vocab_size", 256_000)}  # fmt: skip
TOWER = {"image_size": ("image_size", 224), "patch_size": ("patch_size", 16), "vit_width": ("hidden_size", 768),
         "vit_depth": ("num_hidden_layers", 12), "vit_heads": ("num_attention_heads", 12),
         "vit_mlp_dim": ("intermediate_size", 3072)}  # fmt: skip
TIMM = {r"^blocks\.(\d+)\.norm": r"layers.\1.layer_norm", r"^blocks\.(\d+)\.attn\.proj": r"layers.\1.out_proj",
        r"^blocks\.(\d+)\.(attn|mlp)": r"layers.\1", r"^norm": "post_layernorm", r"^patch_embed\.proj": "patch_embedding",
        r"^pos_embed$": "position_embedding.weight"}  # fmt: skip


@contextlib.contextmanager
def blame(path: Path | str, way_out: str) -> Iterator[None]:
    """Whatever goes wrong inside is the fault of `path`: a ValueError of one line with a way out."""
    try:
        yield
    except Exception as e:  # safetensors, tokenizers, torch and the hub each raise their own kinds
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        if isinstance(e, FileNotFoundError) and isinstance(path, Path):
            reason = "no such file"
        raise ValueError(f"{path}: {reason}; {way_out}") from None


def read_weights(path: Path, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor in `dtype`, None: as stored) of a safetensors file, one at a time.

    Read through a buffer of 16 MB, so that nothing else is in memory: a memory map's pages would stay beside the copies.
    """
    with safetensors.safe_open(path, "pt"):  # checks the header and the file's length, reads no weight
        pass
    with open(path, "rb") as f:
        start, buffer = 8 + int.from_bytes(f.read(8), "little"), torch.empty(2**24, dtype=torch.uint8)
        for key, entry in json.loads(f.read(start - 8)).items():
            if key != "__metadata__":
                if entry["dtype"] not in DTYPES:
                    raise ValueError(f"{key} is stored as {entry['dtype']}, not as one of {', '.join(DTYPES)}")
                stored = DTYPES[entry["dtype"]]
                tensor = torch.empty(entry["shape"], dtype=dtype or stored)
                f.seek(start + entry["data_offsets"][0])
                for part in tensor.view(-1).split(2**22):
                    raw = buffer[: len(part) * stored.itemsize]
                    f.readinto(raw.numpy())
                    part.copy_(raw.view(stored))
                yield key, tensor


def fill(module: nn.Module, files: list[Path], way_out: str, rename: Callable[[str], str] = str,
         dtype: torch.dtype | None = None, new_words: int = 0, only: str = "") -> None:  # fmt: skip
    """Give `module` (on the meta device, if need be) the weights in `files`, one at a time, in `dtype` (None: as stored).

    rename: key in a file -> name here, "" to leave it out; new_words: rows that the embeddings have and the file has not;
    only: a part of the names of the weights to fill.
    Raises ValueError naming the file, or its folder, if a weight is damaged, missing, misshapen or too many.
    """
    missing = {name: p for name, p in module.state_dict(keep_vars=True).items() if only in name}
    for path in files:
        with blame(path, way_out):
            for key, tensor in read_weights(path, dtype):
                if not (name := rename(key)):
                    continue
                if name not in missing:
                    raise ValueError(f"{key} has no place in this model, or comes twice")
                if new_words and name.endswith("embed_tokens.weight"):  # as PaliGemma started its own (Beyer et al., 2024)
                    tensor = torch.cat([tensor, 0.02 * torch.randn(new_words, *tensor.shape[1:]).to(tensor)])
                if tensor.shape != (place := missing.pop(name)).shape:
                    raise ValueError(f"{key} is {tuple(tensor.shape)}, not {tuple(place.shape)} as the sizes say")
                owner, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor) if isinstance(place, nn.Parameter) else tensor)
    if missing:
        where = files[0] if len(files) == 1 else files[0].parent
        raise ValueError(f"{where}: {len(missing)} weights are missing, {min(missing)} for one; {way_out}")


def save_model(model: EFM, path: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Weights, sizes and vocabulary in one safetensors file; of a model with adapters only these, and where its base is.

    weights: those of `trained(model)`, where the model itself is in parts on several devices.
    """
    # one entry: safetensors writes several in random order, and equal models would be unequal files
    made_with = {"config": asdict(model.cfg), "tokenizer": model.tokenizer.tokenizer.to_str()}
    if model.lora_rank:
        made_with |= {"lora_rank": model.lora_rank, "base": os.path.relpath(model.base, path.parent)}
    meta = {"nanoEFM": json.dumps(made_with, ensure_ascii=False)}
    weights = trained(model) if weights is None else weights
    safetensors.torch.save_file({k: v.contiguous() for k, v in weights.items()}, path, meta)


def load_model(path: Path, beside: EFM | None = None) -> EFM:
    """The model that `save_model` wrote. Raises ValueError naming the file if it is missing, damaged or misshapen.

    beside: a model in memory; adapters of the same base share its weights, so that two models take the memory of one.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such checkpoint; run stage1.py first or name another run")
    with blame(path, "not a nanoEFM checkpoint, or a damaged one; train it again"):
        with safetensors.safe_open(path, "pt") as f:
            made_with = json.loads((f.metadata() or {})["nanoEFM"])
        made_with["config"]["state_names"] = tuple(made_with["config"]["state_names"])
        if made_with["config"].get("state_mlp") and not made_with["config"].get("state_hints"):
            raise ValueError("of a nano-arms whose MLP added to the state's tokens")
        tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(made_with["tokenizer"]))
        with torch.device("meta"):
            model = EFM(EFMConfig(**made_with["config"]), tokenizer)
    if not (rank := made_with.get("lora_rank", 0)):
        fill(model, [path], "a damaged checkpoint; train it again")
        return model
    base = Path(os.path.normpath(path.parent / made_with["base"]))
    if beside is not None and beside.lora_rank == rank and base.exists() and base.samefile(beside.base):
        shared = {id(x): x for x in (beside.tokenizer, *(p for name, p in beside.named_parameters() if LORA not in name))}
        model = copy.deepcopy(beside, shared)  # everything is copied but what `shared` has: the base stays one
    else:
        model = add_lora(load_model(base), rank, base)
    fill(model, [path], "a damaged checkpoint; train it again", only=LORA)
    return model


def hub(call: str, repo_id: str, **arguments: Any) -> Any:
    """A function of `huggingface_hub`. Raises ValueError with the way out if the hub is out of reach or says no."""
    import huggingface_hub

    with blame(repo_id, f"accept its licence on huggingface.co/{repo_id} and run `hf auth login`, or name a local copy's folder"):
        return getattr(huggingface_hub, call)(repo_id=repo_id, **arguments)


def push(path: Path, repo_id: str) -> None:
    """Upload a checkpoint that `save_model` wrote to the hub, under its own name, adapters merged. Raises ValueError as `hub`."""
    hub("create_repo", repo_id, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model, whole = load_model(Path(path)), Path(path)
        if model.lora_rank:
            whole = Path(folder) / "merged.safetensors"
            save_model(merge_lora(model), whole)
        hub("upload_file", repo_id, path_or_fileobj=whole, path_in_repo=Path(path).name)


def pull(repo_id: str, name: str = "policy.safetensors") -> EFM:
    """The model that `push` uploaded. Raises ValueError as `hub` and `load_model` do."""
    return load_model(Path(hub("hf_hub_download", repo_id, filename=name)))


def sizes(config: dict, names: dict[str, tuple[str, Any]], **must: tuple) -> dict[str, int]:
    """Fields of EFMConfig from a part of config.json. Raises ValueError if one of `must` is not as model.py computes it."""
    for key, allowed in must.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{key} is {config[key]}, and model.py computes {allowed[0]} only")
    return {ours: int(config.get(theirs, default)) for ours, (theirs, default) in names.items()}


def decoder_sizes(text: dict) -> dict[str, Any]:
    """The decoder's fields of EFMConfig from Gemma's config.json, or PaliGemma's text_config. Raises ValueError as `sizes`."""
    if text.get("model_type") == "gemma2":
        raise ValueError("the decoder is Gemma 2, with more norms and capped logits; model.py has PaliGemma 1's")
    rope = text.get("rope_parameters") or {"rope_theta": text.get("rope_theta", 10_000.0)} | (text.get("rope_scaling") or {})
    sizes(rope, {}, rope_type=("default",), type=("default",))
    # "gelu" in a Gemma file means the tanh approximation, too (transformers' GemmaConfig)
    found = sizes(text, DECODER, model_type=("gemma",), hidden_act=("gelu_pytorch_tanh", "gelu"), attention_bias=(False,),
                  hidden_activation=("gelu_pytorch_tanh", None), rms_norm_eps=(1e-6,), tie_word_embeddings=(True,))  # fmt: skip
    return found | {"rope_theta": float(rope.get("rope_theta", 10_000.0))}


def published(weights: str | Path, model_type: str) -> tuple[dict, tokenizers.Tokenizer, list[Path]]:
    """config.json, tokenizer and safetensors files of a folder, or of the hub repository that `weights` names.

    Raises ValueError, one line, if one of them is missing or damaged, or if they are not of a `model_type`.
    """
    folder = Path(weights)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(weights)):
            raise ValueError(f"{weights}: neither a folder nor the id of a hub repository; name one of the two")
        folder = Path(hub("snapshot_download", str(weights), allow_patterns=["*.safetensors", "*.json"]))
    way_out = f"name the folder of a {model_type} checkpoint as published on the hub"
    with blame(folder / "config.json", way_out):
        config = json.loads((folder / "config.json").read_text())
        if config.get("model_type") != model_type:
            raise ValueError(f"of a {config.get('model_type')} model")
    with blame(folder / "tokenizer.json", way_out):
        tokenizer = tokenizers.Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        with blame(index, way_out):
            names = sorted(set(json.loads(index.read_text())["weight_map"].values())) or names
    return config, tokenizer, [folder / name for name in names]


def rename(key: str) -> str:
    """A weight's key in any layout that transformers has used -> its name here: their wrappers are left out.

    language_model.model.layers.0.mlp.up_proj.weight and model.language_model.layers.0.… -> language_model.layers.0.up_proj.weight
    """
    return "" if key.endswith("lm_head.weight") else ".".join(part for part in key.split(".") if part not in WRAPPERS)


def load_paligemma(weights: str | Path, dtype: torch.dtype = torch.float32) -> EFM:
    """PaliGemma from a folder, or a hub id, with config.json, tokenizer.json and safetensors, as published or saved since.

    The weights come one at a time in `dtype`, so memory peaks at the model's own size. It computes what transformers'
    PaliGemmaForConditionalGeneration does; positions start at 0, not 1, which rotary attention does not see.
    Raises ValueError, one line: a folder or hub id that is not PaliGemma 1, or with damaged, missing or surplus weights.
    """
    config, words, files = published(weights, "paligemma")
    folder = files[0].parent
    with blame(folder / "config.json", "name a PaliGemma 1 checkpoint, such as google/paligemma-3b-pt-224"):
        sizes(config, {}, tie_word_embeddings=(True,))
        tower = sizes(config["vision_config"], TOWER, model_type=("siglip_vision_model",), hidden_act=("gelu_pytorch_tanh",),
                      layer_norm_eps=(1e-6,), num_channels=(3,))  # fmt: skip
        cfg = EFMConfig(**decoder_sizes(config["text_config"]), **tower, resize=True)
    with blame(folder / "tokenizer.json", "take the one published with the weights"):
        tokenizer = Tokenizer(words)
        if words.get_vocab_size() > cfg.vocab_size:
            raise ValueError(f"{words.get_vocab_size()} words, but the model has embeddings for {cfg.vocab_size}")
        with torch.device("meta"):
            model = EFM(cfg, tokenizer)
    fill(model, files, "download it again", rename, dtype)
    return model


def timm_vit(name: str, pretrained: bool) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Sizes, and weights by their names here, of a timm ViT. Raises ValueError if its layout is not ours.

    Ours: no class token, learned positions, pre-LayerNorm blocks, tanh GELU, pixels in [-1, 1]. SigLIP's pooling head is
    dropped. SigLIP was trained with the tanh GELU (jax.nn.gelu in big_vision); some of timm's entries have the exact one.
    """
    with blame(f"timm:{name}", "pip install timm"):
        import timm
    with blame(f"timm:{name}", "choose a SigLIP tower, such as timm:vit_so400m_patch14_siglip_224"):
        gelu = {"act_layer": "gelu_tanh"} if "siglip" in name else {}
        vit = timm.create_model(name, pretrained=pretrained, num_classes=0, **gelu)
        block, side, patch = vit.blocks[0], vit.patch_embed.img_size, vit.patch_embed.patch_size
        scale = [tuple(vit.pretrained_cfg[k]) for k in ("mean", "std")]
        if (type(block).__name__, type(block.mlp.act).__name__, block.norm1.eps) != ("Block", "GELUTanh", 1e-6):
            raise ValueError("its blocks are not ours: other modules, another GELU or another LayerNorm")
        if scale != [(0.5,) * 3] * 2 or side[0] != side[1] or patch[0] != patch[1]:
            raise ValueError("its images are not ours: pixels of another scale, or not square")
        cfg = {"vit_width": vit.embed_dim, "vit_depth": len(vit.blocks), "vit_heads": block.attn.num_heads,
               "vit_mlp_dim": block.mlp.fc1.out_features, "image_size": side[0], "patch_size": patch[0]}  # fmt: skip
        weights = {}
        for key, value in vit.state_dict().items():
            for theirs, ours in TIMM.items():
                key = re.sub(theirs, ours, key)
            if ".qkv." in key:
                weights |= {key.replace("qkv", f"{x}_proj"): part for x, part in zip("qkv", value.chunk(3), strict=True)}
            elif not key.startswith("attn_pool."):
                weights[key] = value[0] if key == "position_embedding.weight" else value
        with torch.device("meta"):
            ours = {(k, v.shape) for k, v in ViT(EFMConfig(**cfg)).state_dict().items()}
        if different := sorted({(k, v.shape) for k, v in weights.items()} ^ ours):
            raise ValueError(f"it is not our ViT, see {different[0][0]}")
    return cfg, weights


def load_unimodal(vit: str, weights: str | Path, cfg: EFMConfig, tokenizer: Tokenizer | None, pretrained: bool = True) -> EFM:
    """The paper's Uni-PaLI: a ViT and a decoder that have not met, and a random projection between them.

    vit: "timm:NAME"; weights: a folder or hub id of Gemma 1, or "" for a random decoder with the sizes of `cfg` and the
    words of `tokenizer`. Gemma's vocabulary gets the number tokens it lacks. Raises ValueError, one line.
    """
    if not vit.startswith("timm:"):
        raise ValueError(f"{vit}: not a vision tower; name one as timm:vit_so400m_patch14_siglip_224")
    tower, vit_weights = timm_vit(vit.removeprefix("timm:"), pretrained)
    files, new_words = [], 0
    if weights:
        config, words, files = published(weights, "gemma")
        with blame(files[0].parent / "config.json", "name a Gemma 1 checkpoint, such as google/gemma-2b"):
            cfg = replace(cfg, **decoder_sizes(config))
        if words.token_to_id("<loc0000>") is None:
            words.add_special_tokens([f"<loc{i:04d}>" for i in range(N_LOC)])
            new_words = max(0, words.get_vocab_size() - cfg.vocab_size)
        tokenizer, cfg = Tokenizer(words), replace(cfg, vocab_size=cfg.vocab_size + new_words)
    model = EFM(replace(cfg, **tower, resize=True), tokenizer)
    model.vision_tower.load_state_dict(vit_weights)
    if files:
        fill(model.language_model, files, "download it again", rename, torch.float32, new_words)
    return model


# --- adapters, memory, speed ------------------------------------------------------------------------------------------
LORA = ".lora_"  # in the names of an adapter's weights, and in no other (peft)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2"]


def add_lora(model: EFM, rank: int, base: Path) -> EFM:
    """Freeze the model, and add to each projection of both towers W x a trainable 2 B A x (Hu et al., 2021), B = 0 at first.

    rank: rows of A; base: the file that has, or will have, the model's weights as they are now (`save_base`).
    Raises ValueError with the way out where peft is missing.
    """
    with blame(f"--lora-rank {rank}", "pip install peft"):
        from peft import LoraConfig, inject_adapter_in_model
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS), model)
    model.lora_rank, model.base = rank, Path(base)
    return model


def merge_lora(model: EFM) -> EFM:
    """The same function without adapters: W + 2 B A in place of W. A model that has none stays as it is."""
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "base_layer"):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    model.lora_rank, model.base = 0, Path()
    return model.requires_grad_(True)


def economise(model: EFM, checkpointing: bool, compiled: bool) -> None:
    """checkpointing: a block's activations are computed again in the backward pass, not kept; compiled: torch.compile.

    Both block by block: activations are few at a block's edges, and blocks are alike, so one compilation serves all.
    """
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # with gradients or not, with a cache or not, ...: a dozen kinds of call
    for tower in filter(None, (model.language_model, getattr(model, "vision_tower", None))):
        for block in tower.layers:
            if compiled:  # for every batch size: the simulations whose episode goes on become fewer
                block.forward = torch.compile(block.forward, dynamic=True)
            if checkpointing:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def trained(model: EFM) -> dict[str, Tensor]:
    """What training changes and checkpoints keep: the adapters' weights where there are some, else all."""
    return {k: v for k, v in model.state_dict().items() if LORA in k or not model.lora_rank}


def save_base(model: EFM, path: Path) -> None:
    """The weights below the adapters, as the model that it was before `add_lora`."""
    plain = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if LORA not in k}
    whole = copy.copy(model)
    whole.lora_rank = 0
    save_model(whole, path, plain)
