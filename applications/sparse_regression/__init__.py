"""Penalties of the lasso family, one or hundreds, by the hypergradient of the cross-validation loss."""
