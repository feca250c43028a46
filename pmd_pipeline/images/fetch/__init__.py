"""Addresses to bytes over HTTP: whom to ask, how often, and what the answer means."""
