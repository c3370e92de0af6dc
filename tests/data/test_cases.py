import hashlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from visattn.data.cases import CaseReader, check_cases, find_cases, fingerprint
from visattn.data.image_mask_folder import ImageMaskFolder
from visattn.errors import UserError
from visattn.labels import Labels

LABELS = {"background": 0, "polyp": 255}
READER = CaseReader(Labels.from_config(LABELS), 3)


def pair(folder, stem, layout=("images", "masks"), shape=(20, 30), suffixes=(".png", ".png"), values=(0, 255)):
    """Write one image and its mask."""
    rng = np.random.default_rng(int(hashlib.sha256(stem.encode()).hexdigest()[:8], 16))
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    mask = np.full(shape, values[0], np.uint8)
    mask[3:12, 5:20] = values[1]
    for name, suffix, array in zip(layout, suffixes, (image, mask), strict=True):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / name / f"{stem}{suffix}")


def dataset(folder, stems="abcdefgh", **keywords):
    for stem in stems:
        pair(folder, stem, **keywords)
    return str(folder)


@pytest.mark.parametrize("layout", [("images", "masks"), ("image", "mask"), ("Original", "Ground Truth")])
def test_layouts(tmp_path, layout):
    root = dataset(tmp_path / "set", layout=layout, suffixes=(".jpg", ".png"))
    cases = find_cases([root])
    assert [case.name for case in cases] == list("abcdefgh")
    assert cases[0].image == tmp_path / "set" / layout[0] / "a.jpg"
    assert cases[0].mask == tmp_path / "set" / layout[1] / "a.png"
    assert cases[0].root == root


def test_masks_with_an_ending_and_files_that_are_no_images(tmp_path):
    for stem in "ab":
        pair(tmp_path, stem)
        (tmp_path / "masks" / f"{stem}.png").rename(tmp_path / "masks" / f"{stem}_segmentation.png")
    for junk in (".DS_Store", "._a.png", "Thumbs.db", "readme.txt"):
        (tmp_path / "images" / junk).write_text("junk")
    (tmp_path / "images" / "folder.png").mkdir()
    assert [case.name for case in find_cases([str(tmp_path)])] == ["a", "b"]


def test_several_roots_lead_the_names(tmp_path):
    roots = [dataset(tmp_path / name, "ab") for name in ("kvasir", "clinic")]
    assert [case.name for case in find_cases(roots)] == ["clinic/a", "clinic/b", "kvasir/a", "kvasir/b"]
    same = [dataset(tmp_path / name / "train", "a") for name in ("one", "two")]
    assert [case.name for case in find_cases(same)] == ["one_train/a", "two_train/a"]
    assert {case.name.partition("/")[0] for case in find_cases([roots[0], "phantom"])} >= {"kvasir", "phantom_0000"}
    (tmp_path / "link").symlink_to(tmp_path / "kvasir")
    for twice in ([roots[0], roots[0]], [roots[0], str(tmp_path / "link")], ["phantom", "phantom"]):
        with pytest.raises(UserError, match="named twice"):
            find_cases(twice)


def test_pranet_layouts(tmp_path):
    dataset(tmp_path / "TrainDataset", "abc", layout=("image", "mask"))
    for name in ("CVC-300", "Kvasir"):
        dataset(tmp_path / "TestDataset" / name, "12")
    assert [case.name for case in find_cases([str(tmp_path)])] == ["a", "b", "c"]
    expected = [("CVC-300/1", "CVC-300"), ("CVC-300/2", "CVC-300"), ("Kvasir/1", "Kvasir"), ("Kvasir/2", "Kvasir")]
    for root in (tmp_path, tmp_path / "TestDataset"):
        assert [(case.name, case.group) for case in find_cases([str(root)], sets=True)] == expected
    with pytest.raises(UserError, match="its folders CVC-300, Kvasir do"):  # test sets are never trained on unasked
        find_cases([str(tmp_path / "TestDataset")])


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("{0}/kvasir_sge", "there is no folder .*Did you mean .*kvasir_seg"),
        ("{0}/kvasir_seg/imges", "Did you mean .*images"),
        ("{0}/nowhere/at/all", "no folder"),
        ("{0}/kvasir_seg/images/a.png", "is a file"),
        ("{0}/kvasir_seg/images", "holds no images/ with masks/"),
        ("{0}", "its folders hollow, kvasir_seg do"),
        ("{0}/hollow", "no image with a mask"),
        ("fantom", "the word phantom"),
    ],
)
def test_wrong_roots_are_explained(tmp_path, root, message):
    dataset(tmp_path / "kvasir_seg")
    for name in ("images", "masks"):
        (tmp_path / "hollow" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=message) as caught:
        find_cases([root.format(tmp_path)])
    assert len(str(caught.value).splitlines()) <= 6


