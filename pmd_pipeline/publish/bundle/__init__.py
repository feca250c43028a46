"""The bundle of a dataset: files to rebuild, verify, describe and train on it, without images."""
