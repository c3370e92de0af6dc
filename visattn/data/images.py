"""Image and mask files in, arrays out, and the preprocessing that training, validation and `predict` share.

Files are read with Pillow, which unlike OpenCV refuses a truncated JPEG. The orientation that a camera notes in EXIF
is applied to images and masks alike.
"""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from visattn.data.slices import Slices
from visattn.errors import UserError
from visattn.files import open_regular

if TYPE_CHECKING:
    import torch  # takes seconds, and whoever only reads files needs none of it

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
"""Endings, in lower case, of the files that are taken for images."""

MAX_PIXELS = 2**26
"""Larger images are refused from their header: 8192 x 8192, some 200 MB as RGB."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
_ORIENTATION = 0x0112  # the EXIF tag
_DEPTH_LOST = "visattn: 16-bit colour was read with 8 bits"  # key in Image.info
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_JPEG_NOISE = 24  # largest difference between the channels of a grey JPEG that was saved in colour


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the network sees it; it rides in the checkpoint.

    Args:
        size: Height and width in pixels that the image is resized to.
        mean: Per channel, subtracted after scaling to 0..1.
        std: Per channel, divided by.
        channels: 1 (grey) or 3 (RGB).
        slices: How a volume is cut into images; None: not at all.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    channels: Literal[1, 3] = 3
    slices: Slices | None = None

    rank: ClassVar[int] = 2

    @property
    def in_channels(self) -> int:
        """Number of channels, as for volumes."""
        return self.channels

    def to_config(self) -> dict[str, Any]:
        """Plain Python that `from_config` reads back."""
        config = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        del config["slices"]
        return config | ({} if self.slices is None else {"slices": self.slices.to_config()})

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Preprocessing":
        """The inverse of `to_config`."""
        height, width = config["size"]
        slices = Slices.from_config(config.get("slices"))
        return cls((int(height), int(width)), tuple(config["mean"]), tuple(config["std"]), config["channels"], slices)


def read_image(path: Path | str, channels: Literal[1, 3] = 3) -> NDArray[np.uint8]:
    """Read an image as (H, W, channels).

    Grey becomes RGB by repetition and RGB grey by luminance (ITU-R 601); alpha is dropped; CMYK and palettes are
    converted; 16 bits are scaled by 255 / 65535.

    Raises:
        UserError: The file is missing, no image, damaged, too large, animated, or holds floating-point numbers.
    """
    with _opened(path) as image:
        mode = image.mode
        if mode in ("I", "I;16", "I;16B", "I;16L"):
            wide = np.asarray(image).astype(np.int64)
            if wide.size and (wide.min() < 0 or wide.max() > 65535):
                raise UserError(
                    f"{path}: 32-bit pixels run from {wide.min()} to {wide.max()}; save it with 8 or 16 bits"
                )
            image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
        elif mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr"):
            raise UserError(f"{path}: pixels of kind '{mode}' are not supported; save it as 8- or 16-bit grey or RGB")
        array = np.array(_without_alpha(image).convert("L" if channels == 1 else "RGB"))
    return array[..., None] if channels == 1 else array


def read_mask(path: Path | str) -> NDArray[np.int32]:
    """Read the label values (H, W) as they stand in the file.

    1-bit masks hold 0 and 255. A palette of greys gives its greys, any other palette its indices. Colour is taken
    only if the three channels agree (up to compression noise in a JPEG). 16 bits are kept.

    Raises:
        UserError: As `read_image`, and if the colours of the mask cannot be told apart from label values.
    """
    with _opened(path) as image:
        if image.info.get(_DEPTH_LOST):
            raise UserError(
                f"{path}: masks in 16-bit colour are not supported; save the labels as 8- or 16-bit grey PNG"
            )
        if image.mode == "P":
            palette = np.array(image.getpalette("RGB") or [], np.int32).reshape(-1, 3)
            indices = np.asarray(image)
            grey = len(palette) > indices.max(initial=0) and (palette == palette[:, :1]).all()
            return palette[:, 0][indices] if grey else indices.astype(np.int32)
        if image.mode == "1":
            return np.asarray(image).astype(np.int32) * 255
        if image.mode in ("L", "LA", "I", "I;16", "I;16B", "I;16L"):
            array = np.asarray(image).astype(np.int32)
            return array[..., 0] if image.mode == "LA" else array
        if image.mode not in ("RGB", "RGBA"):
            raise UserError(
                f"{path}: masks of kind '{image.mode}' are not supported; save the labels as 8-bit grey PNG"
            )
        array = np.asarray(image)
        lossy = image.format in ("JPEG", "MPO")
    # Channel by channel: NumPy is slow along an axis of three.
    red, green, blue = array[..., 0], array[..., 1], array[..., 2]
    low, high = np.minimum(red, green), np.maximum(red, green)
    spread = int((np.maximum(high, blue) - np.minimum(low, blue)).max(initial=0))
    if spread > (_JPEG_NOISE if lossy else 0):
        raise UserError(
            f"{path}: the mask is in colour (channels differ by up to {spread}), so its values are no labels; "
            "save it with one channel of label values"
        )
    if array.shape[-1] == 4 and np.ptp(array[..., 3]) and not np.ptp(array[..., :3]):
        raise UserError(f"{path}: the mask is drawn in the alpha channel; save it with one channel of label values")
    median: NDArray[np.int32] = np.maximum(low, np.minimum(high, blue)).astype(np.int32)
    return median


def resize_image(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize (H, W, C) to `size` (height, width): pixel areas are averaged when shrinking, else bilinear."""
    height, width = image.shape[:2]
    if (height, width) == tuple(size):
        return image
    shrinking = size[0] <= height and size[1] <= width
    resized = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)
    return np.asarray(resized, np.uint8).reshape(*size, image.shape[2])


