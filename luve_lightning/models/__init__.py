"""VLUer, experts, attention and backbones."""
