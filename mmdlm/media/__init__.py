"""Reads images and audio from files and arrays; invalid input raises one clear error."""

from mmdlm.media.audio import read_audio
from mmdlm.media.files import media_kind
from mmdlm.media.image import read_image
from mmdlm.media.search import find_media

__all__ = ["find_media", "media_kind", "read_audio", "read_image"]
