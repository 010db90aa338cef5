"""Reads what an offline wandb run has written: records in blocks of 32 KiB, as in LevelDB's log."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import ArtifactRecord, Record

_BLOCK, _HEADER = 32768, 7
_FULL, _LAST = 1, 4


def records(file: Path) -> Iterator[Record]:
    """Every record of a `.wandb` file."""
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = _HEADER, b""
    while position + _HEADER <= len(data):
        if _BLOCK - position % _BLOCK < _HEADER:  # the end of a block that no header fits into is padding
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + _HEADER])
        parts += data[position + _HEADER : position + _HEADER + length]
        position += _HEADER + length
        if kind in (_FULL, _LAST):
            yield Record.FromString(parts)
            parts = b""


class OfflineRun:
    """One offline run, ended, under a folder: group, tags, configuration, each metric's last value, artifacts."""

    def __init__(self, folder: Path) -> None:
        (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
        self.folder = file.parent
        found = list(records(file))
        assert any(r.HasField("exit") for r in found), f"{file} has no end: {len(found)} records"
        self.run = next(r.run for r in found if r.HasField("run"))
        self.artifacts: list[ArtifactRecord] = [
            r.request.log_artifact.artifact if r.HasField("request") else r.artifact
            for r in found
            if r.HasField("artifact") or (r.HasField("request") and r.request.HasField("log_artifact"))
        ]
        self.config: dict[str, Any] = {}
        for update in [self.run.config, *(r.config for r in found if r.HasField("config"))]:
            for item in update.update:
                self.config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        self.last: dict[str, Any] = {
            item.key or ".".join(item.nested_key): json.loads(item.value_json)
            for r in found
            if r.HasField("history")
            for item in r.history.item
        }

    @property
    def logged(self) -> set[str]:
        """Names in the history."""
        return set(self.last)

    def artifact(self, name: str) -> ArtifactRecord:
        (found,) = [artifact for artifact in self.artifacts if artifact.name == name]
        return found
