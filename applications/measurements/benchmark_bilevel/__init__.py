"""The stochastic methods as a solver of benchmark_bilevel, so that benchopt runs ours beside its own."""
