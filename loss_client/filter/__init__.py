"""Filter room: the texts and scores of a training batch, and the masks that drop false negatives."""
