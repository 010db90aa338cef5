"""LuVe's video latent upsampler and experts, trained and compared with PyTorch Lightning."""
