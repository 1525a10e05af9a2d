"""The `xtuner` command: dispatches to a subcommand and converts its result into an exit status.

A subcommand is a module with `add_arguments(parser)` and `run(args) -> int`; it is imported only when it is called, so
that `xtuner --help` is fast. Exit status: 0 success, 1 failure, 2 usage error, 130 and 143 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from xtuner import __version__
from xtuner.cli.process import (
    collect_garbage_less_often,
    discard_output,
    escape_unencodable_output,
    exit_on_interrupted_import,
    exit_without_teardown,
    flush_output,
    output_is_closed,
)
from xtuner.errors import UsageError, XTunerError, nearest
from xtuner.ranks import exit_rank, should_report
from xtuner.utils.escape import printable


@dataclass(frozen=True)
class Command:
    """A subcommand: its module and its line in `xtuner --help`."""

    module: str
    text: str


# A name with a space is a subcommand of a group: `xtuner convert merge`.
COMMANDS = {
    'list-cfg': Command('xtuner.cli.list_cfg', 'list the shipped configs'),
    'copy-cfg': Command('xtuner.cli.copy_cfg', 'write a config as one flat, commented file to edit'),
    'print-config': Command('xtuner.cli.print_config', 'print the complete config, with defaults filled in'),
    'estimate': Command('xtuner.cli.estimate', 'predict memory, steps and hours, without weights or a GPU'),
    'train': Command('xtuner.cli.train', 'fine-tune a model'),
    'report': Command('xtuner.cli.report', 'write the HTML report of a run'),
    'preprocess': Command('xtuner.cli.preprocess', 'prepare the data of a config before training'),
    'log-dataset': Command('xtuner.cli.log_dataset', 'show encoded conversations and which tokens are trained'),
    'check-custom-dataset': Command('xtuner.cli.check_custom_dataset', 'check every record of a data file'),
    'list-dataset-format': Command('xtuner.cli.list_dataset_format', 'list the supported data formats'),
    'convert merge': Command('xtuner.cli.convert.merge', 'merge an adapter into its base model'),
    'convert to-llama': Command('xtuner.cli.convert.to_llama', 'convert InternLM to a plain Llama checkpoint'),
    'convert split': Command('xtuner.cli.convert.split', 'split the weights of a model into smaller shards'),
    'convert gguf': Command('xtuner.cli.convert.gguf', 'export a model to a GGUF file for llama.cpp'),
    'convert ollama': Command('xtuner.cli.convert.ollama', 'export a GGUF file and a Modelfile for Ollama'),
    'convert pth_to_hf': Command('xtuner.cli.convert.pth_to_hf', 'convert a checkpoint of classical xtuner'),
    'chat': Command('xtuner.cli.chat', 'chat with a model, with or without an adapter'),
    'serve': Command('xtuner.cli.serve', 'serve a model and adapters over HTTP with the OpenAI API'),
    'doctor': Command('xtuner.cli.doctor', 'report what works on this machine'),
}

# OS errors caused by the machine; any other error that is not an `XTunerError` is a bug.
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENAMETOOLONG)


def command() -> None:
    """Entry point of the `xtuner` process: runs one command line and exits with its status."""
    escape_unencodable_output()
    exit_without_teardown(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status; prints at most one line of error without `--debug`."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = '--debug' in words
    collect_garbage_less_often()
    try:
        with exit_on_interrupted_import():
            status = _run(words)
            flush_output()
            return status
    except XTunerError as error:
        _report(error, debug=debug)
        exit_rank(error.exit_status)
        return error.exit_status
    except KeyboardInterrupt:
        _close_bars()
        print('xtuner: interrupted', file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and output_is_closed():  # for example by `head`
            discard_output()
            return 1
        _report(error, debug=debug, unexpected=getattr(error, 'errno', None) not in _REFUSALS)
        exit_rank(1)
        return 1


def _run(words: list[str]) -> int:
    if not words or words[0] in ('-h', '--help', 'help'):
        print(_overview())
        return 0 if words else 2
    if words[0] in ('-V', '--version', 'version'):
        print(f'xtuner {__version__}')
        return 0
    name, rest = _command(words)
    module = importlib.import_module(COMMANDS[name].module)
    parser = _Parser(
        prog=f'xtuner {name}',
        description=module.__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.add_argument('--debug', action='store_true', help='print the traceback of errors')
    return int(module.run(parser.parse_args(rest)))


class _Parser(argparse.ArgumentParser):
    """argparse with usage errors as exceptions: one line, exit status 2."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raises UsageError with the message that argparse would print."""
        raise UsageError(f'{message}; see `{self.prog} --help`')


def _command(words: list[str]) -> tuple[str, list[str]]:
    """Splits the words into the command name, of one or two words, and its arguments."""
    for length in (2, 1):
        name = ' '.join(words[:length])
        if len(words) >= length and name in COMMANDS:
            return name, words[length:]
    group = [name for name in COMMANDS if name.startswith(f'{words[0]} ')]
    if group:
        print(_overview(group))
        if words[1:2] in (['-h'], ['--help']):
            raise SystemExit(0)
        names = [name.split()[1] for name in group]
        wrong = f', not {words[1]!r}{nearest(words[1], names)}' if words[1:] else ''
        raise UsageError(f'`xtuner {words[0]}` needs one of: {", ".join(names)}{wrong}')
    raise UsageError(f'unknown command {words[0]!r}{nearest(words[0], COMMANDS) or ";"} see `xtuner --help`')


def _overview(names: Sequence[str] = tuple(COMMANDS)) -> str:
    width = max(map(len, COMMANDS)) + 2
    rows = '\n'.join(f'  {name:{width}}{COMMANDS[name].text}' for name in names)
    return (
        f'usage: xtuner COMMAND ...\n\n{rows}\n\n`xtuner COMMAND --help` shows its options; --debug prints tracebacks.'
    )


def _report(error: Exception, *, debug: bool, unexpected: bool = False) -> None:
    if debug:
        print(printable(''.join(traceback.format_exception(error))), end='', file=sys.stderr)
    text = ' '.join(str(error).split())
    if isinstance(error, OSError) and not unexpected:
        text = ': '.join(map(str, filter(None, (error.filename, error.strerror))))
    if isinstance(error, UnicodeEncodeError) and (name := _unreadable_name(error)):
        text, unexpected = name, False
    if unexpected:
        text = f'unexpected {type(error).__name__}: {text} (run again with --debug for the traceback)'
    if should_report(text):
        _close_bars()
        print(f'xtuner: error: {printable(" ".join(text.split()))}', file=sys.stderr)


def _close_bars() -> None:
    if 'tqdm' in sys.modules:
        from xtuner.utils.progress import close_bars

        close_bars()


def _unreadable_name(error: UnicodeEncodeError) -> str | None:
    """The message for a path whose bytes cannot be decoded in the locale; None for other encoding errors."""
    wrong = error.object[error.start : error.end]
    if not all('\udc80' <= char <= '\udcff' for char in wrong):  # surrogate escapes of undecodable bytes
        return None
    shown = wrong.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')
    return (f'{shown!r} in the name of a file or folder cannot be decoded in this locale; use UTF-8 '
            '(PYTHONUTF8=1, or LC_ALL=C.UTF-8), or rename it')  # fmt: skip


if __name__ == '__main__':
    command()
