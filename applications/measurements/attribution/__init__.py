"""Influences by this library, pyDVL and kronfluence on one network, each against training again."""
