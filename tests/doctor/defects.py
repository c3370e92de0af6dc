"""Every defect that doctor knows, planted one at a time into a clean data set.

A function here spoils a folder of `images/` and `masks/` (PNG, 64 x 80, phantom_0000 to phantom_0015) and returns the
files that doctor must name, as paths below the folder; an empty list where the finding is about the data set.
"""

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

Plant = Callable[[Path], list[str]]


@dataclass(frozen=True)
class Defect:
    """A planted defect.

    Args:
        name: Its name.
        code: The code of the finding.
        plant: Spoils a folder.
        recipe: Keys of a recipe to examine the folder with; None to examine the folder alone.
        also: Codes of further errors that it brings.
    """

    name: str
    code: str
    plant: Plant
    recipe: tuple[str, ...] | None = None
    also: tuple[str, ...] = ()


DEFECTS: list[Defect] = []
CASE = "phantom_0003"
OTHER = "phantom_0006"
IMAGE, MASK = f"images/{CASE}.png", f"masks/{CASE}.png"


def defect(code: str, *also: str, recipe: tuple[str, ...] | None = None) -> Callable[[Plant], Plant]:
    """Enter a function into `DEFECTS`."""

    def enter(plant: Plant) -> Plant:
        DEFECTS.append(Defect(plant.__name__, code, plant, recipe, also))
        return plant

    return enter