def test_missing_partners_and_twins_are_listed_and_counted(tmp_path):
    root = dataset(tmp_path)
    for stem in "ab":
        (tmp_path / "masks" / f"{stem}.png").unlink()
    (tmp_path / "images" / "c.png").unlink()
    Image.new("RGB", (30, 20)).save(tmp_path / "images" / "d.jpg")
    (tmp_path / "masks" / "zz.png").write_bytes((tmp_path / "masks" / "h.png").read_bytes())
    with pytest.raises(UserError) as caught:
        find_cases([root])
    text = str(caught.value)
    assert text.startswith("5 problems in the data")
    assert text.splitlines()[-1] == "... and 1 more"
    assert "d.png: shares its stem with d.jpg" in text
    assert "a.png: no mask of that name in masks/" in text
    assert "c.png: no image of that name in images/" in text
    assert len(text.splitlines()) == 6


def test_every_case_is_read_before_training(tmp_path):
    root = dataset(tmp_path, "abcdefghij")
    (tmp_path / "images" / "a.png").write_bytes(b"")
    (tmp_path / "images" / "b.png").write_bytes((tmp_path / "images" / "b.png").read_bytes()[:400])
    Image.new("L", (30, 21)).save(tmp_path / "masks" / "c.png")
    pair(tmp_path, "d", values=(0, 1))
    pair(tmp_path, "e", values=(0, 300 % 256 + 90))
    (tmp_path / "masks" / "f.png").write_text("text")
    module = ImageMaskFolder(root=root, labels=LABELS, size=32)
    with pytest.raises(UserError) as caught:
        module.setup("fit")
    lines = str(caught.value).splitlines()
    assert lines[0] == "5 problems in the data (10 cases):"  # e is grey: 134 snaps to 255
    for line, expected in zip(
        lines[1:], ["a.png: the file is empty", "b.png", "c.png: the mask is 30 x 21", "only 0 and 1"], strict=False
    ):
        assert expected in line
    assert lines[-1] == "... and 1 more"


def test_turned_image_beside_an_unturned_mask_is_explained(tmp_path):
    pair(tmp_path, "a")
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.open(tmp_path / "images" / "a.png").save(tmp_path / "images" / "a.png", exif=tags)
    _, problems = check_cases(find_cases([str(tmp_path)]), READER, None)
    assert "EXIF orientation" in problems[0]


def test_fingerprint_sees_bytes_and_names_only(tmp_path):
    def of(root):
        cases = find_cases([root])
        return fingerprint(cases, check_cases(cases, READER, None)[0])

    one, two = dataset(tmp_path / "one"), dataset(tmp_path / "two")
    assert of(one) == of(two)
    pair(tmp_path / "two", "a", values=(255, 0))
    assert of(one) != of(two)
    three = dataset(tmp_path / "three")
    for folder in ("images", "masks"):
        (tmp_path / "three" / folder / "a.png").rename(tmp_path / "three" / folder / "x.png")
    assert of(one) != of(three)


@pytest.mark.slow  # a fresh interpreter imports torch and lightning
def test_reading_data_needs_neither_monai_nor_albumentations():
    code = (
        "import sys; from visattn.data.image_mask_folder import ImageMaskFolder\n"
        "m = ImageMaskFolder(root='phantom', labels={'background': 0, 'polyp': 255}, size=32, augment=['colour'])\n"
        "heavy = {'monai', 'albumentations', 'timm'} & set(sys.modules); sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
