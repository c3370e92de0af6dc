"""Files that no reader should take: damaged, hostile and unfit NIfTI files, each with what is said of it."""

import gzip
import io
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np

SHAPE = (5, 6, 7)


def volume(shape=SHAPE, dtype=np.int16, affine=None, version=1, **fields) -> bytes:
    """A NIfTI file in memory, with header `fields` set after everything else."""
    data = (np.arange(np.prod(shape)) % 100).reshape(shape).astype(dtype)
    kind = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    image = kind(data, np.diag([1, 2, 3, 1.0]) if affine is None else affine)
    return with_fields(image.to_bytes(), **fields)


def with_fields(content: bytes, **fields) -> bytes:
    """The file `content` with some fields of its header replaced."""
    kind, length = (nibabel.Nifti1Header, 348) if content[344:348] == b"n+1\0" else (nibabel.Nifti2Header, 540)
    header = kind(content[:length], check=False)
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + content[length:]


def packed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def dims(*sizes: int) -> np.ndarray:
    result = np.ones(8, np.int16)
    result[0] = len(sizes)
    result[1 : 1 + len(sizes)] = sizes
    return result


def flipped(content: bytes, position: int) -> bytes:
    result = bytearray(content)
    result[position] ^= 0xFF
    return bytes(result)


def bomb() -> bytes:
    """A small volume followed by 48 MB of zeros, in 48 KB."""
    out = io.BytesIO()
    with gzip.GzipFile("", "wb", fileobj=out, mtime=0) as stream:
        stream.write(volume())
        for _ in range(6):
            stream.write(bytes(2**23))
    return out.getvalue()


def rgb() -> bytes:
    data = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    return nibabel.Nifti1Image(data, np.eye(4), dtype=data.dtype).to_bytes()


def with_affine(matrix) -> bytes:
    """A volume whose sform is `matrix`, whatever it is."""
    rows = {f"srow_{name}": np.asarray(matrix, float)[row] for row, name in enumerate("xyz")}
    return volume(sform_code=1, qform_code=0, **rows)


NAN, INF = float("nan"), float("inf")
EYE = np.eye(4)
PLAIN = volume()

