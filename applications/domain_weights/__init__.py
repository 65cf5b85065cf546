"""Weights for the domains of a text corpus, learned for a small transformer on a few pages of the text that counts."""
