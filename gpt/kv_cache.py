"""The key-value cache that makes decoding cheap: what every module has to remember about the earlier tokens of a row.

Keys and values of attention, node values and node keys of the dense DAGs. Rows may hold different numbers of tokens,
so prompts of any length share a batch. B batch, T new tokens, P positions held.
"""

import torch
import torch.nn as nn


class KVCache:
    """Hold earlier tokens per row, filled left to right, overwritten never.

    Usage, by `GPT.hidden_states`: `begin(T)` announces T new tokens a row, every module hands its new
    rows to `update` and gets all P of them back, `commit(lengths)` makes the step's tokens count.
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
        """Announce tokens a row; return their positions (B, T). Raise ValueError beyond block_size."""
        self.width = self.longest + num_tokens  # P
        if self.width > self.block_size:
            raise ValueError(f"{self.width} tokens do not fit a context of {self.block_size}")
        self.positions = self.lengths[:, None] + torch.arange(num_tokens, device=self.lengths.device)
        reach = torch.arange(self.width, device=self.lengths.device)
        self.visible = reach <= self.positions[..., None]  # (B, T, P)
        return self.positions

    def update(self, owner: nn.Module, name: str, new: torch.Tensor) -> torch.Tensor:
        """Store `new` (B, T, ...) at this step's positions; return (B, P, ...), the rows so far."""
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
