"""What a GPU is asked for while it is at hand: tests, times, precision, memory, and a training for the rest."""
