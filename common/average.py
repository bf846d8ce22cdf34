"""An exponential average of a model's weights: what Stage 1 looks at and saves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from common.ranks import shard_like


class Average:
    """a <- decay a + (1 - decay) w after each update, over the weights that are trained: of LoRA the adapters.

    The decay grows to its value, (1 + n) / (10 + n) after n updates: the first weights are soon forgotten. 0: no average.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.weights.items()} if decay else {}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, average in self.average.items():
            average.lerp_(self.weights[name], 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model's weights are the averages."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    @torch.no_grad()
    def exchange(self) -> None:
        for name, average in self.average.items():
            weight = self.weights[name]
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Tensor | int]:
        return {"updates": self.updates, **self.average}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        self.updates = state["updates"]
        with torch.no_grad():
            for name, average in self.average.items():
                average.copy_(shard_like(state[name], average))
