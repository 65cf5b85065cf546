"""Four mini-batch steps of every method against its paper's equations in dense numpy algebra.

Four, because the recursive methods first look back at their second step. Each step gets its own batches, and the
references take them in the order that the methods document by their equations.
"""

from __future__ import annotations

from itertools import cycle

import numpy as np
import pytest
import torch

from bilevel import stochastic
from bilevel.problems.finite_sums import Quadratics
from bilevel.stochastic import Decay, Draws
from bilevel.stochastic.neumann import NeumannTerm

PROBLEM = Quadratics(size=5, outer_size=4, num_samples=12, coupling=0.5)
ALPHA, GAMMA, BETA, Q, T, ETA = 0.3, 0.2, 0.25, 3, 2, 0.4
STEPS, SEED = 4, 7


class Batch:
    """The mean of one level's loss over some samples, in dense matrices."""

    def __init__(self, level, indices):
        rows = {name: value.numpy()[indices] for name, value in PROBLEM._data[level].items()}
        count = len(rows["a"])
        self.A, self.B, self.C = (rows[i].T @ rows[j] / count for i, j in (("a", "a"), ("b", "b"), ("p", "q")))
        self.c, self.d = rows["c"].mean(0), rows["d"].mean(0)

    def dy(self, y, x):
        return self.A @ y + self.C.T @ x + self.c

    def dx(self, y, x):
        return self.B @ x + self.C @ y + self.d


class Feed:
    """For each step, batches of both levels as tensors for the method and as matrices for the reference."""

    def __init__(self, full_steps=()):
        random = np.random.default_rng(0)
        self.steps = []
        for step in range(STEPS):
            indices = {level: [random.choice(12, 4, replace=False) for _ in range(40)] for level in ("g", "f")}
            if step in full_steps:
                for drawn in indices.values():
                    drawn[0] = np.arange(12)
            self.steps.append(indices)

    def run(self, method):
        path = []
        for indices in self.steps:
            draws = [Draws([torch.from_numpy(i) for i in indices[level]]) for level in ("g", "f")]
            method.step(*draws)
            path.append(np.concatenate([method._inner[0].detach().numpy(), method._outer[0].detach().numpy()]))
        return np.stack(path)

    def reference(self, step_of):
        state, path = {"y": np.full(5, 0.5), "x": np.full(4, -0.5)}, []
        for t, indices in enumerate(self.steps):
            g, f = (cycle([Batch(level, i) for i in indices[level]]) for level in ("g", "f"))
            state = step_of(t, state, g, f)
            path.append(np.concatenate([state["y"], state["x"]]))
        return np.stack(path)


def make(kind, **settings):
    y, x = (torch.full((n,), v, dtype=torch.float64, requires_grad=True) for n, v in ((5, 0.5), (4, -0.5)))
    return kind(y, x, PROBLEM.inner_loss, PROBLEM.outer_loss, **settings)


def soba_directions(y, x, u, g, f):
    return g.dy(y, x), g.A @ u - f.dy(y, x), f.dx(y, x) - g.C @ u


def soba(t, s, g, f):
    u = s.get("u", np.zeros(5))
    dy, du, dx = soba_directions(s["y"], s["x"], u, next(g), next(f))
    return {"y": s["y"] - ALPHA * dy, "u": u - BETA * du, "x": s["x"] - GAMMA / (1 + t) ** 0.5 * dx}


def srba(t, s, g, f):
    s = {"u": np.zeros(5), **s}
    g, f, now = next(g), next(f), (s["y"], s["x"], s["u"])
    d = soba_directions(*now, g, f)
    if t % 3:
        d = [a + new - old for a, new, old in zip(s["d"], d, soba_directions(*s["old"], g, f), strict=True)]
    return {
        "y": s["y"] - ALPHA * d[0],
        "u": s["u"] - BETA * d[1],
        "x": s["x"] - GAMMA * d[2],
        "old": now,
        "d": d,
    }


def ma_soba(t, s, g, f):
    u, h = s.get("u", np.zeros(5)), s.get("h", np.zeros(4))
    dy, du, dx = soba_directions(s["y"], s["x"], u, next(g), next(f))
    x = s["x"] - GAMMA * h  # along the average before this step
    return {"y": s["y"] - ALPHA * dy, "u": u - BETA * du, "x": x, "h": (1 - ETA) * h + ETA * dx}


