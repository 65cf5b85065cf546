"""Where to compute."""

from __future__ import annotations

import torch

from applications.frame.errors import UserError


def select_device(name: str) -> torch.device:
    """``"auto"``, the GPU where there is one, ``"cpu"`` or ``"cuda"``.

    Raises:
        UserError: a GPU is asked for and there is none, or it is none of the three.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here. Use --device cpu, or install the driver.")
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"There is no device {name!r}: take auto, cpu or cuda.")
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(automatic if name == "auto" else name)
