"""The families of official checkpoints, one file for each repository."""
