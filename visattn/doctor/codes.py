"""Every kind of finding: its code, how severe it is, what it means, and what to do; docs/doctor.md shows it."""

from dataclasses import dataclass
from typing import Literal

from visattn.doctor import class_codes, volume_codes

Severity = Literal["error", "warning", "info"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
"""Most severe first."""


@dataclass(frozen=True)
class Kind:
    """One kind of finding.

    Args:
        severity: error where training would fail or learn nonsense; warning where the result suffers or may mislead;
            info for what is good to know.
        meaning: What is the matter, as a phrase that fits one file or many.
        fix: What to do, one sentence.
    """

    severity: Severity
    meaning: str
    fix: str


def _kinds(severity: Severity, table: dict[str, tuple[str, str]]) -> dict[str, Kind]:
    return {code: Kind(severity, meaning, fix) for code, (meaning, fix) in table.items()}


_ERRORS = _kinds(
    "error",
    {
        # files
        "no-cases": ("no image has a mask", "Give images and masks the same file names before the suffix."),
        "missing-mask": ("image without a mask of the same name", "Add the mask, or move the image away."),
        "missing-image": ("mask without an image of the same name", "Add the image, or move the mask away."),
        "duplicate-stem": ("two files whose names differ by the suffix alone", "Keep one of them."),
        "broken-link": ("link to a file that is not there", "Restore the target, or remove the link."),
        "empty-file": ("file of 0 bytes", "Copy it again from where it came."),
        "truncated-file": ("file that ends too early", "Copy it again from where it came."),
        "corrupt-checksum": ("PNG whose checksum is wrong", "Copy it again from where it came."),
        "damaged-file": ("image that cannot be decoded", "Copy it again, or open it elsewhere and save it as PNG."),
        "not-an-image": ("file that is no image, whatever its name says", "Replace it by the image, or move it away."),
        "no-permission": ("file that may not be read", "Give yourself the right to read it (chmod u+r)."),
        "image-too-large": ("header that announces too many pixels", "Cut or shrink the image, or discard the file."),
        "several-pictures": ("file that holds several pictures", "Save the one picture that is meant."),
        "pixels-unsupported": (
            "pixels as floating-point or 32-bit numbers",
            "Save it with 8 or 16 bits; the scaling is your decision.",
        ),
        "name-not-utf8": ("file name that is no valid text (UTF-8)", "Rename the file."),
        # pairs
        "size-mismatch": ("image and mask of different size", "Find the mask that belongs to the image."),
        "size-transposed": (
            "mask as high as its image is wide, and the other way round",
            "Turn or transpose the mask; look which of the two fits.",
        ),
        "exif-mismatch": (
            "image turned by its EXIF orientation, mask not (or the other way round), so that the sizes differ",
            "Turn the pixels of both and remove the tag.",
        ),
        "image-is-mask": ("image that is a copy of its mask", "Put the image in its place."),
        "folders-swapped": ("images that look like masks, and masks that do not", "Swap the two folders."),
        # values of masks
        "mask-colour": ("mask in colour, whose values are no labels", "Save it with one channel of label values."),
        "mask-alpha": ("mask drawn in the alpha channel", "Save it with one channel of label values."),
        "mask-unsupported": ("mask with a kind of pixels that holds no labels", "Save the labels as 8-bit grey PNG."),
        "mask-zero-one": (
            "mask of 0 and 1 where the labels are other values",
            "Write the 1 into data.labels, as in {background: 0, object: 1}.",
        ),
        "values-outside-labels": (
            "mask values that data.labels does not name",
            "Add the value to data.labels (a list merges values) or data.ignore, or correct the mask.",
        ),
        "mask-no-labels": (
            "mask of so many values that they are no labels (a photograph, or probabilities)",
            "Save masks with one value for each class; check that the folder is the right one.",
        ),
        "all-masks-empty": (
            "no mask holds anything but background",
            "Check that masks and labels belong to each other.",
        ),
        # splits
        "group-by-failed": ("data.split.group_by cannot be applied", "Correct the expression or the table."),
        "split-failed": ("the cases cannot be divided as data.split says", "Change data.split or add cases."),
        "split-file": ("data.split.files does not fit the cases", "Write the file again for this data."),
        "duplicate-across-parts": (
            "the same image, byte for byte, in two parts, so that the score is memory",
            "Remove one of them, or put both into one group (data.split.group_by).",
        ),
        "group-across-parts": (
            "a patient or video in two parts, so that the score is memory",
            "Keep each group in one part: data.split.group_by, or correct data.split.files.",
        ),
    },
)

_WARNINGS = _kinds(
    "warning",
    {
        "name-case-twins": (
            "names that differ by upper and lower case alone: one is lost on Windows and macOS",
            "Rename one of them.",
        ),
        "name-control-character": ("file name with a control character", "Rename the file."),
        "name-too-long": ("file name of more than 200 bytes, to which nothing can be added", "Rename the file."),
        "name-blank-edge": ("file name that begins or ends with a blank", "Rename the file."),
        "wrong-suffix": (
            "file whose suffix names another format than it has: other programs may refuse it",
            "Rename it to its true format.",
        ),
        "folder-like-image": ("folder with the name of an image file", "Rename or remove the folder."),
        "format-unread": (
            "image in a format that is not read, and so left out",
            "Convert it to PNG, or move it away.",
        ),
        "decoder-warning": ("file about which the decoder complains", "Open it and save it again."),
        "exif-ambiguous": (
            "image with an EXIF orientation, mask without one, of the same size: one of them may be turned",
            "Look whether the mask fits the upright image; if so, write the image upright.",
        ),
        "constant-image": ("image of a single value", "Check where it comes from, or remove it."),
        "black-image": ("image that is black, or nearly", "Check where it comes from, or remove it."),
        "image-cmyk": (
            "image in CMYK, whose colours are converted without its profile",
            "Convert it to RGB with a program that knows the profile.",
        ),
        "small-image": ("image of less than 32 pixels height or width", "Check that it is no thumbnail."),
        "image-enlarged": (
            "image that data.size enlarges more than twice, which adds no detail",
            "Lower data.size, or take the images at their full size.",
        ),
        "aspect-extreme": ("image more than four times as long as wide", "Cut it into pieces, or check it."),
        "aspect-distorted": (
            "image that data.size stretches more than twice along one side",
            "Give data.size as [height, width] in the shape of the images.",
        ),
        "mask-soft-edges": (
            "mask with values between the labels (soft or resized edges), taken as the nearest label",
            "Write the mask again with label values alone, if its edges matter.",
        ),
        "mixed-mask-values": (
            "some masks hold 0 and 1, others 0 and 255",
            "Write all masks with the same values, or name both in data.labels, as in {object: [1, 255]}.",
        ),
        "mask-full": ("mask that is all foreground", "Check that it is meant."),
        "mask-inverted": (
            "mask whose foreground surrounds the rest, unlike the others: perhaps inverted",
            "Look at it; invert it if foreground and background are swapped.",
        ),
        "masks-inverted": (
            "nearly all masks have their foreground around the border: perhaps all are inverted",
            "Look at a few; swap the values in data.labels if foreground and background are swapped.",
        ),
        "masks-mostly-empty": (
            "more than half of the masks are empty",
            "Check that they are meant; many negatives slow down training.",
        ),
        "tiny-foreground": (
            "mask whose foreground is a few pixels: perhaps a slip of the hand",
            "Look at it; such a case counts as much as any other in the mean.",
        ),
        "vanishing-foreground": (
            "mask whose foreground, or one label of it, is lost at data.size",
            "Raise data.size, or cut the images into tiles.",
        ),
        "label-never-present": ("label that no mask holds", "Correct data.labels, or remove the label."),
        "label-missing-in-part": (
            "label that is absent from training or validation",
            "Choose another data.split or seed, so that each part holds every label.",
        ),
        "mask-repeated": ("the same mask, pixel for pixel, for different images", "Look which image it belongs to."),
        "same-image-different-masks": (
            "the same image, with different masks",
            "Keep the right mask, or merge them.",
        ),
        "duplicate-image": (
            "the same image, byte for byte, under several names",
            "Keep one, or put them into one group (data.split.group_by).",
        ),
        "near-duplicate-image": (
            "nearly the same image under several names (re-encoded, resized, or the next frame)",
            "Keep one, or put them into one group (data.split.group_by).",
        ),
        "mirrored-image": (
            "the same image, mirrored or turned: an augmented copy",
            "Keep the original and let data.augment turn it, or put them into one group.",
        ),
        "near-duplicate-across-parts": (
            "nearly the same image, or a mirrored copy, in two parts: the score is too good",
            "Put them into one group (data.split.group_by), or remove one.",
        ),
        "video-frames": (
            "consecutive frames of videos: a random split would put neighbours on both sides",
            "Run doctor with --groups FILE.csv, look at the table, and set data.split.group_by to FILE.csv:group.",
        ),
        "video-across-parts": (
            "frames of one video in two parts: the score is too good",
            "Run doctor with --groups FILE.csv, look at the table, and set data.split.group_by to FILE.csv:group.",
        ),
        "groups-unused": (
            "names that tell several images of one patient or video, which a random split would part",
            "Set data.split.group_by as shown.",
        ),
        "few-cases": (
            "fewer training cases than data.batch_size: one small batch an epoch",
            "Lower data.batch_size.",
        ),
        "few-validation-cases": (
            "fewer than 5 validation cases, too few to choose an epoch by",
            "Raise data.split.val, or use data.split.folds.",
        ),
    },
)

_INFO = _kinds(
    "info",
    {
        "hidden-files": ("hidden or system files, left out", "Nothing to do; delete them if you like."),
        "other-files": ("files that are no images, left out", "Nothing to do, if they are not meant as images."),
        "subfolders": ("folders among the images, not looked into", "Name them as data.root, if they hold cases."),
        "name-not-ascii": (
            "file names beyond ASCII, which some archives and systems alter",
            "Rename them if you pass the data on.",
        ),
        "name-whitespace": ("file names with blanks", "Put such names in quotes in scripts."),
        "exif-turned": ("images that are turned upright by their EXIF orientation", "Nothing to do."),
        "image-16-bit": ("images of 16 bits, scaled to 8", "Stretch the contrast yourself, if few levels are used."),
        "image-alpha": ("images with an alpha channel, which is dropped", "Nothing to do."),
        "image-palette": ("images with a palette, converted", "Nothing to do."),
        "channels-mixed": ("grey images among images in colour", "Nothing to do; or convert all to grey."),
        "channels-grey": ("images without colour, read as RGB", "Set data.channels: 1 to spare memory."),
        "sizes-mixed": ("images of different sizes, all resized to data.size", "Nothing to do."),
        "mask-jpeg": (
            "masks as JPEG: values off the labels are taken as the nearest",
            "Save masks as PNG where you can.",
        ),
        "mask-palette": ("masks with a palette, whose indices or greys are the labels", "Nothing to do."),
        "mask-rgb": ("masks of three equal channels, of which one is read", "Nothing to do."),
        "mask-16-bit": ("masks of 16 bits, whose values are kept", "Nothing to do."),
        "mask-1-bit": ("masks of 1 bit, read as 0 and 255", "Nothing to do; the labels are 0 and 255."),
        "masks-look-black": ("masks of such small values that they look black", "Nothing to do; they are right."),
        "mask-empty": ("masks without foreground", "Nothing to do, if these images show nothing to find."),
        "class-balance": ("share of each label", "Weigh the loss if a label is rare."),
        "parts": ("how the cases are divided", "Nothing to do."),
        "loader-advice": ("what reading this data costs", "Shrink the files once if you train often."),
    },
)

KINDS: dict[str, Kind] = {
    **_ERRORS,
    **_kinds("error", volume_codes.ERRORS),
    **_kinds("error", class_codes.ERRORS),
    **_WARNINGS,
    **_kinds("warning", volume_codes.WARNINGS),
    **_kinds("warning", class_codes.WARNINGS),
    **_INFO,
    **_kinds("info", volume_codes.INFO),
}
"""All kinds by code."""
