"""Forward gradients of unrolled steps: derivatives along a few random directions in place of all."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from ..checks import check_fields
from ..inner.minimize import InnerSolver
from ..linalg.noise import normal, signs
from ..problem import Objective, Problem
from ..recording import recording
from ..solution import Solution, Throw
from ..tree import Tree, leaves
from .forward import carried, num_entries
from .path import Path, finish, fixed_steps

Distribution = Literal["rademacher", "normal", "orthogonal"]


@dataclass(frozen=True)
class ForwardGradient:
    """``mean_i v_i <df/dy, Z v_i>`` over random directions ``v_i``, with ``Z v_i`` carried along as in `ForwardMode`.

    An unbiased estimate of the gradient that `Unroll` computes, of `Steps` or `GradientDescent`, with memory that
    depends neither on the steps nor on the number of hyperparameters ((FG)^2U, Shen et al. 2024), at the cost of one
    Hessian product for each step and direction. Its relative standard error is about ``sqrt(p / num_directions)`` for
    p hyperparameters, so that it is for an outer loop of many small steps, each with new directions. First derivatives
    only.

    Args:
        num_directions: directions of a solve; each is a vector as large as the params (and the optimizer's state).
        distribution: of the directions, whose entries have mean 0 and variance 1. ``"rademacher"``: independent signs,
            of the least variance among those with independent entries. ``"normal"``: Gaussian. ``"orthogonal"``: of one
            length and at right angles to each other, so that as many directions as hyperparameters give the exact
            gradient; in float64, on the host's memory p times num_directions numbers.
        generator: what each solve draws its directions from, a generator of the CPU; None: PyTorch's default one, which
            `torch.manual_seed` sets. Two solves have different directions.
        to_init: a gradient flows to ``init`` as well: its entries count as hyperparameters.

    Raises:
        ValueError, TypeError: bad settings; (when solving) more orthogonal directions than hyperparameters.
        NotImplementedError: (when solving) it is being recorded: directions are drawn on the host.
    """

    num_directions: int = 1
    distribution: Distribution = "rademacher"
    generator: torch.Generator | None = field(default=None, repr=False, compare=False)
    to_init: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_directions < 1:
            raise ValueError(f"num_directions is {self.num_directions}: at least one is needed.")
        if self.distribution not in get_args(Distribution):
            raise ValueError(
                f"distribution is {self.distribution!r}: it is one of {', '.join(get_args(Distribution))}."
            )
        if not (self.generator is None or isinstance(self.generator, torch.Generator)):
            kind = type(self.generator).__name__
            raise TypeError(
                f"generator is of type {kind}: a torch.Generator is needed, such as torch.Generator().manual_seed(0)."
            )
        if self.generator is not None and self.generator.device.type != "cpu":
            raise ValueError(f"generator is on {self.generator.device}: a generator of the CPU is needed.")

    def run(
        self, objective: Objective, init: Tree, args: tuple[Tree, ...], solver: InnerSolver, throw: Throw
    ) -> Solution:
        """See `PathMethod`."""
        steps = fixed_steps(solver, "ForwardGradient")
        path = Path(objective, init, args, steps, "ForwardGradient", to_init=self.to_init)
        start = leaves(init) if self.to_init else []
        operands = [*path.walk.hparams, *(leaf for leaf in start if leaf.requires_grad)]
        count = sum(num_entries(tensor) for tensor in operands)
        if not torch.is_grad_enabled() or count == 0:
            return finish(path.problem, path.walk.steps.minimize(path.problem), throw)
        # Half of the weight of a mean in each of the two places where directions stand.
        directions = self._directions(count, path.problem) / math.sqrt(self.num_directions)
        return finish(path.problem, carried(path, directions, "ForwardGradient(...)", start), throw)

    def _directions(self, count: int, problem: Problem) -> Tensor:
        """``[num_directions, count]``, float64."""
        if recording():
            raise NotImplementedError(
                "hypergrad=ForwardGradient(...) cannot be recorded: its directions are drawn on the host, and a replay "
                "would have those of the recording. Call the function without capture, or take Unroll()."
            )
        shape = (self.num_directions, count)
        device, seed = problem.start.y.device, int(torch.randint(2**62, (), generator=self.generator, device="cpu"))
        if problem.ranks is not None:  # each would follow its own directions, and their sum none
            seed = problem.ranks.first(seed)
        if self.distribution == "rademacher":
            return signs(shape, seed, device)
        drawn = normal(shape, seed, device)
        if self.distribution == "normal":
            return drawn
        if self.num_directions > count:
            raise ValueError(
                f"num_directions is {self.num_directions}, and there are {count} entries of hyperparameters: no more "
                "than that are orthogonal. Take as many, which gives the exact gradient, or ForwardMode()."
            )
        q, r = torch.linalg.qr(drawn.mT)
        uniform: Tensor = (q * r.diagonal().sign()).mT  # among all rotations
        return math.sqrt(count) * uniform
