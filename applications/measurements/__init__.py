"""Times, memory and accuracy of the library beside others: they stand on the frame and on the stories."""