def array(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def save(path: Path, pixels: np.ndarray, **options: object) -> None:
    Image.fromarray(pixels).save(path, **options)


def every(folder: Path, part: str) -> list[Path]:
    return sorted((folder / part).iterdir())


def oriented(path: Path, pixels: np.ndarray, orientation: int, **options: object) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(path, pixels, exif=exif, **options)


def jpeg(folder: Path, quality: int = 95) -> Path:
    """Replace the image by a JPEG."""
    path = folder / f"images/{CASE}.jpg"
    save(path, array(folder / IMAGE), quality=quality)
    (folder / IMAGE).unlink()
    return path


# names and partners


@defect("missing-mask")
def mask_is_missing(folder):
    (folder / MASK).unlink()
    return [IMAGE]


@defect("missing-image")
def image_is_missing(folder):
    (folder / IMAGE).unlink()
    return [MASK]


@defect("missing-mask", "missing-image")
def names_differ_by_case(folder):
    (folder / MASK).rename(folder / f"masks/{CASE.upper()}.png")
    return [IMAGE]


@defect("no-cases", "missing-mask", "missing-image")
def no_names_agree(folder):
    for path in every(folder, "masks"):
        path.rename(path.with_name(f"x{path.name}"))
    return []


@defect("duplicate-stem")
def two_images_of_one_stem(folder):
    save(folder / f"images/{CASE}.jpg", array(folder / IMAGE))
    return [IMAGE]


@defect("name-case-twins")
def names_equal_but_for_case(folder):
    for part, turn in (("images", 1), ("masks", 1)):
        save(folder / part / f"{CASE.upper()}.png", np.rot90(array(folder / part / f"{OTHER}.png"), turn))
    return [f"images/{CASE.upper()}.png", f"masks/{CASE.upper()}.png"]


@defect("broken-link", "missing-image")
def link_to_nothing(folder):
    (folder / IMAGE).unlink()
    (folder / IMAGE).symlink_to("/nowhere/at/all.png")
    return [IMAGE]


@defect("folder-like-image", "missing-image")
def folder_named_as_an_image(folder):
    (folder / IMAGE).unlink()
    (folder / IMAGE).mkdir()
    return [IMAGE]


def _rename(folder: Path, stem: str) -> list[str]:
    for part in ("images", "masks"):
        (folder / part / f"{CASE}.png").rename(folder / part / f"{stem}.png")
    return [f"images/{stem}.png", f"masks/{stem}.png"]


@defect("name-control-character")
def bell_in_a_name(folder):
    _rename(folder, "a\x07b")
    return ["images/a\\x07b.png", "masks/a\\x07b.png"]


@defect("name-blank-edge")
def blank_at_the_end_of_a_name(folder):
    return _rename(folder, "last ")


@defect("name-whitespace")
def blank_in_a_name(folder):
    return _rename(folder, "my image")


@defect("name-not-ascii")
def umlaut_in_a_name(folder):
    return _rename(folder, "darm_grün")


@defect("name-too-long")
def name_of_240_letters(folder):
    return _rename(folder, "n" * 240)


@defect("name-not-utf8")
def name_of_bytes_that_are_no_text(folder):
    _rename(folder, "b\udcff")
    return ["images/b\\udcff.png", "masks/b\\udcff.png"]


@defect("hidden-files")
def hidden_files(folder):
    names = [".DS_Store", "._a.png", "Thumbs.db"]
    for name in names:
        (folder / "images" / name).write_bytes(b"x")
    (folder / "masks/__MACOSX").mkdir()
    return [*(f"images/{name}" for name in names), "masks/__MACOSX"]


@defect("other-files")
def notes_among_the_images(folder):
    (folder / "images/notes.txt").write_text("remember")
    return ["images/notes.txt"]


@defect("subfolders")
def folder_among_the_images(folder):
    (folder / "images/more").mkdir()
    return ["images/more"]


@defect("format-unread")
def image_in_a_format_that_is_not_read(folder):
    Image.fromarray(array(folder / IMAGE)).save(folder / "images/extra.webp")
    return ["images/extra.webp"]


# damage


@defect("empty-file")
def zero_bytes(folder):
    (folder / IMAGE).write_bytes(b"")
    return [IMAGE]


@defect("truncated-file")
def half_a_png(folder):
    data = (folder / IMAGE).read_bytes()
    (folder / IMAGE).write_bytes(data[: len(data) // 2])
    return [IMAGE]


@defect("truncated-file")
def half_a_jpeg(folder):
    path = jpeg(folder)
    path.write_bytes(path.read_bytes()[:-900])
    return [f"images/{CASE}.jpg"]


@defect("corrupt-checksum")
def one_bit_of_a_png(folder):
    data = bytearray((folder / MASK).read_bytes())
    data[-14] ^= 1  # the checksum of the pixels, before the 12 bytes of IEND
    (folder / MASK).write_bytes(data)
    return [MASK]


@defect("damaged-file")
def bmp_of_an_unknown_compression(folder):
    path = folder / f"images/{CASE}.bmp"
    save(path, array(folder / IMAGE))
    (folder / IMAGE).unlink()
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, 30, 77)
    path.write_bytes(data)
    return [f"images/{CASE}.bmp"]


@defect("not-an-image")
def text_with_the_name_of_an_image(folder):
    (folder / IMAGE).write_text("Not found\n" * 30)
    return [IMAGE]


@defect("not-an-image")
def web_page_instead_of_a_mask(folder):
    (folder / MASK).write_text("<html><body>404</body></html>")
    return [MASK]


@defect("image-too-large")
def bomb(folder):
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    (folder / IMAGE).write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return [IMAGE]


@defect("several-pictures")
def tiff_of_two_pages(folder):
    (folder / IMAGE).unlink()
    page = Image.fromarray(array(folder / f"images/{OTHER}.png"))
    page.save(folder / f"images/{CASE}.tif", save_all=True, append_images=[page])
    return [f"images/{CASE}.tif"]


@defect("several-pictures")
def animated_png(folder):
    picture = Image.fromarray(array(folder / IMAGE))
    picture.save(folder / IMAGE, save_all=True, append_images=[picture.rotate(90)])
    return [IMAGE]


@defect("decoder-warning")
def tiff_with_a_broken_tag(folder):
    picture = Image.fromarray(array(folder / IMAGE))
    (folder / IMAGE).unlink()
    path = folder / f"images/{CASE}.tif"
    picture.save(path, tiffinfo={270: "a description of some length"})
    data = bytearray(path.read_bytes())
    (directory,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, directory)
    for index in range(entries):
        entry = directory + 2 + 12 * index
        if struct.unpack_from("<H", data, entry)[0] == 270:
            struct.pack_into("<I", data, entry + 4, 10**6)  # the text would reach beyond the end of the file
    path.write_bytes(data)
    return [f"images/{CASE}.tif"]


@defect("wrong-suffix")
def png_called_jpg(folder):
    (folder / IMAGE).rename(folder / f"images/{CASE}.jpg")
    return [f"images/{CASE}.jpg"]


# kinds of pixels


@defect("image-16-bit")
def image_of_16_bits(folder):
    save(folder / IMAGE, array(folder / IMAGE)[..., 0].astype(np.uint16) * 257)
    return [IMAGE]


@defect("mask-16-bit")
def mask_of_16_bits(folder):
    save(folder / MASK, array(folder / MASK).astype(np.uint16))
    return [MASK]


def _tiff(folder: Path, part: str, pixels: np.ndarray) -> list[str]:
    (folder / part / f"{CASE}.png").unlink()
    save(folder / part / f"{CASE}.tif", pixels)
    return [f"{part}/{CASE}.tif"]


@defect("pixels-unsupported")
def image_of_floats(folder):
    return _tiff(folder, "images", array(folder / IMAGE)[..., 0].astype(np.float32))


@defect("pixels-unsupported")
def mask_of_floats(folder):
    return _tiff(folder, "masks", array(folder / MASK).astype(np.float32) / 255)


@defect("pixels-unsupported")
def image_of_32_bits(folder):
    return _tiff(folder, "images", array(folder / IMAGE)[..., 0].astype(np.int32) * 2**20)


@defect("mask-palette")
def mask_with_a_palette(folder):
    picture = Image.fromarray(array(folder / MASK))
    indexed = picture.convert("P")
    indexed.save(folder / MASK)
    return [MASK]


@defect("image-palette")
def image_with_a_palette(folder):
    Image.fromarray(array(folder / IMAGE)).quantize(64).save(folder / IMAGE)
    return [IMAGE]


@defect("image-alpha")
def image_with_alpha(folder):
    pixels = array(folder / IMAGE)
    save(folder / IMAGE, np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)]))
    return [IMAGE]