# Name to content and a pattern of what is said.
CASES: dict[str, tuple[Callable[[], bytes], str]] = {
    # Nothing there, or something else
    "empty": (lambda: b"", r"the file is empty"),
    "one byte": (lambda: b"\x01", r"truncated"),
    "text": (lambda: b"not an image\n" * 50, r"not a NIfTI file"),
    "html": (lambda: b"<!DOCTYPE html><html>login</html>" * 20, r"not a NIfTI file"),
    "zeros": (lambda: bytes(1000), r"not a NIfTI file"),
    "png": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(1000), r"a PNG image"),
    "jpeg": (lambda: b"\xff\xd8\xff\xe0" + bytes(1000), r"a JPEG image"),
    "zip": (lambda: b"PK\x03\x04" + bytes(1000), r"a zip archive"),
    "nrrd": (lambda: b"NRRD0004\n" + bytes(1000), r"an NRRD file"),
    "dicom": (lambda: bytes(128) + b"DICM" + bytes(1000), r"a DICOM file; give its folder"),
    "pair header": (lambda: PLAIN[:344] + b"ni1\0" + bytes(4), r"\.hdr/\.img pair"),
    "analyze": (lambda: PLAIN[:344] + bytes(4) + PLAIN[348:], r"not a NIfTI file"),
    "magic damaged": (lambda: flipped(PLAIN, 345), r"not a NIfTI file"),
    "gzip of text": (lambda: packed(b"hello" * 200), r"not a NIfTI file"),
    "gzip of nothing": (lambda: packed(b""), r"truncated"),
    "gzip in gzip": (lambda: packed(packed(PLAIN) * 9), r"not a NIfTI file"),
    # Truncated
    "header cut": (lambda: PLAIN[:200], r"truncated"),
    "header cut, packed": (lambda: packed(PLAIN[:300]), r"truncated"),
    "header alone": (lambda: PLAIN[:352], r"more than the file holds"),
    "voxels cut": (lambda: PLAIN[:-1], r"more than the file holds"),
    "voxels cut, packed whole": (lambda: packed(PLAIN[:-100]), r"truncated: 320 of 420 bytes"),
    "stream cut": (lambda: packed(PLAIN)[:-20], r"truncated"),
    "stream cut in its header": (lambda: packed(PLAIN)[:5], r"truncated"),
    "stream cut by its checksum": (lambda: packed(PLAIN)[:-8], r"truncated"),
    "nifti-2 header cut": (lambda: volume(version=2)[:400], r"truncated|damaged"),
    "ends before its voxels": (lambda: packed(volume(vox_offset=2000)[:600]), r"truncated before its voxels begin"),
    # Damaged
    "wrong checksum": (lambda: flipped(packed(PLAIN), -6), r"wrong checksum"),
    "wrong length": (lambda: flipped(packed(PLAIN), -2), r"wrong checksum"),
    "stream damaged": (lambda: flipped(packed(volume(dtype=np.float32)), 120), r"damaged|truncated"),
    "gzip method": (lambda: flipped(packed(PLAIN), 2), r"damaged"),
    "trailing rubbish in gzip": (lambda: packed(PLAIN) + b"rubbish", r"damaged"),
    "endless": (bomb, r"bytes follow the voxels"),
    # Impossible headers
    "no axes": (lambda: volume(dim=dims()), r"damaged header: 0 axes|not a NIfTI"),
    "negative size": (lambda: volume(dim=dims(5, -6, 7)), r"no volume: its sizes are 5 x -6 x 7"),
    "zero size": (lambda: volume(dim=dims(5, 0, 7)), r"no volume"),
    "32000 cubed": (lambda: volume(dim=dims(32000, 32000, 32000)), r"take 122070\.3 GiB, more than the limit"),
    "32000 cubed, packed": (lambda: packed(volume(dim=dims(32000, 32000, 32000))), r"more than the limit"),
    "1000 cubed": (lambda: volume(dim=dims(1000, 1000, 1000)), r"more than the file holds"),
    "1000 cubed, packed": (lambda: packed(volume(dim=dims(1000, 1000, 1000))), r"more than the file holds"),
    "nifti-2 of 2^62": (lambda: volume(version=2, dim=np.array([3, 2**62, 5, 5, 1, 1, 1, 1])), r"more than the limit"),
    "unknown type": (lambda: volume(datatype=999), r"unknown type of voxels, code 999"),
    "type 0": (lambda: volume(datatype=0), r"unknown type|of type"),
    "one bit": (lambda: volume(datatype=1), r"unknown type|of type"),
    "offset inside header": (lambda: volume(vox_offset=100), r"voxels would begin at byte 100"),
    "offset negative": (lambda: volume(vox_offset=-1), r"voxels would begin at byte -1"),
    "offset nan": (lambda: volume(vox_offset=NAN), r"voxels would begin"),
    "offset beyond": (lambda: volume(vox_offset=1e6), r"more than the file holds"),
    "slope infinite": (lambda: volume(scl_slope=INF, scl_inter=0), r"scaled by inf"),
    "inter infinite": (lambda: volume(scl_slope=1, scl_inter=-INF), r"shifted by -inf"),
    # No volume of numbers
    "rgb": (rgb, r"its voxels are colours"),
    "complex": (lambda: volume(dtype=np.complex64), r"complex numbers"),
    "complex128": (lambda: volume(dtype=np.complex128), r"complex numbers"),
    "long double": (lambda: volume(datatype=1536), r"of type|unknown type|more than"),
    "four axes": (lambda: volume(shape=(3, 4, 5, 2)), r"has 4 axes; say which one holds channels"),
    "five axes": (lambda: volume(shape=(3, 4, 5, 2, 3)), r"has 5 axes"),
    # Nowhere in space
    "affine of zeros": (lambda: with_affine(np.zeros((3, 4))), r"its affine is singular"),
    "affine without k": (
        lambda: with_affine(np.diag([1, 1, 0, 1.0])),
        r"its affine is singular: voxel sizes 1, 1, 0 mm",
    ),
    "affine flat": (lambda: with_affine([[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 2, 0]]), r"its affine is singular"),
    "affine nan": (lambda: with_affine(EYE * NAN), r"NaN or infinities"),
    "affine infinite": (lambda: with_affine(np.diag([INF, 1, 1, 1])), r"NaN or infinities"),
    "origin nan": (lambda: with_affine(np.array([[1, 0, 0, NAN], [0, 1, 0, 0], [0, 0, 1, 0]])), r"NaN or infinities"),
    "quaternion too long": (
        lambda: volume(sform_code=0, qform_code=1, quatern_b=2.0, quatern_c=2.0),
        r"its qform is no rotation",
    ),
    "voxel sizes nan": (
        lambda: volume(sform_code=0, qform_code=1, pixdim=[1, NAN, 2, 3, 0, 0, 0, 0]),
        r"NaN or infinities|no rotation",
    ),
    "voxel size zero": (
        lambda: volume(sform_code=0, qform_code=1, pixdim=[1, 1, 0, 3, 0, 0, 0, 0]),
        r"singular",
    ),
    "no form and voxel size zero": (
        lambda: volume(sform_code=0, qform_code=0, pixdim=[1, 1, 0, 3, 0, 0, 0, 0]),
        r"singular",
    ),
}

LABELS: dict[str, tuple[Callable[[], bytes], str]] = {
    "negative": (lambda: nifti_of(np.full(SHAPE, -1, np.int16)), r"label values run from -1 to 0"),
    "too large": (lambda: nifti_of(np.full(SHAPE, 70000, np.int32)), r"run from 0 to 70000"),
    "fractions": (lambda: nifti_of(np.full(SHAPE, 0.5, np.float32)), r"hold values that are no labels, as 0\.5"),
    "nan": (lambda: nifti_of(np.full(SHAPE, NAN, np.float32)), r"210 voxels of the labels are NaN or infinite"),
    "infinite": (lambda: nifti_of(np.full(SHAPE, INF, np.float64)), r"NaN or infinite"),
}


def nifti_of(data: np.ndarray) -> bytes:
    return nibabel.Nifti1Image(data, np.eye(4), dtype=data.dtype).to_bytes()


def big_endian() -> bytes:
    image = nibabel.Nifti1Image(np.arange(210, dtype=">i2").reshape(SHAPE), np.diag([1, 2, 3, 1.0]))
    image.header.set_sform(np.diag([1, 2, 3, 1.0]), 1)
    return nibabel.Nifti1Image(image.dataobj, image.affine, image.header.as_byteswapped(">")).to_bytes()


def write_all(folder: Path) -> dict[Path, str]:
    """Write every case that no reader should take; path to the pattern of its error."""
    found = {}
    for name, (content, message) in CASES.items():
        path = folder / f"{name.replace(' ', '_').replace(',', '')}.nii{'.gz' if len(found) % 2 else ''}"
        path.write_bytes(content())
        found[path] = message
    return found
