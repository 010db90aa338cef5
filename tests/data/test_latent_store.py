"""The latent store: right entries only, written once, whole, whatever happens to the writer."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from luve_lightning.data.latent_store import ENCODER_VERSION, LatentKey, LatentStore
from luve_lightning.data.store import StoreError
from tests.helpers.store_size import StoreSize, store_size

KEY = LatentKey(clip="a" * 64, vae="b" * 64, size=(192, 128), frames=(3, 12))


def latents(seed: int = 0, shape: tuple[int, ...] = (16, 3, 6, 5)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def store(tmp_path: Path) -> LatentStore:
    return LatentStore(tmp_path / "store")


OTHERS = {
    "clip": "c" * 64,
    "vae": "d" * 64,
    "size": (128, 192),
    "frames": (4, 13),
    "variant": "sharpened (amount 1)",
    "stride": 2,
    "resized_from": (384, 256),
    "dtype": "float32",
    "version": ENCODER_VERSION + 1,
    "fps": 16.0,
}


def test_every_field_changes_the_address() -> None:
    assert OTHERS.keys() == asdict(KEY).keys()
    keys = [KEY, *(replace(KEY, **{name: value}) for name, value in OTHERS.items())]
    assert len({key.digest for key in keys}) == len(keys)


def test_address_does_not_change_between_releases() -> None:
    # An address that moves orphans every store: do it by raising ENCODER_VERSION, and then set both lines
    # anew.
    assert ENCODER_VERSION == 1
    assert KEY.digest == "be3401fef2fbc1d33512e988f9d4e1a500e31587b4881d92246f29d2bfe148dc"


keys = st.builds(
    LatentKey,
    clip=st.text("0123456789abcdef", min_size=64, max_size=64),
    vae=st.text(min_size=1, max_size=20),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    frames=st.tuples(st.integers(0, 2), st.integers(3, 5)),
    variant=st.text(min_size=1, max_size=20),
    stride=st.integers(1, 3),
    resized_from=st.none() | st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    fps=st.sampled_from([None, 16, 16.0, 23.976]),
)


@given(one=keys, other=keys)
def test_addresses_are_equal_when_keys_are(one: LatentKey, other: LatentKey) -> None:
    assert (one.digest == other.digest) == (one == other)
    assert one.digest == replace(one).digest == pickle.loads(pickle.dumps(one)).digest
    assert LatentKey(**{**asdict(one), "size": list(one.size)}).digest == one.digest


@pytest.mark.parametrize(
    "change",
    [
        {"clip": "abc"},
        {"clip": "A" * 64},
        {"vae": ""},
        {"size": (0, 8)},
        {"size": (8,)},
        {"size": (8.0, 8)},
        {"frames": (5, 5)},
        {"frames": (-1, 5)},
        {"variant": ""},
        {"stride": 0},
        {"stride": True},
        {"dtype": "float64"},
        {"fps": 0},
    ],
)
def test_impossible_keys_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change)).replace("size", "size|sizes")):
        replace(KEY, **change)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_read_gives_what_was_written(store: LatentStore, dtype: str) -> None:
    key = replace(KEY, dtype=dtype)
    assert not store.has(key)
    written = store.write(key, latents())
    assert store.has(key)
    assert store.path(key).stat().st_size == written
    assert store.shape(key) == (16, 3, 6, 5)
    assert torch.equal(store.read(key), latents().to(getattr(torch, dtype)))
    with safe_open(store.path(key), "pt") as file:  # any safetensors reader opens it
        assert torch.equal(file.get_tensor("latents"), store.read(key))
        content = f"{store.read(key).dtype} (16, 3, 6, 5)\n".encode()
        content += bytes(store.read(key).view(torch.uint8).flatten().tolist())
        assert file.metadata() == {"key": key.json, "sha256": hashlib.sha256(content).hexdigest()}


def test_entry_bytes_depend_on_key_and_latents_only(tmp_path: Path) -> None:
    one, other = LatentStore(tmp_path / "1"), LatentStore(tmp_path / "2")
    one.write(KEY, latents())
    other.write(KEY, latents().permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2))
    assert one.path(KEY).read_bytes() == other.path(KEY).read_bytes()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_window_equals_slicing(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    store = LatentStore(tmp_path_factory.getbasetemp() / "windows")
    store.write(KEY, latents())
    window = {}
    for name, n in (("t", 3), ("y", 6), ("x", 5)):
        start = data.draw(st.integers(0, n - 1))
        window[name] = data.draw(st.none() | st.tuples(st.just(start), st.integers(start + 1, n)))
    slices = [slice(None) if part is None else slice(*part) for part in window.values()]
    assert torch.equal(store.read(KEY, **window), latents().half()[:, slices[0], slices[1], slices[2]])


def test_missing_entry(store: LatentStore) -> None:
    with pytest.raises(StoreError, match="has no latents for") as error:
        store.read(KEY)
    assert "\n" not in str(error.value)


def test_window_outside(store: LatentStore) -> None:
    store.write(KEY, latents())
    with pytest.raises(ValueError, match="outside the tensor of shape"):
        store.read(KEY, t=(1, 4))


def test_entry_of_another_key_is_refused(store: LatentStore) -> None:
    other = replace(KEY, vae="other")
    store.write(other, latents())
    store.path(KEY).parent.mkdir(exist_ok=True)
    store.path(other).rename(store.path(KEY))  # as after a copy by hand
    with pytest.raises(StoreError, match=r"was made for .*other.* expected") as error:
        store.read(KEY)
    assert "\n" not in str(error.value)


def test_damaged_entry_is_refused(store: LatentStore) -> None:
    store.write(KEY, latents())
    os.truncate(store.path(KEY), 200)
    with pytest.raises(StoreError, match=r"damaged entry.*run `luve precompute` again"):
        store.read(KEY)


def flip_bits(path: Path) -> None:
    """The sign of every value; nothing but the values is touched."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for place in range(start + 1, len(content), 2):
        content[place] ^= 0x80
    path.write_bytes(content)


