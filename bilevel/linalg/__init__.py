"""Linear solvers over operators that are known by their products only."""
