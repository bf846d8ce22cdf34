"""What a flag may be, said by its type, and the flags that the stages share."""

from __future__ import annotations

import typing
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from common import UserError


@dataclass(frozen=True)
class Within:
    """The bounds of a number, as metadata of its type: `check` reads them, tyro does not."""

    least: float
    most: float = float("inf")

    def hold(self, value: float) -> bool:
        return self.least <= value <= self.most and value < float("inf")

    def complaint(self) -> str:
        if self.most == float("inf"):
            return f"must be at least {self.least:g}"
        return f"must be between {self.least:g} and {self.most:g}"


Count = Annotated[int, Within(1)]
Whole = Annotated[int, Within(0)]
Size = Annotated[float, Within(0)]
Positive = Annotated[float, Within(1e-9)]
Share = Annotated[float, Within(0, 1)]


@dataclass
class DeviceFlags:
    """Where it is computed: the same in all stages."""

    device: Literal["cpu", "cuda", "mps"] | None = None  # None: a CUDA GPU where there is one, else the CPU
    threads: Count | None = None  # of the CPU; None: two for a small model, PyTorch's choice for others


@dataclass
class ScaleFlags(DeviceFlags):
    """Precision, adapters, and where the run is kept: the same in Stages 1 and 2."""

    lora_rank: Whole = 0  # train LoRA adapters of this rank; 0: no new adapters
    bf16: bool = False  # matrix products in bfloat16; weights, scores and d(o, g) stay in float32
    checkpointing: bool = False  # keep no activations inside the blocks: less memory, a third more time
    compile: bool = False  # torch.compile the blocks: minutes at first, faster after
    eval_episodes: Count = 500  # rollouts of the final policy, for summary.json
    out: str | None = None  # the run's folder; None: runs/{domain}-{stage}-s{seed}
    resume: bool = False  # continue an interrupted run, exactly


def flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def check(cfg: Any) -> None:
    """Raise UserError unless each number of the configuration is within its type's bounds; None is the domain's."""
    hints = typing.get_type_hints(type(cfg), include_extras=True)
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        if value is None:
            continue
        for kind in (hints[field.name], *typing.get_args(hints[field.name])):
            for bounds in getattr(kind, "__metadata__", ()):
                if isinstance(bounds, Within) and not bounds.hold(value):
                    raise UserError(f"{flag(field.name)} {value}: {bounds.complaint()}")


def fill(cfg: Any, defaults: dict[str, Any]) -> None:
    """Give each field of the configuration that is None its default."""
    for field, value in defaults.items():
        if getattr(cfg, field) is None:
            setattr(cfg, field, value)


def must(rules: list[tuple[Any, str]]) -> None:
    """Raise UserError with the complaint of the first rule (holds, complaint) that does not hold."""
    for holds, complaint in rules:
        if not holds:
            raise UserError(complaint)