@defect("mask-alpha")
def mask_drawn_in_alpha(folder):
    pixels = array(folder / MASK)
    save(folder / MASK, np.dstack([np.zeros((*pixels.shape, 3), np.uint8), pixels]))
    return [MASK]


@defect("image-cmyk")
def image_in_cmyk(folder):
    picture = Image.fromarray(array(folder / IMAGE)).convert("CMYK")
    (folder / IMAGE).unlink()
    picture.save(folder / f"images/{CASE}.jpg")
    return [f"images/{CASE}.jpg"]


@defect("mask-colour")
def mask_in_red(folder):
    pixels = array(folder / MASK)
    save(folder / MASK, np.dstack([pixels, pixels * 0, pixels * 0]))
    return [MASK]


@defect("mask-unsupported")
def mask_in_cmyk(folder):
    picture = Image.fromarray(array(folder / MASK)).convert("CMYK")
    (folder / MASK).unlink()
    picture.save(folder / f"masks/{CASE}.tif")
    return [f"masks/{CASE}.tif"]


@defect("mask-rgb")
def mask_of_three_channels(folder):
    save(folder / MASK, np.dstack([array(folder / MASK)] * 3))
    return [MASK]


@defect("mask-1-bit")
def mask_of_one_bit(folder):
    Image.fromarray(array(folder / MASK)).convert("1").save(folder / MASK)
    return [MASK]


@defect("mask-jpeg")
def mask_as_jpeg(folder):
    save(folder / f"masks/{CASE}.jpg", array(folder / MASK), quality=60)
    (folder / MASK).unlink()
    return [f"masks/{CASE}.jpg"]


@defect("channels-mixed")
def one_grey_image(folder):
    save(folder / IMAGE, array(folder / IMAGE)[..., 1])
    return [IMAGE]


@defect("channels-grey")
def all_images_grey(folder):
    for path in every(folder, "images"):
        save(path, array(path)[..., 1])
    return []


