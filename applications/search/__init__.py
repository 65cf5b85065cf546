"""The comparison of `bilevel.sklearn.BilevelSearchCV` with other searches: ``python -m applications.search``."""
