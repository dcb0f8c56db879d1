"""What strangers send: image files, judged by their headers and decoded within limits."""

from nndefense.serving.pictures.decode import decode_all, inspect
from nndefense.serving.pictures.limits import MEDIA_TYPES, Limits, Refused

__all__ = ["MEDIA_TYPES", "Limits", "Refused", "decode_all", "inspect"]
