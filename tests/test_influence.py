"""Influence against what it predicts: leave-one-out retraining, subsets of a small network, labels that are wrong."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel import Influence, ProjectedInfluence
from tests.conformance import randn, relative_error

NUM, FEATURES, CLASSES, RIDGE = 200, 5, 3, 0.02


def blobs(count, seed):
    labels = torch.arange(count) % CLASSES
    centres = 1.2 * torch.eye(CLASSES, FEATURES, dtype=torch.float64)
    return randn(count, FEATURES, seed=seed) + centres[labels], labels


def each(outputs, batch):
    return cross_entropy(outputs, batch[1], reduction="none")


def linear(params, batch):
    return batch[0] @ params["weight"] + params["bias"]


def penalty(params):
    return RIDGE / 2 * params["weight"].square().sum() + RIDGE / 2 * params["bias"].square().sum()


TRAIN, QUERIES = blobs(NUM, 1), blobs(20, 2)
START = {"weight": torch.zeros(FEATURES, CLASSES).double(), "bias": torch.zeros(CLASSES).double()}


def fitted(model, start, weights, penalty=penalty, data=TRAIN):
    """One fit for each row of weights ``[T, n]``, all at once."""

    def objective(params):
        logits = torch.vmap(lambda p: model(p, data))(params)
        losses = torch.vmap(lambda out: each(out, data))(logits)
        return (weights * losses).mean(-1) + torch.vmap(penalty)(params)

    solver = bl.LBFGS(max_steps=2000)
    return bl.argmin(objective, bl.stack(start, len(weights)), solver=solver, hypergrad=None, throw="ignore").value


@pytest.fixture(scope="module")
def logistic():
    full = fitted(linear, START, torch.ones(1, NUM).double())
    return {name: leaf[0] for name, leaf in full.items()}


def losses_of(params):
    return torch.vmap(lambda p: each(linear(p, QUERIES), QUERIES))(params)


def test_leave_one_out_of_logistic_regression():
    """Each of 400 examples left out, and fitted again: correlation 0.99 at least, magnitudes within 5 %."""
    data, count = blobs(400, 1), 400
    weights = torch.cat([torch.ones(1, count), 1 - torch.eye(count)]).double()
    fits = fitted(linear, START, weights, data=data)
    full = {name: leaf[0] for name, leaf in fits.items()}
    losses = losses_of(fits)
    truth = losses[1:] - losses[:1]
    for curvature in ("gauss_newton", "full"):  # which are the same for logistic regression
        scores = bl.influence(linear, each, full, data, QUERIES, penalty=penalty, curvature=curvature, throw="raise")
        predicted = scores.left_out(torch.eye(count, dtype=torch.bool))
        for query in range(len(QUERIES[1])):
            assert np.corrcoef(predicted[:, query], truth[:, query])[0, 1] >= 0.99
        slope = (predicted * truth).sum() / predicted.square().sum()
        assert 0.95 <= slope.item() <= 1.05


def exact(logistic, damping=0.0):
    """By dense matrices of `torch.func`."""
    flat = torch.cat([logistic["weight"].flatten(), logistic["bias"]])
    tree = lambda y: {"weight": y[:-CLASSES].view(FEATURES, CLASSES), "bias": y[-CLASSES:]}  # noqa: E731
    hessian = torch.func.hessian(lambda y: each(linear(tree(y), TRAIN), TRAIN).mean() + penalty(tree(y)))(flat)
    g, q = (torch.func.jacrev(lambda y, d=d: each(linear(tree(y), d), d))(flat) for d in (TRAIN, QUERIES))
    return -q @ torch.linalg.solve(hessian + damping * torch.eye(len(flat)).double(), g.T), g, hessian


def test_values_chunks_and_errors_are_those_of_dense_matrices(logistic):
    truth, g, hessian = exact(logistic)
    settings = {"penalty": penalty, "throw": "ignore"}
    for chunk, query_chunk in ((1024, 64), (67, 9)):
        scores = bl.influence(linear, each, logistic, TRAIN, QUERIES, chunk=chunk, query_chunk=query_chunk, **settings)
        torch.testing.assert_close(scores.values, truth, rtol=1e-7, atol=1e-9)
    own = Influence(linear, each, logistic, TRAIN, query_chunk=33, **settings).of_themselves()
    torch.testing.assert_close(own, (g * torch.linalg.solve(hessian, g.T).T).sum(1), rtol=1e-7, atol=1e-10)
    loose = bl.influence(linear, each, logistic, TRAIN, QUERIES, linear_solver=bl.CG(max_steps=3), **settings)
    wrong = (loose.values - truth).square().mean(-1).sqrt()
    assert (wrong > 1e-5).any()
    assert ((loose.error / wrong - 1).abs() < 0.3).all()
    damped = bl.influence(linear, each, logistic, TRAIN, QUERIES, damping=0.1, **settings)
    torch.testing.assert_close(damped.values, exact(logistic, 0.1)[0], rtol=1e-7, atol=1e-9)
    inverse = torch.linalg.inv(hessian)
    given = bl.influence(linear, each, logistic, TRAIN, QUERIES, inverse=inverse, **settings)
    torch.testing.assert_close(given.values, truth, rtol=1e-7, atol=1e-9)
    assert given.stats["relative_residual"].max() < 1e-10


def test_neumann_is_lissa_and_a_part_of_the_params_holds_the_rest(logistic):
    truth = exact(logistic)[0]
    solver = bl.Neumann(alpha=1.5, max_steps=500)
    scores = bl.influence(linear, each, logistic, TRAIN, QUERIES, penalty=penalty, linear_solver=solver)
    torch.testing.assert_close(scores.values, truth, rtol=1e-5, atol=1e-7)
    last = {"bias": logistic["bias"]}
    model = lambda p, batch: linear({"weight": logistic["weight"], **p}, batch)  # noqa: E731
    part = bl.influence(model, each, last, TRAIN, QUERIES, damping=0.0)
    logits = torch.softmax(linear(logistic, TRAIN), -1)
    curvature = torch.diag(logits.mean(0)) - logits.T @ logits / NUM
    slopes = [torch.softmax(linear(logistic, d), -1) - torch.eye(CLASSES).double()[d[1]] for d in (QUERIES, TRAIN)]
    torch.testing.assert_close(
        part.values, -slopes[0] @ torch.linalg.pinv(curvature) @ slopes[1].T, rtol=1e-6, atol=1e-8
    )


def network(params, batch):
    return torch.tanh(batch[0] @ params["first"]) @ params["second"]


@pytest.mark.parametrize("curvature", ["gauss_newton", "full"])
def test_a_solve_in_the_network(curvature):
    """PyTorch's error was "escaped?". The solution of a linear equation has a closed form."""

    def solved(params, batch):
        a = batch[0] @ params
        return bl.root(lambda y, a: y - 2 + a**2 * y, torch.zeros_like(a), a, solver=bl.Newton(tol=1e-13)).value

    def written(params, batch):
        return 2 / (1 + (batch[0] @ params) ** 2)

    def error(outputs, batch):
        return (outputs - batch[1]).square()

    params = torch.tensor([0.8, 0.3], dtype=torch.float64)
    inputs = randn(12, 2, seed=3)
    train = inputs, written(params, (inputs,)) + 0.1 * randn(12, seed=4)
    queries, settings = tuple(d[:2] for d in train), {"curvature": curvature, "damping": 0.1}
    found, exact = (
        bl.influence(outputs, error, params, train, queries, **settings).values for outputs in (solved, written)
    )
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-10)


