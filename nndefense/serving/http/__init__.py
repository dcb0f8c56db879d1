"""HTTP around the guard: settings, keys, bodies, the micro-batcher, problems, counters and the log."""

from nndefense.serving.http.settings import ServingSettings

__all__ = ["ServingSettings"]
