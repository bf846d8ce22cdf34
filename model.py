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

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokens import N_LOC, QUESTION_STEPS, StepsToGo, Tokenizer, UniformBins


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
