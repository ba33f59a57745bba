"""Text from a model, to look at: plain sampling without a key/value cache."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from workers.model.errors import ModelError


class SampleTokenizer(Protocol):
    """What sampling needs of a tokenizer (those of `workers.data.tokenizers` have it)."""

    @property
    def separator_id(self) -> int:
        """The token that ends a document."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""

    def decode(self, ids: list[int]) -> str:
        """Text of tokens."""


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: SampleTokenizer,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    *,
    context: int | None = None,
) -> str:
    """Return `prompt` and its continuation, which ends at a document separator or after `max_new_tokens`.

    Deterministic for a seed; temperature 0 takes the likeliest token. The model sees the last `context` tokens
    (default: its `seq_len`). An empty prompt starts a new document. Raises ModelError for a bad temperature and for
    a model without a known context.
    """
    if temperature < 0 or max_new_tokens < 0:
        raise ModelError(f"temperature = {temperature}, max_new_tokens = {max_new_tokens}: neither may be negative")
    context = getattr(model, "seq_len", None) if context is None else context
    if not isinstance(context, int) or context < 1:
        raise ModelError(f"{type(model).__qualname__} has no seq_len: say how many tokens it can see (context)")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt) or [tokenizer.separator_id]
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            output = model(torch.tensor([ids[-context:]], device=device))
            logits_V = output if isinstance(output, Tensor) else output.logits
            token = _draw(logits_V[0, -1].float().cpu(), temperature, generator)
            if token == tokenizer.separator_id:
                break
            ids.append(token)
    finally:
        model.train(was_training)
    return tokenizer.decode(ids)


def _draw(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    # Subtract the largest first: a tiny temperature would otherwise overflow.
    weights_V = torch.softmax((logits_V.double() - logits_V.max()) / temperature, dim=0)
    return int(torch.multinomial(weights_V, 1, generator=generator))
