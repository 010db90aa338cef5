"""What LuVe asks of a backbone's text encoder."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_SHOWN = 60  # characters of a text that is cut


class CutTextWarning(UserWarning):
    """A text is longer than the text encoder reads."""


@dataclass(frozen=True)
class CutText:
    """What a text encoder does not see of a text.

    Attributes:
        tokens: tokens of the whole text, the end token included.
        length: how many are seen.
        rest: the words from the first on that is not seen whole.
    """

    tokens: int
    length: int
    rest: str

    def __str__(self) -> str:
        shown = self.rest if len(self.rest) <= _SHOWN else f"{self.rest[:_SHOWN]}..."
        return f"{self.tokens} tokens, of which the text encoder sees {self.length}; cut off: {shown!r}"


class TextConditioner(nn.Module, ABC):
    """Captions to the embeddings that the transformer's cross-attention sees, all padded to one length.

    Attributes:
        tokenizer: the family's.
        encoder: the family's text encoder.
        length: tokens of every caption, padding included.
    """

    tokenizer: Any
    encoder: nn.Module
    length: int

    @property
    @abstractmethod
    def dim(self) -> int:
        """Width of an embedding."""

    @abstractmethod
    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask (1 where there is a token), both int64 B x `length`, on the CPU.

        A caption's own tokens come first: what follows them is padding.
        """

    @abstractmethod
    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings of tokens, B x length x dim, zero past each caption's end."""

    def forward(self, captions: Sequence[str]) -> Tensor:
        """Embeddings of captions, B x length x dim, on the encoder's device."""
        return self.embed(*self.tokenize(captions))

    @abstractmethod
    def cut(self, text: str) -> CutText | None:
        """What is cut off a text that is longer than `length` tokens; None when nothing is."""

    @abstractmethod
    def vocabulary(self) -> Mapping[str, int]:
        """Every token with its number."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest of tokenizer, configuration and weights: what a stored embedding depends on, its length aside."""

    def warn_of_cuts(self, texts: Iterable[str]) -> bool:
        """Warn of texts that are cut, with a count and the first of them; whether there was any."""
        cuts = [(text, cut) for text in dict.fromkeys(texts) if (cut := self.cut(text)) is not None]
        if cuts:
            text, cut = cuts[0]
            more = f" (the first of {len(cuts)})" if len(cuts) > 1 else ""
            warnings.warn(f"the prompt {text[:_SHOWN]!r}... has {cut}{more}", CutTextWarning, stacklevel=3)
        return bool(cuts)
