"""Upstream annotation files: downloaded, found, and read in spans."""
