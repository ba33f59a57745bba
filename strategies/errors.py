"""The error of this package that is about settings."""

from __future__ import annotations


class SettingError(ValueError):
    """A setting, or two that do not go together, that a strategy or a codec cannot work with; names key and remedy."""
