"""Dataset distillation, a few synthetic images that train a network: ``python -m applications.distillation``."""
