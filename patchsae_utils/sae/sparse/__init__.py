"""Training with active latents alone: what differs from the dense step in time and memory, not in its result.

Products that touch the active entries (`kernels`), their Triton form for CUDA (`triton`), and an Adam that never makes a dense gradient (`adam`).
May import: the SAE's model, for `adam` alone.
"""
