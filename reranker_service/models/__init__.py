"""Models: files of a model in, a description of it out; texts in, token sequences out."""
