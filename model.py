"""EFM, a compact embodied foundation model: a ViT, and a prefix LM that answers questions in tokens.

The layout is PaliGemma's (Beyer et al., 2024) at every size: a SigLIP vision tower (Zhai et al., 2023), one
linear projection, and a Gemma decoder (Gemma Team, 2024) used as a prefix LM. A question is

    <image> <image> [state/joints] <bos> What robot action to move to the red goal\\n -> <loc0007> <loc0012>
    <image> <image> [state/joints] <bos> How many steps to move to the red goal\\n    -> <loc0031>

The attention mask lets the prefix (P) see itself, and an answer token (A) the prefix and what came before it:

         P P P A A      Symbols in the shape comments: B batch, T tokens, D width, C head width, H query
       P 1 1 1 0 0      and G key/value heads, P prefix tokens, L answer tokens, K number tokens allowed at a
       P 1 1 1 0 0      position, N patches of an image, Dv their width, S quantities of a state, d numbers of
       P 1 1 1 0 0      a quantity, F moments, J joints.
       A 1 1 1 1 0
       A 1 1 1 1 1

Numbers are tokens `<loc0000>` ... `<loc1023>` of PaliGemma's vocabulary: actions, joints, steps to go.
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

Obs = dict[str, Tensor]  # an observation, see `EFM`
Ranges = list[tuple[int, int]]  # number tokens allowed at each position of an answer: [first, last + 1)


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
    vocab_size: int = 0  # 0: as many as the tokenizer has
    rope_theta: float = 10_000.0
    sinusoidal_numbers: float = 0.0  # the share of a curve in number tokens at first: near numbers are alike
    action_head: int = 0  # width of an MLP added to what scores number tokens, 0 at first; 0: none
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
    state_sinusoids: int = 0  # a quantity's first two also enter as waves, so many: of length 16, 8, 4, ...
    state_mlp: int = 0  # width of an MLP that reads the whole state, standardised, ...
    state_bias_tokens: int = 0  # ... and adds to where so many of an answer's first tokens are predicted


VIT_SMALL = dict(vit_width=384, vit_depth=12, vit_heads=6, vit_mlp_dim=1536)
SO400M = dict(image_size=224, patch_size=14, vit_width=1152, vit_depth=27, vit_heads=16, vit_mlp_dim=4304)
GEMMA_2B = dict(width=2048, depth=18, heads=8, kv_heads=1, head_dim=256, mlp_dim=16_384, vocab_size=257_216)
PRESETS = {
    "nano": EFMConfig(sinusoidal_numbers=0.9, state_sinusoids=7),  # reads states
    "nano-vision": EFMConfig(depth=3),  # reads frames: one block more, to relate what it sees
    "nano-view": EFMConfig(depth=3, sinusoidal_numbers=0.9),  # reads frames of tables
    "nano-deep": EFMConfig(depth=4, mlp_dim=512, sinusoidal_numbers=0.9, state_sinusoids=5),  # reads tables
    "nano-arms": EFMConfig(depth=4, sinusoidal_numbers=1.0, state_mlp=512, state_bias_tokens=14),  # 14 joints
    "nano-wide": EFMConfig(width=128, depth=3, head_dim=32, mlp_dim=512),  # a table, few demonstrations
    "small": EFMConfig(width=512, depth=8, heads=8, kv_heads=2, head_dim=64, mlp_dim=2048, **VIT_SMALL),
    "paligemma-3b": EFMConfig(**GEMMA_2B, **SO400M),
}


# --- what both towers use ---------------------------------------------------------------------------------
def split_heads(x: Tensor, H: int) -> Tensor:
    """float (B, T, H C) -> (B, H, T, C)."""
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """float (B, H, T, C) -> (B, T, H C)."""
    return x.transpose(1, 2).flatten(2)


def no_autocast(x: Tensor) -> torch.autocast:
    """Where bfloat16, with 8 bits of precision, would blur what is measured: states, scores and d(o, g)."""
    return torch.autocast(x.device.type, enabled=False)


# --- vision tower (SigLIP layout) -------------------------------------------------------------------------
class ViTBlock(nn.Module):
    def __init__(self, cfg: EFMConfig):
        super().__init__()
        D = cfg.vit_width
        self.heads = cfg.vit_heads
        self.layer_norm1 = nn.LayerNorm(D, eps=1e-6)
        self.layer_norm2 = nn.LayerNorm(D, eps=1e-6)
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)
        self.fc1 = nn.Linear(D, cfg.vit_mlp_dim)
        self.fc2 = nn.Linear(cfg.vit_mlp_dim, D)

    def forward(self, x: Tensor) -> Tensor:
        """float (B, N, D) -> float (B, N, D); every patch sees every other."""
        h = self.layer_norm1(x)
        q = split_heads(self.q_proj(h), self.heads)  # (B, H, N, C)
        k = split_heads(self.k_proj(h), self.heads)
        v = split_heads(self.v_proj(h), self.heads)
        h = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out_proj(join_heads(h))  # (B, N, D)
        h = self.layer_norm2(x)
        return x + self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


class ViT(nn.Module):
    """Patch embedding with bias, learned positions, pre-LayerNorm blocks, no class token."""

    def __init__(self, cfg: EFMConfig):
        super().__init__()
        D = cfg.vit_width
        N = (cfg.image_size // cfg.patch_size) ** 2
        self.resize_to = (cfg.image_size, cfg.image_size) if cfg.resize else None
        self.patch_embedding = nn.Conv2d(3, D, cfg.patch_size, cfg.patch_size)
        self.position_embedding = nn.Embedding(N, D)
        self.layers = nn.ModuleList(ViTBlock(cfg) for _ in range(cfg.vit_depth))
        self.post_layernorm = nn.LayerNorm(D, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, height, width, 3) -> float (B, N, D)."""
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1  # in float32: bfloat16 blurs pixels
        if self.resize_to and x.shape[-2:] != self.resize_to:  # bicubic, as SigLIP's own preprocessing
            x = F.interpolate(x, self.resize_to, mode="bicubic", antialias=True).clamp(-1, 1)
        x = self.patch_embedding(x.to(self.patch_embedding.weight.dtype))  # (B, D, rows, columns)
        x = x.flatten(2).transpose(1, 2)  # (B, N, D)
        x = x + self.position_embedding.weight
        for layer in self.layers:
            x = layer(x)
        return self.post_layernorm(x)