# sizes and orientation


@defect("size-mismatch")
def mask_of_another_size(folder):
    save(folder / MASK, array(folder / MASK)[:-3])
    return [MASK]


@defect("size-transposed")
def mask_transposed(folder):
    save(folder / MASK, np.ascontiguousarray(array(folder / MASK).T))
    return [MASK]


@defect("exif-mismatch")
def image_turned_by_exif(folder):
    oriented(folder / IMAGE, array(folder / IMAGE), 6)
    return [MASK]


@defect("exif-ambiguous")
def image_upside_down_by_exif(folder):
    oriented(folder / IMAGE, array(folder / IMAGE), 3)
    return [IMAGE]


@defect("exif-turned")
def image_and_mask_turned_by_exif(folder):
    oriented(folder / IMAGE, array(folder / IMAGE), 6)
    oriented(folder / MASK, array(folder / MASK), 6)
    return [IMAGE]


@defect("sizes-mixed")
def one_larger_case(folder):
    for part in ("images", "masks"):
        path = folder / part / f"{CASE}.png"
        save(path, np.ascontiguousarray(np.pad(array(path), [(0, 9), (0, 4), (0, 0)][: array(path).ndim], mode="edge")))
    return []


def _cut(folder: Path, height: int, width: int) -> list[str]:
    rng = np.random.default_rng(0)
    save(folder / IMAGE, rng.integers(0, 255, (height, width, 3), np.uint8))
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2, width // 4 : width // 2] = 255
    save(folder / MASK, mask)
    return [IMAGE]


@defect("aspect-extreme")
def panorama(folder):
    return _cut(folder, 40, 400)


@defect("small-image")
def thumbnail(folder):
    return _cut(folder, 20, 24)


# values of masks


@defect("values-outside-labels", recipe=("--data.labels", "{background: 0, tool: 200, polyp: 255}"))
def value_that_no_label_names(folder):
    pixels = array(folder / MASK)
    pixels[:5, :7] = 100
    save(folder / MASK, pixels)
    return [MASK]


