"""Training with active latents alone: the dense step's result in less time and memory.

Products that touch the active entries (`kernels`), an Adam without dense gradients (`adam`).
"""
