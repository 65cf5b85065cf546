"""Random numbers by a counter: uniform, normal, and not alike for other seeds."""

from __future__ import annotations

import math

import pytest
import torch

from bilevel.linalg.noise import normal, signs, uniform

HOST = torch.device("cpu")


def test_the_first_numbers_are_those_of_splitmix64():
    """Computed with Python's integers."""
    seed, found = 7, uniform((5,), 7, HOST).tolist()
    for index, value in enumerate(found):
        z = (index * 0x9E3779B97F4A7C15 + seed * 0xD1342543DE82EF95 + 1) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        assert value == ((z ^ (z >> 31)) >> 11) / 2**53


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_moments(seed):
    """Within four standard errors of 100,000 draws."""
    count = 100_000
    u, z, s = (draw((count,), seed, HOST) for draw in (uniform, normal, signs))
    error = 4 / math.sqrt(count)
    assert abs(u.mean() - 0.5) <= error * math.sqrt(1 / 12)
    assert abs(z.mean()) <= error
    assert abs(z.square().mean() - 1) <= error * math.sqrt(2)
    assert abs(z.pow(4).mean() - 3) <= error * math.sqrt(96)
    assert abs(s.mean()) <= error
    assert s.abs().unique().tolist() == [1.0]
    assert abs((z[1:] * z[:-1]).mean()) <= error


def test_seeds_and_places_are_independent():
    draws = torch.stack([normal((1000,), seed, HOST) for seed in range(20)])
    apart = torch.corrcoef(draws) - torch.eye(20, dtype=torch.float64)
    assert apart.abs().max() <= 5 / math.sqrt(1000)
    assert normal((3, 4), 0, HOST).shape == (3, 4)
    assert normal((), 0, HOST).shape == ()