def resize_mask(mask: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize class indices (H, W) to `size` (height, width), each pixel taking its nearest neighbour."""
    if mask.shape == tuple(size):
        return mask
    # NEAREST_EXACT samples at pixel centres as the image does; plain NEAREST is shifted by up to half a pixel.
    return np.asarray(cv2.resize(mask, (size[1], size[0]), interpolation=cv2.INTER_NEAREST_EXACT), np.uint8)


def normalise(
    image: NDArray[np.uint8], preprocessing: Preprocessing, out: "torch.Tensor | None" = None
) -> "torch.Tensor":
    """Pixels (H, W, C) of 0..255 to a float32 tensor (C, H, W): scaled to 0..1, minus mean, over std.

    Args:
        image: The pixels.
        preprocessing: Says mean and std.
        out: Where to put the result, such as a place in a batch; by default a new tensor.
    """
    import torch

    std = torch.tensor(preprocessing.std)
    scale = (1.0 / (255.0 * std)).view(-1, 1, 1)
    shift = (-torch.tensor(preprocessing.mean) / std).view(-1, 1, 1)
    out = torch.empty(image.shape[2], *image.shape[:2]) if out is None else out
    return out.copy_(torch.from_numpy(image).permute(2, 0, 1)).mul_(scale).add_(shift)


def prepare(image: NDArray[np.uint8], preprocessing: Preprocessing) -> "torch.Tensor":
    """Resize and normalise (H, W, C) to a tensor (C, h, w)."""
    return normalise(resize_image(image, preprocessing.size), preprocessing)


def image_size(path: Path | str) -> tuple[int, int]:
    """Height and width as `read_image` would return them, from the header alone (the pixels are not decoded).

    Raises:
        UserError: As `read_image`, as far as the header tells.
    """
    with _opened(path, load=False) as image:
        width, height = image.size
        # For TIFF Pillow turns by itself, and has swapped the sizes already.
        turned = image.format != "TIFF" and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


@contextmanager
def _opened(path: Path | str, load: bool = True) -> Iterator[Image.Image]:
    """The image upright and decoded; whatever Pillow or the file system says becomes a `UserError` naming the file."""
    path = Path(path)
    try:
        # Given a path, Pillow maps a raw TIFF into memory and, where EXIF swaps its sides, scrambles it (13.0).
        with open_regular(path) as handle, Image.open(handle, formats=_FORMATS) as image:
            _check_header(path, image)
            if load:
                if image.format == "PNG":
                    _check_png(path)
                tiles = image.tile if isinstance(image, ImageFile.ImageFile) else []
                deep = any("16" in str(tile.args) for tile in tiles)
                image.load()
                image.info[_DEPTH_LOST] = deep and not image.mode.startswith("I")
                yield _upright(image)
            else:
                yield image
    except (UserError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(
            f"{path}: the header announces more than {MAX_PIXELS} pixels; the file is damaged or a trap"
        ) from None
    except UnidentifiedImageError:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty (0 bytes)") from None
        raise UserError(f"{path}: not a PNG, JPEG, BMP or TIFF image, whatever its name says") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except PermissionError:
        raise UserError(f"{path}: cannot be read (permission denied)") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error ...
        reason = (isinstance(error, OSError) and error.strerror) or str(error)[:120] or type(error).__name__
        raise UserError(f"{path}: damaged or unreadable image ({reason})") from None


def _check_header(path: Path, image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UserError(f"{path}: {width} x {height} pixels are more than the limit of {MAX_PIXELS}")
    # MPO is what phones write: a JPEG followed by a preview of itself. The first picture is the photograph.
    # Not n_frames: counting the pages of a TIFF takes time with the square of their number.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise UserError(f"{path}: holds several pictures (animation or pages); save the one you mean")


def _check_png(path: Path) -> None:
    """Compare each chunk's checksum, which Pillow skips for the pixels."""
    data = memoryview(path.read_bytes())
    position = 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            raise UserError(f"{path}: the PNG file is truncated")
        if zlib.crc32(data[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise UserError(f"{path}: the PNG file is corrupt (wrong checksum)")
        if bytes(data[position + 4 : position + 8]) == b"IEND":
            return
        position = end + 4
    raise UserError(f"{path}: the PNG file is truncated")


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.format = image.format
    return turned


def _without_alpha(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "RGBX"):
        return Image.merge("RGB", image.split()[:3])
    image.info.pop("transparency", None)  # of a palette; Pillow warns that `convert` drops it
    return image.getchannel("L") if image.mode == "LA" else image
