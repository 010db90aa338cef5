"""Weight files of networks that measure: where they are looked for, and one line when they are missing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luve_lightning.files import file_digest
from luve_lightning.metrics.base import Unavailable

_CACHE = "~/.cache/luve-lightning"


def weights_folder() -> Path:
    """The folder for weights: $LUVE_WEIGHTS, or ~/.cache/luve-lightning."""
    return Path(os.environ.get("LUVE_WEIGHTS") or _CACHE).expanduser()


@dataclass(frozen=True)
class WeightFile:
    """A file that somebody else published. It is looked for, never downloaded.

    Attributes:
        name: the network, in words.
        file_name: name of the file wherever it is looked for.
        size_bytes: size, for people; checked only together with `sha256`.
        url: where to get it.
        purpose: what it is needed for.
        sha256: 64 hex digits, when the content must be exactly this.
        caches: folders where the library that usually loads it keeps it; `~` and environment variables are
            expanded.
    """

    name: str
    file_name: str
    size_bytes: int
    url: str
    purpose: str
    sha256: str | None = None
    caches: tuple[str, ...] = ()

    def find(self, given: str | Path | None = None) -> Path:
        """The file: a given path (the file or its folder), else in `weights_folder()`, else in `caches`.

        Raises:
            Unavailable: it is in none of them, or, with `sha256`, has another size; one line.
        """
        folders = [weights_folder(), *(Path(os.path.expandvars(cache)).expanduser() for cache in self.caches)]
        places = [folder / self.file_name for folder in folders]
        if given is not None:
            path = Path(given).expanduser()
            places = [path / self.file_name if path.is_dir() else path]
        for place in places:
            if place.is_file():
                size = place.stat().st_size
                if self.sha256 is not None and size != self.size_bytes:
                    raise Unavailable(
                        f"{place} has {size} bytes where {self.name} has {self.size_bytes}: cut short, or another "
                        f"file; get it from {self.url}"
                    )
                return place
        missing = f"{places[0]} does not exist" if given is not None else f"{self.file_name} was not found"
        raise Unavailable(
            f"{self.purpose} needs {self.name}: {missing}; put {self.file_name} ({self.readable_size}, {self.url}) "
            f"into {weights_folder()} or give its path"
        )

    def find_exactly(self, given: str | Path | None = None) -> Path:
        """`find`, with the bytes compared to `sha256`: for files whose name readers trust.

        Raises:
            Unavailable: like `find`, or the content differs; one line.
        """
        path = self.find(given)
        if self.sha256 is not None and file_digest(path) != self.sha256:
            raise Unavailable(f"{path} is not {self.name}: its sha256 differs; get it from {self.url}")
        return path

    @property
    def readable_size(self) -> str:
        """The size in human-readable form: 8 kB, 96 MB, 1.7 GB."""
        if self.size_bytes >= 1e9:
            return f"{self.size_bytes / 1e9:.1f} GB"
        return f"{self.size_bytes / 1e6:.0f} MB" if self.size_bytes >= 1e6 else f"{self.size_bytes / 1e3:.0f} kB"


LAION_HEAD = WeightFile(
    name="LAION's linear aesthetic head",
    file_name="sa_0_4_vit_l_14_linear.pth",
    size_bytes=3_700,
    url="https://github.com/LAION-AI/aesthetic-predictor",
    purpose="the aesthetic score",
)


class DinoFeatures(nn.Module):
    """DINO's class token after the last normalisation, as torch.hub's `dino_vitb16` returns it.

    transformers' `ViTModel` is the same network, except for position embeddings at sizes other than its own: DINO
    interpolates them by a scale factor of (n + 0.1) / 14, transformers to a size of n. VBench's 224x398 is such a
    size.

    Args:
        vit: a `transformers.ViTModel`.
    """

    def __init__(self, vit: Any) -> None:
        super().__init__()
        vit.embeddings = _DinoEmbeddings(vit.embeddings)
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        """N x 3 x h x w in ImageNet's colours to N x D; sides are cut to multiples of the patch."""
        tokens: Tensor = self.vit(images).last_hidden_state
        return tokens[:, 0]


