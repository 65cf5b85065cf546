"""What measurements of one cell for each method, problem and precision share: the tables of their pages, two files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeVar

from applications.frame.run_folder import RunFolder

Precision = Literal["both", "float64", "float32"]


@dataclass(frozen=True)
class Config:
    """What to measure, and where to write it."""

    out: Path
    """Folder of the page."""
    precision: Precision = "both"
    """Precision of the problems."""


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    precision: str


C = TypeVar("C", bound=Cell)


def measured(precision: Precision, measure: Callable[[str], list[C]]) -> list[C]:
    """The cells of the precision that was asked for, or of both."""
    precisions = ("float64", "float32") if precision == "both" else (precision,)
    return [cell for precision in precisions for cell in measure(precision)]


def page(head: Sequence[str], cells: Sequence[C], table: Callable[[list[C]], str]) -> str:
    """The paragraphs of the head, then for each precision the table of its cells."""
    parts = list(head)
    for precision in dict.fromkeys(cell.precision for cell in cells):
        parts += [f"## {precision}", table([cell for cell in cells if cell.precision == precision])]
    return "\n\n".join(parts) + "\n"


def main(config: Config, name: str, measure: Callable[[str], list[C]], page: Callable[[list[C]], str]) -> list[C]:
    """Measure, print and write; the cells."""
    found = measured(config.precision, measure)
    text = page(found)
    print(text)
    write(config.out, name, text, found)
    return found


def write(out: Path, name: str, text: str, cells: Sequence[Cell]) -> None:
    """The page as ``NAME.md`` and the cells as ``NAME.json``.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = RunFolder(out)
    folder.write_text(f"{name}.md", text)
    folder.write_bytes(f"{name}.json", json.dumps([asdict(cell) for cell in cells], indent=1).encode())
