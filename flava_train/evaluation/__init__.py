"""What a trained model can do with what it never saw: retrieval, classification, search."""
