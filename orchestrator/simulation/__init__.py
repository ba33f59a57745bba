"""A deterministic simulator: the production machines under virtual time, with every fault that a cluster has."""
