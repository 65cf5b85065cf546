"""Hypergradient methods: what a backward pass through a solution does."""
