"""What runs at real size without anyone's weights or data: random models of a whole cascade, and painted clips."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from luve_lightning.analysis.model_parts import PartConfigs, Parts
from luve_lightning.data.mini_world import vocabulary
from luve_lightning.data.mini_world.paint import OUTLINES
from luve_lightning.data.mini_world.scene import DIRECTIONS, SPLITS, Photograph, load_photograph, photographs_of
from luve_lightning.data.video_files import MAX_FPS, encode_h264, write_picture
from luve_lightning.data.video_index import CAPTIONS
from luve_lightning.files import replacing, write_text
from luve_lightning.functional.frequency import FrequencyFilter
from luve_lightning.functional.noise_bands import SigmaBand
from luve_lightning.machine import check_video, cores
from luve_lightning.models.attention import Attention
from luve_lightning.models.backbones import denoiser_of
from luve_lightning.models.experts import ExpertConfig, add_expert, expert_parameters, save_expert

# As experiments/experts trains them.
EXPERTS = {
    "lfe": ExpertConfig("attention", 32, 32, FrequencyFilter("low", 0.5), SigmaBand(0.875, 1.0)),
    "hfe": ExpertConfig("feed_forward", 32, 32, FrequencyFilter("high", 0.5), SigmaBand(0.0, 0.875)),
}
BACKBONE, REFINER, VLUER = "backbone", "refiner", "vluer"
"""Subfolders that `write_random_models` fills, beside `experts`."""

_SPECIAL = 8  # numbers left for the tokenizer's own tokens, such as padding, where the vocabulary is small
_STD = 0.02  # of weights that start at zero: a model must not be timed on zeros


def write_random_models(
    folder: Path,
    configs: PartConfigs,
    dtype: torch.dtype,
    device: torch.device,
    attention: Attention | None = None,
    seed: int = 0,
    refiner_alone: bool = False,
) -> Iterator[tuple[str, int]]:
    """Write a backbone, a VLUer, an adapted transformer and its two experts, each as training would export it.

    They are random, and their videos are noise: what is real is the size of everything. The tokenizer knows the mini
    world's words.

    Args:
        folder: a new folder; gets `backbone/`, `vluer/`, `refiner/transformer/`, `experts/lfe/` and `experts/hfe/`.
        configs: sizes of the models. Without a refiner's, it has those of the backbone's transformer.
        dtype: dtype of the transformers and the text encoder; the VAE, the VLUer and the experts are float32.
        device: where the weights are drawn; a GPU is faster, and gives other weights.
        attention: attention of the adapted transformer; None is the backbone's own.
        seed: seed of all weights.
        refiner_alone: write only the adapted transformer and its experts, to use with another folder's models.

    Yields:
        Each subfolder that is written, and the number of its parameters.

    Raises:
        FileExistsError: when the folder holds something.
        ValueError: for an attention that does not fit the transformer.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"output {folder}: expected a new or empty folder")
    if attention is not None:  # refused before anything is written
        denoiser_of(Parts(configs, dtype).refiner).use_attention(attention)
    # A transformer of its own for the third stage, where `configs` has it share the first one's.
    parts = Parts(replace(configs, refiner=configs.refiner or configs.transformer), dtype, device)
    with _seeded(seed, device), torch.no_grad():
        if not refiner_alone:
            yield BACKBONE, _write_backbone(folder / BACKBONE, parts)
            yield VLUER, _write_vluer(folder / VLUER, parts)
        adapted = denoiser_of(parts.refiner)
        if attention is not None:
            adapted.use_attention(attention)
        _no_zeros(adapted.module)
        count = _size(adapted.module)
        adapted.save(folder / REFINER / "transformer", dtype)
        yield REFINER, count
        for name, config in EXPERTS.items():
            add_expert(adapted.module, name, config, dtype=torch.float32)
            weights = list(expert_parameters(adapted.module, name))
            for weight in weights:
                nn.init.normal_(weight, std=_STD)
            save_expert(adapted.module, name, folder / "experts" / name)
            yield f"experts/{name}", sum(weight.numel() for weight in weights)


def _write_backbone(folder: Path, parts: Parts) -> int:
    """Write a whole pipeline folder; the number of its parameters."""
    family, configs = parts.configs.family, parts.configs
    vae = family.from_config("vae", configs.vae)
    family.save_vae(vae, folder, torch.float32)
    words = vocabulary()[: max(1, int(configs.text_encoder.get("vocab_size", 2**15)) - _SPECIAL)]
    tokenizer = family.build_text([" ".join(words)], configs.text_length, {}).tokenizer
    text = family.text_class(tokenizer, parts.text_encoder, configs.text_length)
    family.save(folder, denoiser_of(parts.transformer), text, configs.schedule, folder, parts.dtype)
    count = sum(map(_size, (vae, parts.text_encoder, parts.transformer)))
    parts.forget("text_encoder", "transformer")
    return count


def _write_vluer(folder: Path, parts: Parts) -> int:
    """Write the VLUer; the number of its parameters."""
    _no_zeros(parts.vluer)
    parts.vluer.save_pretrained(folder)
    count = _size(parts.vluer)
    parts.forget("vluer")
    return count


