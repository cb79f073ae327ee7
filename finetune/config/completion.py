"""Completion of commands, options and keys in a shell."""

from collections.abc import Callable, Mapping
from typing import Any

from finetune.config.args import TrainArgs
from finetune.config.fields import all_fields

_BASH = """\
# Completion of moshi-ttt for {shell}; made by `moshi-ttt completion {shell}`.
_moshi_ttt() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" name="" words="" each
    for each in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$name $each" in
            {groups}) name="$each" ;;
            {commands}) name="${{name:+$name }}$each"; break ;;
        esac
    done
    case "$name" in
{cases}
    esac
    compopt +o nospace 2>/dev/null
    [[ "$words" == *--* ]] && compopt -o nospace 2>/dev/null
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _moshi_ttt moshi-ttt
"""
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def completion_script(commands: Mapping[str, Callable[..., Any]], shell: str) -> str:
    """Return the script that makes a shell, bash or zsh, complete the command line."""
    groups = sorted({name.split()[0] for name in commands if " " in name})
    keys = [f"--{field.key}=" for field in all_fields(TrainArgs) if not field.section]
    top = dict.fromkeys(name.split()[0] for name in commands)
    cases = [_case("", top)]
    for group in groups:
        inside = [name.split()[1] for name in commands if name.startswith(f"{group} ")]
        cases.append(_case(group, inside))
    for name, command in commands.items():
        options: Any = vars(command)["options"]
        words = [f"--{field.key}=" for field in all_fields(options) if not field.section]
        cases.append(_case(name, words + (keys if vars(command)["with_overrides"] else [])))
    script = _BASH.format(
        shell=shell,
        groups="|".join(f'" {group}"' for group in groups),
        commands="|".join(f'"{name}"' if " " in name else f'" {name}"' for name in commands),
        cases="\n".join(cases),
    )
    return (_ZSH if shell == "zsh" else "") + script


def _case(name: str, words: Any) -> str:
    return f'        "{name}") words="{" ".join(words)}" ;;'
