"""Inner solvers: they find the minimum; how it was found is not differentiated."""
