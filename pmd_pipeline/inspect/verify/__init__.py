"""Prove that a dataset is what its manifest says; one file for each thing that is looked at."""
