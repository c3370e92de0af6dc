import contextlib
import struct
import zlib

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from visattn.data.images import (
    Preprocessing,
    image_size,
    normalise,
    prepare,
    read_image,
    read_mask,
    resize_image,
    resize_mask,
)
from visattn.errors import UserError

RNG = np.random.default_rng(0)
PICTURE = cv2.GaussianBlur(RNG.integers(0, 256, (31, 47, 3), dtype=np.uint8), (0, 0), 3)
MASK = np.zeros((31, 47), np.uint8)
MASK[4:20, 7:40] = 255
EXIF_UPRIGHT = {  # what a reader must do to the stored array, written down from the EXIF standard
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: np.rot90(a),
}


def save(path, array, **keywords):
    Image.fromarray(array).save(path, **keywords)
    return path


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_orientation_of_image_and_mask(tmp_path, orientation, suffix):
    image = save(tmp_path / f"image{suffix}", PICTURE, exif=exif(orientation))
    mask = save(tmp_path / f"mask{suffix}", MASK, exif=exif(orientation))
    upright = EXIF_UPRIGHT[orientation]
    assert (read_image(image) == upright(PICTURE)).all()
    assert (read_mask(mask) == upright(MASK)).all()
    assert image_size(image) == upright(MASK).shape


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_a_jpeg_is_that_of_opencv(tmp_path, orientation):
    path = save(tmp_path / "image.jpg", PICTURE, exif=exif(orientation), quality=95)
    theirs = cv2.imread(str(path))[..., ::-1]
    assert np.abs(read_image(path).astype(int) - theirs).max() <= 2


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_senseless_orientation_is_ignored(tmp_path, orientation):
    assert (read_image(save(tmp_path / "image.png", PICTURE, exif=exif(orientation))) == PICTURE).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_every_mode_becomes_grey_or_rgb(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    source = Image.fromarray(PICTURE)
    if mode == "I;16":
        grey = np.asarray(source.convert("L"))
        source, mode = Image.fromarray(grey.astype(np.uint16) * 257), "L"
    else:
        source = source.convert(mode)
    source.save(path)
    expected = np.asarray(Image.fromarray(PICTURE).convert(mode).convert("RGB"))
    assert np.abs(read_image(path, 3).astype(int) - expected).max() <= (1 if mode == "CMYK" else 0)
    grey = np.asarray(Image.fromarray(expected).convert("L"))[..., None]
    assert np.abs(read_image(path, 1).astype(int) - grey).max() <= 1


def test_alpha_is_dropped_not_blended(tmp_path):
    transparent = np.dstack([PICTURE, np.zeros(PICTURE.shape[:2], np.uint8)])
    assert (read_image(save(tmp_path / "image.png", transparent)) == PICTURE).all()


def test_transparent_palette_reads_as_its_colours(tmp_path):
    picture = Image.fromarray(PICTURE).quantize(8)
    expected = np.asarray(picture.convert("RGB"))
    picture.save(tmp_path / "image.png", transparency=bytes([0, 255, 100]))
    assert (read_image(tmp_path / "image.png") == expected).all()


def test_16_bit_image_is_scaled_and_16_bit_mask_is_not(tmp_path):
    wide = np.array([[0, 128, 129, 257, 1000, 65535]], np.uint16)
    path = save(tmp_path / "wide.png", wide)
    assert read_image(path, 1)[..., 0].tolist() == [[0, 0, 1, 1, 4, 255]]
    assert read_mask(path).tolist() == wide.tolist()


def test_16_bit_colour_mask_is_refused(tmp_path):
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((4, 4, 3), 300, np.uint16))
    with pytest.raises(UserError, match=r"deep\.png"):
        read_mask(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").shape == (4, 4, 3)


def test_one_bit_mask_holds_0_and_255(tmp_path):
    Image.fromarray(MASK).convert("1").save(tmp_path / "mask.png")
    assert (read_mask(tmp_path / "mask.png") == MASK).all()


def palette_mask(path, palette, indices):
    image = Image.fromarray(np.array(indices, np.uint8), "P")
    image.putpalette(np.array(palette, np.uint8).ravel().tolist())
    image.save(path)
    return path


@pytest.mark.filterwarnings("ignore:'mode' parameter:DeprecationWarning")
def test_palette_mask_gives_greys_or_indices(tmp_path):
    grey = palette_mask(tmp_path / "grey.png", [[0] * 3, [255] * 3], [[0, 1, 1]])
    assert read_mask(grey).tolist() == [[0, 255, 255]]
    colours = palette_mask(tmp_path / "voc.png", [[0, 0, 0], [128, 0, 0], [128, 128, 128]], [[0, 1, 2]])
    assert read_mask(colours).tolist() == [[0, 1, 2]]


def test_grey_jpeg_in_colour_is_a_mask_and_colours_are_not(tmp_path):
    path = save(tmp_path / "mask.jpg", np.dstack([MASK] * 3), quality=75)
    assert np.abs(read_mask(path) - MASK).max() < 80
    for suffix, colour in ((".png", [1, 0, 0]), (".jpg", [200, 0, 0])):
        path = save(tmp_path / f"colour{suffix}", np.full((16, 16, 3), colour, np.uint8))
        with pytest.raises(UserError, match=r"colour.*is in colour"):
            read_mask(path)


def test_mask_drawn_in_alpha_is_refused(tmp_path):
    path = save(tmp_path / "mask.png", np.dstack([np.zeros((*MASK.shape, 3), np.uint8), MASK]))
    with pytest.raises(UserError, match="alpha"):
        read_mask(path)
    opaque = save(tmp_path / "opaque.png", np.dstack([MASK, MASK, MASK, np.full_like(MASK, 255)]))
    assert (read_mask(opaque) == MASK).all()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp"])
def test_truncated_files_are_refused(tmp_path, suffix):
    whole = save(tmp_path / f"whole{suffix}", PICTURE).read_bytes()
    path = tmp_path / f"cut{suffix}"
    # A BMP ends with up to three bytes that pad its last row.
    for length in [1, 10, len(whole) // 2, len(whole) - 50, len(whole) - (4 if suffix == ".bmp" else 3)]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=f"cut{suffix}"):
            read_image(path)
        with pytest.raises(UserError, match=f"cut{suffix}"):
            read_mask(path)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_png_is_refused_wherever_the_damage(tmp_path, data):
    whole = bytearray(save(tmp_path / "whole.png", PICTURE).read_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    (tmp_path / "damaged.png").write_bytes(whole)
    with pytest.raises(UserError, match=r"damaged\.png"):
        read_image(tmp_path / "damaged.png")


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_jpeg_or_tiff_is_read_or_refused_but_never_a_crash(tmp_path, data):
    suffix = data.draw(st.sampled_from([".jpg", ".tif", ".bmp"]))
    whole = bytearray(save(tmp_path / f"whole{suffix}", PICTURE).read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        whole[data.draw(st.integers(0, min(len(whole), 700) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(whole)
    for read in (read_image, read_mask, image_size):
        with contextlib.suppress(UserError):
            read(path)


def bomb(width, height):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"x")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9000, 10000, 60000, 2**31 - 1])
def test_huge_header_is_refused_before_decoding(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(side, side))
    for read in (read_image, read_mask, image_size):
        with pytest.raises(UserError, match=r"bomb\.png.*pixels"):
            read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"not a picture\n" * 20, "not a PNG"), (b"GIF89a" + b"\0" * 40, "not a PNG"), (None, "no such")],
)
def test_files_that_are_no_images(tmp_path, content, message):
    path = tmp_path / "image.png"
    if content is not None:
        path.write_bytes(content)
    for read in (read_image, read_mask, image_size):
        with pytest.raises(UserError, match=rf"image\.png.*{message}"):
            read(path)
    with pytest.raises(UserError, match="directory"):
        read_image(tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_animations_and_pages_are_refused(tmp_path, suffix):
    frames = [Image.fromarray(PICTURE), Image.fromarray(255 - PICTURE)]
    frames[0].save(tmp_path / f"two{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="several pictures"):
        read_image(tmp_path / f"two{suffix}")


def test_phone_jpeg_with_a_preview_is_its_first_picture(tmp_path):
    frames = [Image.fromarray(PICTURE), Image.fromarray(255 - PICTURE)]
    frames[0].save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=frames[1:], quality=95)
    assert np.abs(read_image(tmp_path / "phone.jpg").astype(int) - PICTURE).mean() < 3


def test_floating_point_is_refused(tmp_path):
    path = save(tmp_path / "float.tif", PICTURE[..., 0].astype(np.float32))
    for read in (read_image, read_mask):
        with pytest.raises(UserError, match="'F'"):
            read(path)


def test_resize_averages_when_shrinking_and_keeps_labels():
    board = (np.indices((64, 96)).sum(0) % 2 * 255).astype(np.uint8)
    small = resize_image(np.dstack([board] * 3), (16, 24))
    assert small.shape == (16, 24, 3)
    assert np.abs(small.astype(int) - 127).max() <= 1
    assert resize_image(board[..., None], (16, 24)).shape == (16, 24, 1)
    assert resize_image(board[..., None], (96, 128)).shape == (96, 128, 1)
    mask = RNG.integers(0, 3, (50, 70), dtype=np.uint8) * 100
    assert set(np.unique(resize_mask(mask, (31, 33)))) <= {0, 100, 200}


def test_resized_image_and_mask_stay_aligned():
    # A wide step: where its image crosses the half, its mask must change, for shrinking and for enlarging.
    mask = np.zeros((60, 100), np.uint8)
    mask[:, 37:] = 1
    for size in ((60, 50), (30, 33), (90, 321)):
        image = resize_image(mask[..., None] * 255, size)[..., 0]
        assert ((image > 127) != (resize_mask(mask, size) == 1)).mean() < 1.01 / size[1]


def test_resized_mask_takes_the_pixel_at_the_centre():
    mask = np.arange(30, dtype=np.uint8)[None].repeat(30, axis=0)
    assert resize_mask(mask, (10, 10))[0].tolist() == list(range(1, 30, 3))
    assert resize_mask(mask.T, (10, 10))[:, 0].tolist() == list(range(1, 30, 3))


def test_normalise_and_prepare():
    preprocessing = Preprocessing((8, 12), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    image = RNG.integers(0, 256, (8, 12, 3), dtype=np.uint8)
    expected = (image / 255 - preprocessing.mean) / preprocessing.std
    tensor = normalise(image, preprocessing)
    assert tensor.dtype == torch.float32
    assert np.allclose(tensor.numpy().transpose(1, 2, 0), expected, atol=1e-5)
    assert prepare(PICTURE, preprocessing).shape == (3, 8, 12)
    grey = Preprocessing((8, 12), (0.5,), (0.5,), 1)
    assert prepare(PICTURE[..., :1], grey).shape == (1, 8, 12)


def test_preprocessing_round_trip():
    for preprocessing in (Preprocessing((352, 96)), Preprocessing((8, 12), (0.5,), (0.5,), 1)):
        assert Preprocessing.from_config(preprocessing.to_config()) == preprocessing


def test_real_pairs(real_data):
    for name in ("kvasir_seg", "cvc_clinicdb", "chase_db1", "dsb2018_nuclei"):
        image = sorted((real_data / name / "images").iterdir())[0]
        mask = next((real_data / name / "masks").glob(f"{image.stem}.*"))
        assert read_image(image).shape[:2] == read_mask(mask).shape == image_size(image)
