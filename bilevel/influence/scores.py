"""What is told of influences, and the file that they are kept in on the way."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files import write_atomically
from ..solution import Result, Solution


@dataclass(frozen=True)
class InfluenceScores:
    """Influences of n training examples on q queries.

    Attributes:
        values: ``-g_q^T A^{-1} g_i``, ``[q, n]``: negative where more weight of the example lowers the query's loss.
        error: an estimate of the error that the linear solves left in a row of values, in root mean square, ``[q]``.
        stats: of the linear solves, ``[q]`` each: ``num_steps``, ``residual_norm``, ``relative_residual``, ``result``.
    """

    values: Tensor
    error: Tensor
    stats: dict[str, Tensor]

    @property
    def result(self) -> Result:
        """The worst `Result` over the queries."""
        return Solution(None, self.stats).result

    def left_out(self, sets: Tensor) -> Tensor:
        """The predicted change of each query's loss when a set of examples is left out: ``[s, n] bool -> [s, q]``.

        To first order, so that the effects of the examples add up.
        """
        if not isinstance(sets, Tensor):
            raise TypeError(f"sets is a {type(sets).__name__}: masks [s, n] of bool are needed, n the examples.")
        if sets.dtype != torch.bool or sets.shape[-1] != self.values.shape[1]:
            raise ValueError(
                f"sets has shape {tuple(sets.shape)}, {sets.dtype}: masks [s, n] of bool are needed, n the examples"
            )
        return -(sets.to(self.values) @ self.values.T) / self.values.shape[1]


def joined(parts: list[InfluenceScores]) -> InfluenceScores:
    names = set.intersection(*(set(part.stats) for part in parts))
    return InfluenceScores(
        torch.cat([part.values for part in parts]),
        torch.cat([part.error for part in parts]),
        {name: torch.cat([part.stats[name] for part in parts]) for name in sorted(names)},
    )


def keep(file: str | Path, mark: list[Tensor], scores: InfluenceScores) -> None:
    content = {"mark": mark, "values": scores.values, "error": scores.error, "stats": scores.stats}
    write_atomically(Path(file), lambda opened: torch.save(content, opened))


def kept(file: Path, mark: list[Tensor]) -> list[InfluenceScores]:
    """The scores of a file, or none."""
    if not file.is_file():
        return []
    try:
        found = torch.load(file, weights_only=True)
        before, scores = found["mark"], InfluenceScores(*(found[name] for name in ("values", "error", "stats")))
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{file} is no file of influences, or is damaged: take another one, or delete it.") from error
    exact, sizes, numbers = (part.cpu() for part in mark)
    same = len(before) == len(mark) and all(a.shape == b.shape for a, b in zip(before, mark, strict=True))
    if not same or not (
        torch.equal(before[0].cpu(), exact)
        and torch.allclose(before[1].cpu(), sizes, rtol=1e-4, atol=0)
        and bool(((before[2].cpu() - numbers).abs() <= 1e-4 * sizes).all())
    ):
        raise ValueError(
            f"{file} has the influences of other examples, queries, params, losses, penalty or settings: take another "
            "file."
        )
    return [scores]
