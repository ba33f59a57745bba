"""The lab: several hosts on one machine, joined by emulated links that are as slow, long and lossy as one asks."""
