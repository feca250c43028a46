"""FLAVA and its exchange with Hugging Face."""
