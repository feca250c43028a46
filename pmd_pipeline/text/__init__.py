"""Texts without images: documents become sequences by a vocabulary, which is learned here too."""