def spaba(t, s, g, f):
    s = {"u": np.zeros(5), **s}
    g, f, now = next(g), next(f), (s["y"], s["x"], s["u"])
    d = soba_directions(*now, g, f)
    if t not in FULL["SPABA"]:
        d = [a + new - old for a, new, old in zip(s["d"], d, soba_directions(*s["old"], g, f), strict=True)]
    u = np.clip(s["u"] - BETA * d[1], -0.1, 0.1)
    return {"y": s["y"] - ALPHA * d[0], "u": u, "x": s["x"] - GAMMA * d[2], "old": now, "d": d}


def fsla(t, s, g, f):
    u, y, x = s.get("u", np.zeros(5)), s["y"], s["x"]
    new_y = y - ALPHA * next(g).dy(y, x)
    new_u = u - BETA * (next(g).A @ u - next(f).dy(new_y, x))
    g, f = next(g), next(f)
    h = f.dx(new_y, x) - g.C @ new_u
    if t:
        h = h + (1 - ETA) * (s["h"] - (f.dx(y, s["old"]) - g.C @ u))
    return {"y": new_y, "u": new_u, "x": x - GAMMA * h, "h": h, "old": x}


def inner_loop(y, x, g, steps=T):
    for _ in range(steps):
        y = y - ALPHA * next(g).dy(y, x)
    return y


def neumann(b, batches):
    """lr times the sum over q of the products of q factors."""
    total, product = b.copy(), np.eye(5)
    for batch in batches:
        product = (np.eye(5) - BETA * batch.A) @ product
        total = total + product @ b
    return BETA * total


def random_term(b, batches):
    product = np.eye(5)
    for batch in batches:
        product = (np.eye(5) - BETA * batch.A) @ product
    return BETA * Q * product @ b


def truncation(t):
    return len(NeumannTerm(Q, SEED).draw(cycle([0]), cycle([0]), t).hessian)


def amigo(t, s, g, f):
    y, f, u = inner_loop(s["y"], s["x"], g), next(f), s.get("u", np.zeros(5))
    for _ in range(Q):
        u = u - BETA * (next(g).A @ u - f.dy(y, s["x"]))
    return {"y": y, "u": u, "x": s["x"] - GAMMA * (f.dx(y, s["x"]) - next(g).C @ u)}


def stocbio(t, s, g, f):
    y, f = inner_loop(s["y"], s["x"], g), next(f)
    u = neumann(f.dy(y, s["x"]), [next(g) for _ in range(Q)])
    return {"y": y, "x": s["x"] - GAMMA * (f.dx(y, s["x"]) - next(g).C @ u)}


def bsa(t, s, g, f, steps=T):
    y, f = inner_loop(s["y"], s["x"], g, steps), next(f)
    u = random_term(f.dy(y, s["x"]), [next(g) for _ in range(truncation(t))])
    return {"y": y, "x": s["x"] - GAMMA * (f.dx(y, s["x"]) - next(g).C @ u)}


def ttsa(t, s, g, f):
    return bsa(t, s, g, f, steps=1)


def momentum(inverse, count):
    def step(t, s, g, f):
        first, f = next(g), next(f)
        series, last = [next(g) for _ in range(count(t))], next(g)

        def estimate(y, x):
            return f.dx(y, x) - last.C @ inverse(f.dy(y, x), series)

        y, x = s["y"], s["x"]
        v, w = first.dy(y, x), estimate(y, x)
        if t:
            v = v + (1 - ETA) * (s["v"] - first.dy(*s["old"]))
            w = w + (1 - ETA) * (s["w"] - estimate(*s["old"]))
        return {"y": y - ALPHA * v, "x": x - GAMMA * w, "v": v, "w": w, "old": (y, x)}

    return step


