"""The comparison of influences: the same network for all, what each is held against, libraries that are missing."""

from __future__ import annotations

import json

import pytest
import torch

from applications.frame.command import main
from applications.influence.model import Model
from applications.measurements.attribution import __main__ as attribution
from applications.measurements.attribution.contestants import CONTESTANTS, Trained, by_cg, by_hessian, exact
from tests.conformance import randn, relative_error

TINY = ("--num-train", "60", "--num-queries", "10", "--subsets", "3", "--hidden", "3", "--decay", "0.05")


def comparison(*arguments):
    return main("measurements.attribution", [*TINY, *map(str, arguments)], attribution.Config, attribution.story)


@pytest.fixture(scope="module")
def trained():
    model = Model(4, 3, 2, 0.1, seed=0)
    train, queries = (randn(40, 4), torch.arange(40) % 3), (randn(5, 4, seed=3), torch.arange(5) % 3)
    params = model.fit(train)
    found = Trained.make(params, train, queries, 0.1)
    torch.testing.assert_close(found.module(train[0]), model.outputs(params, train))
    return found


def test_exact_is_the_dense_gauss_newton_matrix(trained):
    params = dict(trained.module.named_parameters())
    outputs = lambda p, x: torch.func.functional_call(trained.module, p, (x,))  # noqa: E731
    flat = lambda tree: torch.cat([leaf.flatten(2) for leaf in tree.values()], 2)  # noqa: E731
    slopes, logits = [], []
    for x, _ in (trained.train, trained.queries):
        slopes.append(flat(torch.func.jacrev(outputs)({k: v.detach() for k, v in params.items()}, x)).detach())
        logits.append(trained.module(x).detach().softmax(-1))
    curve = torch.diag_embed(logits[0]) - logits[0].unsqueeze(2) * logits[0].unsqueeze(1)
    matrix = torch.einsum("ncp,ncd,ndq->pq", slopes[0], curve, slopes[0]) / 40 + 0.1 * torch.eye(slopes[0].shape[2])
    labels = [torch.eye(3)[y] for _, y in (trained.train, trained.queries)]
    g, q = (torch.einsum("ncp,nc->np", s, p - y) for s, p, y in zip(slopes, logits, labels, strict=True))
    truth = -q @ torch.linalg.solve(matrix, g.T)
    assert relative_error(exact(trained), truth) < 1e-8
    assert relative_error(by_cg(trained), truth) < 1e-2
    assert 1e-3 < relative_error(by_hessian(trained), truth) < 0.5  # another matrix, and not far


def test_every_contestant_that_needs_no_other_library_has_a_row(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(attribution.importlib.util, "find_spec", lambda name: None)
    assert comparison("--out", tmp_path / "run") == 0
    (rows,) = json.loads((tmp_path / "run" / "results.json").read_text())["tables"].values()
    assert [row["influences by"] for row in rows] == [name for name, (_, needs) in CONTESTANTS.items() if not needs]
    assert rows[0]["correlation with exact"] > 0.999
    assert "pyDVL: CG: pydvl is not installed." in capsys.readouterr().out


def test_softmax_regression_is_refused(refused):
    assert "--hidden is 0" in refused(comparison, "--hidden", "0")
