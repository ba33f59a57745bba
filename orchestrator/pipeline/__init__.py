"""Runs whose model is cut into stages: the controller of a pipeline, and its shells."""
