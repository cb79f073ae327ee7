"""Secrets, which leave the program nowhere: known by value, replaced wherever text goes out."""

import os
import re
from collections.abc import Iterable, Mapping

HIDDEN = "***"

_ENVIRONMENT = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MOSHI_TTT_TOKEN")
_NAME = re.compile(r"(^|[._-])(key|api_?key|token|password|secret)$", re.IGNORECASE)
_MIN_LENGTH = 6
"""Of shorter ones no service has any, and they would be found in ordinary words."""

_known: set[str] = set()


def learn(value: object) -> None:
    """Take down a secret."""
    if isinstance(value, str) and len(value.strip()) >= _MIN_LENGTH:
        _known.add(value.strip())


def learn_from(options: Mapping[str, object]) -> None:
    """Take down what options of a secret's name have as values, by dotted name, misspelled too."""
    for name, value in options.items():
        if is_secret(name):
            for part in value if isinstance(value, list | tuple) else [value]:
                learn(part)


def learn_from_words(words: Iterable[str]) -> None:
    """Learn the secrets of a command line, with dashes or without, and of the environment."""
    name = ""
    for word in words:
        if word == "=":
            continue  # typed with spaces around it
        left, sign, right = word.partition("=")
        if sign and (is_secret(left.strip("-")) or (not left and is_secret(name))):
            learn(right.strip("'\""))
        elif not sign and is_secret(name):
            learn(word)
        name = word.rstrip("=").strip("-")
    for variable in _ENVIRONMENT:
        learn(os.environ.get(variable))


def is_secret(name: str) -> bool:
    """Return whether an option of this name holds a secret."""
    return _NAME.search(name) is not None


def redact(text: str) -> str:
    """Return a text without the secrets that are known."""
    for secret in _known:
        if secret in text:
            text = text.replace(secret, HIDDEN)
    return text
