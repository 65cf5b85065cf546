"""Hyper-cleaning: find the wrong labels of a training set with clean validation data, by one weight an example."""
