"""Checks that a dataset on disk is the one of its manifest; one file for each kind of file."""
