"""Writes docs/cli.md from the commands themselves; with --check, only says whether it is up to date.

.venv/bin/python docs/cli.py [--check]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from whet.cli import main as commands

PAGE = Path(__file__).with_suffix(".md")
HEAD = """<!-- Written by docs/cli.py from the commands themselves; change those, then run `python docs/cli.py`. -->

# The command line

Every command takes `--help` (`-h`), `--json` and `--debug`:

- `--json` prints the result as JSON on stdout and nothing else there. Progress always goes to stderr.
- `--debug` shows a traceback where something goes wrong. Without it an error is one line on stderr that says what was
  expected, what was found and what to do.

Exit codes: 0 success, 1 an error inside whet (of `export`: a check that failed), 2 bad input, 130 stopped by Ctrl-C.

TASK is a task folder (see [tasks.md](tasks.md)). SYSTEM, FIRST and SECOND are a folder that whet wrote (see
[system.md](system.md)) or a model: an alias, a folder, a `.gguf` file, a Hub id or `openai:NAME@URL` (see
[models.md](models.md)). A model is measured with the task's instruction, zero-shot. `whet chat`, `update` and
`documents` take a folder only.
"""
SHARED = frozenset(("as_json", "debug"))


def usage(name: str, command: click.Command) -> str:
    """The usage line: required arguments in capitals, others in brackets."""
    words = []
    for item in command.params:
        if isinstance(item, click.Argument) and item.name:
            dots = "..." if item.nargs == -1 else ""
            words.append(f"{item.name.upper()}{dots}" if item.required else f"[{item.name.upper()}{dots}]")
    return " ".join(["whet", name, "[OPTIONS]", *words])


def default(option: click.Option) -> str:
    """An option's default where its help shows it."""
    if not option.show_default:
        return ""
    value = option.default
    return ", ".join(f"`{v}`" for v in (value if isinstance(value, tuple) else (value,)))


def rows(command: click.Command) -> list[str]:
    """The table of a command's own options; empty where it has none."""
    options = [p for p in command.params if isinstance(p, click.Option) and p.name not in SHARED]
    if not options:
        return []
    lines = ["| option | default | |", "|---|---|---|"]
    for option in options:
        value = "" if option.is_flag else f" {option.type.name.upper()}"
        times = " May be given several times." if option.multiple else ""
        needed = " Required." if option.required else ""
        told = f"{option.help or ''}{needed}{times}".strip().replace("|", "\\|")
        names = ", ".join((*option.opts, *option.secondary_opts))
        lines.append(f"| `{names}{value}` | {default(option)} | {told} |")
    return [*lines, ""]


def examples(command: click.Command) -> list[str]:
    """The examples of a command's epilog as a block."""
    lines = [line.strip() for line in (command.epilog or "").splitlines()]
    shown = [line for line in lines if line.startswith(("whet ", "echo "))]
    return ["```sh", *shown, "```", ""] if shown else []


def page() -> str:
    """The whole of docs/cli.md."""
    lines = [HEAD]
    for name, command in sorted(commands.commands.items()):
        about = " ".join((command.help or "").split())
        lines += [f"## whet {name}", "", about, "", "```", usage(name, command), "```", ""]
        lines += [*rows(command), *examples(command)]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: list[str]) -> int:
    """Write the page, or with --check compare it; returns the exit code."""
    if arguments not in ([], ["--check"]):
        print(f"expected nothing or --check, found {' '.join(arguments)}", file=sys.stderr)
        return 2
    text = page()
    if arguments:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        print("docs/cli.md is up to date" if same else "docs/cli.md is out of date: run `python docs/cli.py`")
        return 0 if same else 1
    aside = PAGE.with_suffix(".part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
