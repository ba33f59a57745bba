"""The one error of the model package that a user can cause."""

from __future__ import annotations


class ModelError(ValueError):
    """A model, checkpoint or device setting that cannot work; the message says which, and what to do."""
