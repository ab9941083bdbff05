"""To and from other people's formats: the papers' official checkpoints, and timm."""

from ummim.interop.classifier import load_official_classifier
from ummim.interop.official import load_official, save_official
from ummim.interop.timm import export_timm, write_timm

__all__ = ["export_timm", "load_official", "load_official_classifier", "save_official", "write_timm"]
