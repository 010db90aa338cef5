"""What denoising, upsampling and planning show: spectra, comparisons, costs and benchmarks."""
