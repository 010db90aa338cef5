"""Window reads against plain slicing, and what they cost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from luve_lightning.safetensors_window import SafetensorsWindow, check_window

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def write(folder: Path, tensor: Tensor, name: str = "file") -> Path:
    path = folder / f"{name}.safetensors"
    save_file({"other": torch.zeros(3), "latents": tensor}, path, metadata={"key": "k"})
    return path


@st.composite
def shapes_and_windows(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, int] | None]]:
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    window: list[tuple[int, int] | None] = []
    for n in shape:
        start = draw(st.integers(0, n - 1))
        window.append(draw(st.sampled_from([None, (start, draw(st.integers(start + 1, n)))])))
    return shape, window


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=shapes_and_windows(), dtype=st.sampled_from(DTYPES))
def test_window_equals_slicing(tmp_path: Path, case, dtype) -> None:
    shape, window = case
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    with SafetensorsWindow(write(tmp_path, tensor)) as file:
        assert file.shape("latents") == tuple(shape)
        assert file.metadata == {"key": "k"}
        got = file.read("latents", window)
    want = tensor[tuple(slice(None) if part is None else slice(*part) for part in window)]
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert torch.equal(got, want)


def bytes_read() -> int:
    """Bytes this process asked of read calls; mapped files do not count, so cold pages are checked too."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux' count of bytes read")
def test_crop_of_a_large_entry_reads_its_rows_only(tmp_path: Path) -> None:
    tensor = torch.randn(16, 11, 90, 160).half()
    path = write(tmp_path, tensor)
    before = bytes_read()
    with SafetensorsWindow(path) as file:
        got = file.read("latents", (None, (3, 7), (20, 44), (100, 124)))
    share = (bytes_read() - before) / path.stat().st_size
    assert torch.equal(got, tensor[:, 3:7, 20:44, 100:124])
    # 4 of 11 frames and 24 of 90 rows; the bound leaves room for the header and /proc itself.
    assert 4 / 11 * 24 / 90 <= share < 4 / 11 * 24 / 90 + 0.01


def pages_in_memory(path: Path) -> float:
    """Share of a file's pages that are in the page cache."""
    import ctypes
    import mmap

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    descriptor = os.open(path, os.O_RDONLY)
    address = libc.mmap(None, ctypes.c_size_t(size), mmap.PROT_READ, mmap.MAP_SHARED, descriptor, ctypes.c_long(0))
    vector = (ctypes.c_ubyte * pages)()
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), vector) == 0
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    os.close(descriptor)
    return sum(byte & 1 for byte in vector) / pages


def test_crop_of_a_cold_entry_leaves_the_rest_on_disk(tmp_path: Path) -> None:
    path = write(tmp_path, torch.randn(16, 11, 90, 160).half())
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    if pages_in_memory(path) > 0.05:
        pytest.skip("this file system keeps files in memory")
    with SafetensorsWindow(path) as file:
        file.read("latents", (None, (3, 7), (20, 44), (100, 124)))
    assert pages_in_memory(path) < 0.3


@pytest.mark.parametrize(
    "window", [(None,), (None, (0, 0)), (None, (2, 1)), (None, (-1, 2)), (None, (0, 4)), (None, None, None)]
)
def test_window_outside_is_refused(window) -> None:
    with pytest.raises(ValueError, match="window"):
        check_window((2, 3), window)


def test_unknown_tensor_and_dtype_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, torch.arange(4))
    with SafetensorsWindow(path) as file:
        with pytest.raises(ValueError, match=r"holds no tensor 'x', only \['latents', 'other'\]"):
            file.shape("x")
        with pytest.raises(ValueError, match="is I64, expected one of F16"):
            file.read("latents", [None])


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 64, (8).to_bytes(8, "little") + b"not json", (2).to_bytes(8, "little") + b"[]"]
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors file") as error:
        SafetensorsWindow(path)
    assert "\n" not in str(error.value)


def test_cut_file_is_refused_and_leaks_no_descriptor(tmp_path: Path) -> None:
    path = write(tmp_path, torch.randn(4, 5))
    os.truncate(path, path.stat().st_size - 1)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ValueError, match="cut short"):
        SafetensorsWindow(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
