"""Sizes of the built-in decoder, derived from `[model]` (no torch: the controller may ask too)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from workers.config import ModelConfig
from workers.model.errors import ModelError


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderShape:
    """Every size of one decoder; made by `resolve_shape`, which checks that they fit each other."""

    vocab_size: int
    seq_len: int
    layers: int
    dim: int
    heads: int
    kv_heads: int
    hidden: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    init_std: float

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.heads

    @property
    def kv_dim(self) -> int:
        """Width of all key heads together (and of all value heads)."""
        return self.kv_heads * self.head_dim

    @property
    def num_params(self) -> int:
        """Trainable values of the model."""
        return sum(math.prod(shape) for shape in parameter_shapes(self).values())


def resolve_shape(config: ModelConfig, *, vocab_size: int, seq_len: int) -> DecoderShape:
    """Fill in the defaults of `[model]` and check the sizes; raises ModelError naming the setting that does not fit."""
    kv_heads = config.heads if config.kv_heads is None else config.kv_heads
    hidden = math.ceil(config.dim * 8 / 3 / 32) * 32 if config.hidden is None else config.hidden
    if config.dim % config.heads:
        raise ModelError(f"model.heads = {config.heads} does not divide model.dim = {config.dim}")
    if (config.dim // config.heads) % 2:
        raise ModelError(
            f"model.dim / model.heads = {config.dim} / {config.heads} = {config.dim // config.heads} is odd: "
            "rotary positions need an even head width; change model.heads"
        )
    if config.heads % kv_heads:
        raise ModelError(f"model.kv_heads = {kv_heads} does not divide model.heads = {config.heads}")
    if vocab_size < 1 or seq_len < 1:
        raise ModelError(
            f"the data pack has vocab_size = {vocab_size} and seq_len = {seq_len}; both must be at least 1"
        )
    return DecoderShape(
        vocab_size=vocab_size,
        seq_len=seq_len,
        layers=config.layers,
        dim=config.dim,
        heads=config.heads,
        kv_heads=kv_heads,
        hidden=hidden,
        rope_theta=config.rope_theta,
        norm_eps=config.norm_eps,
        tie_embeddings=config.tie_embeddings,
        init_std=config.init_std,
    )


def parameter_shapes(shape: DecoderShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the model's order; the names are those of Hugging Face's Llama."""
    dim, kv_dim, hidden = shape.dim, shape.kv_dim, shape.hidden
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, dim)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "self_attn.q_proj.weight": (dim, dim),
            prefix + "self_attn.k_proj.weight": (kv_dim, dim),
            prefix + "self_attn.v_proj.weight": (kv_dim, dim),
            prefix + "self_attn.o_proj.weight": (dim, dim),
            prefix + "mlp.gate_proj.weight": (hidden, dim),
            prefix + "mlp.up_proj.weight": (hidden, dim),
            prefix + "mlp.down_proj.weight": (dim, hidden),
            prefix + "input_layernorm.weight": (dim,),
            prefix + "post_attention_layernorm.weight": (dim,),
        }
    shapes["model.norm.weight"] = (dim,)
    if not shape.tie_embeddings:
        shapes["lm_head.weight"] = (shape.vocab_size, dim)
    return shapes
