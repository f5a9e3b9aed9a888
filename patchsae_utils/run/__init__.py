"""Run: what every stage uses, whatever it computes.

Artifacts on disk (`artifacts`), processes and devices (`processes`), batches that fit into memory (`memory`), intervals (`intervals`), numbers
that notebooks quote (`results`), other programs' pickles (`pickles`). May import: config.
"""

__all__ = []
