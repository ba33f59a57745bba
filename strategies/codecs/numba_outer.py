"""The compiled form of `outer.Nesterov.step`: the same bits, one pass over memory instead of six."""

from __future__ import annotations

import numpy as np

from strategies.codecs.numba_tools import Array, compiled


@compiled
def nesterov(
    anchor_N: Array, buffer_N: Array, g_N: Array, lr: float, momentum: float, next_N: Array, next_buffer_N: Array
) -> None:
    """`b <- mu b + g`, then `anchor <- anchor - lr (g + mu b)`, each operation rounded once; may be in place."""
    rate, mu = np.float32(lr), np.float32(momentum)
    for i in range(g_N.size):
        buffer = np.float32(np.float32(buffer_N[i] * mu) + g_N[i])
        update = np.float32(np.float32(np.float32(buffer * mu) + g_N[i]) * rate)
        next_N[i] = anchor_N[i] - update
        next_buffer_N[i] = buffer
