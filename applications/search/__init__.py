"""Hyperparameters of scikit-learn models by hypergradients: `BilevelSearchCV`, and ``python -m applications.search``."""

from applications.search.estimator import BilevelSearchCV
from applications.search.feature_models import FeatureKernelRidge, FeatureLogistic, FeatureRidge

__all__ = ["BilevelSearchCV", "FeatureKernelRidge", "FeatureLogistic", "FeatureRidge"]
