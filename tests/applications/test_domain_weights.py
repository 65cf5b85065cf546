"""The weights' hypergradients against finite differences, the texts, resuming, two ranks, the numbers to expect."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import bilevel as bl
from applications.domain_weights.__main__ import Config, story, with_half
from applications.domain_weights.corpus import SHUFFLED, TEXTS, Corpus, pieces, read, shuffled
from applications.domain_weights.knobs import training
from applications.domain_weights.learning import METHODS, Mixture, Onward, look_ahead
from applications.domain_weights.model import losses_of
from applications.domain_weights.search import alone
from applications.domain_weights.train import MixtureTraining
from applications.frame.command import main
from applications.frame.errors import UserError
from tests.applications.conftest import ROOT
from tests.applications.refusals import refusals
from tests.applications.runs import comparable
from tests.conformance import relative_error

TINY = (
    *("--steps", "4", "--learn-steps", "6", "--warm-up", "2", "--every", "2", "--mixtures", "3", "--short-steps", "2"),
    *("--context", "8", "--width", "8", "--heads", "2", "--layers", "1", "--batch", "4", "--outer-batch", "2"),
    *("--precision", "float64"),
)
KNOBS = Config(
    context=8, width=8, heads=2, layers=1, batch=4, outer_batch=4, warm_up=0, every=1, precision="float64", lr=1e-2
)


def domain_weights(*arguments):
    return main("domain_weights", [*TINY, *map(str, arguments)], Config, story)


# --- texts ---


def test_the_texts_that_ship():
    corpus = KNOBS.read()
    assert list(corpus.domains) == ["code", "german", "novel", "plays", "scripture", SHUFFLED]
    assert len(corpus.validation) < 0.2 * len(corpus.test)
    sonnets = (TEXTS / "sonnets.txt").read_text()
    both = torch.cat([corpus.validation, corpus.test])
    assert "".join(corpus.alphabet[i] for i in both.tolist()) == sonnets
    batch = corpus.batch(3, 8, torch.Generator().manual_seed(0))
    assert batch.shape == (6, 3, 9)
    plays = (TEXTS / "plays.txt").read_text()
    assert "".join(corpus.alphabet[i] for i in batch[3, 0].tolist()) in plays
    assert corpus.joined("target").domains["target"] is corpus.validation


def test_a_shuffled_text_has_the_same_letters_in_every_word():
    text = "to be, or not\nto  be, 'tis the Question"
    found = shuffled(text, 0)
    assert found != text
    assert [sorted(word) for word in found.split(" ")] == [sorted(word) for word in text.split(" ")]
    assert [c for c in found if not c.isalpha()] == [c for c in text if not c.isalpha()]


def test_pieces_predict_each_character_once():
    cut = pieces(torch.arange(26), 5)
    assert cut.shape == (5, 6)
    assert cut[:, 1:].flatten().tolist() == list(range(1, 26))


def test_own_texts(tmp_path):
    for name, text in (("a", "abc " * 30), ("b", "xyz " * 30), ("want", "abd " * 80)):
        (tmp_path / f"{name}.txt").write_text(text)
    corpus = read(tmp_path, "want", None, 0.5, 8, 0)
    assert list(corpus.domains) == ["a", "b"]
    assert corpus.alphabet == " abcdxyz"
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xfa" * 50)
    with pytest.raises(UserError, match=r"c\.txt cannot be read"):
        read(tmp_path, "want", None, 0.5, 8, 0)
    (tmp_path / "c.txt").write_text("short")
    with pytest.raises(UserError, match="c has 5 characters"):
        read(tmp_path, "want", None, 0.5, 8, 0)


# --- hypergradients ---


class Case:
    """A small transformer that made some steps, one batch of all domains, and one of the target; float64."""

    def __init__(self):
        texts = [torch.randint(5, (200,), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
        corpus = Corpus(dict(zip("abc", texts, strict=False)), texts[3], texts[3], "abcde")
        self.training = training(KNOBS, corpus, 100, torch.linspace(-1, 1, 3))
        rows = self.training.rows()
        for _ in range(5):
            next(rows)
        random = torch.Generator().manual_seed(1)
        self.mixture = Mixture(self.training.module, self.training.corpus.batch(4, 8, random))
        self.target = self.training.corpus.validation[:99].view(11, 9)
        self.params = {name: value.detach().clone() for name, value in self.training.params.items()}

    def on_target(self, params):
        outputs = bl.nn.functional_call(self.training.module, params, (self.target[:, :-1],))
        return losses_of(outputs, self.target).mean()

    def hypergradient(self, hypergrad, lr=1e-2):
        scores = self.training.scores.detach().requires_grad_()
        ahead = look_ahead(self.mixture, self.params, scores, hypergrad, self.training.next_step(lr))
        (grad,) = torch.autograd.grad(self.on_target(ahead.value), scores)
        return ahead, grad


@pytest.fixture(scope="module")
def case():
    return Case()


def test_the_look_ahead_is_the_next_step_of_the_optimizer(case):
    """The moments of the optimizer go over, leaf by leaf."""
    found = look_ahead(case.mixture, case.params, case.training.scores, None, case.training.next_step(1e-2)).value
    trained = case.training
    kept = trained.state()
    kept = {**kept, "params": {name: value.clone() for name, value in kept["params"].items()}}
    optimizer = torch.optim.Adam(trained.params.values(), 1e-2)
    optimizer.load_state_dict(trained.optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 1e-2
    optimizer.zero_grad()
    case.mixture(trained.params, trained.scores.detach()).backward()
    optimizer.step()
    for name, value in trained.params.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-9, atol=1e-12)
    trained.restore(kept)


def test_the_implicit_hypergradient_is_that_of_the_dense_gauss_newton_matrix(case):
    ahead, grad = case.hypergradient(bl.Implicit(bl.CG(rtol=1e-12, max_steps=2000), damping=0.1))
    names, shapes = list(ahead.value), [value.shape for value in ahead.value.values()]
    flat = torch.cat([value.detach().flatten() for value in ahead.value.values()])

    def tree(y):
        return dict(zip(names, (p.view(s) for p, s in zip(y.split([s.numel() for s in shapes]), shapes, strict=True)),
                        strict=True))  # fmt: skip

    scores = case.training.scores.detach()
    outputs = lambda y: case.mixture.outputs(tree(y), scores)  # noqa: E731
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        jacobian = torch.func.jacrev(outputs)(flat).flatten(0, -2)
        logits = outputs(flat).detach()
        curvature = torch.func.hessian(lambda z: case.mixture.of_outputs(z.view_as(logits), scores))(logits.flatten())
        matrix = jacobian.T @ curvature @ jacobian + 0.1 * torch.eye(len(flat), dtype=torch.float64)
        slope = torch.func.grad(lambda y: case.on_target(tree(y)))(flat)
        mixed = torch.func.jacrev(lambda x: torch.func.grad(lambda y: case.mixture(tree(y), x))(flat), chunk_size=1)(
            scores
        )
    assert relative_error(grad, -torch.linalg.solve(matrix, slope) @ mixed) < 1e-6


def test_sama_is_the_derivative_of_the_step_of_adam(case):
    """Against differences of a short step itself, whose moments do not begin at zero."""
    step, scores = case.training.next_step(1e-4), case.training.scores.detach()
    assert step.state["exp_avg_sq"].abs().max() > 0

    def after(x):
        return case.on_target(look_ahead(case.mixture, case.params, x, None, step).value)

    _, grad = case.hypergradient(bl.SAMA(), lr=1e-4)
    moves = 1e-3 * torch.eye(3, dtype=torch.float64)
    truth = torch.stack([after(scores + move) - after(scores - move) for move in moves]).detach() / 2e-3
    assert relative_error(grad, truth) < 2e-3


def test_the_penalty_is_one_of_gradients(case):
    """With many small steps to answer the nudge it points where differentiation through these steps points."""
    _, grad = case.hypergradient(METHODS["penalty"])
    scores = case.training.scores.detach().requires_grad_()
    solver = bl.Steps(bl.SGD(0.1), max_steps=10)
    ahead = bl.argmin(case.mixture, case.params, scores, solver=solver, hypergrad=bl.Unroll(), throw="ignore")
    (truth,) = torch.autograd.grad(case.on_target(ahead.value), scores)
    assert torch.nn.functional.cosine_similarity(grad, truth, dim=0) > 0.9


def test_onward_without_a_state_is_the_first_step():
    problem = lambda y: (y - 3).square().sum()  # noqa: E731
    start = torch.zeros(2, dtype=torch.float64)
    rule = bl.Adam(0.1)
    first = bl.argmin(problem, start, solver=Onward(rule, None, 0), hypergrad=None, throw="ignore")
    second = bl.argmin(problem, first.value, solver=Onward(rule, first.state.rule, 1), hypergrad=None, throw="ignore")
    both = bl.argmin(problem, start, solver=bl.Steps(rule, max_steps=2), hypergrad=None, throw="ignore")
    torch.testing.assert_close(second.value, both.value, rtol=1e-12, atol=0)


# --- trainings ---


def test_windows_are_drawn_by_the_weights():
    corpus = KNOBS.read()
    only = training(KNOBS, corpus, 3, alone(corpus, "code"))
    assert only.weights.max() > 1 - 1e-10
    before = only.loss_on(corpus.domains["code"])
    only = training(dataclasses.replace(KNOBS, batch=16), corpus, 30, alone(corpus, "code"))
    assert sum(1 for _ in only.rows()) == 30
    assert only.loss_on(corpus.domains["code"]) < before - 0.3
    half = with_half(torch.tensor([0.3, 1.0, -2.0])).softmax(0)
    assert half[-1].item() == pytest.approx(0.5)


def test_weights_that_are_not_finite_end_the_training():
    """A step size of 1e308 made one, which nothing can be drawn by."""
    corpus = KNOBS.read()
    broken = training(KNOBS, corpus, 3, torch.full((len(corpus.domains),), float("nan")))
    with pytest.raises(ArithmeticError, match="weights of the domains are not finite"):
        next(broken.rows())


def test_interrupted_and_resumed_is_bit_for_bit_the_whole_run(tmp_path, monkeypatch):
    arguments = ("--methods", "sama")
    assert domain_weights(*arguments, "--out", tmp_path / "whole") == 0
    step = MixtureTraining.network_step

    def interrupted(self):
        if self.hypergrad is not None and self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(MixtureTraining, "network_step", interrupted)
        assert domain_weights(*arguments, "--out", tmp_path / "halves") == 128 + signal.SIGTERM
    assert main("domain_weights", ["--resume", str(tmp_path / "halves")], Config, story) == 0
    assert comparable(tmp_path / "halves") == comparable(tmp_path / "whole")
    assert results(tmp_path / "halves") == results(tmp_path / "whole")
    assert (tmp_path / "whole" / "weights.png").stat().st_size > 10_000


def results(folder):
    """The tables without minutes and memory."""
    tables = json.loads((folder / "results.json").read_text())["tables"]
    measured = ("minutes to choose", "peak memory (MiB)")
    return [[{k: v for k, v in row.items() if k not in measured} for row in table] for table in tables.values()]


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path):
    """The windows of each step shared out: the same losses and weights by every method, to rounding."""
    assert domain_weights("--out", tmp_path / "one") == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "applications.domain_weights"]
    process = subprocess.run(
        [sys.executable, *launch, *TINY, "--out", str(tmp_path / "two")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "2 ranks" in process.stdout
    one, two = (results(tmp_path / name) for name in ("one", "two"))
    assert sum(map(len, one)) > 12
    for rows, others in zip(one, two, strict=True):
        for row, other in zip(rows, others, strict=True):
            assert other.pop("weights") == row.pop("weights")
            assert other == pytest.approx(row, rel=1e-6)


@refusals(
    *("--steps 0", "--validation 1", "--warm-up 6"),
    (["--every", "50"], "the weights would learn at step 50 first"),
    (["--heads", "3"], "a multiple of --heads 3"),
    (["--methods", "sama", "sama"], "each once"),
    (["--target", "odes"], "odes.txt is needed"),
    (["--texts", "nowhere"], "has the texts none"),
    (["--context", "5000"], "too few for windows of 5000"),
)
def test_bad_settings(arguments, message, refused):
    assert message in refused(domain_weights, *arguments)


@pytest.mark.applications
def test_the_command_of_the_readme(readme_run):
    folder, tables, _ = readme_run("domain_weights")
    (losses, weights) = tables.values()
    test = {row["weights"]: row["test loss"] for row in losses}
    best = min(test[method] for method in METHODS)
    (single,) = (loss for name, loss in test.items() if "alone, the best" in name)
    assert max(test[method] for method in METHODS) < test["uniform"] - 0.04
    assert best < min(single, test["target text alone"]) - 0.02
    assert test["implicit, + target text"] < test["uniform, + target text"] - 0.02
    for row in weights:
        if row["weights"] in METHODS:
            assert row["plays"] + row["scripture"] > 0.5 > 5 * row["code"]
    assert (folder / "weights.png").stat().st_size > 20_000
