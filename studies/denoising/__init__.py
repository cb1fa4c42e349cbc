"""A trained denoiser that others made, pruned, fine-tuned and streamed: `python -m studies.denoising --help`."""
