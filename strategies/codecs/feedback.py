"""Error feedback: what a lossy codec leaves out is added to the next contribution.

Source: EF-SGD (arXiv 1901.09847), algorithm 2, on displacements instead of gradients; the learning rate stays outside
of the residual. With decay beta as in the exchange protocol, section 1.5: x = D + beta e; u = dec(enc(x)); e+ = x - u.

The next residual e+ counts only once the contribution was committed. A contribution that was left out or dropped must
not touch e; so the function returns e+ and the caller decides. Then (beta = 1), always:
sum of what was sent and included + e = sum of the displacements included. Suffix: N = values of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from strategies.codecs.base import Codec
from strategies.elementwise import scalar_like


class Compensated(NamedTuple):
    """A payload and the residual that holds if it is included."""

    payload: Tensor
    next_residual_N: Tensor


def encode_with_feedback(
    codec: Codec, displacement_N: Tensor, residual_N: Tensor | None, *, decay: float = 1.0
) -> Compensated:
    """Encode a displacement plus the residual of earlier ones (None: there is none yet).

    The arguments are left as they are. Raises NonFiniteError as the codec does.
    """
    if residual_N is None:
        total_N = displacement_N
    elif decay == 1.0:
        total_N = torch.add(displacement_N, residual_N)
    else:
        total_N = torch.mul(residual_N, scalar_like(decay, residual_N)).add_(displacement_N)
    payload = codec.encode(total_N)
    sent_N = codec.decode(payload, num_values=total_N.numel())
    return Compensated(payload, torch.sub(total_N, sent_N, out=sent_N))
