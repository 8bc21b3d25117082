"""Text as bytes."""

import torch
from torch import Tensor


class ByteTokenizer:
    """Every byte of the UTF-8 text is a token: nothing is unknown, and nothing has to be fitted."""

    vocab_size = 256

    def encode(self, text: str) -> Tensor:
        """(n,) uint8, the bytes; ``.long()`` makes them indices."""
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0).byte()

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens (n,) in [0, 256); a broken character, as a model may write it, becomes U+FFFD.

        Raises:
            ValueError: on another shape, or a token outside the range.
        """
        if tokens.dim() != 1 or tokens.is_floating_point():
            raise ValueError(f"integer tokens of shape (n,) are needed, got {tokens.dtype} {tuple(tokens.shape)}")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise ValueError(f"bytes lie in [0, 256), got {int(tokens.min())} to {int(tokens.max())}")
        return bytes(tokens.tolist()).decode(errors="replace")
