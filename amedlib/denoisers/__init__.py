"""What is sampled from: callables ``denoiser(x, t, labels=None)`` that return D(x; t)."""