@defect("mask-zero-one", recipe=())
def mask_of_zero_and_one(folder):
    save(folder / MASK, array(folder / MASK) // 255)
    return [MASK]


@defect("mixed-mask-values")
def some_masks_of_zero_and_one(folder):
    save(folder / MASK, array(folder / MASK) // 255)
    return [MASK]


@defect("masks-look-black")
def all_masks_of_zero_and_one(folder):
    for path in every(folder, "masks"):
        save(path, array(path) // 255)
    return []


@defect("mask-soft-edges")
def blurred_mask(folder):
    save(folder / MASK, cv2.GaussianBlur(array(folder / MASK), (0, 0), 2))
    return [MASK]


@defect("mask-no-labels")
def photographs_as_masks(folder):
    for path in every(folder, "masks"):
        save(path, array(folder / "images" / path.name)[..., 1])
    return [f"masks/{path.name}" for path in every(folder, "masks")]


@defect("mask-inverted")
def one_mask_inverted(folder):
    save(folder / MASK, 255 - array(folder / MASK))
    return [MASK]


@defect("masks-inverted")
def all_masks_inverted(folder):
    for path in every(folder, "masks"):
        save(path, 255 - array(path))
    return []


@defect("mask-empty")
def one_mask_empty(folder):
    save(folder / MASK, array(folder / MASK) * 0)
    return ["masks/phantom_0000.png", MASK]  # the first shows nothing to find as it is


@defect("masks-mostly-empty")
def most_masks_empty(folder):
    for path in every(folder, "masks")[:-5]:
        save(path, array(path) * 0)
    return []


@defect("all-masks-empty")
def all_masks_empty(folder):
    for path in every(folder, "masks"):
        save(path, array(path) * 0)
    return []


@defect("all-masks-empty", recipe=())
def all_masks_empty_for_a_recipe(folder):
    return all_masks_empty(folder)


@defect("mask-full")
def mask_all_foreground(folder):
    save(folder / MASK, array(folder / MASK) | 255)
    return [MASK]


@defect("tiny-foreground")
def slip_of_the_hand(folder):
    pixels = array(folder / MASK) * 0
    pixels[30:32, 40:42] = 255
    save(folder / MASK, pixels)
    return [MASK]


@defect("vanishing-foreground", recipe=("--data.size", "[16, 20]"))
def thin_object(folder):
    pixels = array(folder / MASK) * 0
    pixels[32, 5:60] = 255
    save(folder / MASK, pixels)
    return [MASK]


@defect("label-never-present", recipe=("--data.labels", "{background: 0, polyp: 255, tool: 7}"))
def label_that_no_mask_holds(folder):
    return []


# pictures


@defect("constant-image")
def image_of_one_value(folder):
    save(folder / IMAGE, array(folder / IMAGE) * 0 + 90)
    return [IMAGE]


@defect("black-image")
def black_image(folder):
    save(folder / IMAGE, array(folder / IMAGE) * 0)
    return [IMAGE]


@defect("image-is-mask")
def mask_copied_among_the_images(folder):
    (folder / IMAGE).write_bytes((folder / MASK).read_bytes())
    return [IMAGE]


@defect("image-is-mask")
def mask_among_the_images_as_jpeg(folder):
    save(folder / f"images/{CASE}.jpg", array(folder / MASK), quality=90)
    (folder / IMAGE).unlink()
    return [f"images/{CASE}.jpg"]


@defect("folders-swapped", "mask-colour")
def folders_swapped(folder):
    (folder / "images").rename(folder / "x")
    (folder / "masks").rename(folder / "images")
    (folder / "x").rename(folder / "masks")
    return []


@defect("duplicate-image")
def same_image_twice(folder):
    (folder / IMAGE).write_bytes((folder / f"images/{OTHER}.png").read_bytes())
    (folder / MASK).write_bytes((folder / f"masks/{OTHER}.png").read_bytes())
    return [IMAGE]


@defect("same-image-different-masks")
def same_image_with_another_mask(folder):
    (folder / IMAGE).write_bytes((folder / f"images/{OTHER}.png").read_bytes())
    return [MASK]


@defect("mask-repeated")
def same_mask_for_another_image(folder):
    save(folder / MASK, array(folder / f"masks/{OTHER}.png"), compress_level=1)
    return [MASK]


@defect("near-duplicate-image")
def same_image_as_jpeg(folder):
    save(folder / f"images/{CASE}.jpg", array(folder / f"images/{OTHER}.png"), quality=50)
    (folder / IMAGE).unlink()
    return [f"images/{CASE}.jpg"]


@defect("near-duplicate-image")
def same_image_at_another_size(folder):
    for part, how in (("images", cv2.INTER_CUBIC), ("masks", cv2.INTER_NEAREST)):
        pixels = array(folder / part / f"{OTHER}.png")
        save(folder / part / f"{CASE}.png", cv2.resize(pixels, (120, 96), interpolation=how))
    return [IMAGE]


@defect("mirrored-image")
def same_image_mirrored(folder):
    for part in ("images", "masks"):
        save(folder / part / f"{CASE}.png", np.ascontiguousarray(array(folder / part / f"{OTHER}.png")[:, ::-1]))
    return [IMAGE]


@defect("mirrored-image")
def same_image_turned_by_90_degrees(folder):
    for part in ("images", "masks"):
        save(folder / part / f"{CASE}.png", np.rot90(array(folder / part / f"{OTHER}.png")).copy())
    return [IMAGE]


def film(folder: Path) -> None:
    """Two videos: a camera that moves over a scene, cut to another scene half-way."""
    rng = np.random.default_rng(1)
    for part in ("images", "masks"):
        for path in every(folder, part):
            path.unlink()
    for scene in range(2):
        tint = np.array([[200, 90, 70], [90, 160, 60]][scene], np.float32)
        wide = cv2.resize(rng.random((14, 40), np.float32), (220, 90), interpolation=cv2.INTER_CUBIC)
        for frame in range(12):
            view = wide[frame // 2 : frame // 2 + 64, frame : frame + 80, None] * tint
            noise = rng.normal(0, 3, view.shape)
            save(folder / f"images/{scene * 12 + frame + 1}.png", np.clip(view + noise, 0, 255).astype(np.uint8))
            mask = np.zeros((64, 80), np.uint8)
            mask[20:40, 30 - frame : 50 - frame] = 255
            save(folder / f"masks/{scene * 12 + frame + 1}.png", mask)


@defect("video-frames")
def two_videos(folder):
    film(folder)
    return []


# groups and splits


@defect("group-across-parts", recipe=("--data.split.files", "SPLITS", "--data.split.group_by", "^phantom_(.{3})"))
def group_in_two_parts(folder):
    return _splits(folder, lambda i: "val" if i % 4 == 0 else "train")


def _splits(folder: Path, choose: Callable[[int], str], more: dict[str, list[str]] | None = None) -> list[str]:
    content: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for index, path in enumerate(every(folder, "images")):
        content[choose(index)].append(path.stem)
    for part, names in (more or {}).items():
        content[part] += names
    (folder / "splits.json").write_text(json.dumps(content))
    return []


@defect("split-file", recipe=("--data.split.files", "SPLITS"))
def split_file_names_a_case_that_is_not_there(folder):
    return _splits(folder, lambda i: "val" if i > 10 else "train", {"train": ["nobody"]})


@defect("split-file", recipe=("--data.split.files", "SPLITS"))
def split_file_without_validation(folder):
    return _splits(folder, lambda i: "train")


@defect("split-file", recipe=("--data.split.files", "SPLITS"))
def split_file_that_is_not_there(folder):
    return []


@defect("split-failed", recipe=("--data.split.folds", "5", "--data.split.group_by", "^phantom_(.{3})"))
def fewer_groups_than_folds(folder):
    return []


@defect("group-by-failed", recipe=("--data.split.group_by", "^(patient[0-9]+)_"))
def expression_that_matches_nothing(folder):
    return []


@defect("duplicate-across-parts", recipe=("--data.split.files", "SPLITS"))
def same_image_in_training_and_validation(folder):
    _splits(folder, lambda i: "val" if every(folder, "images")[i].stem == OTHER else "train")
    same_image_twice(folder)
    return [IMAGE]


@defect("near-duplicate-across-parts", recipe=("--data.split.files", "SPLITS"))
def nearly_the_same_image_in_training_and_validation(folder):
    _splits(folder, lambda i: "val" if every(folder, "images")[i].stem == OTHER else "train")
    return same_image_as_jpeg(folder)


@defect("video-across-parts", recipe=())
def video_in_training_and_validation(folder):
    film(folder)
    return ["images/1.png", "images/13.png"]  # the first frame of each


@defect("groups-unused")
def patients_in_the_names(folder):
    for part in ("images", "masks"):
        for index, path in enumerate(every(folder, part)):
            path.rename(path.with_name(f"patient{index // 4}_{index % 4}.png"))
    return []


@defect("groups-unused", recipe=())
def patients_in_the_names_torn_by_a_split(folder):
    return patients_in_the_names(folder)


@defect("label-missing-in-part", recipe=("--data.split.files", "SPLITS"))
def label_in_training_alone(folder):
    _splits(folder, lambda i: "val" if i < 5 else "train")
    for path in every(folder, "masks")[:5]:
        save(path, array(path) * 0)
    return []


@defect("few-cases", recipe=("--data.batch_size", "64"))
def batch_larger_than_the_data(folder):
    return []


@defect("few-validation-cases", recipe=())
def one_validation_case(folder):
    for part in ("images", "masks"):
        for path in every(folder, part)[8:]:
            path.unlink()
    return []


@defect("image-enlarged", recipe=("--data.size", "[352, 440]"))
def size_far_above_the_images(folder):
    return [f"images/{path.name}" for path in every(folder, "images")]


@defect("aspect-distorted", recipe=("--data.size", "[32, 160]"))
def size_of_another_shape(folder):
    return [f"images/{path.name}" for path in every(folder, "images")]
