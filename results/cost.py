"""What a sample costs, by counting: `python results/cost.py` writes the table of docs/scale.md.

A sample is a pair of frames (64 x 64 pixels; 3B: 224), a prompt of 16 tokens and an answer of 4, as on the tabletop.

FLOPs: a matrix of a x b takes 2 a b a token forward, 2 a b backward for its input's gradient and, if it is trained,
2 a b for its own. A Stage 1 sample is one forward and backward pass, half of them over an action's tokens and half
over one steps-to-go token. A Stage 2 sample is a step of practice: both models' ViTs see the new frame, the policy
decodes an action (KV cache), the reward model answers d; then comes one forward and backward pass of the decoder on
kept features.

Memory: weights, gradients and AdamW's two moments of what is trained, in float32, 16 bytes a parameter; 4 a frozen
one. Stage 2 trains the decoder only and keeps a second, frozen model for d (LoRA: a second set of adapters on the
same weights). FSDP2, for 3B trained whole, spreads all of it over the devices and gathers, whole, the embeddings and
one block at a time to train, both models to roll out; the others run DDP, which spreads the samples only. Activations
are what autograd keeps for one sample, as `activations` lists it, with fused attention, in float32 and not
recomputed. The caching allocator, PyTorch itself, a block's short-lived results and the all-vocabulary logits of
instruction prediction come on top.

tests/test_cost.py holds all three to 10 % of what small runs on one device take; several devices are arithmetic.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import PRESETS, EFMConfig  # noqa: E402

PROMPT, ANSWER, ALLOWED = (
    16,
    4,
    50,
)  # tokens: of a prompt, of a tabletop action; numbers allowed at a position
NANO = replace(PRESETS["nano-vision"], image_size=64, vocab_size=1100)
ROWS = {  # title: sizes, rank of LoRA (0: full fine-tuning), whether FSDP2 spreads it
    "nano": (NANO, 0, False),
    "small": (replace(PRESETS["small"], image_size=64, vocab_size=1100), 0, False),
    "3B, full": (PRESETS["paligemma-3b"], 0, True),
    "3B, LoRA": (PRESETS["paligemma-3b"], 16, False),
}


# --- sizes ------------------------------------------------------------------------------------------------------------
def matrices(cfg: EFMConfig) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(inputs, outputs) of the matrices of a ViT block and of a decoder block: k, v; then q, o, gate, up, down."""
    V, D, q, kv = cfg.vit_width, cfg.width, cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    vit = [(V, V)] * 4 + [(V, cfg.vit_mlp_dim), (cfg.vit_mlp_dim, V)]
    return vit, [(D, kv)] * 2 + [(D, q), (q, D)] + [(D, cfg.mlp_dim)] * 2 + [(cfg.mlp_dim, D)]


