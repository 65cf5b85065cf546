"""Regularization with many hyperparameters: a penalty for each feature or each weight, and learned augmentation."""
