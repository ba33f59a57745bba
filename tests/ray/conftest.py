"""One Ray of our own for each module, and one pack for all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.launch import LOOPBACK_ONLY, RAY_ENVIRONMENT, RaySession
from tests.small_run import make_pack, small_config

# Before a test module imports Ray, which reads them then.
os.environ.update({**RAY_ENVIRONMENT, LOOPBACK_ONLY: "0"})


@pytest.fixture(scope="session")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("pack"))


@pytest.fixture(scope="module")
def ray_cluster(pack_dir: Path) -> Iterator[None]:
    """Room for several small runs; runs that are started meanwhile use it."""
    os.environ["RAY_ADDRESS"] = "127.0.0.1:1"  # another Ray on this machine, as far as Ray can tell: not for us
    with RaySession(small_config(pack_dir, "run.islands=8")):
        del os.environ["RAY_ADDRESS"]
        yield
