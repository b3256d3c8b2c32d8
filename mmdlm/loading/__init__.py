"""From the files of a checkpoint to the weights of a model, and back."""