# --- transformer (Gemma layout) ---------------------------------------------------------------------------
class RMSNorm(nn.Module):
    def __init__(self, D: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        """float (..., D) -> (..., D): in float32, and multiplied by 1 + weight, Gemma's convention."""
        return F.rms_norm(x.float(), (x.shape[-1],), 1 + self.weight.float(), 1e-6).to(x.dtype)


def rotary(cfg: EFMConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin float (B, 1, T, C) of rotary positions (Su et al., 2021), in halves as Gemma's."""
    exponent = torch.arange(0, cfg.head_dim, 2, device=positions.device) / cfg.head_dim  # (C/2,)
    frequency = cfg.rope_theta**-exponent
    angle = positions[..., None].float() * frequency  # (B, T, C/2)
    angle = angle.repeat(1, 1, 2)[:, None]  # (B, 1, T, C)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys float (B, H, T, C), turned by their positions' angles."""
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


class GemmaBlock(nn.Module):
    def __init__(self, cfg: EFMConfig):
        super().__init__()
        D, C = cfg.width, cfg.head_dim
        self.heads = cfg.heads
        self.kv_heads = cfg.kv_heads
        self.input_layernorm = RMSNorm(D)
        self.post_attention_layernorm = RMSNorm(D)
        self.q_proj = nn.Linear(D, cfg.heads * C, bias=False)
        self.k_proj = nn.Linear(D, cfg.kv_heads * C, bias=False)
        self.v_proj = nn.Linear(D, cfg.kv_heads * C, bias=False)
        self.o_proj = nn.Linear(cfg.heads * C, D, bias=False)
        self.gate_proj = nn.Linear(D, cfg.mlp_dim, bias=False)
        self.up_proj = nn.Linear(D, cfg.mlp_dim, bias=False)
        self.down_proj = nn.Linear(cfg.mlp_dim, D, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: Tensor | None, keep: int
    ) -> Tensor:
        """The block's output at the last `keep` of T positions, float (B, keep, D).

        x float (B, T, D), mask bool (B, 1, T, keys). A cache float (2, B, G, keys or more, C) has the keys
        and values of what came before x, and is given x's own.
        """
        T = x.shape[1]
        keys = mask.shape[-1]
        cos, sin = rope
        h = self.input_layernorm(x)
        k = split_heads(self.k_proj(h), self.kv_heads)  # (B, G, T, C)
        v = split_heads(self.v_proj(h), self.kv_heads)
        # every position has a key and a value; from here on only the last `keep` ask
        q = split_heads(self.q_proj(h[:, -keep:]), self.heads)  # (B, H, keep, C)
        q = rotate(q, cos[:, :, -keep:], sin[:, :, -keep:])
        k = rotate(k, cos, sin)
        if cache is not None:
            cache[0, :, :, keys - T : keys] = k
            cache[1, :, :, keys - T : keys] = v
            k, v = cache[:, :, :, :keys]  # (B, G, keys, C)
        grouped = self.heads != self.kv_heads  # several query heads share a key head
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, :, -keep:], enable_gqa=grouped)
        x = x[:, -keep:] + self.o_proj(join_heads(h))  # (B, keep, D)
        h = self.post_attention_layernorm(x)
        gate = F.gelu(self.gate_proj(h), approximate="tanh")
        return x + self.down_proj(gate * self.up_proj(h))