def _no_zeros(module: nn.Module) -> None:
    """Draw the weights of two dimensions or more that start at zero."""
    weights: list[Tensor] = [weight for weight in module.parameters() if weight.ndim > 1]
    for weight in weights:
        if not weight.any():
            nn.init.normal_(weight, std=_STD)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a seed, on a device, and leave PyTorch's own random numbers as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        with nullcontext() if device.type == "cuda" else _ManyThreads():
            yield


_PIECE = 2**22  # numbers that one thread draws at a time


class _ManyThreads(TorchDispatchMode):
    """Draws large tensors on all cores of a CPU, where PyTorch has one draw them; the same for any number of cores.

    Each piece has a generator of its own, whose seed comes from PyTorch's. Smaller tensors are drawn as always.
    """

    _drawn = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(cores())
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._pool.shutdown()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every operation."""
        del types
        if function not in self._drawn or kwargs or not self._suits(args[0]):
            return function(*args, **(kwargs or {}))
        weight, *numbers = args
        pieces = weight.detach().view(-1).split(_PIECE)
        seeds = torch.randint(2**62, (len(pieces),), device="cpu").tolist()

        def draw(piece: Tensor, seed: int) -> None:
            with torch.no_grad():
                function(piece, *numbers, generator=torch.Generator().manual_seed(seed))

        list(self._pool.map(draw, pieces, seeds))
        return weight

    @staticmethod
    def _suits(weight: Tensor) -> bool:
        return weight.device.type == "cpu" and weight.is_contiguous() and weight.numel() > _PIECE


# Clips and stills ----------------------------------------------------------------------------------------------------

_CRF, _THREADS = 18, 4  # of x264; another number of threads would give other bytes
_CLIPS_AT_ONCE = 8  # of 49 frames at 4K each takes 1.3 GB
_JPEG_QUALITY = 92
_PAN, _REACH = 0.15, 0.3  # camera's way over a clip and a shape's way from the middle, in short sides of the frame
_RADIUS = (0.1, 0.2)  # of a shape, in short sides
_SHOWN = (0.75, 1.0)  # how much of a photograph is seen, a side
# Detail that an enlarged photograph lacks: noise in cells of so many pixels, each as strong as an octave of a picture.
_CELLS, _OCTAVE = (1, 2, 4, 8), 0.012


def make_material(
    folder: Path, *, size: tuple[int, int], clips: int, frames: int, fps: float, stills: int, seed: int
) -> list[Path]:
    """Paint clips and stills of any size, with captions, as `luve index` takes them: the same bytes for the same seed.

    A clip is a photograph of the mini world, enlarged and with fine detail added, over which a camera pans and a shape
    moves: it compresses like video. The first clip trains, the second validates, the third tests, all others train, and
    so with the stills.

    Args:
        folder: gets `clip-000.mp4` (H.264) and its like, `still-000.png`, `still-001.jpg` and so on, and at last
            `metadata.csv` with caption and split of each. UltraVideo's columns hold more captions, the same sentences
            in other orders: ten of a clip, one of a still.
        size: height and width in pixels, both even and at least 32.
        clips: number of clips, >= 0.
        frames: length of a clip, >= 1.
        fps: frames per second, in (0, 240].
        stills: number of stills, PNG and JPEG in turn, >= 0.
        seed: seed of everything random, >= 0.

    Returns:
        The clips, then the stills.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_material(size, clips, frames, fps, stills, seed)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [("clip", number, frames) for number in range(clips)] + [("still", number, 1) for number in range(stills)]

    def make(kind: str, number: int, length: int) -> tuple[Path, list[str], str]:
        split = SPLITS[number] if number < len(SPLITS) else SPLITS[0]
        rng = np.random.default_rng([seed, length == 1, number])
        painted, sentences = _paint(rng, split, size, length)
        suffix = "mp4" if kind == "clip" else ("png", "jpg")[number % 2]
        path = folder / f"{kind}-{number:03d}.{suffix}"
        _write(path, painted, fps)
        return path, _captions(sentences), split

    with ThreadPoolExecutor(min(cores(), _CLIPS_AT_ONCE)) as pool:  # numpy and x264 leave the interpreter to others
        rows = list(pool.map(make, *zip(*wanted, strict=True))) if wanted else []
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file_name", "split", "text", *CAPTIONS])
    writer.writerows((path.name, split, *captions) for path, captions, split in rows)
    write_text(folder / "metadata.csv", text.getvalue())
    return [path for path, _, _ in rows]


def _captions(sentences: Sequence[str]) -> list[str]:
    """A caption for each column: all sentences, in other orders, and two of them alone; then again."""
    orders = itertools.chain.from_iterable(itertools.permutations(sentences, n) for n in range(len(sentences), 1, -1))
    captions = itertools.cycle([" ".join(order) for order in orders])
    return list(itertools.islice(captions, 1 + len(CAPTIONS)))


