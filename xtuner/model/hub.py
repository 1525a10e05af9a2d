"""Resolves a model name to a local folder: a folder, a Hugging Face id, or `modelscope:OWNER/NAME`."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from xtuner.errors import ModelError, first_line
from xtuner.model.run_folder import model_folder
from xtuner.utils.files import read_object
from xtuner.utils.progress import Progress

logger = logging.getLogger('xtuner')

MODELSCOPE = 'modelscope:'
_ID = re.compile(r'[\w.-]+/[\w.-]+|[\w.-]+')
_WEIGHTS = ['*.safetensors', '*.bin']
# Copies of the weights in formats that are never read here.
_UNUSED = ['*.h5', '*.msgpack', '*.onnx', '*.gguf', '*.pth', 'consolidated*', 'original/*']


def resolve_model(
    path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False, weights: bool = True
) -> Path:
    """Returns the local folder of a model, downloading it if necessary.

    Args:
        path: A local folder, a Hugging Face id such as `internlm/internlm-7b`, or `modelscope:OWNER/NAME`.
        revision: Branch, tag or commit of a hub model; None uses the latest.
        trust_remote_code: Whether to download code files too.
        weights: False downloads only config and tokenizer.

    Raises:
        ModelError: No model of that name exists, or there is no network and no local copy.
    """
    folder = model_folder(Path(path)) if weights else Path(path)
    if folder.is_dir():
        return folder
    name = str(path)
    excluded = [*_UNUSED, *([] if trust_remote_code else ['*.py']), *([] if weights else _WEIGHTS)]
    if name.startswith(MODELSCOPE):
        return _from_modelscope(name.removeprefix(MODELSCOPE), revision, excluded)
    if folder.is_file():
        raise ModelError(f'model {name!r} is a file; name the folder that contains it')
    if not _ID.fullmatch(name) or name.startswith('.'):
        raise ModelError(f'model {name!r}: no such folder, and not a hub id of the form OWNER/NAME')
    return _from_hugging_face(name, revision, excluded + (_duplicate_weights(name, revision) if weights else []))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a model's JSON file; raises ModelError with the path if it cannot be read or is not a JSON object."""
    return read_object(path, ModelError)


def _from_hugging_face(name: str, revision: str | None, excluded: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=excluded, tqdm_class=Progress))
    except RevisionNotFoundError as error:
        raise ModelError(f'model {name!r} has no revision {revision!r} on the hub') from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f'model {name!r} is not a local folder, is not in the cache, and the hub cannot be reached; '
            'name a local folder, or connect to the network once'
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f'model {name!r} is not a local folder, and the hub has no such id (or it is private)'
        ) from error
    except Exception as error:
        raise ModelError(f'model {name!r} cannot be downloaded: {first_line(error)}') from error


def _duplicate_weights(name: str, revision: str | None) -> list[str]:
    """A pattern for `.bin` weights if the repository has `.safetensors` too; empty if that cannot be determined."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(name, revision=revision)
    except Exception as error:  # no network, or no such model: the download reports which
        logger.debug('files of %s are unknown: %s', name, error)
        return []
    return ['*.bin'] if any(file.endswith('.safetensors') for file in files) else []


def _from_modelscope(name: str, revision: str | None, excluded: list[str]) -> Path:
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', name):
        raise ModelError(f'model {MODELSCOPE + name!r}: write modelscope:OWNER/NAME')
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise ModelError(f'model {MODELSCOPE + name!r} needs modelscope: pip install "xtuner[modelscope]"') from error
    options: dict[str, Any] = {'revision': revision} if revision else {}
    try:
        return Path(snapshot_download(name, ignore_patterns=excluded, **options))
    except Exception as error:
        where = f' at revision {revision!r}' if revision else ''
        raise ModelError(f'model {name!r}{where} cannot be downloaded from ModelScope: {first_line(error)}') from error
