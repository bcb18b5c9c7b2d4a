"""Causal self-attention in the shape of GPT-2 (Radford et al. 2019), as nanoGPT writes it.

Shapes: B batch, T tokens, C width, H heads, P positions held by the cache (kv_cache.py).
Fused query, key and value; PyTorch's scaled_dot_product_attention (flash kernels where they exist).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt.kv_cache import KVCache


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options) -> torch.Tensor:
    """PyTorch's attention, on the CPU always in fp32: its bf16 backward there takes six times as long (2.13)."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, **options)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options)


class CausalSelfAttention(nn.Module):
    """(B, T, C) -> (B, T, C); position t sees positions 0..t of its row, or what a mask (B, 1, T, P) says: whether it
    sees a position (bool), or what is added to the logits."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: torch.Tensor, cache: KVCache | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)  # (B, T, H, C/H)
        if cache is not None:
            k, v = cache.update(self, "k", k), cache.update(self, "v", v)
            mask = cache.visible[:, None] if mask is None else mask
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))
