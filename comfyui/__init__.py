"""ComfyUI nodes that upsample latents with a VLUer; copy or link this folder into ComfyUI/custom_nodes."""

from .nodes import LoadVLUer, UpsampleLatent, UpsampleLatentBy

NODE_CLASS_MAPPINGS = {
    "LuVeLoadVLUer": LoadVLUer,
    "LuVeUpsampleLatent": UpsampleLatent,
    "LuVeUpsampleLatentBy": UpsampleLatentBy,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LuVeLoadVLUer": "LuVe Load VLUer",
    "LuVeUpsampleLatent": "LuVe Upsample Latent",
    "LuVeUpsampleLatentBy": "LuVe Upsample Latent By",
}
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
