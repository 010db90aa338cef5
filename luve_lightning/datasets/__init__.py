"""Video clips on disk, their index, their latents, and the mini world."""
