"""The text store: right entries only, whole, padded as the pipeline pads, whatever happens to the writer."""

from __future__ import annotations

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

from luve_lightning.data.store import StoreError
from luve_lightning.data.text_store import TEXT_VERSION, StoredEmbeddings, TextKey, TextSource, TextStore, captions_of
from luve_lightning.data.video_index import ClipEntry
from luve_lightning.safetensors_window import tensor_digest
from tests.helpers.store_processes import Entries, check_killed_writer, check_race
from tests.helpers.store_size import StoreSize, store_size

SOURCE = TextSource(encoder="e" * 64, length=8, dtype="float32")
KEY = SOURCE.key("a red boat")


def embedding(tokens: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, 6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def store(tmp_path: Path) -> TextStore:
    return TextStore(tmp_path / "store")


def test_every_field_changes_the_address() -> None:
    others = {"encoder": "f" * 64, "length": 9, "dtype": "bfloat16", "version": TEXT_VERSION + 1}
    assert others.keys() == asdict(SOURCE).keys()
    sources = [SOURCE, *(replace(SOURCE, **{name: value}) for name, value in others.items())]  # type: ignore[arg-type]
    captions = ["", " ", "a red boat", "a red boat ", "A red boat", "a réd boat", "\ud83d"]
    keys = [TextKey(caption, source) for caption in captions for source in sources]
    assert len({key.digest for key in keys}) == len(keys)
    assert len({source.digest for source in sources}) == len(sources)


def test_address_does_not_change_between_releases() -> None:
    # An address that moves orphans every store: do it by raising TEXT_VERSION, and then set both lines anew.
    assert TEXT_VERSION == 1
    assert KEY.digest == "7cb31f0d81b041adbc898d465f55536a0495e5184bf43320cd1b64f173c2e1c6"


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(0, 8), dtype=st.sampled_from(["float16", "bfloat16", "float32"]), caption=st.text())
def test_read_gives_what_was_written_and_zeros(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, dtype: str, caption: str
) -> None:
    store = TextStore(tmp_path_factory.mktemp("store"))
    key = replace(SOURCE, dtype=dtype).key(caption)
    assert not store.has(key)
    written = store.write(key, embedding(tokens))
    assert store.has(key)
    assert store.path(key).stat().st_size == written
    own = embedding(tokens).to(getattr(torch, dtype))
    assert torch.equal(store.read(key), torch.cat([own, own.new_zeros(8 - tokens, 6)]))
    assert store.shape(key)[0] == tokens
    with safe_open(store.path(key), "pt") as file:  # any safetensors reader opens it
        assert torch.equal(file.get_tensor("embedding"), own)
        assert file.metadata() == {"key": key.json, "sha256": tensor_digest(own)}


def test_only_the_tokens_take_space(store: TextStore) -> None:
    key = replace(SOURCE, length=512).key("short")
    batch = torch.randn(4, 512, 6)
    assert store.write(key, batch[1, :3]) < 3 * 6 * 4 + 400
    assert torch.equal(store.read(key)[:3], batch[1, :3])


