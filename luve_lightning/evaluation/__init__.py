"""Folders of videos to scores, scores to tables with intervals; comparisons of upsamplers, spectra of denoising."""
