"""The picture: weights of the domains on the way, and what they are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from applications.frame.figures import BLUE, GREY, ORANGE, plt, png
from applications.frame.run import Row


def weights_and_losses(learned: Mapping[str, list[Row]], domains: Sequence[str], rows: Sequence[Row]) -> bytes:
    """A panel for each method with the weights against the step, and one with the test losses of all rules.

    Args:
        learned: the rows of each training that learned weights. rows: of the table.
    """
    widths = [*[1.0] * len(learned), 1.5]
    figure, axes = plt.subplots(
        1, len(widths), figsize=(3.2 * sum(widths), 3.6), width_ratios=widths, layout="constrained"
    )
    for place, (name, records) in zip(axes, learned.items(), strict=False):
        points = [(record["step"], record["weights"]) for record in records if "weights" in record]
        for index, domain in enumerate(domains):
            place.plot([step for step, _ in points], [weights[index] for _, weights in points], label=domain)
        place.set(title=name, xlabel="step", ylim=(0, 1))
        place.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("weight of the domain")
    axes[0].legend(frameon=False, fontsize=8)
    order = sorted(rows, key=lambda row: -row["test loss"])
    found = set(learned)
    colours = [BLUE if row["weights"] in found else ORANGE if "target" in row["weights"] else GREY for row in order]
    axes[-1].barh([row["weights"] for row in order], [row["test loss"] for row in order], color=colours)
    high, low = order[0]["test loss"], order[-1]["test loss"]
    axes[-1].set(xlim=(low - 0.1, high + 0.02), title="test loss on the target", xlabel="nats a character")
    axes[-1].spines[["top", "right"]].set_visible(False)
    return png(figure)
