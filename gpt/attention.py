"""Causal self-attention and the cache that makes decoding cheap.

Shapes: B batch, T tokens, C width, H heads, P positions held by the cache.

- fused qkv, PyTorch's scaled_dot_product_attention (flash kernels where they exist)
- one cache for everything a module must remember about earlier tokens: keys and values here, node values
  and node keys in the DAG. Rows may hold different numbers of tokens, so prompts of any length share a batch.
Source of the shape: GPT-2 (Radford et al. 2019) as nanoGPT writes it.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Cache:
    """Per-row memory of earlier tokens, filled left to right, overwritten never.

    Usage, by `GPT.hidden_states`: `begin(T)` announces T new tokens a row, every module hands its new
    rows to `extend` and gets all P of them back, `commit(lengths)` makes the step's tokens count.
    A prompt shorter than its batch is padded on the right; what the padding left behind lies beyond the
    row's length, is masked by `visible`, and is overwritten by the tokens that follow.
    """

    def __init__(self, batch_size: int, block_size: int, device="cpu"):
        self.block_size = block_size
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)  # tokens held, per row
        self.longest = 0  # the same for the longest row, known to the host without a device sync
        self.store: dict[tuple[nn.Module, str], torch.Tensor] = {}
        self.prompts = self.rows = self.bias = (
            None  # what GPT keeps of the prompts, and of every row while decoding
        )

    def begin(self, num_tokens: int) -> torch.Tensor:
        """Positions (B, T) of the tokens that come next; raises ValueError beyond block_size."""
        self.width = self.longest + num_tokens  # P
        if self.width > self.block_size:
            raise ValueError(f"{self.width} tokens do not fit a context of {self.block_size}")
        self.positions = self.lengths[:, None] + torch.arange(num_tokens, device=self.lengths.device)
        reach = torch.arange(self.width, device=self.lengths.device)
        self.visible = reach <= self.positions[..., None]  # (B, T, P)
        return self.positions

    def extend(self, owner: nn.Module, name: str, new: torch.Tensor) -> torch.Tensor:
        """Store `new` (B, T, ...) at this step's positions; returns (B, P, ...), the row so far."""
        key = (owner, name)
        if key not in self.store:
            self.store[key] = new.new_zeros(new.size(0), self.block_size, *new.shape[2:])
        rows = torch.arange(new.size(0), device=new.device)[:, None]
        self.store[key][rows, self.positions] = new
        return self.store[key][:, : self.width]

    def commit(self, lengths: torch.Tensor | None = None) -> None:
        """Count the step's tokens: `lengths` (B,) of them a row, or all where it is None."""
        added = self.positions.size(1)
        self.lengths = self.lengths + (added if lengths is None else lengths)
        self.longest += added if lengths is None else int(lengths.max())


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
        self, x: torch.Tensor, cache: Cache | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)  # (B, T, H, C/H)
        if cache is not None:
            k, v = cache.extend(self, "k", k), cache.extend(self, "v", v)
            mask = cache.visible[:, None] if mask is None else mask
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))
