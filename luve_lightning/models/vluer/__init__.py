"""VLUers: video latent upsamplers, ours and the released one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luve_lightning.model_folders import read_config
from luve_lightning.models.vluer.model import BaseVLUer, VLUer
from luve_lightning.models.vluer.released import ReleasedVLUer

__all__ = ["BaseVLUer", "ReleasedVLUer", "VLUer", "load_vluer", "vluer_class"]


def vluer_class(config: Mapping[str, Any], where: str | Path = "vluer") -> type[BaseVLUer]:
    """The class that a configuration names; VLUer when it names none.

    Args:
        config: contents of a config.json.
        where: the folder, for the message.

    Raises:
        ValueError: for the class of another model.
    """
    known = {kind.__name__: kind for kind in BaseVLUer.__subclasses__()}
    name = config.get("_class_name", VLUer.__name__)
    if name not in known:
        raise ValueError(f"{where}: a saved {name}, expected one of {', '.join(sorted(known))}")
    return known[name]


def load_vluer(folder: str | Path, **options: Any) -> BaseVLUer:
    """A saved VLUer of any class.

    Args:
        folder: written by `save_pretrained`, by training, or by `luve convert vluer`.
        options: of diffusers' `from_pretrained`, such as `torch_dtype`.

    Raises:
        FileNotFoundError: when it does not exist.
        ValueError: when files are damaged, or hold another model or other weights than the configuration requires.
    """
    net: BaseVLUer = vluer_class(read_config(folder, ""), folder).from_pretrained(folder, **options)
    return net
