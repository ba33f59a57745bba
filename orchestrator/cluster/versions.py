"""What the machines of one cluster must have in common."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

from orchestrator.version import PROTOCOL_VERSION, VERSION


@dataclass(frozen=True, kw_only=True, slots=True)
class Versions:
    """The versions of one machine.

    Attributes:
        python: with its patch level: Ray refuses to mix them.
        protocol: see `orchestrator.version`.
    """

    python: str
    ray: str
    atoll: str
    protocol: int


def my_versions() -> Versions:
    """Those of this process."""
    return Versions(
        python=platform.python_version(),
        ray=importlib.metadata.version("ray"),
        atoll=VERSION,
        protocol=PROTOCOL_VERSION,
    )


def disagreements(mine: Versions, theirs: Versions) -> list[str]:
    """One text with both sides for everything that differs; empty if the two can be in one cluster."""
    pairs = {
        "Python": (mine.python, theirs.python),
        "Ray": (mine.ray, theirs.ray),
        "Atoll": (mine.atoll, theirs.atoll),
        "the protocol": (mine.protocol, theirs.protocol),
    }
    return [f"{name} is {here} here and {there} there" for name, (here, there) in pairs.items() if here != there]
