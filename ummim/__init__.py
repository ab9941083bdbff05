"""ummim: masked image modelling pre-training of large vision backbones."""

__version__ = "0.1.0"
