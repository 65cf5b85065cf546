"""Training data attribution: which training images speak for and against a prediction, and which labels are wrong."""
