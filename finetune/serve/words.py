"""Tokens, one a frame, as words with their times."""

import json
from dataclasses import dataclass, field

from finetune.data import FRAME_RATE_HZ, Codec

TimedWord = tuple[str, float, float]
"""The word, when Moshi begins to say it, and when its last token comes, in seconds."""

_BEGINS = "▁"


@dataclass
class Words:
    """The words of a text stream that comes token by token."""

    codec: Codec
    done: list[TimedWord] = field(default_factory=list)
    num_frames: int = 0
    _tokens: list[int] = field(default_factory=list)
    _first_frame: int = 0

    def add(self, token: int) -> str:
        """Take the next frame's token. Returns its piece of text: empty for padding; with a space
        where a word begins."""
        frame, self.num_frames = self.num_frames, self.num_frames + 1
        padding = {self.codec.text_padding_id, self.codec.end_of_text_padding_id}
        if token in padding or not 0 <= token < self.codec.tokenizer.vocab_size():
            return ""
        piece: str = self.codec.tokenizer.id_to_piece(token)
        if piece.startswith(_BEGINS) or not self._tokens:
            self.close()
            self._first_frame = frame
        self._tokens.append(token)
        self._last_frame = frame
        return piece.replace(_BEGINS, " ")

    def close(self) -> None:
        """End the open word."""
        if self._tokens:
            text = self.codec.tokenizer.decode(self._tokens).strip()
            start, end = self._first_frame, self._last_frame + 1
            if text:
                times = (round(frame / FRAME_RATE_HZ, 2) for frame in (start, end))
                self.done.append((text, *times))
        self._tokens = []

    def transcript(self) -> str:
        """Return all words as the file of a transcript for training has them."""
        self.close()
        words = [[w, [start, end], "SPEAKER_MAIN"] for w, start, end in self.done]
        return json.dumps({"alignments": words}, ensure_ascii=False) + "\n"
