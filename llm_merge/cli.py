"""The command line: `llm-merge merge | analyze | hi-merge`, and what a command's end means to a shell.

Each command is a module of `commands/` that adds its arguments and runs. This one knows no models; torch is imported by
what runs, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from llm_merge import __version__
from llm_merge.commands import analyze, hi_merge, merge
from llm_merge.commands.console import Console
from llm_merge.distributed import process_number
from llm_merge.errors import MergeError, Stopped

FAILED, STOPPED = 1, 130
"""Exit codes beside 0; argparse ends with 2 for arguments that it cannot read."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 1 after an error that was said in a sentence, 130 when stopped by Ctrl-C.

    argv    without the program's name; None: those of the process

    Raises SystemExit with 2 for arguments that cannot be read, and with 0 for `--help`.
    """
    args = build_parser().parse_args(_joined(sys.argv[1:] if argv is None else argv))
    process = process_number()
    console = Console(json=args.json, quiet=args.quiet, silent=process > 0)
    try:
        code: int = args.run(args, console)
        return code
    except MergeError as error:
        console.error(error.message if process == 0 else f"Process {process}: {error.message}")
        return FAILED
    except (KeyboardInterrupt, Stopped):
        console.error("Stopped.")
        return STOPPED
    except BrokenPipeError:  # `| head` has read enough; Python would complain once more when it closes the stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llm-merge", description="Mix fine-tuned models. See why. Try before you save."
    )
    parser.add_argument("--version", action="version", version=f"llm-merge {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (merge, analyze, hi_merge):
        command.add_parser(commands)
    return parser


def _joined(argv: Sequence[str]) -> list[str]:
    """`--metric -loss` as one word: argparse would take the metric's name for an option."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] == "--metric" and word == "-loss":
            words[-1] = f"--metric={word}"
        else:
            words.append(word)
    return words
