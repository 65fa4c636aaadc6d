"""Scores and embeddings to figures: verification and retrieval."""
