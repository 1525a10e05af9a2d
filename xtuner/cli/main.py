"""The `xtuner` command: finds the subcommand, runs it, turns its end into an exit status.

A subcommand is a module with `add_arguments(parser)` and `run(args) -> int`; it is imported only when it is called, so
that `xtuner --help` costs nothing. Exit status: 0 done, 1 failed, 2 wrong call, 130 and 143 interrupted.
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
    flush_results,
    forget_results,
    leave,
    look_for_cycles_less_often,
    reader_has_gone,
    stops_at_once_while_importing,
    write_what_the_locale_lacks,
)
from xtuner.errors import UsageError, XTunerError, nearest
from xtuner.ranks import exit_rank, should_report
from xtuner.utils.escape import printable


@dataclass(frozen=True)
class Command:
    """A subcommand: the module that carries it and its line in `--help`."""

    module: str
    text: str


# A name with a space is a command of a group: `xtuner convert merge`.
COMMANDS = {
    'list-cfg': Command('xtuner.cli.list_cfg', 'list the configs that come with xtuner'),
    'copy-cfg': Command('xtuner.cli.copy_cfg', 'write a config as one flat, commented file to edit'),
    'print-config': Command('xtuner.cli.print_config', 'show a config as training will see it'),
    'estimate': Command('xtuner.cli.estimate', 'predict memory, steps and hours, without weights or a GPU'),
    'train': Command('xtuner.cli.train', 'fine-tune a model'),
    'report': Command('xtuner.cli.report', 'write the page that shows a run'),
    'preprocess': Command('xtuner.cli.preprocess', 'prepare the data of a config ahead of training'),
    'log-dataset': Command('xtuner.cli.log_dataset', 'show conversations as the model will see them'),
    'check-custom-dataset': Command('xtuner.cli.check_custom_dataset', 'check a file of conversations, every record'),
    'list-dataset-format': Command('xtuner.cli.list_dataset_format', 'list the data formats'),
    'convert merge': Command('xtuner.cli.convert.merge', 'merge an adapter into its base model'),
    'convert to-llama': Command('xtuner.cli.convert.to_llama', 'write InternLM as a plain Llama checkpoint'),
    'convert split': Command('xtuner.cli.convert.split', 'cut the weights of a model into smaller shards'),
    'convert gguf': Command('xtuner.cli.convert.gguf', 'write a model as a GGUF file for llama.cpp'),
    'convert ollama': Command('xtuner.cli.convert.ollama', 'write a GGUF file and a Modelfile for Ollama'),
    'convert pth_to_hf': Command('xtuner.cli.convert.pth_to_hf', 'read a checkpoint of classical xtuner'),
    'chat': Command('xtuner.cli.chat', 'talk to a model, with or without an adapter'),
    'serve': Command('xtuner.cli.serve', 'serve a model and adapters over HTTP, in the form of the OpenAI API'),
    'doctor': Command('xtuner.cli.doctor', 'say what works on this machine, to paste into an issue'),
}

# What the machine refuses is no fault of ours; everything else that is no `XTunerError` is.
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENAMETOOLONG)


def command() -> None:
    """The process `xtuner`: one command line, then its exit status."""
    write_what_the_locale_lacks()
    leave(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status; prints at most one line of error, unless `--debug`."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = '--debug' in words
    look_for_cycles_less_often()
    try:
        with stops_at_once_while_importing():
            status = _run(words)
            flush_results()
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
        if isinstance(error, BrokenPipeError) and reader_has_gone():  # such as `head`: nothing is left to say
            forget_results()
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
    parser.add_argument('--debug', action='store_true', help='print the traceback of an error')
    return int(module.run(parser.parse_args(rest)))


class _Parser(argparse.ArgumentParser):
    """argparse, with a wrong call as an exception: one line, exit status 2."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raises what argparse would print."""
        raise UsageError(f'{message}; see `{self.prog} --help`')


def _command(words: list[str]) -> tuple[str, list[str]]:
    """Splits the words into a command's name, of one or two words, and its arguments."""
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
    return f'usage: xtuner COMMAND ...\n\n{rows}\n\n`xtuner COMMAND --help` explains one; --debug prints tracebacks.'


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
    """What to say where the error is about a path's bytes that are no text in the locale; None for any other."""
    wrong = error.object[error.start : error.end]
    if not all('\udc80' <= char <= '\udcff' for char in wrong):  # Python's stand-ins for such bytes
        return None
    shown = wrong.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')
    return (f'{shown!r} in the name of a file or folder is no text in this locale; use UTF-8 (PYTHONUTF8=1, or '
            'LC_ALL=C.UTF-8), or rename it')  # fmt: skip


if __name__ == '__main__':
    command()
