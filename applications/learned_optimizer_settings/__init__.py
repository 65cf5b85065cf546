"""A learning-rate schedule and a momentum, learned by the hypergradient of whole training runs."""