class Gemma(nn.Module):
    """The decoder's blocks, between embeddings that its caller makes and a final norm."""

    # the embeddings' gradient: a dense one is as large as the table, 2 GB at 3B; `logits` makes one already
    sparse = True

    def __init__(self, cfg: EFMConfig):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.width)
        self.layers = nn.ModuleList(GemmaBlock(cfg) for _ in range(cfg.depth))
        self.norm = RMSNorm(cfg.width)

    def embed(self, ids: Tensor) -> Tensor:
        """long (B, T) -> float (B, T, D)."""
        x = F.embedding(ids, self.embed_tokens.weight, sparse=self.sparse)
        return x * torch.tensor(math.sqrt(self.cfg.width), dtype=x.dtype)  # Gemma rounds the factor, too

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, keep: int, caches: Tensor | None = None
    ) -> Tensor:
        """Hidden states of the last `keep` positions, float (B, keep, D); the last block skips the others."""
        T = x.shape[1]
        last = len(self.layers) - 1
        rope = rotary(self.cfg, positions)
        for i, layer in enumerate(self.layers):
            cache = None if caches is None else caches[i]
            x = layer(x, rope, mask, cache, keep if i == last else T)
        return self.norm(x)


def prefix_mask(valid: Tensor, answers: int) -> Tensor:
    """The module docstring's mask: valid bool (B, P) of the prefix -> bool (B, 1, T, T), T = P + answers."""
    B, P = valid.shape
    T = P + answers
    mask = torch.ones(T, T, dtype=torch.bool, device=valid.device).tril()
    mask[:P, :P] = True
    keys = torch.cat([valid, valid.new_ones(B, answers)], 1)  # (B, T)
    mask = mask & keys[:, None]  # (B, T, T)
    itself = torch.eye(T, dtype=torch.bool, device=valid.device)
    return (mask | itself)[:, None]  # a padding row sees itself: no NaN


