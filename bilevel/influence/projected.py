"""Influences from a few numbers an example: gradients by random signs, stored once for all queries to come."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..linalg.noise import signs
from ..solution import Result, Solution, make_codes
from ..tree import Tree
from .attribution import Influence
from .data import Losses, count_of
from .scores import InfluenceScores


class ProjectedInfluence:
    """Influences from ``dimension`` stored numbers an example: a query costs its gradient, and no solve and no pass.

    With random signs ``P [k, p]`` over ``sqrt(k)`` (Johnson and Lindenstrauss 1984; Achlioptas 2003) the scalar product
    of ``P g_q`` and ``P A^{-1} g_i`` is ``g_q^T A^{-1} g_i`` in the mean, with an error of about
    ``|g_q| |A^{-1} g_i| / sqrt(k)``. The second vector is what is stored, ``[n, k]``: k right-hand sides are solved, k
    being the dimension, and the examples are passed over once for each chunk of them. P is drawn anew where it is
    needed, row by row. It pays where queries come one by one, or are many more than k; for a few it costs more.

    Args:
        influence: with the model, the examples and the solver.
        dimension: k. seed: of the signs.
        features: those of an earlier one with the same arguments, in place of the solves, as a file kept them.

    Attributes:
        features: ``P A^{-1} g_i`` of each example, ``[n, k]``.
        stats: of the k linear solves, as in `InfluenceScores`; where features were given, of none.

    Raises:
        ValueError: a dimension below 1, or features of another shape. SolveError: as the influence's ``throw`` says.
    """

    def __init__(self, influence: Influence, dimension: int, *, seed: int = 0, features: Tensor | None = None):
        if dimension < 1:
            raise ValueError(f"dimension is {dimension}: one number an example at least is stored.")
        shape = (influence.num_examples, dimension)
        if features is not None and features.shape != shape:
            raise ValueError(f"features has shape {tuple(features.shape)}: {shape} is needed, examples by dimension.")
        self.influence, self.dimension, self.seed = influence, dimension, seed
        none = torch.zeros(1, dtype=torch.int64, device="cpu")
        self.stats = {"num_steps": none, "result": make_codes(Result.STEPS_DONE, none)}
        self.features = self._solved() if features is None else features

    @torch.no_grad()
    def of(self, queries: Tree, losses: Losses | None = None) -> InfluenceScores:
        """The influences on queries, as `Influence.of` gives them.

        ``error`` is that of the projection, estimated from the lengths of the projected vectors; ``stats`` has for each
        query the worst of the solves behind the features, where these were made here.
        """
        found = [
            self._projected(self.influence._gradients(batch, losses or self.influence.losses))
            for batch in self.influence._batches(queries, self.influence.query_chunk)
        ]
        projected = torch.cat(found)
        values = projected @ self.features.T
        lengths = projected.square().sum(-1) * self.features.square().sum(-1).mean()
        error = ((lengths + values.square().mean(-1)) / self.dimension).sqrt()
        count = count_of(queries)
        return InfluenceScores(-values, error, {name: stat.amax().expand(count) for name, stat in self.stats.items()})

    @torch.no_grad()
    def _solved(self) -> Tensor:
        """``P A^{-1} g_i``: the solves are those of the rows of P, which the examples' slopes along them follow."""
        influence, parts, solves = self.influence, [], []
        for rows in self._rows():
            solve: Solution[Tensor] = influence._solve(rows)
            batches = influence._batches(influence.train, influence.chunk)
            parts.append(torch.cat([influence._slopes(batch, solve.value) for batch in batches], -1))
            solves.append(solve.stats)
        self.stats = {name: torch.cat([stats[name] for stats in solves]) for name in solves[0]}
        return torch.cat(parts).T.contiguous()

    def _projected(self, vectors: Tensor) -> Tensor:
        """``[q, p] -> [q, k]``."""
        return torch.cat([vectors @ rows.T for rows in self._rows()], -1)

    def _rows(self) -> Iterator[Tensor]:
        """P, so many rows at once as there are queries; each row has a seed of its own."""
        y, size = self.influence.y, self.influence.query_chunk
        seeds = torch.randint(
            2**31, (self.dimension,), generator=torch.Generator().manual_seed(self.seed), device="cpu"
        ).tolist()
        for first in range(0, self.dimension, size):
            rows = [signs(y.shape, seed, y.device) for seed in seeds[first : first + size]]
            yield torch.stack(rows).to(y) / self.dimension**0.5
