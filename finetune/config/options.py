"""Options of commands: dataclasses, read from a command line as a configuration is from YAML."""

import dataclasses
import difflib
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar, get_args

from finetune.config.args import TrainArgs
from finetune.config.fields import Field, all_fields, complete, fill, marks_of
from finetune.config.marks import MustExist, Positional
from finetune.config.must_exist import what_is_missing
from finetune.config.values import members, parse
from finetune.errors import UserError
from finetune.safety import learn_from, redact
from ttt.options import abbreviated

Options = TypeVar("Options")

BARE = "\0"
"""The value of an option behind which stands none: no word of a command line can be this."""


def read_options(
    cls: type[Options], words: Sequence[str], given: Mapping[str, Any], *, with_overrides: bool
) -> tuple[Options, dict[str, Any]]:
    """Return a command's options, and the keys of a configuration that stand among them.

    Args:
        words: what was given without a name.
        given: texts by name, or `BARE`.
        with_overrides: names that are no option are keys of a configuration.

    Raises:
        UserError: naming every mistake.
    """
    cls = complete(cls)
    fields = {field.key: field for field in all_fields(cls) if not field.section}
    # A key that is this command's own option is the name of another one, and no secret.
    learn_from({name: text for name, text in given.items() if name != "key" or name not in fields})
    known = {**fields, **_configuration_fields(), **fields} if with_overrides else fields
    given = {name: _text_of(name, text, known) for name, text in given.items()}
    own = {name: value for name, value in given.items() if name in fields}
    others = {name: value for name, value in given.items() if name not in fields}
    places = [key for key, field in fields.items() if is_positional(field) and key not in own]
    own |= dict(zip(places, words, strict=False))
    for word in words[len(places) :]:
        named = [key for key, field in fields.items() if is_positional(field) and key in given]
        hint = f"--{named[0]} is given already." if named else _place_of(word, known, given)
        raise UserError(f"unexpected argument: {abbreviated(redact(word))}. {hint}")
    missing = [key for key, field in fields.items() if field.is_required and not own.get(key)]
    # `--table run.yaml`: the switch took the word behind it, of which it can make nothing.
    took = [name for name in given if _took_a_word(name, given[name], known)]
    if missing and missing == places[len(words) :] and len(took) == 1:
        own[missing.pop()] = given[took[0]]
        (own if took[0] in own else others)[took[0]] = "true"
    for name in others:
        # Among the keys of a configuration, one may be what is missing.
        wanted = missing if with_overrides and missing else list(fields)
        is_key = with_overrides and name in _configuration_keys()
        meant = None if is_key else _meant(name, wanted)
        if meant or not with_overrides:
            hint = f"Did you mean --{meant}?" if meant else "Ask for --help to see them all."
            raise UserError(f"unknown option: --{abbreviated(redact(name))}. {hint}")
    for name in missing:
        raise UserError(f"--{name} is missing. Ask for --help to see what it is.")
    options, problems = fill(cls, {key: _text(value) for key, value in own.items()})
    _raise([f"--{key}: {text}" for key, text in problems])
    return options, others


def _text_of(name: str, text: Any, known: Mapping[str, Field]) -> Any:
    """Return the text of an option, also where none was given behind a switch.

    Raises:
        UserError: none was given, and it is no switch.
    """
    if text != BARE:
        return text
    if name in known and bool not in members(known[name].kind):
        raise UserError(f"--{name} needs a value: --{name}=VALUE.")
    return "true"


def _place_of(word: str, known: Mapping[str, Field], given: Collection[str]) -> str:
    """Return a sentence on where a word belongs that was given without a name."""
    options = [field for key, field in known.items() if not is_positional(field)]
    if "=" in word or word in known:
        return f"Did you mean --{abbreviated(redact(word))}?"
    of_choice = [field for field in options if word in _choices(field)]
    # The first option is what is most often given.
    first = [field for field in options[:1] if _may_be(word, field) and field.key not in given]
    for field in of_choice or first:
        return f"Did you mean --{field.key}={abbreviated(redact(word))}?"
    return "Options are given as --NAME=VALUE."


