"""Backbones of our own, registered with timm; none yet: heads take any timm backbone by name."""
