"""The built-in decoder: Llama with the parameter names and conventions of Hugging Face `transformers`.

Pre-norm RMSNorm (https://arxiv.org/abs/1910.07467), rotary positions (https://arxiv.org/abs/2104.09864; the two
halves of a head rotate against each other, as in `transformers`, not neighbouring pairs as in the paper), SwiGLU
(https://arxiv.org/abs/2002.05202), grouped-query attention (https://arxiv.org/abs/2305.13245) through torch SDPA.
Shapes: B samples, T positions, D width, H heads, K key/value heads, E head width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.model.linear import Linear, linear
from workers.model.shape import DecoderShape


def rotary_tables(seq_len: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, both (T, 1, E), the angles repeated for the two halves."""
    inverse_frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), inverse_frequency)
    angles_T1E = torch.cat([angles, angles], dim=-1)[:, None, :]
    return angles_T1E.cos(), angles_T1E.sin()


def rotate(x_BTHE: Tensor, cos_T1E: Tensor, sin_T1E: Tensor) -> Tensor:
    """Turn each head by the angles of its position."""
    half = x_BTHE.shape[-1] // 2
    turned = torch.cat([-x_BTHE[..., half:], x_BTHE[..., :half]], dim=-1)
    return x_BTHE * cos_T1E + turned * sin_T1E


class Attention(nn.Module):
    """Causal self-attention; `kv_heads` of keys and values serve `heads` of queries."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.grouped = shape.kv_heads != shape.heads
        self.q_proj = Linear(shape.dim, shape.dim)
        self.k_proj = Linear(shape.dim, shape.kv_dim)
        self.v_proj = Linear(shape.dim, shape.kv_dim)
        self.o_proj = Linear(shape.dim, shape.dim)

    def forward(self, x_BTD: Tensor, cos_T1E: Tensor, sin_T1E: Tensor) -> Tensor:
        """`x_BTD -> y_BTD`."""
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BHTE = rotate(self.q_proj(x_BTD).view(heads), cos_T1E, sin_T1E).transpose(1, 2)
        k_BKTE = rotate(self.k_proj(x_BTD).view(heads), cos_T1E, sin_T1E).transpose(1, 2)
        v_BKTE = self.v_proj(x_BTD).view(heads).transpose(1, 2)
        mixed_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BKTE, v_BKTE, is_causal=True, enable_gqa=self.grouped)
        out: Tensor = self.o_proj(mixed_BHTE.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.dim, shape.hidden)
        self.up_proj = Linear(shape.dim, shape.hidden)
        self.down_proj = Linear(shape.hidden, shape.dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """`x_BTD -> y_BTD`."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return out


class Layer(nn.Module):
    """One decoder layer: attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = FeedForward(shape)
        self.input_layernorm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)

    def forward(self, x_BTD: Tensor, cos_T1E: Tensor, sin_T1E: Tensor) -> Tensor:
        """`x_BTD -> y_BTD`."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_T1E, sin_T1E)
        out: Tensor = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        return out


class Decoder(nn.Module):
    """Embedding, layers and final norm (`model.` in the parameter names)."""

    cos_T1E: Tensor
    sin_T1E: Tensor

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(shape.vocab_size, shape.dim), freeze=False)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        cos_T1E, sin_T1E = rotary_tables(shape.seq_len, shape.head_dim, shape.rope_theta)
        self.register_buffer("cos_T1E", cos_T1E, persistent=False)
        self.register_buffer("sin_T1E", sin_T1E, persistent=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """`tokens_BT -> hidden_BTD`."""
        x_BTD: Tensor = self.embed_tokens(tokens_BT)
        cos_T1E, sin_T1E = self.cos_T1E[: tokens_BT.shape[1]], self.sin_T1E[: tokens_BT.shape[1]]
        if torch.is_autocast_enabled(x_BTD.device.type):
            # fp32 tables would turn bf16 queries and keys back into fp32 (`transformers` casts them too).
            dtype = torch.get_autocast_dtype(x_BTD.device.type)
            cos_T1E, sin_T1E = cos_T1E.to(dtype), sin_T1E.to(dtype)
        for layer in self.layers:
            x_BTD = layer(x_BTD, cos_T1E, sin_T1E)
        out: Tensor = self.norm(x_BTD)
        return out


class Llama(nn.Module):
    """The decoder with its output head; initialised from `seed` alone, whatever the global generators hold.

    Weights are normal with `init_std`; the two projections that write to the residual stream are smaller by
    sqrt(2 * layers), as in GPT-2, so that the stream's variance does not grow with depth.
    """

    def __init__(self, shape: DecoderShape, *, seed: int) -> None:
        super().__init__()
        self.shape = shape
        self.seq_len = shape.seq_len
        self.model = Decoder(shape)
        self.lm_head = None if shape.tie_embeddings else Linear(shape.dim, shape.vocab_size)
        self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        residual_std = self.shape.init_std / math.sqrt(2 * self.shape.layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue  # norms start at one
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            parameter.normal_(0.0, residual_std if residual else self.shape.init_std, generator=generator)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """`tokens_BT -> logits_BTV`; T is at most `seq_len`."""
        assert tokens_BT.shape[1] <= self.seq_len, f"{tokens_BT.shape[1]} positions, the model has {self.seq_len}"
        hidden_BTD = self.model(tokens_BT)
        weight_VD = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return linear(hidden_BTD, weight_VD)
