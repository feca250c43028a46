"""Upstream annotation files: download, listing, reading by spans."""
