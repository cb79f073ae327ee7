"""Some texts can be no path, whatever is on the disk."""

import os
from pathlib import Path

from finetune.errors import UserError
from finetune.safety.secrets import redact

MAX_PATH_BYTES = 4095
MAX_NAME_BYTES = 255


def path_problem(text: str) -> str | None:
    """Why no file can be called so; None: one can.

    Without this the system's own errors come from wherever the path is first used.
    """
    if "\0" in text:
        return "holds a NUL character, which no path can"
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        return f"holds characters that no path can: {shown(text)}"
    if is_too_long(text):
        return f"is too long for a path ({len(encoded)} bytes): {shown(text)}"
    if text.startswith("~"):
        name = text.split("/")[0]
        if os.path.expanduser(name) == name:
            return f"begins with {name}, and there is no such home directory; write the path out"
    return None


def is_too_long(text: str) -> bool:
    """Return whether Linux takes no path of that length, or a name in it."""
    encoded = text.encode(errors="surrogatepass")
    longest = max(len(name) for name in encoded.split(b"/"))
    return len(encoded) > MAX_PATH_BYTES or longest > MAX_NAME_BYTES


def start_of(path: Path, key: str) -> str:
    """Return a sentence on where a path starts that a configuration names, which may have been
    written for another folder; nothing for whole paths, and for options of a command line."""
    if path.is_absolute() or key.startswith("--"):
        return ""
    return f" Relative paths start from the current folder, {Path.cwd()}."


def shown(text: str) -> str:
    """A path for a message, short and in characters that can be printed."""
    text = redact(text)
    plain = ascii(text) if any(0xD800 <= ord(c) <= 0xDFFF or c < " " for c in text) else repr(text)
    return plain if len(plain) <= 100 else f"{plain[:60]}… ({len(text)} characters)"


def not_too_long(words: list[str]) -> list[str]:
    """The words of a command line, none of which the system would refuse as a path wherever it is
    used first."""
    for word in words:
        value = word.split("=", 1)[-1]
        if any(is_too_long(item) for item in value.split(",")):
            raise UserError(f"on the command line: {shown(word)} is too long for any value.")
    return words
