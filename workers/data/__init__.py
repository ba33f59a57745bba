"""Data: packs of tokens, their reader, and the keyed order of samples."""
