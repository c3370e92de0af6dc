"""Cases of volumes: found for training and for prediction, and read with all their channels on one grid."""

from visattn.data.volume_case import (
    Problem,
    VolumeCase,
    check_contrast,
    image_geometry,
    read_case,
    read_case_label,
)
from visattn.data.volume_inputs import find_volume_cases
from visattn.data.volume_layouts import Layout, find_training_cases, scan_volumes
from visattn.data.volume_pairs import VolumeScan

__all__ = [
    "Layout",
    "Problem",
    "VolumeCase",
    "VolumeScan",
    "check_contrast",
    "find_training_cases",
    "find_volume_cases",
    "image_geometry",
    "read_case",
    "read_case_label",
    "scan_volumes",
]
