"""VLUers: video latent upsamplers, ours and the released one."""

from luve_lightning.models.vluer.base import BaseVLUer
from luve_lightning.models.vluer.loading import load_vluer, vluer_class
from luve_lightning.models.vluer.model import VLUer
from luve_lightning.models.vluer.released import ReleasedVLUer

__all__ = ["BaseVLUer", "ReleasedVLUer", "VLUer", "load_vluer", "vluer_class"]