def vrbo(t, s, g, f):
    def estimate(y, x, f, series, last):
        return f.dx(y, x) - last.C @ neumann(f.dy(y, x), series)

    y, x = s["y"], s["x"]
    if t % 3 == 0:
        full_g, full_f = next(g), next(f)
        v, w = full_g.dy(y, x), estimate(y, x, full_f, [full_g] * Q, full_g)
    else:
        v, w = s["v"], s["w"]
    old, x = (y, x), x - GAMMA * w
    for k in range(T + 1):
        batch = next(g)
        sample = next(f), [next(g) for _ in range(Q)], next(g)
        v = v + batch.dy(y, x) - batch.dy(*old)
        w = w + estimate(y, x, *sample) - estimate(*old, *sample)
        old = (y, x)
        if k < T:
            y = y - ALPHA * v
    return {"y": y, "x": x, "v": v, "w": w}


def f2sa(t, s, g, f):
    z, x, penalty = s["y"], s["x"], 4.0 + 0.5 * t
    y = s.get("penalised", z)
    for _ in range(T):
        b, h = next(g), next(f)
        y, z = y - ALPHA / penalty * (h.dy(y, x) + penalty * b.dy(y, x)), z - ALPHA * b.dy(z, x)
    b, h = next(g), next(f)
    return {"y": z, "x": x - GAMMA * (h.dx(y, x) + penalty * (b.dx(y, x) - b.dx(z, x))), "penalised": y}


def bome(t, s, g, f):
    y, x = s["y"], s["x"]
    target, b, h = inner_loop(y, x, g), next(g), next(f)
    gap = np.concatenate([b.dy(y, x), b.dx(y, x) - b.dx(target, x)])
    goal = np.concatenate([h.dy(y, x), h.dx(y, x)])
    step = goal + max(0.0, ETA - goal @ gap / (gap @ gap)) * gap
    return {"y": y - GAMMA * step[:5], "x": x - GAMMA * step[5:]}


BASIC = {"inner_lr": ALPHA, "outer_lr": GAMMA}
SERIES = {**BASIC, "num_terms": Q, "neumann_lr": BETA}
FORMULAS = {
    "SOBA": (stochastic.SOBA, {"inner_lr": ALPHA, "linear_lr": BETA, "outer_lr": Decay(GAMMA)}, soba),
    "SRBA": (stochastic.SRBA, {**BASIC, "linear_lr": BETA, "period": 3}, srba),
    "MA-SOBA": (stochastic.MASOBA, {**BASIC, "linear_lr": BETA, "mixing": ETA}, ma_soba),
    "SPABA": (
        stochastic.SPABA,
        {**BASIC, "linear_lr": BETA, "probability": 0.4, "seed": SEED, "clip": 0.1},
        spaba,
    ),
    "FSLA": (stochastic.FSLA, {**BASIC, "linear_lr": BETA, "mixing": ETA}, fsla),
    "AmIGO": (stochastic.AmIGO, {**BASIC, "linear_lr": BETA, "num_inner_steps": T, "num_linear_steps": Q}, amigo),
    "stocBiO": (stochastic.StocBiO, {**SERIES, "num_inner_steps": T}, stocbio),
    "BSA": (stochastic.BSA, {**SERIES, "num_inner_steps": T, "seed": SEED}, bsa),
    "TTSA": (stochastic.TTSA, {**SERIES, "seed": SEED}, ttsa),
    "MRBO": (stochastic.MRBO, {**SERIES, "mixing": ETA}, momentum(neumann, lambda t: Q)),
    "SUSTAIN": (stochastic.SUSTAIN, {**SERIES, "mixing": ETA, "seed": SEED}, momentum(random_term, truncation)),
    "VRBO": (stochastic.VRBO, {**SERIES, "num_inner_steps": T, "period": 3}, vrbo),
    "F2SA": (stochastic.F2SA, {**BASIC, "num_inner_steps": T, "penalty": 4.0, "penalty_growth": 0.5}, f2sa),
    "BOME": (stochastic.BOME, {**BASIC, "num_inner_steps": T, "control": ETA}, bome),
}


FULL = {"SRBA": (0, 3), "VRBO": (0, 3), "SPABA": (0, 3)}
"""Steps on all the data; the coin of SPABA with its seed falls so."""


