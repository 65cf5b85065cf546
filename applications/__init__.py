"""Applications of `bilevel`: each folder is one story, run with ``python -m applications.<name>``."""
