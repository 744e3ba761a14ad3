"""Scoring: pairs of texts in, scores out, each pair scored once."""
