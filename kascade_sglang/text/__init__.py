"""Text of our own: books, documents with planted facts in them, and the words of those facts."""
