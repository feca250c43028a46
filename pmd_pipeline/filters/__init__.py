"""Predicates on captions and on images: a filter is one function, counted under its own name."""