def test_a_second_write_changes_nothing(store: TextStore) -> None:
    store.write(KEY, embedding(seed=0))
    assert store.write(KEY, embedding(seed=1)) == 0
    assert torch.equal(store.read(KEY)[:5], embedding(seed=0))
    with store.claim(KEY) as mine:
        assert not mine


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(9, 6), r"n x D with n <= 8, got torch.float32 \(9, 6\)"),
        (torch.zeros(1, 5, 6), "n x D"),
        (torch.zeros(5, 6, dtype=torch.int64), "floats"),
        (torch.full((5, 6), float("nan")), 'of caption "a red boat" has values that are not finite'),
        (torch.full((5, 6), 1e39, dtype=torch.float64), "not finite in float32"),
    ],
)
def test_what_cannot_be_an_embedding_is_refused(store: TextStore, wrong: torch.Tensor, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        store.write(KEY, wrong)
    assert store_size(store.root) == StoreSize(0, 0, 0)


def test_missing_damaged_and_swapped_entries_are_refused_in_one_line(store: TextStore) -> None:
    with pytest.raises(StoreError, match=r'no embedding of caption "a red boat" by .* run `luve embed`') as error:
        store.read(KEY)
    assert "\n" not in str(error.value)
    other = SOURCE.key("another")
    store.write(other, embedding())
    store.path(KEY).parent.mkdir(exist_ok=True)
    store.path(other).rename(store.path(KEY))  # as after a copy by hand
    with pytest.raises(StoreError, match=r"was made for .* expected"):
        store.read(KEY)
    os.truncate(store.path(KEY), 150)
    with pytest.raises(StoreError, match=r"damaged entry.*run `luve embed` again"):
        store.read(KEY)


def test_flipped_bits_are_noticed_and_entries_of_before_the_digest_are_valid(store: TextStore) -> None:
    store.write(KEY, embedding())
    assert store.check(KEY)
    content = bytearray(store.path(KEY).read_bytes())
    content[-1] ^= 0x80
    store.path(KEY).write_bytes(content)
    for look in (store.read, store.check):
        with pytest.raises(StoreError, match=r"damaged entry: .*sha256 differs.*run `luve embed` again"):
            look(KEY)
    store.path(KEY).write_bytes(save({"embedding": embedding()}, metadata={"key": KEY.json}))
    assert store.check(KEY) is False
    assert torch.equal(store.read(KEY)[: len(embedding())], embedding())


@pytest.mark.parametrize("record", ["[]", "5", '"text"', "[" * 100_000, '{"backbone": 1}', '{"backbone": "b", "x": 1}'])
def test_strange_records_are_one_line(store: TextStore, record: str) -> None:
    (store.root / "sources").mkdir(parents=True)
    (store.root / "sources" / "strange.json").write_text(record)
    with pytest.raises(StoreError, match=r"strange\.json is no record of `luve embed`.*delete it"):
        store.source()


@pytest.mark.parametrize("change", [{"encoder": ""}, {"length": 0}, {"length": True}, {"dtype": "float64"}])
def test_impossible_sources_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(SOURCE, **change)  # type: ignore[arg-type]


def test_records_say_what_a_store_holds(store: TextStore) -> None:
    with pytest.raises(StoreError, match="there are: none, run `luve embed`"):
        store.source()
    store.record(SOURCE, "data/mini/wan")
    store.record(SOURCE, "data/mini/wan")
    assert store.source() == SOURCE
    assert store.sources() == {SOURCE: "data/mini/wan"}
    other, longer = replace(SOURCE, encoder="f" * 64), replace(SOURCE, length=9)
    store.record(other, "other")
    listed = "e{12} of data/mini/wan, 8 tokens, float32; f{12} of other"
    with pytest.raises(StoreError, match=f"more than one kind of embedding .* there are: {listed}"):
        store.source()
    assert store.source("fff") == other
    store.record(longer, "data/mini/wan")
    with pytest.raises(StoreError, match="more than one kind"):
        store.source("eee")
    assert store.source("eee", length=9) == longer
    with pytest.raises(StoreError, match="no such embeddings for encoder any, length any, dtype bfloat16"):
        store.source(dtype="bfloat16")
    # What another version of the code embedded is there, and not to be used.
    store.record(replace(other, encoder="a" * 64, version=TEXT_VERSION - 1), "old")
    with pytest.raises(StoreError, match="no such embeddings for encoder aaa"):
        store.source("aaa")
    (store.root / "sources" / "torn.json").write_text('{"encoder": "e", "len')
    with pytest.raises(StoreError, match=r"torn\.json is no record"):
        store.source()
    assert store_size(store.root) == StoreSize(0, 0, 0)


def test_a_lookup_can_be_sent_to_loader_workers(store: TextStore) -> None:
    with store.claim(KEY):
        lookup = pickle.loads(pickle.dumps(StoredEmbeddings(store, SOURCE)))
        with lookup.store.claim(KEY) as mine:
            assert not mine, "a copy has no claim of its own"
        store.write(KEY, embedding())
    assert torch.equal(lookup("a red boat"), store.read(KEY))


ENTRIES = Entries(
    lambda number: SOURCE.key(f"caption {number}"), lambda number: embedding(seed=number), reads=lambda rows: rows[:5]
)


@pytest.mark.slow
def test_a_killed_writer_frees_its_claim_and_leaves_no_entry(store: TextStore, tmp_path: Path) -> None:
    check_killed_writer(store, ENTRIES, tmp_path / "ready")


def test_processes_never_write_one_entry_twice(store: TextStore) -> None:
    check_race(store, ENTRIES, 3)


def test_captions_of_an_index_are_those_that_all_its_clips_have() -> None:
    """Own clips have the column caption; of an index of those and UltraVideo's only that one is in all."""
    own = ClipEntry("a", Path("a.mp4"), "a", 30, 9, 64, 64, {"caption": "一只猫"})
    mixed = replace(own, captions={"Style": "plain", "caption": "a cat"})
    assert captions_of([own, mixed, own], ["caption"]) == ["", "一只猫", "a cat"]
    assert captions_of([mixed], ["Style", "caption"]) == ["", "plain", "a cat"]
    for columns, what in ((["Style"], "'Style' is no caption column"), ([], "at least one is needed")):
        with pytest.raises(ValueError, match=f"^columns: {what}; known: caption$"):
            captions_of([mixed, own], columns)
