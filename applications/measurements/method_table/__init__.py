"""Every hypergradient method on every problem with an exact answer: the table of relative errors in ``docs/``."""
