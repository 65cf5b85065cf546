"""Outer variables by hypergradients and by black-box search, side by side under one time budget."""
