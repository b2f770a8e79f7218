"""Which samples the training loader draws, and in which order."""
