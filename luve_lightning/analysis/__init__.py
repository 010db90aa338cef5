"""Spectra of denoising, comparisons of upsamplers, plans of cost, and benchmarks."""