def _choices(field: Field) -> list[Any]:
    return [each for kind in members(field.kind) for each in get_args(kind)]


def _may_be(word: str, field: Field) -> bool:
    """Return whether a word may be the value of an option that takes a path or a number."""
    if {bool, str}.intersection(members(field.kind)):
        return False
    try:
        parse(word, field.kind)
    except ValueError:
        return False
    return True


def _took_a_word(name: str, value: Any, known: Mapping[str, Field]) -> bool:
    """Return whether an option is a switch, and has a text that is no value of it."""
    if name not in known or bool not in members(known[name].kind):
        return False
    try:
        parse(_text(value), known[name].kind)
    except ValueError:
        return True
    return False


def _meant(name: str, known: Sequence[str]) -> str | None:
    """Return the option that was probably meant; of another section, none is."""
    section, dot, _ = name.partition(".")
    if dot:
        sections = {key.partition(".")[0] for key in known if "." in key}
        close = difflib.get_close_matches(section[:100], sections, n=1)
        known = [key for key in known if close and key.startswith(f"{close[0]}.")]
    similar = difflib.get_close_matches(name[:100], known, n=1)
    similar += [key for key in known if key.startswith(name)]
    return similar[0] if similar else None


@cache
def _configuration_fields() -> Mapping[str, Field]:
    return {field.key: field for field in all_fields(TrainArgs)}


@cache
def _configuration_keys() -> frozenset[str]:
    """Return all keys of a configuration, also without their sections: so they are known again."""
    fields = _configuration_fields().values()
    return frozenset(name for field in fields for name in (field.key, field.name))


def require_there(options: Any) -> None:
    """Check that all is there which options name and a command cannot do without.

    Raises:
        UserError: naming everything that is missing.
    """
    _raise([text for _, text in what_is_missing(options, dashes="--")])


def _raise(problems: Sequence[str]) -> None:
    if problems:
        several = ["several options:", *problems]
        raise UserError(problems[0] if len(problems) == 1 else "\n  - ".join(several))


def ask_for_missing(
    options: Any, checks: Mapping[str, Callable[[Any], object]] | None = None
) -> Any:
    """Return options with answers in the place of those that are `ASKED` and null; an answer
    that is no value, or names what is not there, is asked for again.

    Args:
        checks: by name, what raises `UserError` for an answer that is of no use.

    Raises:
        UserError: one is null, and there is no terminal, or no answer.
    """
    for field in all_fields(type(options)):
        name, answer = field.key, None
        if not field.is_asked or getattr(options, name) is not None:
            continue
        if not sys.stdin.isatty():
            raise UserError(f"--{name} is missing. Ask for --help to see what it is.")
        question = field.doc.removesuffix(".")
        while answer is None:
            try:
                text = input(f"{question}.\n{name}: ").strip()
            except EOFError:
                sys.stderr.write("\n")
                raise UserError(f"--{name} is missing. Ask for --help to see what it is.") from None
            try:
                found = _answer(text, field) if text else None
                if found is not None and checks is not None and name in checks:
                    checks[name](found)
                answer = found
            except (ValueError, UserError) as error:
                sys.stderr.write(f"{error}\n")
        options = dataclasses.replace(options, **{name: answer})
    return options


def _answer(text: str, field: Field) -> Any:
    """
    Raises:
        ValueError, UserError: it is no value of the option, or names what is not there.
    """
    answer = parse(text, field.given_kind)
    for mark in marks_of(field.kind, MustExist):
        mark.require(answer, f"--{field.key}")
    return answer


def is_positional(field: Field) -> bool:
    return bool(marks_of(field.kind, Positional))


def _text(value: Any) -> Any:
    return value if isinstance(value, str | list) else str(value)
