"""Pure mathematics on tensors: no Ray, no clock, no global randomness, no I/O."""
