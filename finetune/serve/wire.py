"""The messages of a call's websocket are those of stock `moshi.server`, and some for our page.

A message is a byte, its kind, and what that kind holds. Kinds and numbers are those of Kyutai's
servers; stock `moshi.client` sends audio alone, and is sent handshake, audio and text. A message of
no meaning is answered with what is wrong with it, as text of the kind `ERROR`.
"""

import json
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import numpy as np
import sphn

from finetune.serve.engine import Samples

HANDSHAKE, AUDIO, TEXT, CONTROL, METADATA, ERROR, PING = range(7)
RESTART = 3
"""The control that begins the conversation anew."""

MAX_MESSAGE_BYTES = 2**16
MAX_METADATA_BYTES = 2**12
_OPUS_SLICE_BYTES = 512
"""Fed to the decoder at once: few bytes can mean minutes of silence."""

Action = Literal["restart", "forget", "ttt_on", "ttt_off"]
Format = Literal["opus", "pcm"]


class Malformed(ValueError):
    """A message of no meaning."""


class Sound(Protocol):
    """A caller's way of coding audio, in both directions."""

    def decode(self, payload: bytes) -> Iterator[Samples]:
        """The samples of a message, piece by piece.

        Raises:
            Malformed: it is not that format.
        """

    def encode(self, samples: Samples) -> bytes:
        """The bytes for a frame; there may be none yet."""


class Opus:
    """Ogg Opus, as stock `moshi.client` speaks it."""

    def __init__(self, rate_hz: int) -> None:
        self._reader = sphn.OpusStreamReader(rate_hz)
        self._writer = sphn.OpusStreamWriter(rate_hz)

    def decode(self, payload: bytes) -> Iterator[Samples]:
        for start in range(0, len(payload), _OPUS_SLICE_BYTES):
            try:
                yield self._reader.append_bytes(payload[start : start + _OPUS_SLICE_BYTES])
            except ValueError as error:
                raise Malformed(f"no Ogg Opus: {error}") from None

    def encode(self, samples: Samples) -> bytes:
        return bytes(self._writer.append_pcm(samples))


class Pcm:
    """Signed 16-bit little-endian samples at Mimi's rate."""

    def decode(self, payload: bytes) -> Iterator[Samples]:
        if len(payload) % 2:
            raise Malformed("half a sample")
        yield np.frombuffer(payload, dtype="<i2").astype(np.float32) / 32768

    def encode(self, samples: Samples) -> bytes:
        return (samples.clip(-1, 1) * 32767).round().astype("<i2").tobytes()


def sound(form: Format, rate_hz: int) -> Sound:
    return Opus(rate_hz) if form == "opus" else Pcm()


def message(kind: int, payload: bytes = b"") -> bytes:
    return bytes([kind]) + payload


def metadata(**fields: Any) -> bytes:
    return message(METADATA, json.dumps(fields, ensure_ascii=False).encode())


_REQUESTS = '{"do": "restart"}, {"do": "forget"} and {"do": "ttt", "on": true or false}'
_ACTIONS: dict[str, Action] = {"restart": "restart", "forget": "forget"}


def action_of(kind: int, payload: bytes) -> Action | None:
    """Return what a control or metadata message asks for; None: nothing.

    Raises:
        Malformed: it has no meaning.
    """
    if kind in (HANDSHAKE, PING):
        return None
    if kind == CONTROL and len(payload) == 1 and payload[0] <= RESTART:
        return "restart" if payload[0] == RESTART else None
    if kind != METADATA or len(payload) > MAX_METADATA_BYTES:
        raise Malformed("unknown kind of message")
    try:
        asked = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"no JSON ({str(error)[:80]}); there are {_REQUESTS}") from None
    try:
        wanted = asked["do"]
        if wanted == "ttt" and isinstance(asked["on"], bool):
            return "ttt_on" if asked["on"] else "ttt_off"
        return _ACTIONS[wanted]
    except (KeyError, TypeError):
        raise Malformed(f"unknown request; there are {_REQUESTS}") from None
