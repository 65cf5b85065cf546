"""What a training survives: an adjoint that explodes, a meta-gradient that leaps; and the average that is evaluated."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

import bilevel as bl
from applications.few_shot import guard, methods
from applications.few_shot.average import Average
from applications.few_shot.config import Config
from applications.few_shot.methods import meta_step
from applications.few_shot.train import Session, create_learner, meta_train, one_step, scheduled

CPU = torch.device("cpu")
CONFIG = Config(
    width=8, tasks=4, inner_steps=5, inner_lr=0.05, cg_steps=1, steps=40, lr=1e-2, threads=1, precision="float64"
)


@dataclass(frozen=True)
class SaddleInTask:
    """CG, with the Hessian of one task such that its first direction ``b`` has almost no curvature.

    On the span of ``b`` and another direction it is ``[[1e-3, 1], [1, 1e-3]]``: the step is 1000 times too long, no
    negative curvature is seen in it, and the residual grows by 1000.
    """

    task: int

    def solve(self, operator, b, state=None):
        return bl.CG(max_steps=1).solve(_Saddle(operator, b, self.task), b, state)


class Diagonal(bl.Operator):
    def __init__(self, diagonal):
        super().__init__((), len(diagonal), diagonal.dtype, diagonal.device)
        self.diagonal = diagonal

    def matvec(self, v):
        return self.diagonal * v


class _Saddle:
    symmetric = True

    def __init__(self, operator, b, task):
        self.operator, self.task = operator, task
        self.first = torch.nn.functional.normalize(b[task], dim=0)
        other = torch.roll(self.first, 1)
        self.second = torch.nn.functional.normalize(other - (other @ self.first) * self.first, dim=0)

    def matvec(self, v):
        product = self.operator.matvec(v)
        along, across = v[self.task] @ self.first, v[self.task] @ self.second
        rest = v[self.task] - along * self.first - across * self.second
        saddle = (1e-3 * along + across) * self.first + (along + 1e-3 * across) * self.second + rest
        return torch.cat([product[: self.task], saddle[None], product[self.task + 1 :]])


@pytest.fixture
def session(toy_splits):
    def create(chosen=None, **changes):
        config = replace(CONFIG, **changes)
        learner = create_learner(config, toy_splits.train, CPU, chosen)
        return Session(config, toy_splits, CPU, learner, torch.optim.Adam(learner.parameters(), config.lr))

    return create


def gradients(session):
    return torch.cat([param.grad.flatten() for param in session.learner.parameters()])


CHOSEN = {"hypergrad": bl.Implicit(SaddleInTask(task=1))}


class TestAnAdjointThatExplodes:
    def test_without_a_guard_it_decides_the_step(self, session, monkeypatch):
        monkeypatch.setattr(methods, "guarded", lambda hypergrad, strength: hypergrad)
        broken, sound = session(CHOSEN), session({"hypergrad": bl.Implicit(bl.CG(max_steps=1))})
        norms = [one_step(s, s.sampler("train"), 1e-2)["meta_gradient_norm"] for s in (broken, sound)]
        assert norms[0] > 50 * norms[1]

    def test_the_step_is_the_mean_over_the_other_tasks(self, session):
        broken = session(CHOSEN)
        row = one_step(broken, broken.sampler("train"), 1e-2)
        assert row["left_out"] == 1
        assert "skipped" not in row
        assert row["adjoint_relative_residual"] > 100  # what was found is told
        sound = session({"hypergrad": bl.Implicit(bl.CG(max_steps=1))})
        episodes = sound.sampler("train").episodes(4, 0)
        others = methods.Episodes(*(tensor[[0, 2, 3]] for tensor in episodes.tensors()))
        outcome = meta_step(sound.learner, others)
        outcome.objective.backward()
        torch.testing.assert_close(gradients(broken), gradients(sound), rtol=1e-10, atol=1e-14)
        assert row["loss"] == pytest.approx(outcome.query_loss.item(), rel=1e-12)

    def test_a_training_learns_all_the_same_and_says_so(self, session):
        rows = list(meta_train(session(CHOSEN)))
        assert all(row["left_out"] == 1 for row in rows)
        early, late = (sum(r["loss"] for r in part) for part in (rows[:5], rows[-5:]))
        assert late < 0.8 * early
        assert "40 tasks were left out of the meta-gradient in 40 meta-steps (the last: 40)" in guard.told(rows)

    def test_a_task_whose_queries_are_not_finite(self, session):
        """Its loss and its gradient are NaN: neither is in the means."""
        learner = session().learner
        episodes = session().sampler("train").episodes(4, 0)
        episodes.query_x[2] = math.nan
        outcome = meta_step(learner, episodes)
        outcome.objective.backward()
        assert outcome.kept == 3
        assert math.isfinite(outcome.query_loss)
        assert all(torch.isfinite(param.grad).all() for param in learner.parameters())

    def test_a_sound_solve_is_left_as_it_is(self):
        operator = Diagonal(torch.tensor([1.0, 4.0, 100.0], dtype=torch.float64))
        b = torch.tensor([1.0, 1.0, 0.15], dtype=torch.float64)
        solver = bl.CG(max_steps=1)
        plain = solver.solve(operator, b)
        found = guard.Guarded(solver, torch.tensor(1.0, dtype=torch.float64)).solve(operator, b)
        assert plain.stats["relative_residual"] > 1  # CG's may be, on its way
        assert torch.equal(found.value, plain.value)
        assert not found.stats[guard.LEFT_OUT]

    def test_first_order_has_no_residual_and_is_kept(self, session):
        one = session(cg_steps=0)
        assert one_step(one, one.sampler("train"), 1e-2)["left_out"] == 0


class TestClipping:
    def test_a_leap_is_shortened_and_does_not_open_the_way(self):
        clipping = guard.Clipping(3.0)
        assert [clipping.factor(1.0) for _ in range(50)] == [1.0] * 50
        assert clipping.factor(300.0) == pytest.approx(0.01)
        assert clipping.running == pytest.approx(1 + 2 / 30)
        assert clipping.factor(3.0) == 1.0

    def test_none_never_shortens(self):
        clipping = guard.Clipping(None)
        assert [clipping.factor(norm) for norm in (1.0, 1e9)] == [1.0, 1.0]

    def test_a_zero_gradient(self):
        clipping = guard.Clipping(3.0)
        assert clipping.factor(0.0) == 1.0
        assert clipping.factor(5.0) == 1.0

    def test_the_update_is_clipped_and_recorded(self, session):
        one = session(clip=1.0)
        one.clipping.running = 1e-6
        row = one_step(one, one.sampler("train"), 1e-2)
        assert row["clipped"]
        assert row["meta_gradient_norm"] > 1e-3  # as it was before
        assert gradients(one).norm() == pytest.approx(1e-6, rel=1e-9)
        assert "clipped in 1 meta-steps" in guard.told([{"step": 1, **row}])


@pytest.mark.parametrize(("schedule", "expected"), [("constant", 1.0), ("root", 0.5), ("cosine", 0.5)])
def test_schedules_go_by_steps(session, schedule, expected):
    one = session(schedule=schedule, steps=6000)
    assert scheduled(one) == 1
    one.step = 3000
    assert scheduled(one) == pytest.approx(expected)


class TestAverage:
    def test_its_window_is_a_tenth_of_the_steps_and_ends_at_the_horizon(self, session):
        learner = session().learner
        average, (name, param) = Average(learner, horizon=4), next(iter(learner.meta.items()))
        expected = param.detach().clone()
        for step in range(1, 60):
            with torch.no_grad():
                param.fill_(float(step))
            average.update(step)
            expected += (step - expected) / min(4, 1 + step // 10)
            if step < 10:
                assert torch.equal(average.averaged().meta[name], param)
        torch.testing.assert_close(average.averaged().meta[name], expected)

    def test_it_and_the_running_norm_survive_a_checkpoint(self, session):
        whole, first = session(steps=30, schedule="constant"), session(steps=15, schedule="constant")
        expected = list(meta_train(whole))[15:]
        list(meta_train(first))
        resumed = session(steps=30, schedule="constant")
        resumed.restore(first.state())
        found = list(meta_train(resumed))
        for one, two in zip(found, expected, strict=True):
            assert {**one, "seconds": 0} == {**two, "seconds": 0}
        assert resumed.clipping == whole.clipping
        assert all(torch.equal(value, whole.average.values[name]) for name, value in resumed.average.values.items())
