"""`BilevelSearchCV` tunes scikit-learn models by hypergradients; its comparison: ``python -m applications.search``."""

from applications.search.estimator import BilevelSearchCV
from applications.search.feature_models import FeatureKernelRidge, FeatureLogistic, FeatureRidge

__all__ = ["BilevelSearchCV", "FeatureKernelRidge", "FeatureLogistic", "FeatureRidge"]
