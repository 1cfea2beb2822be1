"""Numbers that say how good a model is, from the model and its data alone."""
