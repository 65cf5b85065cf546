"""What is studied: training and test examples, the blocks of the features, and which of them are known to be noise."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.linalg import toeplitz

from applications.frame.data import load, split
from applications.frame.errors import UserError


@dataclass(frozen=True)
class Study:
    """One draw of a data set.

    Attributes:
        features, targets: of the training examples, ``[n, d]`` and ``[n]``; `test_features`, `test_targets` likewise.
        blocks: the block of each feature, ``[d]`` from 0; block_names: of each block.
        noise: features that are known to be useless, ``[d]`` booleans.
        support_known: all others are known to be useful.
        intercept: whether the models have one.
    """

    name: str
    features: np.ndarray
    targets: np.ndarray
    test_features: np.ndarray
    test_targets: np.ndarray
    blocks: np.ndarray
    block_names: tuple[str, ...]
    noise: np.ndarray
    support_known: bool
    intercept: bool = True
    shuffle: int = field(default=0, kw_only=True)
    """Seed of the folds."""

    def subset(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.features[rows], self.targets[rows]


def draw(name: str, seed: int, test_size: float, noise_features: int, block_size: int) -> Study:
    """A data set by name or path, split (or simulated) by the seed.

    Args:
        name: ``"diabetes"`` (Efron et al. 2004: ten measurements, their squares and products, 64 in all),
            ``"synthetic"``, ``"sparse-ho"``, or a file that `applications.frame.data.load` takes.
        test_size: part of real data that is kept for the test.
        noise_features: columns of noise that are appended to real data.
        block_size: consecutive features of the synthetic data and of files that share a block.

    Raises:
        UserError: the data cannot be used.
    """
    if name == "synthetic":
        return synthetic(seed, block_size)
    if name == "sparse-ho":
        return sparse_ho(seed)
    return real(name, seed, test_size, noise_features, block_size)


def synthetic(seed: int, block_size: int = 20) -> Study:
    """200 examples of 300 features, neighbours correlated by 0.5; five features of two runs of twenty count, +1 or -1.

    The noise has a quarter of the signal's variance.
    """
    random = np.random.default_rng(seed)
    num_examples, num_features = 200, 300
    root = np.linalg.cholesky(toeplitz(0.5 ** np.arange(num_features)))
    features = random.normal(size=(num_examples + 2000, num_features)) @ root.T
    runs = random.permutation(np.arange(num_features).reshape(-1, 20))[:2]
    useful = np.concatenate([random.choice(run, 5, replace=False) for run in runs])
    truth = np.zeros(num_features)
    truth[useful] = random.choice([-1.0, 1.0], len(useful))
    signal = features @ truth
    targets = signal + signal.std() / 2 * random.normal(size=len(signal))
    return standardized(
        "synthetic",
        (features[:num_examples], targets[:num_examples]),
        (features[num_examples:], targets[num_examples:]),
        consecutive(num_features, block_size),
        noise=truth == 0,
        support_known=True,
        shuffle=seed,
    )


def sparse_ho(seed: int) -> Study:
    """The data and the folds of the example ``plot_lassoCV`` of sparse-ho (Bertrand et al.), for seed 0; no intercept.

    That example has no test examples: these are 2,000 more of the same distribution.
    """
    from sklearn.datasets import make_regression

    features, targets, truth = make_regression(
        n_samples=500, n_features=1000, noise=40, random_state=42 + seed, coef=True
    )
    random = np.random.default_rng(seed)
    test_features = random.normal(size=(2000, 1000))
    test_targets = test_features @ truth + 40 * random.normal(size=2000)
    return Study(
        "sparse-ho",
        *(features, targets, test_features, test_targets),
        *consecutive(1000, 100),
        noise=truth == 0,
        support_known=True,
        intercept=False,
        shuffle=42 + seed,
    )


def real(name: str, seed: int, test_size: float, noise_features: int, block_size: int) -> Study:
    """Split, expanded where it is diabetes, with columns of noise appended."""
    examples = load(name, task="regression")
    features = examples.features
    blocks, block_names = consecutive(features.shape[1], block_size)
    if name == "diabetes":
        features, blocks, block_names = with_products(features)
    random = np.random.default_rng(seed)
    if noise_features:
        features = np.hstack([features, random.normal(size=(len(features), noise_features))])
        blocks, block_names = np.append(blocks, np.full(noise_features, len(block_names))), (*block_names, "noise")
    noise = np.arange(features.shape[1]) >= features.shape[1] - noise_features
    rows = np.arange(len(features))
    train, test = split(type(examples)(name, rows[:, None], examples.targets, 0), (1 - test_size, test_size), seed)
    if np.ptp(train.targets) == 0:
        raise UserError(
            f"{name}: all targets are {train.targets[0]:g}; there is nothing to predict. Is it the right column?"
        )
    return standardized(
        name,
        (features[train.features[:, 0]], train.targets),
        (features[test.features[:, 0]], test.targets),
        (blocks, block_names),
        noise=noise,
        support_known=False,
        shuffle=seed,
    )


def with_products(features: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Features (of mean 0), their squares and their products; the square of one with two values says nothing new."""
    from sklearn.preprocessing import PolynomialFeatures

    expansion = PolynomialFeatures(2, include_bias=False)
    expanded = expansion.fit_transform(features)
    powers = expansion.powers_
    two_valued = np.array([len(np.unique(column)) == 2 for column in features.T])
    kept = ~(powers[:, two_valued] == 2).any(1)
    blocks = np.where(powers.sum(1) == 1, 0, np.where(powers.max(1) == 2, 1, 2))
    return expanded[:, kept], blocks[kept], ("measurements", "squares", "products")


def consecutive(num_features: int, size: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Features in their order, ``size`` to a block."""
    blocks = np.arange(num_features) // size
    return blocks, tuple(f"{size * b}-{min(size * (b + 1), num_features) - 1}" for b in range(blocks[-1] + 1))


def standardized(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    blocks: tuple[np.ndarray, tuple[str, ...]],
    *,
    noise: np.ndarray,
    support_known: bool,
    shuffle: int,
) -> Study:
    """Mean 0 and variance 1 over the training examples, of features and targets; a constant feature becomes 0."""
    from sklearn.preprocessing import StandardScaler

    scaler, middle, size = StandardScaler().fit(train[0]), train[1].mean(), train[1].std()
    (x, y), (test_x, test_y) = [(scaler.transform(x), (y - middle) / size) for x, y in (train, test)]
    return Study(name, x, y, test_x, test_y, *blocks, noise=noise, support_known=support_known, shuffle=shuffle)
