"""Atoll: train one model on several machines that synchronise rarely. The public API."""

from __future__ import annotations

from orchestrator.version import VERSION as __version__

__all__ = ["__version__"]
