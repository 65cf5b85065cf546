from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from applications.few_shot.data import ImageClasses, Splits


def real_data_root() -> Path:
    default = Path(__file__).parents[3].parent / "shared" / "data"
    return Path(os.environ.get("BILEVEL_DATA", default))


@pytest.fixture(scope="session")
def omniglot_root() -> Path:
    root = real_data_root()
    if not (root / "omniglot" / "omniglot28.npz").is_file():
        pytest.skip(f"real Omniglot is not at {root}; set BILEVEL_DATA to its folder")
    return root


@pytest.fixture(scope="session")
def glyph_root(tmp_path_factory) -> Path:
    """One cache of the built-in data set for all tests."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def toy_splits() -> Splits:
    """20 + 20 + 20 classes of blurred noise patterns, 20 noisy instances each, 28 x 28."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(60, 1, 1, 7, 7, generator=generator)
    patterns = torch.nn.functional.interpolate(coarse.flatten(0, 2).unsqueeze(1), 28, mode="bilinear")
    noise = 0.3 * torch.rand(60, 20, 1, 28, 28, generator=generator)
    images = ((patterns.view(60, 1, 1, 28, 28) * 0.7 + noise) * 255).to(torch.uint8)
    parts = [ImageClasses(images[i : i + 20], tuple(f"class{j}" for j in range(i, i + 20))) for i in (0, 20, 40)]
    return Splits(*parts)
