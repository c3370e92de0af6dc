"""What opening a file told: damage, kinds of pixels, orientation, sizes that do not fit."""

from collections import Counter
from collections.abc import Sequence

from visattn.data.phantoms import PHANTOM
from visattn.doctor.findings import Findings
from visattn.doctor.reading import Seen
from visattn.survey import Facts

_REFUSALS = (
    ("the file is empty", "empty-file"),
    ("truncated", "truncated-file"),
    ("wrong checksum", "corrupt-checksum"),
    ("not a PNG, JPEG, BMP or TIFF", "not-an-image"),
    ("permission denied", "no-permission"),
    ("announces more than", "image-too-large"),
    ("more than the limit", "image-too-large"),
    ("not enough memory", "image-too-large"),
    ("pictures (animation or pages)", "several-pictures"),
    ("32-bit pixels", "pixels-unsupported"),
    ("pixels of kind", "pixels-unsupported"),
    ("the mask is in colour", "mask-colour"),
    ("in the alpha channel", "mask-alpha"),
    ("masks in 16-bit colour", "mask-unsupported"),
    ("masks of kind 'F'", "pixels-unsupported"),
    ("masks of kind", "mask-unsupported"),
)
"""What the strict readers of visattn/data say, and what it is called here."""

_SUFFIXES = {
    "PNG": {".png"},
    "JPEG": {".jpg", ".jpeg"},
    "MPO": {".jpg", ".jpeg"},
    "BMP": {".bmp"},
    "TIFF": {".tif", ".tiff"},
}
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_SMALL_SIDE = 32
_LONG = 4.0


def check_files(seen: Sequence[Seen], findings: Findings) -> None:
    """Examine every file by itself, then the pairs, then what the images have in common."""
    for one in seen:
        for facts in (one.image, one.mask):
            check_file(facts, findings)
        for path, text in one.complaints:
            findings.file("decoder-warning", path, text)
        _check_pair(one, findings)
        if not one.image.error:
            check_image(one, findings)
        if not one.mask.error:
            _check_mask_kind(one.mask, findings)
    check_together([one.image for one in seen if not one.image.error], findings)


def refusal(message: str) -> str:
    """The code for what a reader says about a file that it refuses."""
    return next((code for part, code in _REFUSALS if part in message), "damaged-file")


def check_file(facts: Facts, findings: Findings) -> None:
    """Why a file cannot be read, and whether its suffix is right."""
    if facts.error:
        findings.file(refusal(facts.error), facts.path, facts.error.removeprefix(f"{facts.path}: "))
    suffix = facts.path.suffix.lower()
    if facts.format and suffix and suffix not in _SUFFIXES.get(facts.format, {suffix}):
        findings.file("wrong-suffix", facts.path, f"is {facts.format}")


def _check_pair(one: Seen, findings: Findings) -> None:
    image, mask = one.image, one.mask
    if image.error or mask.error or image.size is None or mask.size is None:
        return
    turned = image.orientation != mask.orientation
    if image.size != mask.size:
        note = f"image {_shown(image.size)}, mask {_shown(mask.size)}"
        sideways = (image.orientation in _SIDEWAYS) != (mask.orientation in _SIDEWAYS)
        if image.size == mask.size[::-1]:
            findings.file("exif-mismatch" if sideways else "size-transposed", mask.path, note)
        else:
            findings.file("size-mismatch", mask.path, note)
    elif turned and image.orientation != 1 and (image.orientation not in _SIDEWAYS or image.size[0] == image.size[1]):
        findings.file("exif-ambiguous", image.path, f"orientation {image.orientation}, mask {mask.orientation}")
    elif turned and mask.orientation != 1 and (mask.orientation not in _SIDEWAYS or image.size[0] == image.size[1]):
        findings.file("exif-ambiguous", mask.path, f"orientation {mask.orientation}, image {image.orientation}")
    elif image.orientation != 1:
        findings.file("exif-turned", image.path)


def check_image(one: Seen, findings: Findings) -> None:
    """Size, values and kind of pixels of an image that can be read."""
    facts, look = one.image, one.look
    assert facts.size is not None
    height, width = facts.size
    if min(height, width) < _SMALL_SIDE:
        findings.file("small-image", facts.path, _shown(facts.size))
    elif max(height, width) > _LONG * min(height, width):
        findings.file("aspect-extreme", facts.path, _shown(facts.size))
    if look is not None and look.bright <= 2 and look.high <= 16:
        findings.file("black-image", facts.path)
    elif look is not None and look.low == look.high:
        findings.file("constant-image", facts.path, f"value {look.low}")
    if facts.mode == "CMYK":
        findings.file("image-cmyk", facts.path)
    elif facts.mode.startswith("I"):
        findings.file("image-16-bit", facts.path)
    elif facts.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        findings.file("image-alpha", facts.path)
    elif facts.mode == "P":
        findings.file("image-palette", facts.path)


def _check_mask_kind(facts: Facts, findings: Findings) -> None:
    if facts.mode == "P":
        findings.file("mask-palette", facts.path)
    elif facts.mode.startswith("I"):
        findings.file("mask-16-bit", facts.path)
    elif facts.mode == "1":
        findings.file("mask-1-bit", facts.path)
    elif facts.mode in ("RGB", "RGBA"):
        findings.file("mask-rgb", facts.path)


def check_together(images: Sequence[Facts], findings: Findings) -> None:
    """What all images have in common: sizes and colour."""
    sizes = Counter(facts.size for facts in images if facts.size)
    if len(sizes) > 1:
        usual, number = sizes.most_common(1)[0]
        areas = sorted(sizes, key=lambda size: size[0] * size[1])
        findings.whole(
            "sizes-mixed",
            f"{len(sizes)} sizes (width x height) from {_shown(areas[0])} to {_shown(areas[-1])}, "
            f"most often {_shown(usual)} ({number} of {len(images)})",
        )
    grey = [facts for facts in images if facts.grey and PHANTOM not in facts.path.parts[:1]]
    if grey and len(grey) < len(images):
        for facts in grey:
            findings.file("channels-mixed", facts.path)
    elif grey:
        findings.whole("channels-grey", f"all {len(grey)}")


def _shown(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"
