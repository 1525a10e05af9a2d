"""Byte ranges of tensors in weight files, to read them without memory mapping."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

ByteRange = tuple[int, int]
"""A tensor's first byte in the file, and the byte after its last."""

_LOCAL_HEADER_BYTES = 30  # size of a zip member's header before its name


def safetensors_ranges(path: Path) -> dict[str, ByteRange]:
    """Returns the byte ranges of all tensors in a .safetensors file, from its header."""
    with path.open('rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        header = json.loads(file.read(length))
    header.pop('__metadata__', None)
    offsets = {name: entry['data_offsets'] for name, entry in header.items()}
    return {name: (8 + length + begin, 8 + length + end) for name, (begin, end) in offsets.items()}


def bin_ranges(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, ByteRange]:
    """Returns the byte ranges of the contiguous tensors in a `.bin` file.

    torch stores each storage uncompressed as a member of a zip archive and maps the whole file, so that storages have
    the same layout in memory as in the file. If that does not hold, the result is empty.

    Args:
        path: The file.
        tensors: The tensors that torch mapped from it.
    """
    if not zipfile.is_zipfile(path):  # a file of torch before 1.6
        return {}
    members = _members(path)
    addresses = sorted({tensor.untyped_storage().data_ptr() for tensor in tensors.values()})
    if len(members) != len(addresses) or any(
        member - members[0] != address - addresses[0] for member, address in zip(members, addresses, strict=True)
    ):
        return {}
    shift = members[0] - addresses[0] if members else 0
    return {
        name: (tensor.data_ptr() + shift, tensor.data_ptr() + shift + tensor.nbytes)
        for name, tensor in tensors.items()
        if tensor.is_contiguous() and tensor.numel()
    }


def _members(path: Path) -> list[int]:
    """Start offsets of the storages, in file order."""
    begins = []
    with zipfile.ZipFile(path) as archive, path.open('rb') as file:
        for info in archive.infolist():
            if not re.search(r'/data/\d+$', info.filename) or info.compress_type != zipfile.ZIP_STORED:
                continue
            file.seek(info.header_offset)
            header = file.read(_LOCAL_HEADER_BYTES)
            lengths = (int.from_bytes(header[26:28], 'little'), int.from_bytes(header[28:30], 'little'))
            begins.append(info.header_offset + _LOCAL_HEADER_BYTES + sum(lengths))
    return sorted(begins)
