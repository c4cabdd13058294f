"""Vision towers, the Q-Former and the two BLIP-2 models."""
