"""The hands: train, encode, move bytes."""
