from __future__ import annotations

import pytest
import torch

from applications.few_shot.__main__ import main
from applications.few_shot.data import ImageClasses, Splits


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


QUICK = ["--width", "8", "--tasks", "2", "--inner-steps", "2", "--eval-tasks", "4", "--validate-every", "3"]


@pytest.fixture(scope="session")
def short_run(glyph_root, tmp_path_factory):
    """Makes the folder of a short, uninterrupted run of so many meta-steps."""

    def make(steps):
        folder = tmp_path_factory.mktemp("runs") / "whole"
        assert main([*QUICK, "--steps", str(steps), "--data-root", str(glyph_root), "--out", str(folder)]) == 0
        return folder

    return make