class _DinoEmbeddings(nn.Module):
    """Patch tokens with DINO's position embeddings; replaces transformers' `ViTEmbeddings`."""

    patch_embeddings: Any
    cls_token: nn.Parameter
    position_embeddings: nn.Parameter

    def __init__(self, published: Any) -> None:
        super().__init__()
        self.cls_token = published.cls_token
        self.position_embeddings = published.position_embeddings
        self.patch_embeddings = published.patch_embeddings

    def forward(self, pixel_values: Tensor, **_: object) -> Tensor:
        grid: Tensor = self.patch_embeddings.projection(pixel_values)
        tokens = grid.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        height, width = pixel_values.shape[2:]
        return tokens + self._positions(grid.shape[2], grid.shape[3], height == width)

    def _positions(self, rows: int, columns: int, square: bool) -> Tensor:
        token, grid = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        side = round(grid.shape[1] ** 0.5)
        if square and rows == side:
            return self.position_embeddings
        grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / side, (columns + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", align_corners=False)
        return torch.cat([token, grid.flatten(2).transpose(1, 2)], dim=1)


class ClipFeatures(nn.Module):
    """CLIP's image embedding, before any normalisation.

    Args:
        clip: a `transformers.CLIPVisionModelWithProjection`.
    """

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor) -> Tensor:
        """N x 3 x 224 x 224 in CLIP's colours to N x D."""
        embeddings: Tensor = self.clip(images).image_embeds
        return embeddings


def load_dino(source: str | Path, purpose: str) -> DinoFeatures:
    """DINO's ViT.

    Args:
        source: a folder, or the name of a repository in the hub's cache.
        purpose: name of the metric, for the message.

    Raises:
        Unavailable: found in neither.
    """
    from transformers import ViTModel

    # DINO's own code normalises with 1e-6; the published configuration says 1e-12.
    options: dict[str, object] = {"add_pooling_layer": False, "layer_norm_eps": 1e-6}
    return DinoFeatures(_from_pretrained(ViTModel, source, purpose, "DINO ViT-B/16, 343 MB", options))


def load_clip(source: str | Path, purpose: str, size: str) -> ClipFeatures:
    """The image side of CLIP in float32 (VBench runs it in float16 on a GPU: the fourth digit differs).

    Args:
        source: a folder, or the name of a repository in the hub's cache.
        purpose: name of the metric, for the message.
        size: name and size of the network, for the message.

    Raises:
        Unavailable: found in neither.
    """
    from transformers import CLIPVisionModelWithProjection

    return ClipFeatures(_from_pretrained(CLIPVisionModelWithProjection, source, purpose, size, {}))


def load_aesthetic_head(weights: str | Path | None) -> nn.Linear:
    """LAION's linear head on CLIP ViT-L/14 embeddings of length 1: 768 numbers to a score of about 1 to 10.

    Args:
        weights: the file, or None to look in the usual places.

    Raises:
        Unavailable: it is missing, or is another file.
    """
    path = LAION_HEAD.find(weights)
    head = nn.Linear(768, 1)
    try:
        head.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load may raise anything for a broken file
        reason = str(error).partition("\n")[0]
        raise Unavailable(f"{path} is not {LAION_HEAD.name} ({LAION_HEAD.url}): {reason}") from error
    return head


def _from_pretrained(kind: type, source: str | Path, purpose: str, what: str, options: dict[str, object]) -> nn.Module:
    """A transformers model from a folder or the hub's cache, without network access."""
    # A folder of that name beside the other weights takes precedence over the cache.
    own = weights_folder() / Path(source).name
    folder = Path(source).expanduser()
    place = folder if folder.is_dir() else own if own.is_dir() else source
    try:
        network: nn.Module = kind.from_pretrained(  # type: ignore[attr-defined]
            str(place), local_files_only=True, dtype=torch.float32, **options
        )
    except (OSError, ValueError) as error:
        raise Unavailable(
            f"{purpose} needs {source} ({what}): neither a folder, nor {own}, nor in the hub's cache; "
            f"fetch it once with `hf download {source}`, or copy its folder to {own}"
        ) from error
    return network
