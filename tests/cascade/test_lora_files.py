"""What a LoRA file and what lies beside it may be, and the line for what it may not."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig
from safetensors.torch import save_file

from luve_lightning.cascade.lora_files import read_lora

WEIGHTS = {"transformer.proj_out.lora_A.weight": torch.zeros(4, 24)}
CONFIG = LoraConfig(r=4, lora_alpha=16, target_modules=["proj_out"]).to_dict()


def peft_folder(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(WEIGHTS, folder / "adapter_model.safetensors")
    content = {**CONFIG, "target_modules": ["proj_out"], **changes}
    (folder / "adapter_config.json").write_text(json.dumps(content, default=str))
    return folder


def test_the_configuration_is_found_from_the_folder_and_from_the_file(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "peft", use_rslora=True, lora_dropout=0.1, base_model_name_or_path="x/y")
    link = tmp_path / "linked.safetensors"
    link.symlink_to(folder / "adapter_model.safetensors")
    for source in (folder, folder / "adapter_model.safetensors", str(folder), link):
        found = read_lora(source)
        assert found.configuration is not None
        assert (found.configuration.rank, found.configuration.alpha, found.configuration.rslora) == (4, 16, True)
        assert found.tensors.keys() == WEIGHTS.keys()


def test_the_configuration_is_found_in_headers(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    for header in (
        {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in CONFIG.items()}, default=list)},
        {"lora_config": json.dumps({"r": 4, "lora_alpha": 16, "init_lora_weights": True})},
    ):
        save_file(WEIGHTS, file, metadata=header)
        found = read_lora(file).configuration
        assert found is not None
        assert (found.rank, found.alpha) == (4, 16)
    for header, rank in (({}, 4), ({"r": "4"}, 4), ({"lora_rank": "8"}, 8), ({"rank": "4.0"}, 4)):
        save_file(WEIGHTS, file, metadata={"lora_alpha": "16.0", **header})
        found = read_lora(file).configuration
        assert found is not None
        assert (found.rank, found.alpha) == (rank, 16)
    for header, message in (
        ({"lora_alpha": "much"}, 'lora_alpha: no value of PEFT\'s: "much"'),
        ({"lora_alpha": "nan"}, "lora_alpha: no value"),
        ({"lora_alpha": "4", "r": "2.5"}, "r: no value"),
    ):
        save_file(WEIGHTS, file, metadata=header)
        with pytest.raises(ValueError, match=f"header: {message}"):
            read_lora(file)
    save_file(WEIGHTS | {"x.lora_down.weight": torch.zeros(2, 24)}, file, metadata={"lora_alpha": "16"})
    with pytest.raises(ValueError, match="header: r: no value"):
        read_lora(file)
    save_file(WEIGHTS, file, metadata={"ss_network_alpha": "8"})  # kohya's: its tensors say alpha
    assert read_lora(file).configuration is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "OFT", "r": 3.5}, 'peft_type is "OFT", which cannot be honoured'),
        ({"peft_type": "LOKR"}, "lora_alpha is 16, which cannot be honoured"),
        ({"bias": "all"}, 'bias is "all", which'),
        ({"modules_to_save": ["proj_out"]}, r'modules_to_save is \["proj_out"\], which'),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is true, which"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is "),
        ({"layer_replication": [[0, 2]]}, "layer_replication is "),
        ({"some_later_key": 1}, "some_later_key is 1, which"),
        ({"lora_alpha": None}, "lora_alpha: no value of PEFT's: null"),
        ({"lora_alpha": 0}, "lora_alpha: "),
        ({"r": True}, "r: no value"),
        ({"r": 0}, "r: no value"),
        ({"use_rslora": "yes"}, "use_rslora: "),
        ({"alpha_pattern": {"(": 4}}, "alpha_pattern: "),
        ({"rank_pattern": {"to_q": 2.5}}, "rank_pattern: "),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = peft_folder(tmp_path / "peft", **changes)
    for source in (folder, folder / "adapter_model.safetensors"):
        with pytest.raises(ValueError, match=rf"adapter_config\.json: {message}"):
            read_lora(source)


def test_the_configurations_of_other_kinds(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "peft")
    for given, kind in ((LoKrConfig(r=4, alpha=3, decompose_both=True), "LoKr"), (LoHaConfig(r=4, alpha=3), "LoHa")):
        content = given.to_dict()
        (folder / "adapter_config.json").write_text(json.dumps(content, default=str))
        found = read_lora(folder).configuration
        assert found is not None
        assert (found.kind, found.rank, found.alpha, found.rslora) == (kind, 4, 3, False)
        for change, message in (
            ({"alpha": 0}, "alpha: no value"),
            ({"r": 3.5}, "r: no value"),
            ({"use_rslora": True}, "use_rslora is true, which cannot be honoured"),
        ):
            (folder / "adapter_config.json").write_text(json.dumps(content | change, default=str))
            with pytest.raises(ValueError, match=message):
                read_lora(folder)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff", "[" * 100_000])
def test_a_configuration_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    folder = peft_folder(tmp_path / "peft")
    (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"adapter_config\.json: ") as error:
        read_lora(folder)
    assert "\n" not in str(error.value)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch evil",)


def test_files_that_are_no_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "empty.safetensors": b"",
        "text.safetensors": b"a boat sails over the sea, slowly",
        "text.txt": b"a boat sails over the sea, slowly",
        "evil.bin": pickle.dumps({"a": _Evil()}),
        "numbers.bin": pickle.dumps({"a": 1}),
    }.items():
        (tmp_path / name).write_bytes(content)
    save_file(WEIGHTS, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-100])
    torch.save({"epoch": 3, "lora": WEIGHTS}, tmp_path / "training.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "training.pt").read_bytes()[:-300])
    for name, message in {
        "empty.safetensors": "is empty",
        "text.safetensors": "is not a safetensors file, or was cut short",
        "text.txt": "is not a safetensors file, or was cut short",
        "cut.safetensors": "is not a safetensors file, or was cut short",
        "cut.pt": "is a pickle that is not loaded .it holds more than tensors, or was cut short.",
        "evil.bin": "is a pickle that is not loaded .*; expected a .safetensors file",
        "numbers.bin": "is a pickle ",
        "training.pt": "is a pickle of something else than tensors by name",
    }.items():
        with pytest.raises(ValueError, match=f"^LoRA {name}: .*{message}") as error:
            read_lora(Path(name))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "evil").exists()
    torch.save(WEIGHTS, tmp_path / "plain.pt")
    assert read_lora(tmp_path / "plain.pt").tensors.keys() == WEIGHTS.keys()


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file there"):
        read_lora(tmp_path)
    for name in ("one", "two"):
        save_file(WEIGHTS, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"2 files of weights \(one\.safetensors, two\.safetensors\): give the one"):
        read_lora(tmp_path)
    assert read_lora(tmp_path, weight_name="two.safetensors").tensors
    with pytest.raises(FileNotFoundError, match=r"no three\.safetensors in"):
        read_lora(tmp_path, weight_name="three.safetensors")
    with pytest.raises(FileNotFoundError, match=r"LoRA nothing/of/the/kind: no such file or folder"):
        read_lora("nothing/of/the/kind")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"LoRA some/lora: .* is not available from the hub: ") as error:
        read_lora("some/lora", weight_name="x.safetensors", local_files_only=True, cache_dir=tmp_path / "hub")
    assert "\n" not in str(error.value)
    (tmp_path / "expert.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is an expert of LuVe \(expert\.json lies there\)"):
        read_lora(tmp_path / "one.safetensors")


def test_a_part_of_a_lora_is_not_taken_for_it(tmp_path: Path) -> None:
    """Of the parts of a sharded LoRA, each loads by itself."""
    for number in (1, 2):
        save_file(WEIGHTS, tmp_path / f"adapter_model-0000{number}-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"is cut into 2 parts \(adapter_model-00001.*expected one file that holds"):
        read_lora(tmp_path)
    (tmp_path / "adapter_model-00002-of-00002.safetensors").unlink()
    for place in (tmp_path, tmp_path / "adapter_model-00001-of-00002.safetensors"):
        with pytest.raises(ValueError, match=r"adapter_model-00001-of-00002.safetensors is one of several parts"):
            read_lora(place)


def test_two_configurations_must_agree(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "peft")
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 16})}
    save_file(WEIGHTS, folder / "adapter_model.safetensors", metadata=header)
    assert read_lora(folder).configuration is not None
    peft_folder(folder, lora_alpha=8)
    save_file(WEIGHTS, folder / "adapter_model.safetensors", metadata=header)
    with pytest.raises(ValueError, match=r"adapter_config\.json and .*header give it different scales"):
        read_lora(folder)
