"""Image-text pairs for training: sources, augmentation, mixing, streaming."""
