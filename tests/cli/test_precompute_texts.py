"""`luve embed`: what it stores, skips, shares and refuses, with a tiny text encoder."""

from __future__ import annotations

import json
import multiprocessing
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from transformers import AutoTokenizer, UMT5EncoderModel

from luve_lightning.data.text_store import EmbedReport, StoredEmbeddings, TextKey, TextSource, TextStore, embed_captions
from luve_lightning.models.backbones import load_backbone
from tests.helpers.run_luve import Outcome, run_luve
from tests.helpers.small_text import write_text_encoder
from tests.helpers.small_world import add_row, write_world
from tests.helpers.store_size import store_size
from tests.helpers.waiting import wait_for

Luve = Callable[..., Outcome]
BRIEF = ["a red boat sails.", "", "birds fly", "birds fly"]
LONG = " ".join(["calm water"] * 12)  # more than the 16 tokens


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_encoder(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips; each brief description another, the summarized ones all long but the last."""
    folder = tmp_path_factory.mktemp("world")
    path = write_world(folder, len(BRIEF), frames=1, height=16, width=16)
    lines = path.read_text().splitlines()
    for number, brief in enumerate(BRIEF):
        fields = lines[number + 1].split(",")
        fields[14], fields[23] = brief, LONG if number < 3 else "slowly"
        lines[number + 1] = ",".join(fields)
    path.write_text("\n".join(lines) + "\n")
    (folder / "splits.json").write_text(
        '{"train": ["source-0", "source-1"], "val": ["source-2"], "test": ["source-3"]}'
    )
    return path


@pytest.fixture
def luve(capsys: pytest.CaptureFixture[str], backbone: Path, index: Path, tmp_path: Path) -> Luve:
    """Runs the verb; keyword arguments replace or add options."""

    def run(**options: object) -> Outcome:
        given: dict[str, object] = {"backbone": backbone, "index": index, "store": tmp_path / "store"}
        given |= {"dtype": "float32", "device": "cpu", "batch_size": 2} | options
        return run_luve(capsys, "embed", *(f"--{name}={value}" for name, value in given.items()))

    return run


def summary(outcome: Outcome) -> tuple[int, int]:
    """Embedded and already there."""
    assert outcome.code == 0, outcome.err
    rows = dict(line.strip().split(None, 1) for line in outcome.out.splitlines() if line.startswith("  "))
    return int(rows["embedded"].split()[0]), int(rows["already"].split()[-1])


def stored(folder: Path) -> StoredEmbeddings:
    store = TextStore(folder)
    return StoredEmbeddings(store, store.source())


def test_embeddings_are_those_of_the_pipeline(luve: Luve, backbone: Path, tmp_path: Path) -> None:
    outcome = luve(columns='["Brief Description", "Summarized Description"]')
    assert summary(outcome) == (5, 0)
    assert re.search(
        rf"\n  cut +1 caption, for instance '{LONG[:40]}'\.\.\.: \d+ tokens, of which .* sees 16; ", outcome.out
    )
    pipeline = WanPipeline(
        AutoTokenizer.from_pretrained(backbone / "tokenizer"),
        UMT5EncoderModel.from_pretrained(backbone / "text_encoder"),
        None,
        None,
    )
    find = stored(tmp_path / "store")
    for caption, tokens in (("", 1), ("birds fly", 3), ("a red boat sails.", 5), (LONG, 16), ("slowly", 2)):
        with torch.no_grad():
            want, unconditional = pipeline.encode_prompt(caption, "", max_sequence_length=16)
        torch.testing.assert_close(find(caption), want[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(find(""), unconditional[0], rtol=1e-5, atol=1e-5)
        assert find.store.shape(find.source.key(caption))[0] == tokens


def test_a_second_run_embeds_nothing_and_a_third_fills_a_gap(luve: Luve, tmp_path: Path) -> None:
    assert summary(luve()) == (3, 0)
    find = stored(tmp_path / "store")
    path = find.store.path(find.source.key("slowly"))
    before = path.read_bytes()
    assert summary(luve()) == (0, 3)
    path.unlink()
    assert summary(luve(batch_size=1)) == (1, 2)
    assert path.read_bytes() == before


def test_splits_columns_and_settings_have_entries_of_their_own(luve: Luve, tmp_path: Path) -> None:
    # Only the empty caption, given twice, and one more.
    assert summary(luve(columns='["Brief Description"]', splits="[train]")) == (2, 0)
    assert summary(luve(columns='["Brief Description"]', splits="[val, test]")) == (1, 1)
    assert summary(luve(columns='["Brief Description"]', length=8)) == (3, 0)
    assert summary(luve(columns='["Brief Description"]', dtype="bfloat16")) == (3, 0)
    sources = TextStore(tmp_path / "store").sources()
    assert sorted((source.length, source.dtype) for source in sources) == [
        (8, "float32"),
        (16, "bfloat16"),
        (16, "float32"),
    ]


def test_another_text_encoder_never_reads_the_first_ones_entries(luve: Luve, tmp_path: Path) -> None:
    assert summary(luve()) == (3, 0)
    assert summary(luve(backbone=write_text_encoder(tmp_path / "other", seed=1))) == (3, 0)


def _share(backbone: Path, root: Path, captions: list[str], start: object, done: object) -> None:
    encoder = load_backbone(backbone).text()
    source = TextSource(encoder.fingerprint(), encoder.length, "float32")
    start.wait()  # type: ignore[attr-defined]
    report = embed_captions(encoder, TextStore(root), source, captions, 2, lambda n: None)
    done.put((report.embedded, report.there))  # type: ignore[attr-defined]


def test_processes_share_the_work_and_each_ends_with_all_of_it(backbone: Path, tmp_path: Path) -> None:
    captions = [f"boat {'water ' * n}" for n in range(40)]
    context = multiprocessing.get_context("fork")
    start, done = context.Barrier(2), context.Queue()
    arguments = (backbone, tmp_path / "store", captions, start, done)
    running = [context.Process(target=_share, args=arguments) for _ in range(2)]
    for process in running:
        process.start()
    reports = [done.get(timeout=150) for _ in running]
    for process in running:
        process.join()
    assert sum(embedded for embedded, _ in reports) == 40, "a caption was embedded twice, or not at all"
    assert all(embedded + there == 40 for embedded, there in reports)
    assert store_size(tmp_path / "store").entries == 40
    assert store_size(tmp_path / "store").unfinished == 0


def test_a_run_waits_for_what_others_make_and_does_it_when_they_give_up(backbone: Path, tmp_path: Path) -> None:
    encoder = load_backbone(backbone).text()
    source = TextSource(encoder.fingerprint(), encoder.length, "float32")
    mine, theirs = TextStore(tmp_path / "store"), TextStore(tmp_path / "store")
    captions = ["a", "b", "c", "d", "e"]
    reports: list[EmbedReport] = []

    def run() -> None:
        reports.append(embed_captions(encoder, mine, source, captions, 2, lambda n: None))

    with theirs.claim(source.key("d")) as held:
        with theirs.claim(source.key("b")) as also_held:
            assert held
            assert also_held
            runner = threading.Thread(target=run)
            runner.start()
            assert wait_for(lambda: store_size(mine.root).entries == 3)
            assert not mine.has(source.key("b"))
            theirs.write(source.key("b"), torch.zeros(1, 16))
        time.sleep(0.1)
        assert runner.is_alive(), "it must wait for the last one"
    runner.join(150)
    assert [(report.embedded, report.there) for report in reports] == [(4, 1)]
    assert store_size(mine.root).entries == 5
    assert store_size(mine.root).unfinished == 0


class _Waits(TextStore):
    """A disk that stands still until the text encoder is at work again."""

    def __init__(self, root: Path, encoder: torch.nn.Module) -> None:
        super().__init__(root)
        self.again, self.calls = threading.Semaphore(0), 0
        encoder.register_forward_pre_hook(self.begins)

    def begins(self, *_: object) -> None:
        self.calls += 1
        if self.calls > 1:
            self.again.release()

    def write(self, key: TextKey, tensor: torch.Tensor) -> int:
        if key.caption != "c":  # the last one
            assert self.again.acquire(timeout=150)
        return super().write(key, tensor)


def test_a_batch_is_written_while_the_next_is_embedded(backbone: Path, tmp_path: Path) -> None:
    text = load_backbone(backbone).text()
    source, store = TextSource(text.fingerprint(), text.length, "float32"), _Waits(tmp_path / "store", text.encoder)
    done: list[int] = []
    report = embed_captions(text, store, source, ["a", "b", "c"], 1, done.append)
    assert (report.embedded, done) == (3, [1, 1, 1])
    assert report.bytes == store_size(store.root).bytes


def test_what_was_embedded_before_a_failure_is_written(backbone: Path, tmp_path: Path) -> None:
    text = load_backbone(backbone).text()
    source, store = TextSource(text.fingerprint(), text.length, "float32"), TextStore(tmp_path / "store")
    calls: list[int] = []

    def fails_at_last(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no memory")

    text.encoder.register_forward_pre_hook(fails_at_last)
    with pytest.raises(RuntimeError, match="no memory"):
        embed_captions(text, store, source, ["a", "b", "c"], 1, lambda n: None)
    assert [store.has(source.key(caption)) for caption in "abc"] == [True, True, False]
    assert store_size(store.root).unfinished == 0


def test_check_names_the_damaged(luve: Luve, tmp_path: Path) -> None:
    assert "missing        3, `luve embed` makes them" in luve(check="true").out
    luve()
    assert "sound          3 embeddings" in luve(check="true").out
    path = next((tmp_path / "store").glob("??/*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    outcome = luve(check="true")
    assert outcome.code == 2
    assert f"damaged        1\n    damaged entry: {path} holds another embedding" in outcome.out
    line = outcome.error_lines[-1]
    assert "1 of 3 embeddings are damaged, the first is damaged entry" in line


def test_a_tokenizer_that_pads_in_front_is_refused(backbone: Path, tmp_path: Path) -> None:
    encoder = load_backbone(backbone).text()
    encoder.tokenizer.padding_side = "left"
    source = TextSource(encoder.fingerprint(), encoder.length, "float32")
    store = TextStore(tmp_path)
    with pytest.raises(ValueError, match="pads in front of captions"):
        embed_captions(encoder, store, source, ["a"], 1, lambda n: None)
    assert store_size(store.root).entries == store_size(store.root).unfinished == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("columns", '["Summary"]', "columns: 'Summary' is no caption column; known: Brief Description,"),
        ("batch_size", 0, "expected batch_size >= 1 and length >= 1, got 0"),
        ("length", 0, "length >= 1, got 2 and 0"),
        ("device", "gpu", "device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("device", "cuda:99", "device: no cuda:99 here, PyTorch sees"),
        ("dtype", "float16", "dtype"),
        ("backbone", "./nothing", "backbone ./nothing: "),
        ("index", "nothing.csv", "nothing.csv: no such CSV"),
        ("store", __file__, f"store: {__file__} is not a folder"),
    ],
)
def test_mistakes_are_one_line(luve: Luve, option: str, value: object, message: str) -> None:
    outcome = luve(**{option: value})
    assert outcome.code == 2
    (line,) = outcome.error_lines
    assert message in line


def test_rows_left_out_are_told(luve: Luve, index: Path, tmp_path: Path) -> None:
    copy = tmp_path / "clips.csv"
    copy.write_text(index.read_text())
    add_row(copy, clip_id="a boat", url="source-0")
    outcome = luve(index=copy, clips=index.parent / "clips", **{"keep.min_width": 16})
    assert outcome.code == 0, outcome.err
    assert f"{copy}: 4 clips of 4 source videos, 1 row dropped" in outcome.out
    assert "1  bad clip_id (first: a boat 'a boat'" in outcome.out


def test_what_it_took_is_written_on_request(luve: Luve, tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    embedded, _ = summary(luve(measured=path, batch_size=1))
    found = json.loads(path.read_text())
    assert (found["unit"], found["done"], found["total"], found["made"], found["there"]) == (
        "caption",
        embedded,
        embedded,
        embedded,
        0,
    )
    assert found["first_seconds"] > 0
    assert found["seconds_per_unit"] > 0
    assert found["bytes"] > 0
    luve(measured=path)
    found = json.loads(path.read_text())
    assert (found["done"], found["made"], found["there"]) == (0, 0, embedded)
    assert found["seconds_per_unit"] is None
