"""Bytes become one checked picture, or there is a reason why not."""
