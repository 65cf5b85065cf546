"""Influences ``-g_q^T A^{-1} g_i`` of one trained network, by this library and by those of the others that are here."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bilevel as bl
from applications.influence.model import Batch, Params, losses

Curvature = Literal["gauss_newton", "full"]
GAUSS: Curvature = "gauss_newton"
DIMENSION = 256
"""Numbers that the projections keep of a gradient."""


@dataclass(frozen=True)
class Trained:
    """A network of one hidden layer (tanh) at the minimum of its mean loss and ``decay / 2 * |params|^2``, in float64.

    Attributes:
        module: with the params in it.
    """

    module: nn.Sequential
    train: Batch
    queries: Batch
    decay: float

    @classmethod
    def make(cls, fit: Params, train: Batch, queries: Batch, decay: float) -> Trained:
        """From the params of `applications.influence.model.Model`, whose matrices are transposed."""
        (features, hidden), classes = fit["weight0"].shape, fit["weight1"].shape[1]
        module = nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, classes)).double()
        state = {"0.weight": fit["weight0"].T, "0.bias": fit["bias0"], "2.weight": fit["weight1"].T,
                 "2.bias": fit["bias1"]}  # fmt: skip
        module.load_state_dict(state)
        return cls(module, train, queries, decay)

    @property
    def params(self) -> Params:
        return {name: value.detach() for name, value in self.module.named_parameters()}

    def outputs(self, params: Params, batch: Batch) -> Tensor:
        found: Tensor = bl.nn.functional_call(self.module, params, (batch[0],))
        return found

    def in_single_precision(self) -> Trained:
        """A copy: kronfluence changes the module that it is given."""
        train, queries = ((features.float(), labels) for features, labels in (self.train, self.queries))
        return Trained(copy.deepcopy(self.module).float(), train, queries, self.decay)

    def influence(self, linear_solver: Any = None, inverse: Any = None, curvature: Curvature = GAUSS) -> bl.Influence:
        """The penalty is the damping."""
        solver = linear_solver or (bl.CG(rtol=1e-3) if inverse is None else None)
        return bl.Influence(
            self.outputs, losses, self.params, self.train, damping=self.decay, linear_solver=solver, inverse=inverse,
            curvature=curvature, throw="ignore",
        )  # fmt: skip


def exact(trained: Trained) -> Tensor:
    """By CG to nearly all digits: what the others approximate, ``[q, n]``."""
    return trained.influence(bl.CG(rtol=1e-10, max_steps=5000)).of(trained.queries).values


def by_cg(trained: Trained) -> Tensor:
    return trained.influence().of(trained.queries).values


def by_hessian(trained: Trained) -> Tensor:
    return trained.influence(bl.MINRES(rtol=1e-3), curvature="full").of(trained.queries).values


def by_gradients(trained: Trained) -> Tensor:
    size = sum(value.numel() for value in trained.params.values())
    return trained.influence(inverse=torch.eye(size, dtype=torch.float64)).of(trained.queries).values


def by_projections(trained: Trained) -> Tensor:
    return bl.ProjectedInfluence(trained.influence(), DIMENSION).of(trained.queries).values


def ekfac(trained: Trained) -> Any:
    """The inverse that curvlinops has of it."""
    import curvlinops

    factors = curvlinops.EKFACLinearOperator(
        trained.module, nn.CrossEntropyLoss(), list(trained.module.parameters()), [trained.train],
        fisher_type=curvlinops.FisherType.TYPE2, separate_weight_and_bias=False,
    )  # fmt: skip
    return curvlinops.KFACInverseLinearOperator(factors, damping=trained.decay, use_exact_damping=True)


def by_preconditioned_cg(trained: Trained) -> Tensor:
    solver = bl.CG(rtol=1e-3, preconditioner=bl.InversePreconditioner(ekfac(trained)))
    return trained.influence(solver).of(trained.queries).values


def by_ekfac(trained: Trained) -> Tensor:
    return trained.influence(inverse=ekfac(trained)).of(trained.queries).values


def by_pydvl(trained: Trained) -> Tensor:
    """Its CG, with the Hessian and the penalty as regularization."""
    from pydvl.influence.torch import CgInfluence

    return _by_model_of_pydvl(
        CgInfluence(
            trained.module,
            nn.CrossEntropyLoss(),
            regularization=trained.decay,
            rtol=1e-3,
            maxiter=1000,
            solve_simultaneously=True,
        ),
        trained,
    )


def by_pydvl_ekfac(trained: Trained) -> Tensor:
    """In float32: in float64 pyDVL 0.10 multiplies matrices of both precisions, which is an error."""
    from pydvl.influence.torch import EkfacInfluence

    single = trained.in_single_precision()
    return _by_model_of_pydvl(
        EkfacInfluence(single.module, update_diagonal=True, hessian_regularization=single.decay), single
    )


def _by_model_of_pydvl(model: Any, trained: Trained) -> Tensor:
    fitted = model.fit(DataLoader(TensorDataset(*trained.train), batch_size=len(trained.train[1])))
    found: Tensor = -fitted.influences(*trained.queries, *trained.train).detach().double()
    return found


def by_kronfluence(trained: Trained) -> Tensor:
    """Its EKFAC, in float32 as it is meant to be used."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments

    logging.disable(logging.INFO)
    task, single = _kronfluence_task(), trained.in_single_precision()
    train, queries = TensorDataset(*single.train), TensorDataset(*single.queries)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "influence", prepare_model(single.module, task), task, cpu=True, disable_tqdm=True, output_dir=folder
        )
        analyzer.fit_all_factors(
            "ekfac", train, per_device_batch_size=len(train), factor_args=FactorArguments(strategy="ekfac")
        )
        analyzer.compute_pairwise_scores(
            "scores", "ekfac", queries, train, per_device_query_batch_size=len(queries),
            per_device_train_batch_size=len(train), score_args=ScoreArguments(damping_factor=single.decay),
        )  # fmt: skip
        found: Tensor = -analyzer.load_pairwise_scores("scores")["all_modules"].double()
    return found


def _kronfluence_task() -> Any:
    from kronfluence.task import Task
    from torch.nn.functional import cross_entropy

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits, labels = model(batch[0]), batch[1]
            if sample:
                labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
            return cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    return Classification()


CONTESTANTS: dict[str, tuple[Callable[[Trained], Tensor], tuple[str, ...]]] = {
    "bilevel: CG": (by_cg, ()),
    "bilevel: MINRES, Hessian": (by_hessian, ()),
    "bilevel: CG, EKFAC of curvlinops as preconditioner": (by_preconditioned_cg, ("curvlinops",)),
    "bilevel: EKFAC of curvlinops alone": (by_ekfac, ("curvlinops",)),
    f"bilevel: {DIMENSION} projections": (by_projections, ()),
    "bilevel: gradients alone": (by_gradients, ()),
    "pyDVL: CG": (by_pydvl, ("pydvl",)),
    "pyDVL: EKFAC": (by_pydvl_ekfac, ("pydvl",)),
    "kronfluence: EKFAC": (by_kronfluence, ("kronfluence",)),
}
"""What computes the influences, and the modules that it needs."""
