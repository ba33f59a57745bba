"""The fault benchmark: a run without faults, a run with random ones, and what the second came to beside the first."""
