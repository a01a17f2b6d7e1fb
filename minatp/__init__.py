"""minatp: a LLaMA that thinks in continuous latent tokens (ATP-Latent, arXiv 2601.21598)."""
