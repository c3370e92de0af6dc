"""Data modules and what they are made of.

The table holds import paths, so that listing the data modules imports none of them.
"""

DATA = {
    "ImageFolder": "visattn.data.image_folder.ImageFolder",
    "ImageMaskFolder": "visattn.data.image_mask_folder.ImageMaskFolder",
    "MedMNIST": "visattn.data.medmnist.MedMNIST",
    "VolumeFolder": "visattn.data.volume_folder.VolumeFolder",
}
"""Data modules that a recipe may name, and where they live."""
