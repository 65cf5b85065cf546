"""Loss weights learned by a small network, on long-tailed and on noisy labels (Meta-Weight-Net, Shu et al. 2019)."""
