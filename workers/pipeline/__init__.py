"""Pipelines of stages (SWARM): the machines of peers and trainers, stage functions, and a run in one process."""