def test_the_coin_of_spaba():
    """The first step sees all the data, and later ones as often as the probability says."""
    method = make(stochastic.SPABA, **BASIC, probability=0.3, seed=SEED)
    tosses = []
    for step in range(4000):
        method.num_steps = step
        tosses.append(method.wants_full_batch)
    assert tosses[0]
    assert sum(tosses) / 4000 == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 4000) ** 0.5)
    others = [make(stochastic.SPABA, **BASIC, probability=0.3, seed=seed) for seed in range(40)]
    for other in others:
        other.num_steps = 1
    assert 0 < sum(other.wants_full_batch for other in others) < 40


@pytest.mark.parametrize("name", FORMULAS)
def test_steps_are_those_of_the_paper(name):
    kind, settings, step_of = FORMULAS[name]
    feed = Feed(full_steps=FULL.get(name, ()))
    found, expected = feed.run(make(kind, **settings)), feed.reference(step_of)
    # Rounding in float64, of numbers of order one and matrices of condition 10.
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)
    assert np.abs(found[1:] - found[:-1]).max() > 1e-2


SIZES = [6, 4, 2]


@pytest.mark.parametrize("batches", [3, SIZES])
def test_saba_is_the_saga_estimate_of_each_quantity(batches):
    """Every batch is met and met again; those not met yet stand at the mean of the others."""
    cuts = np.split(np.random.default_rng(1).permutation(12), [6, 10] if batches == SIZES else [4, 8])
    weights = np.array([len(cut) for cut in cuts]) / 12
    order = [(0, 2), (1, 1), (0, 0), (2, 1), (1, 2), (0, 0), (2, 1)]
    method = make(stochastic.SABA, **BASIC, linear_lr=BETA, inner_batches=batches, outer_batches=batches)
    y, u, x = np.full(5, 0.5), np.zeros(5), np.full(4, -0.5)
    memory = {"g": {}, "f": {}}

    def mean(known):
        total = sum(weights[k] for k in known)
        return sum(weights[k] * value for k, value in known.items()) / total

    for i, j in order:
        method.step(torch.from_numpy(cuts[i]), torch.from_numpy(cuts[j]), inner_index=i, outer_index=j)
        g, f = Batch("g", cuts[i]), Batch("f", cuts[j])
        new = {"g": np.concatenate([g.dy(y, x), g.A @ u, g.C @ u]), "f": np.concatenate([f.dy(y, x), f.dx(y, x)])}
        estimate = {}
        for level, index in (("g", i), ("f", j)):
            known = memory[level]
            centre = mean(known) if known else new[level]
            estimate[level] = centre + 3 * weights[index] * (new[level] - known.get(index, centre))
            known[index] = new[level]
        g_y, hessian, cross = np.split(estimate["g"], [5, 10])
        f_y, f_x = np.split(estimate["f"], [5])
        y, u, x = y - ALPHA * g_y, u - BETA * (hessian - f_y), x - GAMMA * (f_x - cross)
        np.testing.assert_allclose(method._inner[0].detach().numpy(), y, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(method._outer[0].detach().numpy(), x, rtol=1e-11, atol=1e-12)


def test_f2sa_converges_to_the_minimiser_of_its_penalty_function():
    """min over x, y of f + p (g - min g): a linear system, whose solution is where full-batch F2SA stays."""
    penalty, g, f = 5.0, Batch("g", np.arange(12)), Batch("f", np.arange(12))
    inverse = np.linalg.inv(g.A)
    # g - min g = (y - y*(x)) A (y - y*(x)) / 2, and A y*(x) = -(C' x + c)
    hessian = np.block(
        [
            [f.A + penalty * g.A, f.C.T + penalty * g.C.T],
            [f.C + penalty * g.C, f.B + penalty * g.C @ inverse @ g.C.T],
        ]
    )
    linear = np.concatenate([f.c + penalty * g.c, f.d + penalty * g.C @ inverse @ g.c])
    truth = np.linalg.solve(hessian, -linear)[5:]
    method = make(stochastic.F2SA, inner_lr=0.8, outer_lr=0.3, penalty=penalty, num_inner_steps=10)
    for _ in range(320):
        method.step()
    np.testing.assert_allclose(method._outer[0].detach().numpy(), truth, rtol=1e-6, atol=1e-7)
