"""How a folder's family is found: by names that are compared, never by importing what a file names."""

from __future__ import annotations

import json
import socket
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from luve_lightning import model_folders
from luve_lightning.models import backbones
from luve_lightning.models.backbones import family_named, family_of, load_backbone
from luve_lightning.models.backbones.wan import WanBackbone
from tests.helpers.tiny_wan import tiny_transformer

FAMILY = """
from luve_lightning.models.backbones.wan import WanBackbone

class LateBackbone(WanBackbone):
    name = "late"
    class_names = frozenset({"ZLatePipeline"})
"""


def write_index(folder: Path, **content: Any) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps(content))
    return folder


def test_a_family_is_found_by_pipeline_transformer_vae_or_text_encoder(tmp_path: Path) -> None:
    theirs = write_index(tmp_path / "a", _class_name="LuVePipeline", transformer=["x", "WanTransformer3DModel"])
    assert type(load_backbone(theirs)) is WanBackbone
    for part, content in {
        "transformer": {"_class_name": "WanTransformer3DModel"},
        "vae": {"_class_name": "AutoencoderKLWan"},
        "text_encoder": {"architectures": ["UMT5EncoderModel"]},
    }.items():
        folder = tmp_path / f"only-{part}"
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(content))
        assert type(load_backbone(folder)) is WanBackbone
    assert family_of(tiny_transformer()) is family_named("wan") is WanBackbone
    with pytest.raises(ValueError, match=r"family: expected one of .*wan.*, got 'other'"):
        family_named("other")


def test_nothing_is_imported_because_a_file_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "named_by_a_file.py").write_text("class Transformer: ...")
    monkeypatch.syspath_prepend(tmp_path)
    index = {"_class_name": "named_by_a_file.Pipeline", "transformer": ["named_by_a_file", "Transformer"]}
    with pytest.raises(ValueError, match=r"no family of backbones is known for named_by_a_file\.Pipeline"):
        load_backbone(write_index(tmp_path / "folder", **index))
    assert "named_by_a_file" not in sys.modules


def test_another_package_brings_a_family_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_index(tmp_path / "folder", _class_name="ZLatePipeline")
    with pytest.raises(ValueError, match="no family of backbones is known for ZLatePipeline"):
        load_backbone(folder)
    (tmp_path / "late_family.py").write_text(FAMILY)
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint("late", "late_family", backbones.GROUP)
    monkeypatch.setattr(backbones, "entry_points", lambda group: [entry] if group == entry.group else [])
    backbones._import_families.cache_clear()
    found = load_backbone(folder)
    assert (type(found).__name__, type(found).__module__) == ("LateBackbone", "late_family")


@pytest.mark.parametrize(("proxies", "asked"), [({}, True), ({"https": "http://proxy:1"}, False)])
def test_where_the_hub_has_no_address_its_cache_alone_is_asked(
    proxies: dict[str, str], asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_local: list[bool] = []

    def no_address(*_: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    def nothing(*_: Any, local_files_only: bool, **__: Any) -> str:
        only_local.append(local_files_only)
        raise LocalEntryNotFoundError("nothing there")

    monkeypatch.setattr(model_folders, "getproxies", lambda: proxies)
    monkeypatch.setattr(model_folders, "hf_hub_download", nothing)
    monkeypatch.setattr(model_folders.socket, "getaddrinfo", no_address)
    with pytest.raises(FileNotFoundError, match="it cannot be reached") as raised:
        load_backbone("nobody/nothing")
    assert set(only_local) == {asked}
    assert ("Name or service not known" in str(raised.value)) == asked
