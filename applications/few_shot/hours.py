"""``hours``: how the accuracy of runs on validation classes grew with the hours of their training, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from applications.few_shot.config import Config
from applications.few_shot.train import describe
from applications.frame.errors import UserError
from applications.frame.figures import png
from applications.frame.run_folder import RunFolder, understood

PAPER = {(5, 1): (99.16, 99.50), (5, 5): (99.67, 99.74), (20, 1): (94.46, 96.18), (20, 5): (98.69, 99.14)}
"""Ways and shots on Omniglot -> accuracy of implicit MAML by gradient descent and Hessian-free, in percent: table 2 of
Rajeswaran et al. 2019, on test classes."""

USAGE = "usage: python -m applications.few_shot hours RUN [RUN ...] PICTURE.png"


def command(arguments: list[str]) -> int:
    """Read the runs, write the picture."""
    if len(arguments) < 2 or not arguments[-1].endswith(".png") or arguments[0].startswith("-"):
        print(USAGE)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    picture = draw([Path(argument) for argument in arguments[:-1]])
    RunFolder(Path(arguments[-1]).parent).write_bytes(Path(arguments[-1]).name, picture)
    return 0


def validations(rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Hours of training and accuracy in percent, for each validation of a run."""
    hours = {row["step"]: row["seconds"] / 3600 for row in rows if "seconds" in row}
    return [(hours[r["step"]], float(r["validation_accuracy"])) for r in rows if "validation_accuracy" in r]


def draw(runs: list[Path]) -> bytes:
    """A curve for each run, and the paper's numbers for its setting as lines: a PNG.

    Raises:
        UserError: no folder of a run, or one without a validation.
    """
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    settings: dict[tuple[int, int], Any] = {}
    for path in runs:
        folder = RunFolder.open(path)
        config = Config.from_json(folder.read_json("config.json"))
        with understood(path / "metrics.jsonl"):
            points = validations(folder.metrics())
        if not points:
            raise UserError(f"{path} has no validation yet: there is nothing to draw. Train on, with --validate-every.")
        (line,) = axis.plot(*zip(*points, strict=True), ".-", label=f"{describe(config)} ({path.name})")
        if config.data == "omniglot":
            settings.setdefault((config.ways, config.shots), line.get_color())
    for (ways, shots), colour in settings.items():
        for value, style in zip(PAPER.get((ways, shots), ()), ("--", ":"), strict=False):
            axis.axhline(value, color=colour, linestyle=style, linewidth=1)
    axis.set(xlabel="hours of training", ylabel="accuracy on validation classes (%)")
    axis.set_title("dashed: the paper's gradient descent, dotted: its Hessian-free (test classes)", fontsize=9)
    axis.legend(frameon=False, loc="lower right", fontsize=8)
    return png(figure)
