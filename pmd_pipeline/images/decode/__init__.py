"""Fetched bytes to one checked, resized and encoded image, or a reason for its absence."""
