"""The released VLUer's file: converted, used, trained on, and refused when anything differs."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from luve_lightning.losses import LatentL1
from luve_lightning.models.vluer import ReleasedVLUer, load_vluer
from luve_lightning.models.vluer.released import buffer_names, read_released
from luve_lightning.tasks import VLUerTask
from tests.helpers.noise import noise
from tests.helpers.released import reference, released_content, released_state, rule_weights

State = dict[str, Tensor]
LATENTS = (1, 16, 2, 64, 64)


@pytest.fixture(scope="module")
def state() -> State:
    net = ReleasedVLUer()
    rule_weights(net)
    return released_state(net)


@pytest.fixture(scope="module")
def converted(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a whole simulated file becomes."""
    folder = tmp_path_factory.mktemp("released")
    torch.save(released_content(state), folder / "model.pth")
    read_released(folder / "model.pth").save_pretrained(folder / "vluer")
    return folder / "vluer"


@pytest.fixture(scope="module")
def features(converted: Path) -> Tensor:
    """What the encoder makes of LATENTS: the costly part, which does not know the scale."""
    with torch.no_grad():
        made: Tensor = load_vluer(converted).eval().encoder(noise(*LATENTS))
    return made


def test_a_released_state_has_1724_tensors(state: State) -> None:
    assert len(state) == 1724
    shapes = reference()["parameters"] | reference()["buffers"]
    assert {name: list(each.shape) for name, each in state.items()} == shapes
    with torch.device("meta"):
        assert set(buffer_names(ReleasedVLUer())) == set(reference()["buffers"])


