"""Choice of pairs by a preselector: those whose document is near the anchor's own positive, or above it."""
