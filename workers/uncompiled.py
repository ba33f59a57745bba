"""torch's optimizers without torch's compiler: the same bits, and runs that compile nothing do not pay for its import.

The methods of `torch.optim.Optimizer` are wrapped so that a compiled function which contains them breaks its graph
there, and for this they import `torch._dynamo`: for every island as much processor time again as torch itself takes.
The built-in loop calls its optimizer outside of whatever a model may have compiled.
"""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import torch

T = TypeVar("T", bound=torch.optim.Optimizer)

BOOKKEEPING = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")


def uncompiled(kind: type[T]) -> type[T]:
    """`kind` whose methods are the ones that torch wraps; of the same name, and a `kind` itself."""
    methods: dict[str, Any] = {name: inspect.unwrap(getattr(kind, name)) for name in BOOKKEEPING}
    methods["step"] = torch.no_grad()(inspect.unwrap(kind.step))
    return type(kind.__name__, (kind,), methods)