@pytest.mark.slow
@torch.no_grad()
def test_converts_loads_and_upsamples(
    state: State, converted: Path, features: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = load_vluer(converted).eval()
    assert type(net) is ReleasedVLUer
    assert json.loads((converted / "config.json").read_text())["_class_name"] == "ReleasedVLUer"
    assert all(torch.equal(each, state[name]) for name, each in net.state_dict().items())
    assert len(net.state_dict()) == 1592
    latents = noise(*LATENTS)
    monkeypatch.setattr(net.encoder, "forward", lambda x: features)
    for side in (96, 128, 192):  # 1.5x, 2x, 3x
        out = net(latents, (1, side, side))
        assert out.shape == (1, 16, 1, side, side)
        assert out.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen encoder", "all weights"])
def test_trains_a_step(
    converted: Path, tiny_backbone: Path, frozen: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not frozen and not request.config.getoption("--all-references"):
        pytest.skip("half a minute on a quiet core: pytest --all-references")
    task = VLUerTask(ReleasedVLUer(), str(tiny_backbone), {"latent": LatentL1()}, init_from=str(converted), lr=1e-4)
    task.net.encoder.requires_grad_(not frozen)
    if frozen:
        features = request.getfixturevalue("features")
        monkeypatch.setattr(task.net.encoder, "forward", lambda x: features)
    before = {name: each.clone() for name, each in task.net.state_dict().items()}
    low, high = noise(*LATENTS), noise(1, 16, 1, 64, 72)
    optimizer = torch.optim.Adam([each for each in task.net.parameters() if each.requires_grad], lr=1e-4)
    task.losses["latent"](task(low, (1, 64, 72)), high).backward()
    optimizer.step()
    moved = [name for name, each in task.net.state_dict().items() if not torch.equal(each, before[name])]
    trained = [name for name, each in task.net.named_parameters() if each.requires_grad]
    assert moved == trained
    assert not any(name.startswith("encoder") for name in trained) if frozen else len(trained) == 1592


def light(state: State) -> State:
    """The same names and shapes in a file of a few hundred KiB."""
    return {name: each if name.endswith("position_bias") else _thin(name, each) for name, each in state.items()}


def _thin(name: str, tensor: Tensor) -> Tensor:
    if name.endswith("index"):
        return tensor.to(torch.int16)
    return torch.zeros(1).expand(tensor.shape)


INDEX = "decoder.stage1.residual_group2.blocks.0.attn.relative_position_index"
POSITIONS = "encoder.stage7.residual_group1.blocks.5.attn.position_bias"
CHANGES: dict[str, tuple[Callable[[State], object], str]] = {
    "missing": (
        lambda state: state.pop("conv.bias"),
        "1723 tensors, expected the released VLUer's 1724: 1 missing, such as conv.bias",
    ),
    "unknown": (lambda state: state.update(extra=torch.zeros(1)), "1 unknown, such as extra"),
    "shape": (
        lambda state: state.update({"conv.bias": torch.zeros(8)}),
        "1 of another shape, such as conv.bias (8 instead of 16)",
    ),
    "not finite": (
        lambda state: state.update({"conv.bias": torch.full((16,), torch.nan)}),
        "1 not finite, such as conv.bias",
    ),
    "number": (lambda state: state.update({3: torch.zeros(1), "extra": torch.zeros(1)}), "2 unknown, such as 3"),  # type: ignore[dict-item]
    "float8": (
        lambda state: state.update({"conv.bias": torch.zeros(16, dtype=torch.float8_e4m3fn)}),
        "1 not plain numbers, such as conv.bias (torch.float8_e4m3fn, torch.strided, cpu)",
    ),
    "integers": (
        lambda state: state.update({"conv.bias": torch.zeros(16, dtype=torch.int64)}),
        "1 not plain numbers, such as conv.bias (torch.int64",
    ),
    "complex": (
        lambda state: state.update({"conv.bias": torch.zeros(16, dtype=torch.complex64)}),
        "1 not plain numbers, such as conv.bias (torch.complex64",
    ),
    "index": (
        lambda state: state.update({INDEX: state[INDEX].flip(0)}),
        f"{INDEX} differs from that of windows of 6 x 8 x 8",
    ),
    "positions": (
        lambda state: state.update({POSITIONS: state[POSITIONS] + 0.01}),
        f"{POSITIONS} differs from that of windows of 2 x 8 x 8",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_refuses_a_state_that_does_not_fit(
    state: State, tmp_path: Path, change: Callable[[State], object], message: str
) -> None:
    other = light(state)
    change(other)
    torch.save(released_content(other), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refused:
        read_released(tmp_path / "model.pth")
    assert str(refused.value).startswith(f"{tmp_path / 'model.pth'}: ")
    assert message in str(refused.value)


def test_a_file_of_few_bytes_with_all_tensors_passes(state: State, tmp_path: Path) -> None:
    """The refusals above are for their changes, not for how their files are made."""
    torch.save(released_content(light(state)), tmp_path / "model.pth")
    net = read_released(tmp_path / "model.pth", crop=True)
    assert net.config.crop
    assert not any(each.any() for each in net.parameters())


def test_refuses_a_file_with_a_wrong_byte(state: State, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    other = light(state)
    torch.save(released_content({**other, "conv.bias": torch.full((16,), 7.5)}), path)
    content = path.read_bytes()
    changed = content.replace(torch.full((16,), 7.5).numpy().tobytes(), torch.full((16,), 7.25).numpy().tobytes())
    assert changed != content
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=r"damaged: the checksum of \S+ in it differs; download the file again$"):
        read_released(path)


class Harmful:
    """Something that is no plain type."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"sd": [1]}}, "expected the released VLUer's file"),
        ({"state_dict": {}, "epoch": 1}, "got a dictionary of state_dict, epoch"),
        ([1, 2], "got list"),
        (Harmful(), "cannot be read as a PyTorch file of plain tensors: "),
    ],
)
def test_refuses_other_files(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refused:
        read_released(tmp_path / "model.pth")
    assert message in str(refused.value)


def test_refuses_what_is_no_pytorch_file(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as file:
        file.writestr("a.txt", "hello")
    (tmp_path / "empty.pth").touch()
    for name in ("text.pth", "zip.pth", "empty.pth"):
        with pytest.raises(ValueError, match=r"^[^\n]*: cannot be read as a PyTorch file of plain tensors: [^\n]+$"):
            read_released(tmp_path / name)
        with pytest.raises(ValueError, match=r"holds code, which is not run$"):
            read_released(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_released(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="a folder, expected the file"):
        read_released(tmp_path)
