"""What tests of resumed runs compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from applications.frame.run_folder import RunFolder


def comparable(folder: Path) -> list[dict[str, Any]]:
    """Metrics without the clock."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in RunFolder(folder).metrics()]
