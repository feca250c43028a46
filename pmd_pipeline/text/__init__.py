"""Texts without images: documents packed into sequences, and the vocabulary for it."""