def test_flipped_bits_are_noticed_where_the_whole_is_read(store: LatentStore) -> None:
    store.write(KEY, latents())
    assert store.check(KEY)
    flip_bits(store.path(KEY))
    for look in (store.read, store.check):
        with pytest.raises(StoreError, match=r"damaged entry: .*sha256 differs.*run `luve precompute` again"):
            look(KEY)
    # A window does not read the rest, which is the point of it.
    assert torch.equal(store.read(KEY, t=(0, 1)), -latents().half()[:, :1])


def test_entries_of_before_the_digest_are_found_and_readable(store: LatentStore) -> None:
    path = store.path(KEY)
    path.parent.mkdir(parents=True)
    path.write_bytes(save({"latents": latents().half()}, metadata={"key": KEY.json}))
    assert store.has(KEY)
    assert torch.equal(store.read(KEY), latents().half())
    assert store.check(KEY) is False
    assert store.write(KEY, latents(1)) == 0


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "header",
    [
        DEEP,
        f'{{"latents": {DEEP}}}',
        '{"__metadata__": [], "latents": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}',
        '{"__metadata__": {"key": 1}, "latents": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}',
        '{"latents": {"dtype": "F16", "shape": [1.0], "data_offsets": [0, 2]}}',
        '{"latents": {"dtype": "F16", "shape": [9], "data_offsets": [0, 2]}}',
        '{"latents": {"dtype": "F16", "shape": [-1], "data_offsets": [2, 0]}}',
        '{"latents": {"dtype": {}, "shape": [1], "data_offsets": [0, 2]}}',
        '{"latents": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2, 4]}}',
        '{"latents": []}',
        "[]",
    ],
)
def test_strange_headers_are_one_line(store: LatentStore, header: str) -> None:
    path = store.path(KEY)
    path.parent.mkdir(parents=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0\0")
    for look in (store.read, store.check, store.shape, lambda key: store.read(key, t=(0, 1))):
        with pytest.raises(StoreError, match="damaged entry") as error:
            look(KEY)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 600


def test_another_tensor_or_rank_is_a_damaged_entry(store: LatentStore) -> None:
    path = store.path(KEY)
    path.parent.mkdir(parents=True)
    for content in ({"other": latents()}, {"latents": torch.zeros(3, 4)}):
        path.write_bytes(save(content, metadata={"key": KEY.json}))
        for look in (store.read, store.shape, lambda key: store.read(key, t=(0, 1))):
            with pytest.raises(StoreError, match="damaged entry"):
                look(KEY)


@pytest.mark.parametrize("shape", [(16, 3, 6), (1, 16, 3, 6, 5), (16, 0, 6, 5)])
def test_wrong_shape_is_refused(store: LatentStore, shape: tuple[int, ...]) -> None:
    with pytest.raises(StoreError, match="C x t x h x w"):
        store.write(KEY, torch.zeros(shape))


def test_integers_are_refused(store: LatentStore) -> None:
    with pytest.raises(StoreError, match="floats"):
        store.write(KEY, torch.zeros(16, 3, 6, 5, dtype=torch.int64))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_refused(store: LatentStore, value: float) -> None:
    bad = latents()
    bad[3, 1, 2, 4] = value
    with pytest.raises(StoreError, match="not finite"):
        store.write(KEY, bad)
    assert store_size(store.root) == StoreSize(0, 0, 0)


def test_overflow_is_refused_and_fits_in_float32(store: LatentStore) -> None:
    large = latents()
    large[0, 0, 0, 0] = 70_000
    with pytest.raises(StoreError, match=r"reach 7e\+04, float16 holds up to 6.55e\+04: store them as float32"):
        store.write(KEY, large)
    assert not store.has(KEY)
    store.write(replace(KEY, dtype="float32"), large)


def test_second_write_changes_nothing(store: LatentStore) -> None:
    store.write(KEY, latents(0))
    assert store.write(KEY, latents(1)) == 0
    assert torch.equal(store.read(KEY), latents(0).half())
    with store.claim(KEY) as mine:
        assert not mine


def test_second_write_inside_one_claim_changes_nothing(store: LatentStore) -> None:
    with store.claim(KEY) as mine:
        assert mine
        assert store.write(KEY, latents(0)) > 0
        assert store.write(KEY, latents(1)) == 0
    assert torch.equal(store.read(KEY), latents(0).half())
    assert store_size(store.root).unfinished == 0


def test_unused_claim_leaves_nothing(store: LatentStore) -> None:
    with store.claim(KEY) as mine:
        assert mine
        assert store_size(store.root) == StoreSize(0, 0, 1)
        with store.claim(KEY) as again, LatentStore(store.root).claim(KEY) as other:
            assert not again
            assert not other
        with store.claim(replace(KEY, stride=2)) as unrelated:
            assert unrelated
    assert store_size(store.root) == StoreSize(0, 0, 0)
    with store.claim(KEY) as mine:
        assert mine


def test_a_signal_while_a_claim_is_made_leaves_nothing(store: LatentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exception may come in any line, here when the file exists and is locked."""
    real, calls = fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        real(descriptor, operation)
        calls.append(descriptor)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(KeyboardInterrupt), store.claim(KEY):
        pytest.fail("it was not claimed")
    assert store_size(store.root).unfinished == 0
    with store.claim(KEY) as mine:
        assert mine


def test_failed_write_leaves_nothing(store: LatentStore) -> None:
    with store.claim(KEY) as mine:
        assert mine
        with pytest.raises(StoreError):
            store.write(KEY, latents() * float("nan"))
    assert store_size(store.root) == StoreSize(0, 0, 0)


def test_pickled_store_holds_no_claim(store: LatentStore) -> None:
    with store.claim(KEY):
        copy = pickle.loads(pickle.dumps(store))
        with copy.claim(KEY) as mine:
            assert not mine
        store.write(KEY, latents())
    assert torch.equal(copy.read(KEY), latents().half())


def test_size(store: LatentStore) -> None:
    assert store_size(store.root) == StoreSize(0, 0, 0)
    sizes = [store.write(replace(KEY, stride=n), latents(n)) for n in range(1, 5)]
    assert store_size(store.root) == StoreSize(4, sum(sizes), 0)
