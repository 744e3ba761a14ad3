"""Filter: texts of a batch and their scores in, masks out."""
