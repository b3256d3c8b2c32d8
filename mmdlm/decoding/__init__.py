"""One denoising loop and one file per strategy."""
