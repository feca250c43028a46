"""The page on a dataset: one HTML file with its numbers, its losses and pictures of both."""
