"""Stage 6: the data set in the wanted conversation format and container, with manifest and data card."""
