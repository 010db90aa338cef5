"""Stands in for ComfyUI: the modules that our nodes import, and how it loads a folder of custom_nodes."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

PACK = Path(__file__).resolve().parents[2] / "comfyui"


class Interrupted(Exception):
    """What ComfyUI raises where a user stops a run."""


class ComfyUI:
    """A ComfyUI without models or a GPU.

    Attributes:
        folder: where it is installed.
        calls: what its memory management was asked, in order.
        progress: done and total of each step of a progress bar.
        bf16: whether the device is good at bfloat16.
        devices: where models run, where results wait, and where weights wait.
        samples_before_stop: samples until a user stops the run; None never stops.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.calls: list[str] = []
        self.freed: list[tuple[float, torch.device]] = []
        self.progress: list[tuple[int, int]] = []
        self.bf16 = False
        self.devices = dict.fromkeys(("run", "result", "weights"), torch.device("cpu"))
        self.samples_before_stop: int | None = None
        self.paths: dict[str, list[str]] = {}
        comfy = _module("comfy")
        comfy.__path__ = []  # a package
        parts = {
            "folder_paths": _module("folder_paths", models_dir=str(folder / "models"), **self._folder_paths()),
            "comfy": comfy,
            "comfy.model_management": _module("comfy.model_management", **self._model_management()),
            "comfy.utils": _module("comfy.utils", ProgressBar=self._progress_bar()),
        }
        for name, module in parts.items():
            patch.setitem(sys.modules, name, module)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(parts[parent], child, module)

    def install(self, patch: pytest.MonkeyPatch) -> ModuleType:
        """The nodes' folder copied into custom_nodes, and loaded as ComfyUI does."""
        copy = self.folder / "custom_nodes" / "luve.nodes"  # a dot, as a version number in a folder's name has
        shutil.copytree(PACK, copy, ignore=shutil.ignore_patterns("__pycache__"))
        name = str(copy).replace(".", "_x_")
        spec = importlib.util.spec_from_file_location(name, copy / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, name, module)
        for child in ("nodes", "upsampler"):
            patch.delitem(sys.modules, f"{name}.{child}", raising=False)
        spec.loader.exec_module(module)
        return module

    def _folder_paths(self) -> dict[str, Callable[..., Any]]:
        def add_model_folder_path(name: str, path: str, is_default: bool = False) -> None:
            del is_default
            self.paths.setdefault(name, []).append(path)

        return {"add_model_folder_path": add_model_folder_path, "get_folder_paths": lambda name: list(self.paths[name])}

    def _model_management(self) -> dict[str, Callable[..., Any]]:
        def free_memory(memory_required: float, device: torch.device, keep_loaded: tuple[Any, ...] = ()) -> None:
            del keep_loaded
            self.calls.append("free_memory")
            self.freed.append((memory_required, device))

        def throw_exception_if_processing_interrupted() -> None:
            self.calls.append("interrupted?")
            if self.samples_before_stop is not None and self.calls.count("interrupted?") > self.samples_before_stop:
                raise Interrupted

        return {
            "get_torch_device": lambda: self.devices["run"],
            "intermediate_device": lambda: self.devices["result"],
            "unet_offload_device": lambda: self.devices["weights"],
            "should_use_bf16": lambda device: self.bf16,
            "free_memory": free_memory,
            "soft_empty_cache": lambda: self.calls.append("soft_empty_cache"),
            "throw_exception_if_processing_interrupted": throw_exception_if_processing_interrupted,
        }

    def _progress_bar(self) -> type:
        progress = self.progress

        class ProgressBar:
            def __init__(self, total: int) -> None:
                self.total, self.done = total, 0

            def update(self, value: int) -> None:
                self.done += value
                progress.append((self.done, self.total))

        return ProgressBar


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    return module
