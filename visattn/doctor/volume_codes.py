"""The kinds of findings that only volumes have; `codes.py` holds those that they share with images."""

ERRORS = {
    "volume-incomplete": (
        "case that lacks a channel or its label, or has one too many",
        "Add the missing file under the name that the layout asks for, or move the case away.",
    ),
    "volume-damaged": ("volume that cannot be decoded", "Copy it again from where it came."),
    "not-a-volume": ("file that is no NIfTI, whatever its name says", "Replace it by the volume, or convert it."),
    "volume-too-large": ("header that announces too many voxels", "Crop the volume, or discard the file."),
    "volume-axes": (
        "volume with more than three axes where each file is one channel",
        "Extract one volume, or store channels along the fourth axis of every case.",
    ),
    "voxels-unsupported": (
        "voxels that are no single numbers (colours, complex)",
        "Save it with one integer or float a voxel.",
    ),
    "affine-broken": (
        "header that places the voxels nowhere (NaN, zero or flat affine)",
        "Restore the header from the original, or set sform and qform.",
    ),
    "volume-not-finite": ("volume without a single finite voxel", "Export it again; the values are lost."),
    "grid-mismatch": (
        "label that lies on another grid than its image",
        "Resample the label to the image's grid (nearest neighbour), or find the one that belongs to it.",
    ),
    "channel-elsewhere": (
        "channel that lies elsewhere than the first one",
        "Register it to the first channel, or correct its header.",
    ),
    "label-not-whole": (
        "label with values between whole numbers, or NaN",
        "Write it again with nearest-neighbour resampling; look whether it is an image.",
    ),
}

WARNINGS = {
    "header-contradiction": (
        "header whose sform and qform place the volume differently, so that programs disagree",
        "Set both to the one that is right; here the sform is used.",
    ),
    "header-no-position": (
        "header with neither sform nor qform: which side is left is unknown",
        "Convert the original again with a program that keeps the orientation.",
    ),
    "affine-shear": (
        "axes that are not perpendicular (a gantry's tilt, or an affine registration kept in the header)",
        "Resample the volume to perpendicular axes, if sizes in mm matter.",
    ),
    "spacing-odd": (
        "voxels of less than 0.05 mm or more than 12 mm",
        "Check the unit of the voxel sizes; microscopes and some exports write other units than mm.",
    ),
    "spacing-mixed": (
        "voxel sizes that differ more than twice between cases",
        "Give data.spacing (three numbers, or median), so that all are resampled to one.",
    ),
    "volume-thin": ("volume of less than 8 voxels along an axis", "Check that it is no single slice or localiser."),
    "channel-resampled": (
        "channel on another grid than the first one, to which it is resampled",
        "Resample it once with the program of your choice.",
    ),
    "volume-constant": ("volume of a single value", "Check where it comes from, or remove the case."),
    "volume-nan": (
        "voxels that are NaN or infinite, which are taken as the mean of the others",
        "Export the volume again; look where the voxels lie.",
    ),
    "volume-outlier": (
        "volume whose values, normalised, are spread unlike the others'",
        "Look at it: perhaps another sequence, without contrast agent, inverted, or an artefact.",
    ),
    "volume-duplicate": (
        "the same volume, voxel for voxel, under several names",
        "Keep one, or put them into one group (data.split.group_by).",
    ),
    "volume-near-duplicate": (
        "nearly the same volume under several names (another export, smoothed, turned, or shifted a little)",
        "Keep one, or put them into one group (data.split.group_by).",
    ),
    "label-on-background": (
        "label that lies mostly where the image is empty: flipped, shifted, or of another case",
        "Look at label and image together.",
    ),
    "label-tiny": (
        "label whose whole foreground is a few voxels: perhaps a slip of the hand",
        "Look at it; such a case counts as much as any other in the mean.",
    ),
    "label-specks": (
        "label with parts of one to three voxels beside larger ones",
        "Remove them if they are slips: lesion-wise scores count each as a lesion.",
    ),
}

INFO = {
    "layout": ("how cases were found", "Nothing to do."),
    "volumes": ("sizes and voxel sizes", "Nothing to do."),
    "orientation-mixed": (
        "volumes whose axes run in different directions",
        "Nothing to do: data.orientation turns all to one.",
    ),
    "oblique": ("volumes whose axes are tilted by more than 5 degrees", "Nothing to do."),
    "label-float": ("labels stored as floating-point numbers", "Save them as integers, which are smaller and exact."),
}