# --- the model --------------------------------------------------------------------------------------------
class EFM(nn.Module):
    """p(answer | observation, question). It is policy and steps-to-go predictor: the question tells which.

    An observation is a dict of tensors, of which any may be missing:

        images    uint8 (B, 2, height, width, 3)
        features  float (B, 2, N, Dv)   images that `encode_images` has encoded
        state     float (B, S, d)       S quantities of d numbers; or (B, F, S, d), at F moments
        joints    float (B, J) [rad]    become number tokens, 256 bins over a turn (Appendix A.2)

    A goal is known only through the prompt's text.
    """

    # of a model that has adapters (`add_lora`): their rank, the file of the weights below them
    lora_rank, base = 0, Path()

    def __init__(self, cfg: EFMConfig, tokenizer: Tokenizer):
        super().__init__()
        self.cfg = cfg = replace(cfg, vocab_size=cfg.vocab_size or tokenizer.tokenizer.get_vocab_size())
        self.tokenizer = tokenizer
        self.language_model = Gemma(cfg)
        if cfg.image_size:
            self.vision_tower = ViT(cfg)
            self.multi_modal_projector = nn.Linear(cfg.vit_width, cfg.width)
        if cfg.state_names:
            self.add_state_inputs()
        self.initialise()
        if cfg.action_head:  # behind the other weights, whose random numbers stay what they are without it
            first = nn.Linear(cfg.width, cfg.action_head)
            last = nn.Linear(cfg.action_head, cfg.width)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.action_head = nn.Sequential(first, nn.GELU(), last)

    def initialise(self) -> None:
        """Random weights, but for norms and biases; with `sinusoidal_numbers` partly number tokens."""
        self.apply(self.initialise_module)
        if self.cfg.sinusoidal_numbers:
            loc, share = self.tokenizer.loc, self.cfg.sinusoidal_numbers
            numbers = self.language_model.embed_tokens.weight.data[loc : loc + N_LOC]
            numbers.mul_((1 - share) ** 0.5).add_(share**0.5 * sinusoids(self.cfg.width))
        for name, p in self.named_parameters():  # what blocks add starts small (GPT-2)
            if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
                p.data /= math.sqrt(2 * (self.cfg.depth if "language" in name else self.cfg.vit_depth))

    def initialise_module(self, m: nn.Module) -> None:
        if isinstance(m, nn.Linear | nn.Conv2d):
            nn.init.normal_(m.weight, std=m.weight[0].numel() ** -0.5)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif m is self.language_model.embed_tokens:  # tied: inputs are scaled by sqrt(D), outputs are not
            nn.init.normal_(m.weight, std=m.embedding_dim**-0.5)
        elif isinstance(m, nn.Embedding):
            nn.init.normal_(m.weight, std=0.02)

    @property
    def device(self) -> torch.device:
        return self.language_model.embed_tokens.weight.device

    def forward(self, f: Callable[..., Any], *args: Any) -> Any:
        """f(model, *args), a method or a function of several: what DDP and FSDP take for one forward pass."""
        return f(self, *args)

    # --- the question -------------------------------------------------------------------------------------
    def encode_images(self, images: Tensor) -> Tensor:
        """uint8 (B, 2, height, width, 3) -> float (B, 2, N, Dv), each image on its own."""
        return self.vision_tower(images.flatten(0, 1)).unflatten(0, images.shape[:2])

    def prefix(self, obs: Obs, prompts: list[str], answer: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embeddings float (B, P, D) and valid bool (B, P) of images, joints, state and prompt.

        answer: ids long (B, L) that follow the prompt; P then counts them, too.
        """
        ids, valid = self.tokenizer.prompts(prompts, self.device)
        L = 0
        if answer is not None:
            L = answer.shape[1]
            ids = torch.cat([ids, answer], 1)
            valid = torch.cat([valid, torch.ones_like(answer, dtype=torch.bool)], 1)
        parts = [self.language_model.embed(ids)]
        if "state" in obs:
            parts.insert(0, self.embed_state(obs["state"]))  # (B, F S, D)
        if "joints" in obs:
            J = obs["joints"].shape[1]
            joints = UniformBins(256, -math.pi, math.pi, J).encode(obs["joints"].cpu()).to(self.device)
            parts.insert(0, self.language_model.embed(joints + self.tokenizer.loc))  # (B, J, D)
        if "features" in obs or "images" in obs:
            features = obs["features"] if "features" in obs else self.encode_images(obs["images"])
            parts.insert(0, self.multi_modal_projector(features).flatten(1, 2))  # (B, 2 N, D)
        x = torch.cat(parts, 1)  # (B, P, D)
        bias = self.state_bias(obs)
        if bias is not None:  # from the prompt's last token on, which predicts the answer's first
            first = x.shape[1] - 1 - L
            place = x[:, first : first + bias.shape[1]]
            place += bias[:, : place.shape[1]]
        observed = valid.new_ones(len(x), x.shape[1] - valid.shape[1])  # no padding there
        return x, torch.cat([observed, valid], 1)

    # --- the answer ---------------------------------------------------------------------------------------
    def hidden(self, obs: Obs, prompts: list[str], ids: Tensor) -> Tensor:
        """What predicts each token of an answer long (B, L), given those before it: float (B, L, D)."""
        L = ids.shape[1]
        x, valid = self.prefix(obs, prompts, ids[:, :-1])  # (B, P + L - 1, D)
        P = x.shape[1] - L + 1
        positions = valid.cumsum(1) - 1  # padding takes no position
        return self.language_model(x, positions, prefix_mask(valid[:, :P], L - 1), keep=L)

    def logits(self, hidden: Tensor, ids: Tensor | None) -> Tensor:
        """float (..., D) -> (..., K): scores of the number tokens `ids`, of every token if None."""
        table = self.language_model.embed_tokens.weight
        with no_autocast(hidden):
            hidden = hidden.to(table.dtype)
            if ids is None:
                return hidden @ table.T
            if self.cfg.action_head:
                hidden = hidden + self.action_head(hidden)
            return hidden @ table[ids].T

    def number_ids(self, first: int, end: int) -> Tensor:
        """Ids of the numbers first ... end - 1, long (end - first,)."""
        return torch.arange(first, end, device=self.device) + self.tokenizer.loc

    def log_probs(self, obs: Obs, prompts: list[str], answer: Tensor, ranges: Ranges) -> list[Tensor]:
        """log p of every allowed number at every answer position, given those before: L x float (B, K)."""
        hidden = self.hidden(obs, prompts, answer + self.tokenizer.loc)  # (B, L, D)
        least = min(first for first, _ in ranges)
        most = max(end for _, end in ranges)
        # one product for all positions; unbound, not indexed: an index costs a gradient of all positions
        logits = self.logits(hidden, self.number_ids(least, most)).float().unbind(1)  # L x (B, most - least)
        log_probs = []
        for scores, (first, end) in zip(logits, ranges, strict=True):
            log_probs.append(scores[:, first - least : end - least].log_softmax(-1))
        return log_probs

    def log_prob(
        self, obs: Obs, prompts: list[str], answer: Tensor, ranges: Ranges, temperature: float = 1.0
    ) -> Tensor:
        """log p(answer | o, question): the sum over the answer's tokens, float (B,).

        answer: number tokens long (B, L). p is normalised over the allowed numbers: this is the probability
        with which `sample` draws the answer at the same temperature.
        """
        log_probs = self.log_probs(obs, prompts, answer, ranges)
        total = 0
        for i, (first, _) in enumerate(ranges):
            log_p = log_probs[i]  # (B, K)
            if temperature != 1:
                log_p = (log_p / temperature).log_softmax(-1)
            token = answer[:, i, None] - first  # (B, 1)
            total = total + log_p.gather(1, token)[:, 0]
        return total

    @torch.no_grad()
    def sample(
        self,
        obs: Obs,
        prompts: list[str],
        ranges: Ranges,
        generator: torch.Generator | None = None,
        greedy: bool = False,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Draw an answer token by token, from the allowed numbers; the prefix is computed once (KV cache).

        Returns number tokens long (B, L), and the entropy of each position [nats], float (B, L).
        """
        cfg = self.cfg
        x, valid = self.prefix(obs, prompts)
        bias = self.state_bias(obs)
        B, P, _ = x.shape
        L = len(ranges)
        keys = F.pad(valid, (0, L - 1), value=True)  # bool (B, P + L - 1): of the prefix, and of the answer
        positions = keys.cumsum(1) - 1
        caches = x.new_empty(cfg.depth, 2, B, cfg.kv_heads, P + L - 1, cfg.head_dim)
        mask = prefix_mask(valid, 0)  # (B, 1, P, P)
        tokens, entropies = [], []
        for i, (first, end) in enumerate(ranges):
            now = positions[:, P + i - x.shape[1] : P + i]  # x is the prefix at first, then the last token
            hidden = self.language_model(x, now, mask, 1, caches)[:, -1]  # (B, D)
            logits = self.logits(hidden, self.number_ids(first, end)).float()  # (B, K)
            log_p = (logits / temperature).log_softmax(-1)
            entropies.append(-(log_p.exp() * log_p).sum(-1))
            # inverse-CDF sampling from one uniform number a row: the same draw on every device
            u = torch.rand(B, 1, generator=generator).to(log_p.device)
            token = (log_p.exp().cumsum(-1) < u).sum(-1).clamp(max=end - first - 1)  # (B,)
            if greedy:
                token = log_p.argmax(-1)
            tokens.append(token + first)
            x = self.language_model.embed(tokens[-1][:, None] + self.tokenizer.loc)  # (B, 1, D)
            if bias is not None and i + 1 < bias.shape[1]:
                x = x + bias[:, i + 1, None]
            mask = keys[:, None, None, : P + i + 1]  # (B, 1, 1, keys)
        return torch.stack(tokens, 1), torch.stack(entropies, 1)

    def steps_to_go(self, obs: Obs, goals: list[str], steps: StepsToGo) -> Tensor:
        """d(o, g) = E_p(steps to go | o, Question_steps_to_go(g)) [steps to go], float (B,)."""
        prompts = [QUESTION_STEPS.format(g) for g in goals]
        answer = torch.zeros(len(goals), 1, dtype=torch.long, device=self.device)  # its value is not read
        p = self.log_probs(obs, prompts, answer, steps.ranges)[0].exp()  # (B, K)
        with no_autocast(p):
            return p @ steps.edges.to(p)  # [Eq. 1]

    # --- text as an answer --------------------------------------------------------------------------------
    def text_log_prob(self, obs: Obs, prompts: list[str], texts: list[str]) -> Tensor:
        """log p(text | o, question): the sum over its tokens and <eos>, among all tokens, float (B,)."""
        ids, valid = self.tokenizer.answers(texts, self.device)  # (B, L)
        hidden = self.hidden(obs, prompts, ids)  # (B, L, D)
        log_p = self.logits(hidden, None).float().log_softmax(-1)  # (B, L, vocabulary)
        return (log_p.gather(2, ids[..., None])[..., 0] * valid).sum(1)

    @torch.no_grad()
    def generate_text(self, obs: Obs, prompts: list[str], longest: int = 64) -> list[str]:
        """The most probable token again and again, up to <eos> or `longest` of them; not cached."""
        ids = torch.zeros(len(prompts), 0, dtype=torch.long, device=self.device)
        while ids.shape[1] < longest and not (ids == self.tokenizer.eos).any(1).all():
            hidden = self.hidden(obs, prompts, F.pad(ids, (0, 1)))[:, -1]  # (B, D), predicts the added token
            ids = torch.cat([ids, self.logits(hidden, None).argmax(-1, keepdim=True)], 1)
        return [self.tokenizer.text(row) for row in ids.tolist()]

    # --- states in place of images ------------------------------------------------------------------------
    def add_state_inputs(self) -> None:
        """Weights that read a state: a linear map for each quantity and, perhaps, an MLP for them all."""
        cfg = self.cfg
        S = len(cfg.state_names)
        d = cfg.state_dim + 2 * 2 * cfg.state_sinusoids
        self.state_weight = nn.Parameter(torch.randn(S, d, cfg.width) / math.sqrt(d))
        # on the CPU even where the weights are made on the meta device: no file brings these two
        words = [self.tokenizer.encode(name) for name in cfg.state_names]
        self.register_buffer("state_words", torch.tensor(sum(words, []), device="cpu"), persistent=False)
        shares = [torch.full((1, len(ids)), 1 / len(ids), device="cpu") for ids in words]
        self.register_buffer("state_average", torch.block_diag(*shares), persistent=False)  # (S, words)
        if cfg.state_mlp:
            n, W = S * cfg.state_dim, cfg.state_mlp
            self.register_buffer("state_mean", torch.zeros(n))
            self.register_buffer("state_scale", torch.ones(n))
            out = cfg.state_bias_tokens * cfg.width
            layers = [nn.Linear(n, W), nn.GELU(), nn.Linear(W, W), nn.GELU(), nn.Linear(W, out)]
            self.state_mlp = nn.Sequential(*layers)

    def embed_state(self, state: Tensor) -> Tensor:
        """float (B, S, d) or, at F moments, (B, F, S, d) -> float (B, F S, D); positions tell moments apart.

        A quantity enters by its name, in the prompt's own words: so "red" in the prompt finds the red goal.
        """
        words = self.language_model.embed(self.state_words)  # (words of all names, D)
        names = self.state_average @ words  # (S, D), each the mean of its words
        state = state.flatten(1, -2).unflatten(1, (-1, len(names)))  # (B, F, S, d)
        with no_autocast(state):
            if self.cfg.state_mlp:
                state = self.standardise(state.flatten(2)).view_as(state)
            if self.cfg.state_sinusoids:  # a sum of cosines is nearly a distance: a goal's radius
                octaves = 2 ** torch.arange(self.cfg.state_sinusoids, device=state.device)
                # of positions alone: waves of the tool's lag tell the last action, and it would be copied
                angle = (state[..., :2, None] * (2 * math.pi / 16) * octaves).flatten(-2)
                state = torch.cat([state, angle.sin(), angle.cos()], -1)
            state = torch.einsum("bfsd,sdw->bfsw", state, self.state_weight) + names
        return state.flatten(1, 2)

    def state_bias(self, obs: Obs) -> Tensor | None:
        """What the MLP adds where an answer's first tokens are predicted: float (B, so many, D), or None."""
        if not self.cfg.state_mlp or "state" not in obs:
            return None
        now = obs["state"].flatten(1)[:, -len(self.state_mean) :]  # (B, S d), of the last moment
        with no_autocast(now):
            return self.state_mlp(self.standardise(now)).unflatten(1, (-1, self.cfg.width))

    def fit_standardiser(self, states: Tensor) -> None:
        """Take mean and standard deviation of the state's numbers from demonstrations' float (M, S d)."""
        self.state_mean.copy_(states.mean(0))
        self.state_scale.copy_(states.std(0) + 1e-2)  # some hardly vary

    def standardise(self, flat: Tensor) -> Tensor:
        """States float (..., S d) in standard deviations, cut off at three: an MLP says anything beyond."""
        return ((flat - self.state_mean) / self.state_scale).clamp(-3, 3)


def sinusoids(D: int) -> Tensor:
    """float (N_LOC, D), rows of norm 1: cosines and sines, of 4 to 512 numbers; near numbers are alike."""
    wavelength = torch.logspace(math.log10(4), math.log10(512), (D + 1) // 2)
    angle = 2 * math.pi * torch.arange(N_LOC)[:, None] / wavelength
    return torch.cat([angle.cos(), angle.sin()], 1)[:, :D] * (2 / D) ** 0.5
