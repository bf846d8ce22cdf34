"""What every test needs: the repository's root on the path, one thread, the `slow` marker, shared data."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the reference models have random weights: nothing is fetched


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: minutes, not seconds; left out unless asked for with `-m slow`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr or any("::" in arg for arg in config.args):  # asked for by marker or by name
        return
    config.hook.pytest_deselected(items=[i for i in items if i.get_closest_marker("slow")])
    items[:] = [i for i in items if not i.get_closest_marker("slow")]


def declare_torchvision_ops() -> torch.library.Library | None:
    """Make `import timm`, `import transformers` work with a torchvision that was compiled for another torch.

    It then fails on describing torchvision::nms, an operator that does not exist; none of our tests calls it,
    so declaring its name is enough. Returns what must stay alive, or None where torchvision imports as it is.
    """
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return None
    except RuntimeError:
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # what the failed import left behind
        library = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


@pytest.fixture(scope="session")
def torchvision_ops():
    """Ask for it in every test that imports timm or transformers."""
    return declare_torchvision_ops()


# --- what several files need, once a process -----------------------------------------------------------
EPISODES = 12


@pytest.fixture(scope="session")
def states() -> dict[str, np.ndarray]:
    """Demonstrations from states."""
    from common.demos import record

    return record("pointmass", "state", EPISODES, seed=0)


@pytest.fixture(scope="session")
def images() -> dict[str, np.ndarray]:
    """The same ones, from images."""
    from common.demos import record

    return record("pointmass", "images", EPISODES, seed=0)


@pytest.fixture(scope="session", params=["state", "images"])
def recorded(request, states, images) -> tuple[str, dict[str, np.ndarray]]:
    return request.param, {"state": states, "images": images}[request.param]


def one_view(data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As if the domain had but one view: the frame before then belongs to an observation."""
    return data | ({"frames": data["frames"][np.arange(len(data["action"]))][:, 0].copy()} if "frames" in data else {})


@pytest.fixture(scope="session")
def references(tmp_path_factory) -> Path:
    """A folder with an uninterrupted run of each stage, Stage 2's on Stage 1's, and the demonstrations."""
    from tests.runs import SCRIPTS, train

    folder = tmp_path_factory.mktemp("references")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in SCRIPTS:
            train(stage, f"runs/{stage}")
    return folder


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