def check_material(size: Any, clips: Any, frames: Any, fps: Any, stills: Any, seed: Any) -> None:
    """Refuse what cannot be painted; see `make_material`.

    Raises:
        ValueError: an argument is out of its range, or of another type.
    """
    if not isinstance(size, list | tuple) or [type(side) for side in size] != [int, int]:
        raise ValueError(f"size: expected a height and a width, got {size!r}")
    height, width = size
    if min(size) < 32 or height % 2 or width % 2:
        raise ValueError(f"size: expected even sides of at least 32 pixels, got {height}x{width}")
    for name, value, least in (("clips", clips, 0), ("frames", frames, 1), ("stills", stills, 0), ("seed", seed, 0)):
        if type(value) is not int or value < least:
            raise ValueError(f"{name}: expected {least} or more, got {value!r}")
    if type(fps) not in (int, float) or not 0 < fps <= MAX_FPS:
        raise ValueError(f"fps: expected a number in (0, {MAX_FPS}], got {fps!r}")
    check_video(frames, height, width)


def _write(path: Path, frames: np.ndarray, fps: float) -> None:
    if path.suffix == ".mp4":
        encode_h264(path, frames, Fraction(fps).limit_denominator(1001), _CRF, _THREADS)
    elif path.suffix == ".png":
        write_picture(path, frames[0])
    else:
        with replacing(path) as temporary:
            Image.fromarray(frames[0]).save(temporary, format="JPEG", quality=_JPEG_QUALITY)


def _paint(rng: np.random.Generator, split: str, size: tuple[int, int], frames: int) -> tuple[np.ndarray, list[str]]:
    """A clip, uint8 T x H x W x 3, and its caption's sentences, in the mini world's words."""
    height, width = size
    short = min(size)
    behind, before = (photographs_of(split)[i] for i in rng.choice(len(photographs_of(split)), 2, replace=False))
    pan, way, shape = (str(rng.choice(list(names))) for names in (DIRECTIONS, DIRECTIONS, OUTLINES))
    travel = round(short * _PAN)
    picture = _enlarged(behind, (height + travel, width + travel), rng)
    radius = round(short * rng.uniform(*_RADIUS))
    texture = _enlarged(before, (2 * radius, 2 * radius), rng).astype(np.uint16)
    place = (np.arange(2 * radius, dtype=np.float32) + 0.5) / radius - 1
    y, x = torch.meshgrid(torch.from_numpy(place), torch.from_numpy(place), indexing="ij")
    # In steps of 1/255; the edge fades over a pixel.
    cover = ((0.5 - OUTLINES[shape](x, y) * radius).clamp(0, 1) * 255).round().numpy().astype(np.uint16)[..., None]
    seen = np.empty((frames, height, width, 3), np.uint8)
    time = np.linspace(-1, 1, frames) if frames > 1 else rng.uniform(-1, 1, 1)
    corners = _path(time, DIRECTIONS[pan], (travel / 2, travel / 2), travel / 2)
    spots = _path(time, DIRECTIONS[way], (height / 2 - radius, width / 2 - radius), short * _REACH)
    for frame, (top, left), (row, column) in zip(seen, corners, spots, strict=True):
        frame[:] = picture[top : top + height, left : left + width]
        region = frame[row : row + 2 * radius, column : column + 2 * radius]
        region[:] = (region * (255 - cover) + texture * cover) // 255
    article = "an" if before.texture[0] in "aeiou" else "a"
    background, front = f"a photograph of {behind.subject} .", f"{article} {before.texture} {shape}"
    if frames == 1:
        return seen, [background, f"{front} stands still ."]
    return seen, [background, f"the camera pans {pan} .", f"{front} moves {way} ."]


def _path(
    time: np.ndarray, direction: tuple[int, int], middle: tuple[float, float], reach: float
) -> list[tuple[int, int]]:
    """Whole rows and columns of something that is `reach` pixels from its middle at times -1 and 1."""
    across, down = direction
    rows, columns = np.rint(middle[0] + time * down * reach), np.rint(middle[1] + time * across * reach)
    return list(zip(rows.astype(int).tolist(), columns.astype(int).tolist(), strict=True))


def _enlarged(photograph: Photograph, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Most of a photograph in another size, with detail down to a pixel, uint8 H x W x 3."""
    height, width = size
    picture = load_photograph(photograph)
    scale = min(picture.shape[1] / height, picture.shape[2] / width) * rng.uniform(*_SHOWN)
    rows, columns = max(1, int(height * scale)), max(1, int(width * scale))
    top, left = (
        int(rng.integers(has - takes + 1)) for has, takes in zip(picture.shape[1:], (rows, columns), strict=True)
    )
    cut = picture[None, :, top : top + rows, left : left + columns]
    grown = F.interpolate(cut, size, mode="bicubic", antialias=scale > 1, align_corners=False)
    for cell in _CELLS if scale < 1 else ():
        shape = (1, 1, -(-height // cell) + 1, -(-width // cell) + 1)
        noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).mul_(_OCTAVE)
        if cell > 1:
            noise = F.interpolate(noise, scale_factor=cell, mode="bilinear", align_corners=False)
        grown += noise[..., :height, :width]
    return grown[0].clamp_(0, 1).mul_(255).round_().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
