"""Which implementation of a codec runs: the torch form, or a compiled one: numba's on CPUs, Triton's on GPUs.

All write and read the same bytes, so members of one run may differ in it. The choice is made once, when the settings
are resolved; nothing falls back later. Torch is not imported here: the command line asks before it starts anything.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Literal

from strategies.errors import SettingError

if TYPE_CHECKING:
    from types import ModuleType

Backend = Literal["torch", "numba", "triton"]
BackendChoice = Literal["auto", "torch", "numba", "triton"]

REMEDY = "`pip install 'atoll[fast]'` installs it"
TRITON_REMEDY = "it comes with torch for CUDA"
TRITON_CODECS = ("int8", "int4", "fp4", "e3m0")
Kernels = Literal["numba_dense", "numba_sparse", "numba_sums", "numba_outer", "triton_dense"]


def resolve_backend(choice: BackendChoice) -> tuple[Backend, str | None]:
    """Return the implementation that `codec.backend` means on this machine, and a warning if it is the slower one.

    "auto" never means Triton (ADR 57). Raises SettingError when a form is asked for by name and not installed.
    """
    if choice == "torch":
        return "torch", None
    if choice == "triton":
        if importlib.util.find_spec("triton") is None:
            raise SettingError(
                f"codec.backend = 'triton', but triton is not installed; {TRITON_REMEDY}, or set codec.backend = 'auto'"
            )
        return "triton", None
    if importlib.util.find_spec("numba") is not None:
        return "numba", None
    if choice == "numba":
        raise SettingError(
            f"codec.backend = 'numba', but numba is not installed; {REMEDY}, or set codec.backend = 'auto'"
        )
    return "torch", f"numba is not installed: codecs and sums run in their torch form, several times slower; {REMEDY}"


def use_cache_dir(path: str) -> None:
    """Keep compiled code under `path`, for example `~/.cache/atoll/numba`, written out. Call it before `load_kernels`.

    NUMBA_CACHE_DIR in the environment stays in force. Without either, numba writes beside the source, or into its own
    folder below the user's cache where that is read-only. Does nothing where numba is not installed.
    """
    if importlib.util.find_spec("numba") is None:
        return
    config = importlib.import_module("numba").config
    if not config.CACHE_DIR:
        config.CACHE_DIR = path


def load_kernels(name: Kernels) -> ModuleType:
    """Import a file of compiled codecs; each kernel is compiled, or read from a cache, at its first call.

    Raises SettingError when numba or Triton cannot be imported, for example beside an unsupported numpy.
    """
    backend, remedy = ("triton", TRITON_REMEDY) if name.startswith("triton") else ("numba", f"reinstall it ({REMEDY})")
    try:
        return importlib.import_module(f"strategies.codecs.{name}")
    except ImportError as error:
        raise SettingError(
            f"codec.backend = {backend!r}, but {backend} cannot be imported ({error}); {remedy} "
            "or set codec.backend = 'torch'"
        ) from error
