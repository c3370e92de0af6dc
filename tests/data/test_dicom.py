"""DICOM folders: synthetic series are put together as the scanner meant, and what is no even stack is refused."""

import sys
import warnings

import numpy as np
import pytest

from visattn.data.volumes import find_volume_cases, read_case
from visattn.errors import UserError

pydicom = pytest.importorskip("pydicom")
from visattn.data.dicom import dicom_geometry, read_dicom  # noqa: E402

ROWS, COLUMNS, SLICES = 5, 7, 6


def directions(seed):
    """Row and column direction of an oblique slice, and their normal, in LPS."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))
    return q[0], q[1], np.cross(q[0], q[1])


def write_slice(path, pixels, position, along, down, spacing, series="1.2.3", **tags):
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.MRImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    dataset.SOPClassUID = pydicom.uid.MRImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID
    dataset.SeriesInstanceUID = series
    dataset.Modality = "MR"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 1
    dataset.ImagePositionPatient = [f"{value:.8g}" for value in position]
    dataset.ImageOrientationPatient = [f"{value:.8g}" for value in (*along, *down)]
    dataset.PixelSpacing = [f"{value:.8g}" for value in spacing]  # of rows, then of columns
    dataset.PixelData = pixels.astype("<i2").tobytes()
    for name, value in tags.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)


def write_series(folder, seed=0, keep=range(SLICES), step=None, spacing=(0.9, 1.3), first=0, **tags):
    """A series with files named against their order; returns values (slice, row, column), origin, directions, step."""
    folder.mkdir(parents=True, exist_ok=True)
    along, down, normal = directions(seed)
    step = normal * 2.5 if step is None else step(along, normal)
    origin = np.array([12.5, -30.25, 88.0])
    values = np.random.default_rng(seed).integers(-500, 500, (SLICES, ROWS, COLUMNS))
    for k in keep:
        write_slice(folder / f"im{first + SLICES - k:03d}", values[k], origin + k * step, along, down, spacing, **tags)
    return values, origin, along, down, step


@pytest.mark.parametrize("seed", range(4))
def test_voxels_lie_where_the_standard_says(tmp_path, seed):
    """Each voxel's position by equation C.7.6.2.1-1 of the standard, LPS turned to RAS; values rescaled."""
    values, origin, along, down, step = write_series(tmp_path / "s", seed, RescaleSlope="2", RescaleIntercept="-7")
    array, geometry = read_dicom(tmp_path / "s")
    assert array.shape == geometry.shape == (COLUMNS, ROWS, SLICES)
    assert array.dtype == np.float32
    for i, j, k in [(0, 0, 0), (6, 0, 0), (0, 4, 0), (3, 2, 5), (6, 4, 5)]:
        lps = origin + k * step + i * 1.3 * along + j * 0.9 * down
        np.testing.assert_allclose(geometry.affine @ [i, j, k, 1], [-lps[0], -lps[1], lps[2], 1], atol=1e-5)
        assert array[i, j, k] == 2 * values[k, j, i] - 7
    np.testing.assert_allclose(geometry.zooms, (1.3, 0.9, 2.5), atol=1e-5)
    assert geometry.header is None


def test_simpleitk_agrees(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    write_series(tmp_path / "s", 3, RescaleSlope="1", RescaleIntercept="-7")
    array, geometry = read_dicom(tmp_path / "s")
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "s")))
    theirs = sitk.GetArrayFromImage(image)
    assert sorted(theirs.shape) == sorted(array.shape)
    for index in np.ndindex(array.shape):
        lps = (geometry.affine @ [*index, 1])[:3] * [-1, -1, 1]
        at = image.TransformPhysicalPointToContinuousIndex(lps.tolist())
        np.testing.assert_allclose(at, np.rint(at), atol=1e-3)
        assert theirs[tuple(np.rint(at).astype(int)[::-1])] == array[index]


def test_each_slice_has_its_own_slope(tmp_path):
    """As PET stores it."""
    along, down, normal = directions(1)
    (tmp_path / "s").mkdir()
    for k in range(3):
        write_slice(
            tmp_path / "s" / f"{k}.dcm", np.full((4, 3), 10), k * 2 * normal, along, down, (1, 1), RescaleSlope=k + 1
        )
    assert read_dicom(tmp_path / "s")[0][0, 0].tolist() == [10, 20, 30]


def test_other_files_are_passed_over(tmp_path):
    write_series(tmp_path / "s")
    (tmp_path / "s" / "notes.txt").write_text("of the technician")
    (tmp_path / "s" / ".DS_Store").write_bytes(bytes(200))
    (tmp_path / "s" / "sub").mkdir()
    assert read_dicom(tmp_path / "s")[0].shape == (COLUMNS, ROWS, SLICES)


def test_a_single_slice_takes_its_thickness(tmp_path):
    write_series(tmp_path / "s", keep=[2], SliceThickness="4")
    assert read_dicom(tmp_path / "s")[1].zooms[2] == pytest.approx(4)
    write_series(tmp_path / "t", keep=[2])
    with pytest.raises(UserError, match=r"single slice without a SliceThickness"):
        read_dicom(tmp_path / "t")


def two_series(folder):
    write_series(folder, SeriesDescription="t1 mprage")
    write_series(folder, first=50, series="1.2.4", SeriesDescription="localizer")


