from __future__ import annotations

import pytest
import torch

from applications.frame.data import mislabel
from applications.frame.errors import UserError


def noisy(labels: torch.Tensor, num_classes: int, part: float, seed: int = 0) -> torch.Tensor:
    return mislabel(labels, num_classes, part, torch.Generator().manual_seed(seed))


def test_as_many_are_wrong_as_were_asked_for_and_every_other_class_is_as_likely():
    labels = torch.arange(30_000) % 3
    found = noisy(labels, 3, 0.4)
    wrong = found != labels
    assert wrong.double().mean().item() == pytest.approx(0.4, abs=0.01)  # three standard deviations
    counts = torch.stack([((found - labels) % 3 == shift).sum() for shift in (1, 2)]) / wrong.sum()
    assert counts.tolist() == pytest.approx([0.5, 0.5], abs=0.015)
    assert set(found.tolist()) == {0, 1, 2}
    assert torch.equal(labels, torch.arange(30_000) % 3)


def test_the_seed_decides_and_more_noise_adds_to_less():
    labels = torch.arange(1000) % 10
    assert torch.equal(noisy(labels, 10, 0.3, seed=4), noisy(labels, 10, 0.3, seed=4))
    assert not torch.equal(noisy(labels, 10, 0.3, seed=4), noisy(labels, 10, 0.3, seed=5))
    few, many = noisy(labels, 10, 0.3), noisy(labels, 10, 0.6)
    assert torch.equal(few[few != labels], many[few != labels])
    assert torch.equal(noisy(labels, 10, 0.0), labels)
    assert (noisy(labels, 10, 1.0) != labels).all()


@pytest.mark.parametrize(("num_classes", "part", "message"), [(1, 0.5, "at least two"), (3, 1.5, "between 0 and 1")])
def test_what_cannot_be_made_wrong_is_refused(num_classes, part, message):
    with pytest.raises(UserError, match=message):
        noisy(torch.zeros(4, dtype=torch.long), num_classes, part)
