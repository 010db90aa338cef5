"""`luve embed`: embeds captions with the text encoder, once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from luve_lightning.callbacks.cpu_threads import cpu_threads
from luve_lightning.cli import Verb
from luve_lightning.cli.open_index import check_folder, check_stored, entries_of, open_index, print_summary
from luve_lightning.data.text_store import TextSource, TextStore, captions_of, embed_captions
from luve_lightning.data.video_index import Limits, Split
from luve_lightning.machine import choose_device, decoding_threads
from luve_lightning.models.backbones import load_backbone
from luve_lightning.terminal import Steps

VERBS = {
    "embed": Verb(
        "Data",
        "embed captions into the text store, once",
        examples=("experiments/embed/mini.yaml",),
        goes_on=True,
    )
}


def embed(
    backbone: str,
    index: Path,
    store: Path,
    columns: list[str] | None = None,
    splits: list[Split] | None = None,
    clips: Path | None = None,
    keep: Limits = Limits(),  # noqa: B008  # frozen
    length: int | None = None,
    batch_size: int = 8,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    threads: int = 2,
    device: str = "auto",
    check: bool = False,
) -> None:
    """Embeds captions with the backbone's text encoder and stores them, so that training needs no text encoder.

    The empty caption, which classifier-free guidance needs, is always included. What is stored already is skipped,
    so an interrupted run continues. Several runs, one per GPU, may share a store: start each with its own device;
    when any of them ends, every caption is there.

    Args:
        backbone: Folder or hub id of the diffusers pipeline with the tokenizer and text encoder.
        index: CSV with UltraVideo's columns.
        store: Folder of the caption embeddings.
        columns: Caption columns; default ["Summarized Description"].
        splits: Splits to embed, of train, val and test; default all clips.
        clips: Folder of the clips; default clips/ beside the CSV, else the CSV's own folder.
        keep: Which clips of the index to take.
        length: Number of tokens to pad or cut a caption to; default the backbone's own, at most 512 for Wan.
        batch_size: Captions embedded at once.
        dtype: Dtype of the text encoder's weights and on disk. Wan's was trained in bfloat16; float16 overflows.
        threads: CPU threads for embedding. Fixed, because the last digit of embeddings depends on it.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        check: Embed nothing; read every stored embedding of these captions and name the damaged ones. The exit
            code is 2 when there are any.
    """
    started = time.perf_counter()
    console = Console(emoji=False)
    # Checked before minutes of loading.
    if batch_size < 1 or (length is not None and length < 1):
        raise ValueError(f"expected batch_size >= 1 and length >= 1, got {batch_size} and {length}")
    check_folder("store", store)
    target = choose_device(device)
    entries = entries_of(open_index(console, index, clips, keep), splits)
    captions = captions_of(entries, columns or ["Summarized Description"])
    encoder = load_backbone(backbone).text(getattr(torch, dtype), length)
    source = TextSource(encoder.fingerprint(), encoder.length, dtype)
    console.print(
        f"{len(captions)} captions, text encoder {source.encoder[:12]} on {target}", highlight=False
    )
    texts = TextStore(store)
    if check:
        keys = [source.key(caption) for caption in captions]
        check_stored(console, texts, keys, len(keys), decoding_threads(), started).complain()
        return
    texts.clean()
    with cpu_threads(threads), Steps(console) as steps:
        steps.begin("captions", len(captions))
        report = embed_captions(encoder.to(target), texts, source, captions, batch_size, steps.advance)
    # Last: whoever finds a record finds all its captions.
    texts.record(source, backbone)
    cut = ""
    if report.first_cut is not None:
        caption, first = report.first_cut
        cut = f"  cut            {report.cut} captions, for instance {caption[:40]!r}...: {first}"
    embedded = f"  embedded       {report.embedded} captions, {report.bytes / 2**20:.1f} MiB"
    print_summary(console, store, [embedded, cut, f"  already there  {report.there}"], started)
