"""Codes that were made before, and whether a model reads them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from finetune.data.problems import FileProblem
from finetune.data.text import TextEncoder


class Codes(NamedTuple):
    """Part of a recording that was encoded before."""

    audio: torch.Tensor
    """Int64 `[2, num_codebooks, T]`: Moshi, the user."""
    text: torch.Tensor | None = None
    """Int64 `[T]`; None: it is made of the words."""


@dataclass(frozen=True)
class ReadCodes:
    """It says which codes a model reads.

    Args:
        num_codebooks: of each channel; more are no mistake, as Mimi's first ones mean the same.
        num_codes: entries of a codebook.
    """

    num_codebooks: int
    num_codes: int

    def require(self, codes: Codes, title: str, text: TextEncoder | None) -> None:
        """Check that the model reads them.

        Args:
            title: what messages call their recording.
            text: with the model's tokenizer; None: tokens are not looked at.

        Raises:
            FileProblem: it does not.
        """
        num_codebooks = codes.audio.shape[1]
        if num_codebooks < self.num_codebooks:
            raise FileProblem(
                f"codes {title} are of {num_codebooks} codebooks a channel, and the model reads "
                f"{self.num_codebooks}",
                "encode with as many codebooks, or name the audio instead",
                code="other-codes",
            )
        if codes.audio.numel() and (highest := int(codes.audio.max())) >= self.num_codes:
            raise FileProblem(
                f"codes {title} go up to {highest}, and Mimi has {self.num_codes} a codebook",
                "check that they are Mimi's, and that rows are streams",
                code="other-codes",
            )
        if text is None or codes.text is None or not codes.text.numel():
            return
        num_tokens = text.tokenizer.vocab_size()
        if (highest := int(codes.text.max())) >= num_tokens:
            raise FileProblem(
                f"the text of codes {title} holds tokens up to {highest}, and the tokenizer has "
                f"{num_tokens}",
                "make it with the model's own tokenizer",
                code="other-codes",
            )