def other_size(folder):
    write_series(folder, keep=[0])
    write_slice(folder / "x", np.zeros((5, 9)), (9, 9, 9), *directions(0)[:2], (0.9, 1.3))


def other_spacing(folder):
    write_series(folder, keep=[0])
    write_series(folder, keep=[1], spacing=(1, 1))


def other_orientation(folder):
    write_series(folder, keep=[0])
    write_series(folder, 1, keep=[1])


def doubled(folder):
    write_series(folder)
    write_series(folder, first=50)


def with_tags(**tags):
    return lambda folder: write_series(folder, **tags)


BAD = {
    "mixed": (two_series, r"holds 2 series, t1 mprage \(6\), localizer \(6\).*folder of its own"),
    "missing": (with_tags(keep=[0, 1, 3, 5]), r"2 of 6 slices are missing, the first between im005 and im003"),
    "doubled": (doubled, r"6 slices lie on others"),
    "tilted": (
        with_tags(step=lambda along, normal: 2.5 * normal + 0.5 * along),
        r"gantry was tilted by 11\.3 degrees.*shear.*dcm2niix",
    ),
    "size": (other_size, r"differs in size"),
    "spacing": (other_spacing, r"differs in pixel spacing"),
    "turned": (other_orientation, r"differs in orientation"),
    "no position": (with_tags(ImagePositionPatient=None), r"lacks ImagePositionPatient"),
    "no orientation": (with_tags(ImageOrientationPatient=None), r"lacks ImageOrientationPatient"),
    "impossible": (with_tags(PixelSpacing=["0", "1"]), r"impossible position, orientation or pixel spacing"),
    "many frames": (with_tags(NumberOfFrames="3"), r"multi-frame.*dcm2niix"),
    "colours": (with_tags(SamplesPerPixel=3), r"holds colours"),
    "too few bytes": (with_tags(PixelData=bytes(20)), r"pixels cannot be read"),
    "no pixels": (with_tags(PixelData=None), r"pixels cannot be read"),
    "nothing": (lambda folder: folder.mkdir(), r"holds no DICOM images"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_even_stack_is_refused(tmp_path, name):
    make, said = BAD[name]
    make(tmp_path / "s")
    with pytest.raises(UserError, match=rf"(?s)^{tmp_path}.*{said}") as caught:
        read_dicom(tmp_path / "s")
    assert len(str(caught.value).splitlines()) <= 6


def test_uneven_slices_are_refused(tmp_path):
    along, down, normal = directions(0)
    (tmp_path / "s").mkdir()
    for k, height in enumerate((0, 2, 4, 6.7, 8.7)):
        write_slice(tmp_path / "s" / str(k), np.zeros((4, 3)), height * normal, along, down, (1, 1))
    with pytest.raises(UserError, match=r"distance between slices varies, 2 to 2\.7 mm, first between 2 and 3"):
        read_dicom(tmp_path / "s")


def test_positions_rounded_to_text_are_even(tmp_path):
    along, down, normal = directions(0)
    (tmp_path / "s").mkdir()
    for k in range(40):
        write_slice(tmp_path / "s" / str(k), np.zeros((4, 3)), np.round(k / 3 * normal, 3), along, down, (1, 1))
    assert read_dicom(tmp_path / "s")[1].zooms[2] == pytest.approx(1 / 3, abs=1e-4)


def test_the_budget_holds_before_pixels_are_read(tmp_path):
    write_series(tmp_path / "s", PixelData=None)
    with pytest.raises(UserError, match=r"7 x 5 x 6 voxels are more than"):
        read_dicom(tmp_path / "s", budget=700)


def test_a_damaged_file_is_named(tmp_path):
    write_series(tmp_path / "s")
    (tmp_path / "s" / "im002").write_bytes((tmp_path / "s" / "im002").read_bytes()[:220])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match=r"im002|slices are missing"):
            read_dicom(tmp_path / "s")


def test_predict_takes_a_folder_as_a_case(tmp_path):
    values, *_ = write_series(tmp_path / "in" / "anna" / "t1")
    cases, problems = find_volume_cases([tmp_path / "in"], ["t1c"])
    assert [case.name for case in cases] == ["anna/t1"]
    assert problems == []
    array, geometry, notes = read_case(cases[0])
    np.testing.assert_array_equal(array[0], values.transpose(2, 1, 0))
    assert geometry.same_grid(dicom_geometry(tmp_path / "in" / "anna" / "t1"))
    assert notes == []
    (again,), _ = find_volume_cases([tmp_path / "in" / "anna" / "t1"], ["t1c"])
    assert again.name == "t1"
    with pytest.raises(UserError, match=r"one file of a DICOM series.\nGive its folder"):
        find_volume_cases([tmp_path / "in" / "anna" / "t1" / "im001"], ["t1c"])


def test_a_bad_series_is_the_problem_of_one_case(tmp_path):
    write_series(tmp_path / "in" / "bad", keep=[0, 1, 3, 5])
    write_series(tmp_path / "in" / "good")
    cases, problems = find_volume_cases([tmp_path / "in"], ["t1c"])
    assert [case.name for case in cases] == ["good"]
    assert [(problem.name, "missing" in str(problem)) for problem in problems] == [("bad", True)]


def test_without_pydicom_the_extra_is_named(tmp_path, monkeypatch):
    write_series(tmp_path / "s")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"pip install 'visattn\[dicom\]'"):
        read_dicom(tmp_path / "s")
