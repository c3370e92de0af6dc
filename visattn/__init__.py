"""Attention blocks, backbones and segmentation networks for medical images."""

__version__ = "0.1.0.dev0"
