"""Worker process that renders chat templates; started, fed and ended by `templates.rendering`.

A chat template is untrusted code from the publisher of the tokenizer. The worker has no files, no network and no
inherited environment, a limited address space, and a CPU time limit for each conversation: the kernel kills the
process when it is used up, even within a single long operation such as `10 ** 10 ** 9`, which no handler could stop.

The file runs as a script with only jinja2 and the standard library; it must not import anything else of the package.
Frames on standard input and output: four bytes of length, then JSON. A request is a frame with `template`, `variables`
and `seconds` for compiling, and `count` frames, one per conversation; each is answered by one frame, in order.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO

if __name__ == '__main__':  # runs without site-packages, whose .pth files would execute code
    sys.path += sys.argv[2:]

import jinja2
from jinja2 import ext, nodes, sandbox, utils
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

_REASONING = ('reasoning_content', 'thinking', 'reasoning')
# Imported lazily by templates; imported early because no file can be opened later.
_LATER = ('jinja2.constants', 'jinja2.debug', 'encodings.ascii', 'encodings.latin_1', 'encodings.unicode_escape',
          'encodings.utf_16', 'encodings.utf_32', 'html', 'pprint', 'textwrap', 'unicodedata')  # fmt: skip
_MAX_MESSAGE = 500  # maximum characters of a template's error that are returned


def main() -> None:
    """Serves requests until standard input is closed, which happens when the parent process ends."""
    settings = json.loads(sys.argv[1])
    _confine(settings['memory'])
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    _write(sink, {'jinja2': jinja2.__version__})
    while (head := _read(source)) is not None:
        request = json.loads(head)
        frames = [_read(source) for _ in range(request['count'])]
        for frame in frames:
            if frame is None:
                return
            answer = _answer(request, frame)
            _write(sink, answer)
            if answer.get('error') == 'memory':  # the next conversation must find the same memory as this one
                return


def _confine(memory: int) -> None:
    """Drops permissions that rendering does not need: open files, new processes, memory beyond `memory` bytes."""
    for name in _LATER:
        importlib.import_module(name)
    time.localtime()  # reads the time zone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent process
    if hasattr(signal, 'SIGPROF'):  # the parent may have ignored or blocked it
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    try:
        import resource
    except ImportError:  # Windows: the waiting parent ends the process
        return
    limits = {'RLIMIT_AS': memory, 'RLIMIT_FSIZE': 0, 'RLIMIT_NOFILE': 3, 'RLIMIT_NPROC': 0, 'RLIMIT_CORE': 0}
    for name, most in limits.items():
        hard = resource.getrlimit(getattr(resource, name))[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS refuses some
            resource.setrlimit(getattr(resource, name), (most, most))


def _answer(request: dict[str, Any], frame: bytes) -> dict[str, Any]:
    try:
        _allow(request['seconds'])
        template = _compiled(request['template'])
        job = json.loads(frame.decode('utf-8', 'surrogatepass'))
        _allow(job['seconds'])
        return {'texts': list(_texts(template, request['variables'], job))}
    except MemoryError:
        return {'error': 'memory'}
    except RecursionError:
        return {'error': 'depth'}
    except _TooMuchOutput:
        return {'error': 'output'}
    except TemplateSyntaxError as error:
        return {'error': 'syntax', 'message': f'line {error.lineno}: {_error_text(error.message)}'}
    except Exception as error:  # templates may raise anything
        return {'error': 'refused', 'message': _error_text(error)}
    finally:
        _allow(0)


def _allow(seconds: float) -> None:
    """Sets the CPU time after which the kernel kills this process; 0: no limit.

    The signal's default action needs no Python, so it also interrupts a single long operation.
    """
    if hasattr(signal, 'setitimer'):  # not on Windows
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _error_text(error: object) -> str:
    """Text of an exception; its content is chosen by the template and may be too long to convert."""
    try:
        return str(error)[:_MAX_MESSAGE] or type(error).__name__
    except Exception:
        return type(error).__name__


def _texts(template: jinja2.Template, variables: dict[str, Any], job: dict[str, Any]) -> Iterator[str | list[Any]]:
    """Renders the views of a conversation: the first as text, the others as differences from the first.

    A view is a number of messages, and whether the generation prompt follows. Most are a prefix of the first view.
    """
    messages, whole = [_message(message) for message in job['messages']], None
    if job['tools'] is not None and not all(isinstance(tool, dict) for tool in job['tools']):
        raise TemplateError('each of `tools` must be a JSON object')
    remaining = job['characters']
    for count, prompt in job['views']:
        text = template.render(messages=messages[:count], tools=job['tools'], documents=None,
                               add_generation_prompt=prompt, **variables)  # fmt: skip
        same = 0 if whole is None else _common(whole, text)
        remaining -= len(text) - same
        if remaining < 0:
            raise _TooMuchOutput
        yield text if whole is None else [same, text[same:]]
        whole = text if whole is None else whole


def _common(one: str, other: str) -> int:
    """Length of the common prefix of two texts, by bisection, since comparing slices is faster than a loop."""
    if one.startswith(other):
        return len(other)
    low, high = 0, min(len(one), len(other)) + 1  # `low` characters match, `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as transformers passes it: without nulls, its reasoning under every name that templates read."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    return message if reasoning is None else {'thinking': reasoning, **message, 'reasoning_content': reasoning}


class _TooMuchOutput(Exception):
    """A template exceeded its output limit."""


@lru_cache(maxsize=8)
def _compiled(text: str) -> jinja2.Template:
    """Compiles a template in the environment that transformers gives to chat templates."""
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters['tojson'] = _to_json
    environment.globals.update(raise_exception=_raise, strftime_now=_now, dict=_Dict(), namespace=_Namespace)
    return environment.from_string(text)


class _Generation(ext.Extension):
    """`{% generation %}`, which marks what the model writes: rendered unchanged."""

    tags = {'generation'}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
        return nodes.CallBlock(self.call_method('_shown'), [], [], body).set_lineno(line)

    def _shown(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(utils.Namespace):
    """Jinja's namespace without names that begin with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:  # positional self, so that a value may be named `self`
        self, *rest = args
        values = dict(*rest, **values)
        for name in values:
            _check_name(name)
        utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith('_'):
        raise SecurityError(f'a namespace name must not begin with an underscore: {name!r}')


class _Dict:
    """`dict` without class attributes."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **values)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without Jinja's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _read(source: BinaryIO) -> bytes | None:
    head = source.read(4)
    if len(head) < 4:
        return None
    size = struct.unpack('>I', head)[0]
    frame = source.read(size)
    return frame if len(frame) == size else None


def _write(sink: BinaryIO, answer: dict[str, Any]) -> None:
    frame = json.dumps(answer, ensure_ascii=False).encode('utf-8', 'surrogatepass')
    sink.write(struct.pack('>I', len(frame)) + frame)
    sink.flush()


if __name__ == '__main__':
    with contextlib.suppress(BrokenPipeError):
        main()
