"""Reading a window of a tensor in a safetensors file without reading the rest of the file.

`safetensors.safe_open(...).get_slice` maps the file, and the kernel's read-ahead then fetches all of it: a 64x64
crop of a 45 MB entry cost 45 MB from a cold disk. Reading only the window's rows cost 11 MB, and 3 MB for three of
its eleven frames.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

Range = tuple[int, int] | None

DTYPES: dict[str, torch.dtype] = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""safetensors' names of the dtypes that tensors are stored in."""

DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
"""torch's names of these: "float16", "bfloat16", "float32"."""

_LONGEST_HEADER = 100_000_000  # the limit of the format itself


DIGEST = "sha256"
"""Metadata of a file that `packed` made: `tensor_digest` of its tensor."""


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of a tensor's dtype, shape and bytes in row-major order, 64 hex digits."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(_bytes(tensor))
    return digest.hexdigest()


def packed(name: str, tensor: Tensor, metadata: dict[str, str]) -> bytes:
    """One tensor as a safetensors file with its digest in the metadata; equal arguments give equal bytes.

    safetensors' own `save` writes several metadata entries in an order that changes from run to run.

    Args:
        name: name of the tensor.
        tensor: tensor of a dtype in `DTYPES`.
        metadata: more of it.
    """
    data = _bytes(tensor)
    dtype = next(code for code, known in DTYPES.items() if known == tensor.dtype)
    header = {
        "__metadata__": {**metadata, DIGEST: tensor_digest(tensor)},
        name: {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [0, len(data)]},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format's alignment: data begins at a multiple of eight
    return b"".join([len(text).to_bytes(8, "little"), text, data])


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in row-major order; as bytes, because NumPy has no bfloat16."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


class SafetensorsWindow:
    """One open safetensors file. Use it as a context manager.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: when it does not exist.
        ValueError: when the file is not a complete safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._header, self._data = self._read_header()
        except BaseException as error:
            os.close(self._fd)
            if isinstance(error, OSError):  # from a descriptor: it names no file
                error.filename = str(path)
            raise
        self.metadata: dict[str, str] = self._header.pop("__metadata__", None) or {}

    def __enter__(self) -> SafetensorsWindow:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _read_header(self) -> tuple[dict[str, Any], int]:
        size = os.fstat(self._fd).st_size
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if size < 8 or not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise ValueError(f"{self.path} is not a safetensors file")
        try:
            header = json.loads(os.pread(self._fd, length, 8))
            end = _data_length(header)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError(f"{self.path} is not a safetensors file: its header cannot be read") from None
        if size != 8 + length + end:
            raise ValueError(f"{self.path} is cut short: {size} bytes, expected {8 + length + end}")
        return header, 8 + length

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return list(self._header)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises:
            ValueError: when the file holds no tensor of that name.
        """
        if name not in self._header:
            raise ValueError(f"{self.path} holds no tensor {name!r}, only {sorted(self._header)}")
        return tuple(self._header[name]["shape"])

    def whole(self, name: str) -> Tensor:
        """The whole tensor, which may be empty; raises like `read`."""
        shape = self.shape(name)
        if 0 in shape:
            return torch.zeros(shape, dtype=self._dtype(name))
        return self.read(name, [None] * len(shape))

    def _dtype(self, name: str) -> torch.dtype:
        kind = self._header[name]["dtype"]
        if kind not in DTYPES:
            raise ValueError(f"{self.path}: tensor {name!r} is {kind}, expected one of {', '.join(DTYPES)}")
        return DTYPES[kind]

    def read(self, name: str, window: Sequence[Range]) -> Tensor:
        """Part of a tensor.

        Reads contiguous runs of whole rows (the last axis), merged over the axes that the window takes in full: a
        row is short, and one request for it costs less than one for each of its parts.

        Args:
            name: the tensor.
            window: for each axis (start, stop) with 0 <= start < stop <= length, or None for all of it.

        Returns:
            Exactly `tensor[window]`, contiguous, in its own memory.

        Raises:
            ValueError: for a window outside the tensor, or a dtype that is not in `DTYPES`.
        """
        shape = self.shape(name)
        ranges = check_window(shape, window)
        dtype = self._dtype(name)
        rows = [*ranges[:-1], (0, shape[-1])]
        lengths = [stop - start for start, stop in rows]
        buffer = bytearray(math.prod(lengths) * dtype.itemsize)
        if lengths != list(shape):
            # Without this the kernel reads ahead of every run.
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
        offset = self._data + self._header[name]["data_offsets"][0]
        self._read_runs(memoryview(buffer), shape, rows, offset, dtype.itemsize)
        tensor = torch.frombuffer(buffer, dtype=dtype).view(lengths)
        return tensor[..., slice(*ranges[-1])].contiguous()

    def _read_runs(
        self, into: memoryview, shape: Sequence[int], rows: Sequence[tuple[int, int]], offset: int, itemsize: int
    ) -> None:
        full = len(shape) - 1  # axes from here on are read in full
        while full > 0 and rows[full] == (0, shape[full]):
            full -= 1
        inner = math.prod(shape[full + 1 :]) * itemsize
        run = (rows[full][1] - rows[full][0]) * inner
        strides = [math.prod(shape[axis + 1 :]) * itemsize for axis in range(full)]
        for i, index in enumerate(np.ndindex(*(stop - start for start, stop in rows[:full]))):
            at = sum((rows[axis][0] + n) * strides[axis] for axis, n in enumerate(index))
            self._read_into(into[i * run : (i + 1) * run], offset + at + rows[full][0] * inner)

    def _read_into(self, into: memoryview, at: int) -> None:
        done = 0
        while done < len(into):
            got = os.preadv(self._fd, [into[done:]], at + done)
            if got == 0:
                raise ValueError(f"{self.path} was cut short while it was read")
            done += got


def _data_length(header: dict[str, Any]) -> int:
    """Number of bytes behind a header; raises some error for a header with wrong types or sizes."""
    metadata = header.get("__metadata__")
    if metadata is not None and not all(isinstance(text, str) for text in metadata.values()):
        raise TypeError("metadata other than texts")
    end = 0
    for name, info in header.items():
        if name == "__metadata__":
            continue
        (first, last), shape, dtype = info["data_offsets"], info["shape"], info["dtype"]
        if any(type(n) is not int or n < 0 for n in (first, last, *shape)) or not isinstance(dtype, str):
            raise TypeError("sizes other than whole numbers")
        if first > last or (dtype in DTYPES and last - first != math.prod(shape) * DTYPES[dtype].itemsize):
            raise ValueError("a tensor's place and shape differ")
        end = max(end, last)
    return end


def check_window(shape: Sequence[int], window: Sequence[Range]) -> list[tuple[int, int]]:
    """A window with None filled in.

    Raises:
        ValueError: when it has another number of axes than the tensor, is empty, or lies outside.
    """
    if len(window) != len(shape):
        raise ValueError(f"window {tuple(window)} has {len(window)} axes, the tensor has {len(shape)}")
    ranges = [(0, n) if part is None else (part[0], part[1]) for n, part in zip(shape, window, strict=True)]
    if any(not 0 <= start < stop <= n for n, (start, stop) in zip(shape, ranges, strict=True)):
        raise ValueError(f"window {ranges} is empty or outside the tensor of shape {tuple(shape)}")
    return ranges
