"""Shell completion of the `mimkit` command: a script that needs no Python when it runs."""

import contextlib
import io
import os
import re
import runpy
import shlex
import sys
from collections.abc import Mapping
from unittest import mock

SHELLS = ("bash", "zsh")
# One line of `--help`: the names of an option, then what it takes. Boxes are tyro's.
_OPTION = re.compile(r"^[│|\s]*(?P<names>--?\w[\w-]*(?:, --?\w[\w-]*)*)(?P<takes>(?: \S+)?)", re.M)
_CHOICES = re.compile(r"\{(.*?)\}")
# zsh has bash's words and `complete` in a module of its own.
_ZSH = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"
_SCRIPT = """\
_mimkit() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    words={commands}
  else
    case "${{COMP_WORDS[1]}} $before" in
{choices}
      *) case "${{COMP_WORDS[1]}} $word" in
{flags}
      esac ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _mimkit mimkit
"""

Options = Mapping[str, tuple[str, ...]]  # an option -> the words that it takes, if they are few


def script(shell: str, options: Mapping[str, Options]) -> str:
    """Return the script that completes commands, their options, and words that an option takes.

    Anything else is completed as the name of a file.

    Args:
        shell: One of `SHELLS`.
        options: The options of each command.
    """
    choices = [
        f"      {shlex.quote(f'{command} {option}')}) words={shlex.quote(' '.join(words))} ;;"
        for command, known in options.items()
        for option, words in known.items()
        if words
    ]
    flags = [
        f"        {shlex.quote(f'{command} -')}*) words={shlex.quote(' '.join(known))} ;;"
        for command, known in options.items()
        if known
    ]
    commands = shlex.quote(" ".join(options))
    body = _SCRIPT.format(commands=commands, choices="\n".join(choices), flags="\n".join(flags))
    return (_ZSH if shell == "zsh" else "") + body


def options_of(command: str, module: str) -> dict[str, tuple[str, ...]]:
    """Return the options that the `--help` of a command shows."""
    text = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [f"mimkit {command}", "--help"]),
        mock.patch.dict(os.environ, {"COLUMNS": "1000"}),  # no option is wrapped
        contextlib.redirect_stdout(text),
        contextlib.redirect_stderr(io.StringIO()),  # runpy warns of modules that are loaded already
        contextlib.suppress(SystemExit),
    ):
        runpy.run_module(module, run_name="__main__")
    return options_in(text.getvalue())


def options_in(text: str) -> dict[str, tuple[str, ...]]:
    r"""Return the options in a help text, and the words that each takes.

    Example:
        >>> options_in("| -h, --help  show this |\n| --device {auto,cpu}  Where to train. |")
        {'--help': (), '--device': ('auto', 'cpu')}
    """
    options = {}
    for found in _OPTION.finditer(text):
        words = [w for group in _CHOICES.findall(found["takes"]) for w in group.split(",")]
        for name in found["names"].split(", "):
            if name.startswith("--"):
                options[name] = tuple(word for word in words if word != "None")
    return options