def decay(params):
    return 0.005 * sum(leaf.square().sum() for leaf in params.values())


def test_linear_datamodeling_score_of_a_small_network():
    """Half of the examples left out, a hundred times, and the network trained again from where it stood."""
    start = {"first": randn(FEATURES, 8, seed=3) / 2, "second": randn(8, CLASSES, seed=4) / 3}
    full = {name: leaf[0] for name, leaf in fitted(network, start, torch.ones(1, NUM).double(), decay).items()}
    generator = torch.Generator().manual_seed(5)
    out = torch.stack([torch.randperm(NUM, generator=generator) < NUM // 5 for _ in range(100)])
    again = fitted(network, full, (~out).double(), decay)
    truth = torch.vmap(lambda p: each(network(p, QUERIES), QUERIES))(again) - each(network(full, QUERIES), QUERIES)
    scores = bl.influence(network, each, full, TRAIN, QUERIES, penalty=decay)
    predicted = scores.left_out(out)
    score = np.mean([spearmanr(predicted[:, q], truth[:, q]).statistic for q in range(len(QUERIES[1]))])
    assert score >= 0.8
    # What the inverse curvature is worth: products of gradients alone predict less.
    plain = bl.influence(network, each, full, TRAIN, QUERIES, inverse=torch.eye(8 * (FEATURES + CLASSES)).double())
    alone = np.mean([spearmanr(plain.left_out(out)[:, q], truth[:, q]).statistic for q in range(len(QUERIES[1]))])
    assert alone < score - 0.02


def test_wrong_labels_are_the_ones_that_speak_for_themselves():
    """Digits, a tenth of them mislabelled: self-influence ranks them first."""
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images, given = images[:600] / 16, labels[:600].clone()
    wrong = torch.rand(600, generator=torch.Generator().manual_seed(0)) < 0.1
    given[wrong] = (given[wrong] + 1 + torch.arange(int(wrong.sum())) % 9) % 10
    data, ridge = (images, given), lambda w: 5e-3 * w.square().sum()
    softmax = lambda w, batch: batch[0] @ w  # noqa: E731
    loss = lambda w: each(softmax(w, data), data).mean() + ridge(w)  # noqa: E731
    weight = bl.argmin(loss, torch.zeros(64, 10).double(), hypergrad=None).value
    own = Influence(softmax, each, weight, data, penalty=ridge, linear_solver=bl.CG(rtol=1e-3)).of_themselves()
    first = own.argsort(descending=True)[: int(wrong.sum())]
    assert wrong[first].double().mean() >= 0.75


def test_a_file_goes_on_where_it_was_cut_off(logistic, tmp_path):
    file, calls = tmp_path / "scores.pt", []
    all_of_them = bl.influence(linear, each, logistic, TRAIN, QUERIES, penalty=penalty)

    class Stops(Exception):
        pass

    class Counted(bl.CG):
        def solve(self, operator, b, state=None):
            calls.append(len(b))
            if len(calls) == 3:
                raise Stops
            return super().solve(operator, b, state)

    made = Influence(linear, each, logistic, TRAIN, penalty=penalty, query_chunk=4, linear_solver=Counted())
    with pytest.raises(Stops):
        made.of(QUERIES, file=file)
    scores = made.of(QUERIES, file=file)
    assert calls == [4] * 6
    torch.testing.assert_close(scores.values, all_of_them.values)
    with pytest.raises(ValueError, match="other"):
        made.of(tuple(part.flip(0) for part in QUERIES), file=file)


def test_an_inverse_of_curvlinops_preconditions_or_answers(logistic):
    """KFAC and EKFAC of softmax regression: CG beside them needs fewer steps, alone they are near."""
    curvlinops = pytest.importorskip("curvlinops")
    net = torch.nn.Linear(FEATURES, CLASSES).double()
    # As badly scaled as features are that nobody has looked at.
    scale = torch.logspace(-1, 1, FEATURES, dtype=torch.float64)
    train, queries = ((x * scale, labels) for x, labels in (TRAIN, QUERIES))
    params = {"weight": (logistic["weight"] / scale.unsqueeze(1)).T.contiguous(), "bias": logistic["bias"]}
    net.load_state_dict(params)
    model = lambda p, batch: torch.func.functional_call(net, p, (batch[0],))  # noqa: E731
    damping = 1e-3
    plain = bl.influence(model, each, params, train, queries, damping=damping, throw="raise")
    loss, data = torch.nn.CrossEntropyLoss(), [(train[0], train[1])]
    for kind in (curvlinops.KFACLinearOperator, curvlinops.EKFACLinearOperator):
        factors = kind(
            net, loss, list(net.parameters()), data, fisher_type=curvlinops.FisherType.TYPE2,
            separate_weight_and_bias=False,
        )  # fmt: skip
        inverse = curvlinops.KFACInverseLinearOperator(factors, damping=damping, use_exact_damping=True)
        solver = bl.CG(preconditioner=bl.InversePreconditioner(inverse))
        helped = bl.influence(model, each, params, train, queries, damping=damping, linear_solver=solver, throw="raise")
        assert relative_error(helped.values, plain.values) <= 1e-5
        assert helped.stats["num_steps"].max() < plain.stats["num_steps"].min()
        alone = bl.influence(model, each, params, train, queries, damping=damping, inverse=inverse)
        assert np.corrcoef(alone.values.flatten(), plain.values.flatten())[0, 1] > 0.9
        assert 0.01 < alone.stats["relative_residual"].max() < 1


def test_projections_store_a_few_numbers_an_example(logistic):
    """The error falls as one over the root of their number, and is the one that is told; scores correlate."""
    whole = Influence(linear, each, logistic, TRAIN, penalty=penalty, query_chunk=50, throw="raise")
    truth = whole.of(QUERIES).values
    errors = []
    for dimension in (20, 80, 320, 1280):
        found = [ProjectedInfluence(whole, dimension, seed=seed).of(QUERIES) for seed in range(3)]
        wrong = torch.stack([scores.values - truth for scores in found]).square().mean((0, 2)).sqrt()
        told = torch.stack([scores.error for scores in found]).square().mean(0).sqrt()
        assert 0.7 < (told / wrong).median() < 1.4
        errors.append(float(wrong.square().mean().sqrt()))
    for more, fewer in itertools.pairwise(errors):
        assert 1.6 < more / fewer < 2.5
    correlations = [np.corrcoef(row, exact)[0, 1] for row, exact in zip(found[0].values, truth, strict=True)]
    assert min(correlations) > 0.97


def test_projected_features_are_kept_and_given_back(logistic):
    settings = {"penalty": penalty, "throw": "raise"}
    whole = Influence(linear, each, logistic, TRAIN, **settings)
    first = ProjectedInfluence(whole, 100)
    scores = first.of(QUERIES)
    assert first.features.shape == (NUM, 100)
    assert first.stats["num_steps"].shape == (100,)
    assert scores.result is bl.Result.CONVERGED
    assert scores.stats["relative_residual"].shape == (20,)
    other = Influence(linear, each, logistic, TRAIN, query_chunk=7, chunk=30, **settings)
    again = ProjectedInfluence(other, 100, features=first.features).of(QUERIES)
    torch.testing.assert_close(again.values, scores.values)
    assert again.result is bl.Result.STEPS_DONE
    torch.testing.assert_close(ProjectedInfluence(other, 100).of(QUERIES).values, scores.values, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(ProjectedInfluence(whole, 100, seed=1).of(QUERIES).values, scores.values, rtol=0.01)
    with pytest.raises(ValueError, match="examples by dimension"):
        ProjectedInfluence(whole, 50, features=first.features)
    with pytest.raises(ValueError, match="dimension is 0"):
        ProjectedInfluence(whole, 0)


def test_what_is_wrong_is_told(logistic):
    settings = {"penalty": penalty}
    with pytest.warns(bl.SolveWarning, match="influences"):
        bl.influence(linear, each, logistic, TRAIN, QUERIES, linear_solver=bl.CG(rtol=1e-10, max_steps=2), **settings)
    assert Influence(linear, each, logistic, TRAIN, **settings).distance < 1e-8
    away = {name: leaf + 0.3 for name, leaf in logistic.items()}
    assert Influence(linear, each, away, TRAIN, **settings).distance > 0.1
    unfinished = {"first": randn(FEATURES, 8, seed=3), "second": randn(8, CLASSES, seed=4)}
    with pytest.warns(bl.SolveWarning, match="no minimum"):
        bl.influence(network, each, unfinished, TRAIN, QUERIES, curvature="full", damping=0.0)
    x, labels = TRAIN
    infinite = (torch.where(torch.arange(NUM).unsqueeze(-1) == 3, math.nan, x), labels)
    with pytest.raises(bl.SolveError, match=r"NaN or an infinity.*loss of each example"):
        bl.influence(linear, each, logistic, infinite, QUERIES, **settings)
    for change, words in (
        ({"curvature": "none"}, "gauss_newton"),
        ({"damping": -1.0}, "negative"),
        ({"chunk": 0}, "chunk"),
        ({"losses": lambda o, b: cross_entropy(o, b[1])}, "one loss for each"),
        ({"train": (TRAIN[0], TRAIN[1][:3])}, "first dimension"),
    ):
        given = {"losses": each, "train": TRAIN, **change}
        with pytest.raises(ValueError, match=words):
            Influence(linear, given.pop("losses"), logistic, given.pop("train"), **given)
    scores = bl.influence(linear, each, logistic, TRAIN, QUERIES, **settings)
    assert dataclasses.is_dataclass(scores)
    assert scores.result is bl.Result.CONVERGED
    assert relative_error(scores.left_out(torch.ones(1, NUM, dtype=torch.bool)), -scores.values.mean(1)[None]) < 1e-12
    with pytest.raises(ValueError, match="masks"):
        scores.left_out(torch.ones(NUM))


@pytest.mark.parametrize("layer", [torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(8)], ids=repr)
def test_a_network_in_training_mode_is_told(layer):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(FEATURES, 8), layer, torch.nn.Linear(8, CLASSES)).double()
    params = {name: p.detach() for name, p in net.named_parameters()}

    def outputs(p, batch):
        return torch.func.functional_call(net, p, (batch[0],))

    with pytest.raises(ValueError, match=r"by itself.*module\.eval\(\)"):
        Influence(outputs, each, params, TRAIN)
    net.eval()
    bl.influence(outputs, each, params, TRAIN, QUERIES)


def test_sparse_examples_are_refused(logistic):
    x, labels = TRAIN
    with pytest.raises(TypeError, match=r"sparse.*to_dense"):
        Influence(linear, each, logistic, (x.to_sparse(), labels))


def test_no_graph_of_other_parts_is_kept():
    """Parts of the network that require grad kept the graphs of all chunks."""
    body, head = torch.nn.Linear(FEATURES, 6).double(), {"weight": randn(6, CLASSES, seed=5)}

    def outputs(p, batch):
        return torch.tanh(body(batch[0])) @ p["weight"]

    influences = Influence(outputs, each, head, TRAIN, damping=0.1)
    found = [influences.of(QUERIES).values, influences.of_themselves(), influences.distance]
    projected = ProjectedInfluence(influences, 3)
    assert not any(tensor.requires_grad for tensor in [*found, projected.features, projected.of(QUERIES).values])


def test_an_inverse_is_the_whole_answer():
    params, x = {"w": randn(2)}, randn(6, 2)

    def influence(**settings):
        return Influence(
            lambda p, batch: batch @ p["w"], lambda out, _: out.square() / 2, params, x, damping=5.0, **settings
        )

    with pytest.raises(ValueError, match="Both inverse and linear_solver"):
        influence(inverse=torch.eye(2).double(), linear_solver=bl.CG())
    with pytest.raises(TypeError, match="inverse is of type function"):
        influence(inverse=lambda g: g).of(x)
    with pytest.warns(bl.SolveWarning, match="linear solve of the influences"):
        scores = influence(inverse=torch.eye(2).double()).of(x)
    assert scores.result is bl.Result.STAGNATED


def test_a_file_is_of_one_question_alone(logistic, tmp_path):
    """Examples in another order, a query in the middle, penalty, curvature and solver: each is another question."""

    def of(train=TRAIN, queries=QUERIES, file=None, **settings):
        return Influence(linear, each, logistic, train, **{"penalty": penalty, **settings}).of(queries, file=file)

    file = tmp_path / "scores.pt"
    scores = of(file=file)
    torch.testing.assert_close(of(file=file).values, scores.values)
    order = torch.randperm(len(TRAIN[1]), generator=torch.Generator().manual_seed(0))
    middle = [1, 2, 0, *range(3, len(QUERIES[1]) - 1), len(QUERIES[1]) - 1]
    middle = [0, 2, 1, *middle[3:]]
    others = {
        "examples": {"train": tuple(part[order] for part in TRAIN)},
        "queries": {"queries": tuple(part[middle] for part in QUERIES)},
        "penalty": {"penalty": lambda params: 10 * penalty(params)},
        "damping": {"damping": 0.1},
        "curvature": {"curvature": "full"},
        "solver": {"linear_solver": bl.CG(max_steps=1)},
    }
    for changed in others.values():
        with pytest.raises(ValueError, match="has the influences of other examples"):
            of(file=file, **changed)
    for content in (b"garbage", b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is no file of influences"):
            of(file=file)
    torch.save({"a": 1}, file)
    with pytest.raises(ValueError, match="is no file of influences"):
        of(file=file)


def test_arguments_of_a_wrong_kind_are_named(logistic):
    x, labels = TRAIN
    with pytest.raises(TypeError, match="the examples hold a ndarray"):
        Influence(linear, each, logistic, (x.numpy(), labels))
    with pytest.raises(TypeError, match=r"params holds torch\.int64"):
        Influence(linear, each, {**logistic, "count": torch.ones(2, dtype=torch.int64)}, TRAIN)
    with pytest.raises(TypeError, match="params holds list_iterator"):
        Influence(linear, each, iter(["weight"]), TRAIN)
    with pytest.raises(ValueError, match="penalty returned a tensor of shape"):
        Influence(linear, each, logistic, TRAIN, penalty=lambda params: torch.ones(3, dtype=torch.float64))
    with pytest.raises(TypeError, match="outputs is Linear: a function is needed, such as lambda params, batch"):
        Influence(torch.nn.Linear(4, 3), each, logistic, TRAIN)
    with pytest.raises(TypeError, match="losses is CrossEntropyLoss: a function is needed"):
        Influence(linear, torch.nn.CrossEntropyLoss(), logistic, TRAIN)
    with pytest.raises(ValueError, match=r"chunk is 2\.5"):
        Influence(linear, each, logistic, TRAIN, chunk=2.5)
    made = Influence(linear, each, logistic, TRAIN, penalty=penalty)
    for queries in ((QUERIES[0][:, :-1], QUERIES[1]), (QUERIES[0].float(), QUERIES[1])):
        with pytest.raises(ValueError, match="outputs and losses take the examples"):
            made.of(queries)
    with pytest.raises(TypeError, match="sets is a list: masks"):
        made.of(QUERIES).left_out([[0, 1]])
