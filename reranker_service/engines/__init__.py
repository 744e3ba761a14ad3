"""Engines: token sequences in, one number (or one vector) a sequence out."""
