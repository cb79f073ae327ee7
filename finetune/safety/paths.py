"""What no path can be, whatever is on the disk."""

import os

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
    longest = max((len(name) for name in encoded.split(b"/")), default=0)
    if len(encoded) > MAX_PATH_BYTES or longest > MAX_NAME_BYTES:
        return f"is too long for a path ({len(encoded)} bytes): {shown(text)}"
    if text.startswith("~"):
        name = text.split("/")[0]
        if os.path.expanduser(name) == name:
            return f"begins with {name}, and there is no such home directory; write the path out"
    return None


def shown(text: str) -> str:
    """A path for a message, short and in characters that can be printed."""
    plain = ascii(text) if any(0xD800 <= ord(c) <= 0xDFFF or c < " " for c in text) else repr(text)
    return plain if len(plain) <= 100 else f"{plain[:60]}… ({len(text)} characters)"
