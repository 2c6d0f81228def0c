"""Training: the encoder, the whole model, and the draft of a frozen model."""
