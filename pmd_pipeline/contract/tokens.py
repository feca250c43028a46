"""What the packing of texts and the trainer's tokenizer agree on."""

SPECIAL_TOKENS = PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
"""BERT's special tokens, in its order."""

DOCUMENT_SEPARATOR = "\n\n"
"""Stands between two documents of a sequence, and inside none; the trainer puts [SEP] there."""
