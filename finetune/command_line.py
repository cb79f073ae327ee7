"""The command line: from the words that were typed to the command that they name.

A command is a function of a dataclass, its options; fire hands over the words that were typed. A
group is commands whose names begin with the same word: `moshi-ttt data index`.
"""

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn, get_type_hints

import fire

from finetune.config import BARE, files_read, help_page, read_options, require_there
from finetune.errors import UserError
from finetune.interrupt import ending_on_signals, signal_of
from finetune.kept import require_outputs, without_empty_folders
from finetune.safety import learn_from_words, not_too_long, outlets, redact
from ttt.options import abbreviated

Words = Callable[..., None]
COMMANDS: dict[str, Words] = {}
"""What `moshi-ttt` can do, by name: a word, or a group and a word."""

GROUPS = {"data": "From a folder of recordings to data that a run can train on."}
RENAMED = {"encode": "data encode"}
"""Commands by the name that they once had, under which they may still be called."""

_HELP = {"--help", "-h"}
_VERSION = {"--version", "-V"}


def command(function: Callable[..., None], group: str = "") -> Words:
    """Make a command of a function of options and, if it takes them, of a configuration's keys.

    It is called when the options are known to be right, all that they name is there, and what they
    have as `outputs` replaces nothing that it must not.

    Args:
        group: the command is in this group, and its function is called `GROUP_NAME`.
    """
    cls = get_type_hints(function)["options"]
    with_overrides = "overrides" in inspect.signature(function).parameters

    # Values come as they were typed: fire would make `2026_11_22` a number.
    @fire.decorators.SetParseFn(str)
    def words(*words: str, **given: Any) -> None:
        options, overrides = read_options(cls, words, given, with_overrides=with_overrides)
        if hasattr(options, "check"):
            options.check()
        require_there(options)
        if hasattr(options, "outputs"):
            overwrite = getattr(options, "overwrite", None)
            inputs = files_read(options)
            require_outputs(options.outputs(), inputs=inputs, overwrite=overwrite)
        function(options, overrides) if with_overrides else function(options)

    words.__doc__ = function.__doc__
    vars(words).update(options=cls, with_overrides=with_overrides)
    name = function.__name__.removeprefix(f"{group}_").replace("_", "-")
    COMMANDS[f"{group} {name}".strip()] = words
    return words


data_command = partial(command, group="data")


def call(component: Mapping[str, Words] | Words, *, name: str) -> int:
    """Have fire call what the command line names. Returns the exit status."""
    typed = sys.argv[1:]
    # Of `config`, a key is the name of an option, and no secret.
    is_config = typed[:1] == ["config"]
    learn_from_words(w for w in typed if not (is_config and w.partition("=")[0] == "--key"))
    with outlets(), ending_on_signals():
        return run(lambda: _follow(not_too_long(typed), component, name))


def _follow(typed: list[str], component: Mapping[str, Words] | Words, name: str) -> None:
    typed, wants_help = _without_help(typed)
    if not wants_help and (typed[:1] == ["version"] or not _VERSION.isdisjoint(typed)):
        print(f"{name} {_version()}")
        return
    if not isinstance(component, Mapping):
        chosen = component
    else:
        found, typed = _find_command(typed, component, wants_help)
        if found not in component:
            print(_overview(f"{name} {found}".strip(), component, found))
            return
        name, chosen = found, component[found]
    if wants_help or typed == ["help"]:
        print(help_page(name, chosen))
    else:
        fire.Fire(chosen, command=_with_bare(typed), name=name)


def _without_help(typed: list[str]) -> tuple[list[str], bool]:
    """Return the words without those that ask for help, and whether there are any: an option
    anywhere, or `help` where a command is named."""
    typed = [word for word in typed if word != "--"]  # behind it fire looks for options of its own
    rest = [word for word in typed if word not in _HELP]
    while "help" in rest[: 2 if rest[:1] and rest[0] in GROUPS else 1]:
        rest.remove("help")
    return rest, len(rest) < len(typed)


def _version() -> str:
    try:
        return version("moshi-ttt")
    except PackageNotFoundError:
        return "(not installed: of a bare checkout)"


def _with_bare(typed: list[str]) -> list[str]:
    """Return the words with `BARE` where an option has no value, for which fire puts `True`, which
    may be a value as well."""
    following = [*typed, "--"][1:]
    return [
        f"{word}={BARE}" if _is_option(word) and "=" not in word and _is_option(after) else word
        for word, after in zip(typed, following, strict=True)
    ]


def _is_option(word: str) -> bool:
    """Return whether fire takes a word for an option, or for the end of all of them."""
    return word.startswith("--") or re.match("-[a-zA-Z]", word) is not None


def _find_command(
    typed: list[str], known: Mapping[str, Words], wants_help: bool
) -> tuple[str, list[str]]:
    """Return the name of the command that the first words are, and the words behind it.

    The name of a group, or nothing, if the words are no more, or help is wanted of it.
    """
    words = [*RENAMED.get(typed[0], typed[0]).split(), *typed[1:]] if typed else []
    group = words[0] if words and words[0] in GROUPS else ""
    rest = words[1:] if group else words
    if rest and (full := f"{group} {rest[0]}".strip()) in known:
        return full, rest[1:]
    if rest and not (wants_help and rest[0].startswith("-")):
        _refuse_command(group, rest[0], known)
    return group, []


def _overview(name: str, component: Mapping[str, Words], group: str) -> str:
    """Return help for all commands, or for those of a group."""
    lines = {}
    for each, function in component.items():
        first, *second = each.split()
        if group and second and first == group:
            lines[second[0]] = function.__doc__
        elif not group:
            lines[first] = GROUPS.get(first) or function.__doc__
    top = f"{name} COMMAND [--OPTION=VALUE ...]; {name} COMMAND --help"
    intro = [GROUPS[group], ""] if group else []
    return "\n".join(
        [top, "", *intro]
        + [f"  {each:<12} {str(text).splitlines()[0]}" for each, text in lines.items()]
    )


def _refuse_command(group: str, word: str, known: Mapping[str, Words]) -> NoReturn:
    prefix = f"{group} " if group else ""
    names = list(dict.fromkeys(n.removeprefix(prefix) for n in known if n.startswith(prefix)))
    # `moshi-ttt index` means `moshi-ttt data index`.
    by_word = {name.split()[-1]: name for name in reversed(names)} | {n: n for n in names}
    possible = [*by_word] if group else [*GROUPS, *by_word]
    close = difflib.get_close_matches(word[:100].lower(), possible, 1)
    shown = names if group else [*dict.fromkeys(name.split()[0] for name in names)]
    hint = f"There are {', '.join(shown)}."
    if word.startswith("-"):
        hint = f"Options come behind the command. {hint}"
    elif close:
        hint = f"Did you mean {prefix}{by_word.get(close[0], close[0])}?"
    raise UserError(f"unknown command: {prefix}{abbreviated(redact(word))}. {hint}")


def run(command: Callable[[], Any]) -> int:
    """Run `command`; a user's mistake is a message, not a traceback. Returns the exit status."""
    try:
        with without_empty_folders():
            command()
        return 0
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"\nstopped by {signal_of(error).name}", file=sys.stderr)
        return 128 + signal_of(error)


def print_all(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)
