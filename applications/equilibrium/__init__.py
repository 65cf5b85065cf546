"""A deep equilibrium classifier: its hidden layer is a fixed point, and its gradient that of the solution."""
