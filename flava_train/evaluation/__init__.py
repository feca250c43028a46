"""Evaluation of a trained model on held-out data: retrieval, zero-shot classification, search."""