def parameters(cfg: EFMConfig, rank: int = 0) -> dict[str, int]:
    """How many a decoder block, the ViT, the embeddings and all have; and adapters of rank r, r (a + b) a matrix."""
    vit, gemma = matrices(cfg)
    V, D, N = cfg.vit_width, cfg.width, (cfg.image_size // cfg.patch_size) ** 2
    vit_block = sum(a * b + b for a, b in vit) + 4 * V  # biases, two LayerNorms
    block = sum(a * b for a, b in gemma) + 2 * D
    tower = (3 * cfg.patch_size**2 + 1) * V + N * V + cfg.vit_depth * vit_block + 2 * V
    embeddings = cfg.vocab_size * D
    vit_adapters, adapters = (
        depth * rank * sum(a + b for a, b in m) for depth, m in ((cfg.vit_depth, vit), (cfg.depth, gemma))
    )
    return {"block": block, "tower": tower, "embeddings": embeddings,
            "all": tower + (V + 1) * D + embeddings + cfg.depth * block + D,
            "vit_adapters": vit_adapters, "adapters": adapters}  # fmt: skip


# --- FLOPs ------------------------------------------------------------------------------------------------------------
def vit_flops(cfg: EFMConfig, rank: int = 0, train: bool = False) -> float:
    """Of one frame, forward or, `train`, forward and backward."""
    N, once = (cfg.image_size // cfg.patch_size) ** 2, 2 if rank else 3
    patches = (
        2 * N * 3 * cfg.patch_size**2 * cfg.vit_width * (1 + (train and not rank))
    )  # pixels take no gradient
    matrix = sum(2 * N * a * b for a, b in matrices(cfg)[0]) * (once if train else 1)
    adapters = sum(2 * N * rank * (a + b) for a, b in matrices(cfg)[0]) * (3 if train else 1)
    attention = 4 * N * N * cfg.vit_width * (3 if train else 1)
    return patches + cfg.vit_depth * (matrix + adapters + attention)


def decoder_flops(
    cfg: EFMConfig, T: int, keep: int, keys: int = 0, rank: int = 0, train: bool = False
) -> float:
    """Of T tokens that attend to `keys` (0: to one another); the last block computes no more than the last `keep`."""
    keys, passes, once = keys or T, 3 if train else 1, (2 if rank else 3) if train else 1
    total = 2 * keep * cfg.width * ALLOWED * passes  # logits
    for tokens in [T] * (cfg.depth - 1) + [keep]:
        for i, (a, b) in enumerate(matrices(cfg)[1]):
            n = T if i < 2 else tokens  # every token's keys and values are needed
            total += 2 * n * (a * b * once + rank * (a + b) * passes)
        total += 4 * tokens * keys * cfg.heads * cfg.head_dim * passes
    return total


def projector_flops(cfg: EFMConfig, tokens: int) -> float:
    return 2 * tokens * cfg.vit_width * cfg.width


def prefix_tokens(cfg: EFMConfig) -> int:
    return 2 * (cfg.image_size // cfg.patch_size) ** 2 + PROMPT


# --- memory -----------------------------------------------------------------------------------------------------------
def activations(cfg: EFMConfig, T: int, keep: int, vit: bool) -> float:
    """Bytes that autograd keeps for the backward pass of a sample of T tokens."""
    N, D, M = (cfg.image_size // cfg.patch_size) ** 2, cfg.width, cfg.mlp_dim
    q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    # x and its norm, twice; q, k, v, what attention returns; before and after GELU
    tower = (
        2
        * N
        * (
            3 * cfg.patch_size**2
            + cfg.vit_depth * (8 * cfg.vit_width + 2 * cfg.vit_mlp_dim)
            + 2 * cfg.vit_width
        )
    )
    # x, x at length 1 and that times the norm's weight, twice; q, attention's; gate, its GELU, up, their product
    per_token, keys = 6 * D + 2 * q + 4 * M, 2 * kv
    decoder = (cfg.depth - 1) * T * (per_token + keys) + T * (3 * D + keys) + keep * per_token
    masks = (cfg.depth - 1) * T * T  # as numbers, one for each block
    return 4 * (vit * tower + 2 * N * cfg.vit_width + decoder + masks + 2 * T * cfg.head_dim)


# --- the two stages ---------------------------------------------------------------------------------------------------
@dataclass
class Cost:
    parameters: int  # of one model, adapters included
    trained: int
    flops: float  # a sample
    states: float  # bytes: weights, gradients, moments
    gathered: tuple[
        float, float
    ]  # bytes that each of several devices holds whole at a time: to train, to roll out
    activations: float  # bytes a sample

    def memory(self, devices: int, shard: bool) -> float:
        """Bytes on each device, with one sample."""
        if devices == 1 or not shard:
            return self.states + self.activations
        return self.states / devices + max(self.gathered[0] + self.activations, self.gathered[1])


def cost(cfg: EFMConfig, rank: int, stage: int) -> Cost:
    n, P = parameters(cfg, rank), prefix_tokens(cfg)
    vit, T = stage == 1, P + ANSWER - 1
    projector = projector_flops(cfg, P - PROMPT)
    train = [decoder_flops(cfg, P + L - 1, L, rank=rank, train=True) for L in (ANSWER, 1)]
    if stage == 1:
        flops = sum(train) / 2 + 2 * vit_flops(cfg, rank, train=True) + projector * (2 if rank else 3)
    else:
        decode = decoder_flops(cfg, P, 1, rank=rank) + sum(
            decoder_flops(cfg, 1, 1, P + i, rank) for i in range(1, ANSWER)
        )
        d = decoder_flops(cfg, P, 1, rank=rank)
        # the projector: once in each question, forward and, for its own gradient, backward in training
        flops = 2 * vit_flops(cfg, rank) + decode + d + train[0] + projector * (3 if rank else 4)
    adapters = n["adapters"] + n["vit_adapters"]
    trained = (n["adapters"] + vit * n["vit_adapters"]) if rank else n["all"] - (not vit) * n["tower"]
    frozen = n["all"] + adapters - trained
    second = 0 if stage == 1 else adapters if rank else n["all"]  # the reward model's own weights
    to_train = 8 * (n["embeddings"] + n["block"])  # with gradients
    to_roll_out = 0 if stage == 1 else 8 * n["all"]  # two models
    states = 16 * trained + 4 * (frozen + second)
    kept = activations(cfg, T, ANSWER, vit)
    return Cost(n["all"] + adapters, trained, flops, states, (to_train, to_roll_out), kept)


# --- the table --------------------------------------------------------------------------------------------------------
def short(x: float) -> str:
    """12,345,678 -> 12.3 M"""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if x >= factor:
            return f"{x / factor:.3g} {unit}"
    return f"{x / 1e3:.3g} k"


def table() -> str:
    columns = ["model", "stage", "parameters", "trained", "FLOPs a sample", "bytes a sample's activations"]
    columns += ["bytes on 1 device", "on each of 8", "on each of 64"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for title, (cfg, rank, shard) in ROWS.items():
        for stage in (1, 2):
            c = cost(cfg, rank, stage)
            cells = [c.parameters, c.trained, c.flops, c.activations]
            cells += [c.memory(n, shard) for n in (1, 8, 64)]
            lines.append(f"| {title} | {stage} | " + " | ".join(map(short, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    page = Path(__file__).parent.parent / "docs" / "scale.md"
    before, rest = page.read_text().split("<!-- cost -->\n")
    _, after = rest.split("<!-- end -->", 1)
    page.write_text(f"{before}<!-- cost -->\n{table()}<!-- end -->{after}")
    print(table())
