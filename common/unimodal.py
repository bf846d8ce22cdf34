"""`stage0.py --unimodal`: what the two towers learn from when pictures and words never meet. See docs/pretraining.md."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import EFM

CELLS = 4  # a patch is cut into 4 x 4 cells, each with its mean colour
COLOURS = 3 * CELLS**2  # numbers of a patch


def cell_colours(images: Tensor, patch_size: int) -> Tensor:
    """Each patch's 4 x 4 cells, uint8 (B, 2, H, H, 3) -> float (B, 2, N, 48): mean colours in [-1, 1]."""
    side = images.shape[2] // patch_size  # as the ViT, without a rest at the right and the bottom
    pixels = images[:, :, : side * patch_size, : side * patch_size].flatten(0, 1).permute(0, 3, 1, 2)
    cells = F.adaptive_avg_pool2d(pixels.float() / 127.5 - 1, side * CELLS)  # (2 B, 3, rows, columns)
    colours = F.unfold(cells, CELLS, stride=CELLS).transpose(1, 2)  # (2 B, N, 48)
    return colours.unflatten(0, images.shape[:2])


def picture_loss(model: EFM, head: nn.Linear, images: Tensor) -> Tensor:
    """|W f + b - [c, c']|², averaged over patches and numbers; no word is in it.

    f (Dv,) is a patch's feature, c (48,) its `cell_colours`, c' those of the same patch of the other image.
    W and b, the head, are thrown away at the end.
    """
    colours = cell_colours(images, model.cfg.patch_size)  # (B, 2, N, 48)
    both = torch.cat([colours, colours.flip(1)], -1)  # (B, 2, N, 96)
    return F.mse_loss(head(model.encode_images(images)), both)


def word_loss(model: EFM, texts: list[str], questions: list[str], tokens: Tensor, ranges: list) -> Tensor:
    """-log p(text) - log p(answer | question), averaged: no picture is in it; tokens long (B, 2), the answers'."""
    written = model.text_log_prob({}, [""] * len(texts), texts)  # (B,), word after word
    return -(written + model.log_prob({}, questions, tokens, ranges)).mean()
