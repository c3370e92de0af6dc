"""MedMNIST's files, class folders and tables of images as data modules."""

import csv
import io
import zipfile

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from visattn.data.class_augment import CLASS_AUGMENT, _policy, build_class_augmenter
from visattn.data.class_files import list_folders
from visattn.data.class_preprocessing import ClassPreprocessing, fits
from visattn.data.image_folder import ImageFolder
from visattn.data.medmnist import MedMNIST
from visattn.data.medmnist_file import case_rank
from visattn.data.medmnist_flags import FLAGS
from visattn.errors import UserError
from visattn.recipe import packaged_recipes


def npz(path, labels, shape=(28, 28), **changes):
    """A file of MedMNIST's form; `labels` holds those of each part."""
    rng = np.random.default_rng(0)
    arrays = {f"{part}_images": rng.integers(0, 256, (len(own), *shape), np.uint8) for part, own in labels.items()}
    arrays |= {f"{part}_labels": own for part, own in labels.items()}
    np.savez_compressed(path, **{**arrays, **changes})
    return path


def parts(*columns, kind=np.uint8):
    count = {"train": 8, "val": 4, "test": 6}
    if columns:
        return {part: np.arange(n * columns[0]).reshape(n, -1).astype(kind) % 2 for part, n in count.items()}
    return {part: (np.arange(n) % 2).astype(kind) for part, n in count.items()}


@pytest.mark.parametrize("labels", [parts(), parts(1), parts(1, kind=np.int64)], ids=["(N,)", "(N, 1)", "int64"])
def test_labels_of_either_form_and_official_parts(labels, tmp_path):
    data = MedMNIST(str(npz(tmp_path / "breastmnist.npz", labels)), batch_size=4, num_workers=0)
    data.setup("fit")
    assert {part: len(cases) for part, cases in data.cases.items()} == {"train": 8, "val": 4, "test": 6}
    assert data.labels.names == ("malignant", "normal, benign")
    assert [case.classes for case in data.cases["val"]] == [(0,), (1,), (0,), (1,)]
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (4, 3, 28, 28)
    assert batch["target"].tolist() == [0, 1, 0, 1]


def test_several_labels_become_a_row_of_yes_and_no(tmp_path):
    data = MedMNIST(str(npz(tmp_path / "chestmnist.npz", parts(14))), num_workers=0)
    data.setup()
    assert data.labels.multi_label
    target = next(iter(data.val_dataloader()))["target"]
    np.testing.assert_array_equal(target.numpy(), parts(14)["val"])


@pytest.mark.parametrize(
    ("shape", "channels", "expected"),
    [((28, 28), None, (3, 28, 28)), ((28, 28, 3), None, (3, 28, 28)), ((28, 28, 3), 1, (1, 28, 28)),
     ((12, 12, 12), None, (1, 12, 12, 12))],
)  # fmt: skip
def test_grey_colour_and_volumes(shape, channels, expected, tmp_path):
    file = npz(tmp_path / "x.npz", parts(), shape)
    data = MedMNIST(str(file), task="binary-class", labels=["a", "b"], channels=channels, mean=[0] * expected[0],
                    std=[1] * expected[0], num_workers=0)  # fmt: skip
    data.setup()
    image = data.read_case(data.cases["train"][3])
    stored = np.load(file)["train_images"][3]
    batch = next(iter(data.val_dataloader()))["image"]
    assert tuple(batch.shape[1:]) == expected
    if channels is None:
        np.testing.assert_array_equal(
            image, stored if shape[-1] == 3 else np.repeat(stored[..., None], expected[0], -1)
        )
        np.testing.assert_allclose(data.preprocessing.prepare(image).movedim(0, -1).numpy() * 255, image, atol=1e-4)


def test_the_last_axis_tells_images_from_volumes():
    shapes = {(28, 28): 2, (28, 28, 1): 2, (28, 28, 3): 2, (28, 28, 28): 3, (28, 28, 28, 1): 3}
    assert {shape: case_rank(shape) for shape in shapes} == shapes
    assert all(fits(shape, rank) and not fits(shape, 5 - rank) for shape, rank in shapes.items())


def test_size_brings_images_and_volumes_to_the_network(tmp_path):
    for shape, size in (((28, 28), 40), ((12, 12, 12), [16, 8, 20])):
        data = MedMNIST(str(npz(tmp_path / "x.npz", parts(), shape)), task="binary-class", labels=["a", "b"], size=size,
                        num_workers=0)  # fmt: skip
        data.setup()
        want = (40, 40) if size == 40 else (16, 8, 20)
        assert next(iter(data.train_dataloader()))["image"].shape[2:] == want


def test_a_split_divides_what_is_not_for_testing(tmp_path):
    file = npz(tmp_path / "breastmnist.npz", parts())
    data = MedMNIST(str(file), split={"folds": 3, "fold": 0})
    folds = data.find_folds()
    assert sorted(case.name for fold in folds for case in fold["val"]) == sorted(
        [f"train_{i:05d}" for i in range(8)] + [f"val_{i:05d}" for i in range(4)]
    )
    assert all(len(fold["test"]) == 6 and {case.part for case in fold["test"]} == {"test"} for fold in folds)


def test_the_file_is_found_by_flag_and_size(tmp_path):
    npz(tmp_path / "breastmnist.npz", parts())
    npz(tmp_path / "breastmnist_64.npz", parts(), (64, 64))
    assert MedMNIST(str(tmp_path), flag="breastmnist", native=64).preprocessing.size == (64, 64)
    with pytest.raises(UserError, match=r"Did you mean 'breastmnist'"):
        MedMNIST(str(tmp_path), flag="breastmnst")
    with pytest.raises(UserError, match=r"holds no breastmnist_224\.npz"):
        MedMNIST(str(tmp_path), flag="breastmnist", native=224)
    with pytest.raises(UserError, match="which of"):
        MedMNIST(str(tmp_path))


def test_real_files(real_data):
    for name, shape, counts in (
        ("breastmnist", (28, 28), (546, 78, 156)),
        ("adrenalmnist3d", (28, 28, 28), (1188, 98, 298)),
    ):
        data = MedMNIST(str(real_data / "medmnist"), flag=name)
        data.setup()
        assert data.preprocessing.size == shape
        assert tuple(len(data.cases[part]) for part in ("train", "val", "test")) == counts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": np.full(8, 5)}, "holds 5, but there are 2 classes"),
        ({"train_labels": np.full(7, 1)}, "not whole numbers, one for each"),
        ({"train_labels": np.full(8, 0.5)}, "not whole numbers"),
        ({"train_labels": np.zeros((8, 3), np.uint8)}, "3 columns"),
        ({"train_images": np.zeros((8, 28, 28), np.float32)}, "not uint8"),
        ({"val_images": np.zeros((4, 20, 20), np.uint8)}, "of one size"),
        ({"train_images": np.array([None] * 8)}, "could execute code: refused"),
        ({"train_images": np.zeros((8, 28), np.uint8)}, "train_images is"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(changes, message, tmp_path):
    file = npz(tmp_path / "breastmnist.npz", parts(), **changes)
    with pytest.raises(UserError, match=message):
        MedMNIST(str(file)).setup()


def test_damaged_and_dishonest_files_are_refused(tmp_path):
    file = npz(tmp_path / "breastmnist.npz", parts())
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not of MedMNIST's form"):
        MedMNIST(str(file))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 64, 64)})
    with zipfile.ZipFile(file, "w") as archive:
        for part in ("train", "val", "test"):
            archive.writestr(f"{part}_images.npy", header.getvalue())
            archive.writestr(f"{part}_labels.npy", header.getvalue())
    with pytest.raises(UserError, match=r"claims \d+ bytes and has"):
        MedMNIST(str(file))


def test_every_flag_has_a_task_and_names():
    assert len(FLAGS) == 18
    for task, names in FLAGS.values():
        assert len(names) == 2 or task != "binary-class"
        assert len(set(names)) == len(names)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(1)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(6):
            pixels = rng.integers(0, 256, (20, 30, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"p{index // 2}_{index}.png")
    return tmp_path / "images"


def table(path, rows):
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_class_folders_and_groups(folder):
    data = ImageFolder(str(folder), size=16, split={"val": 0.34, "group_by": "^(p[0-9])_"}, num_workers=0)
    data.setup()
    assert data.labels.names == ("cat", "dog")
    assert {part: len(cases) for part, cases in data.cases.items()} == {"train": 8, "val": 4, "test": 0}
    groups = {part: {case.group for case in cases} for part, cases in data.cases.items()}
    assert not groups["train"] & groups["val"], "both classes of a patient stay together"
    assert next(iter(data.val_dataloader()))["image"].shape == (4, 3, 16, 16)


def test_folders_that_are_divided_stay_so(folder):
    parted = folder.parent / "parted"
    for part, index in (("train", 0), ("val", 1), ("test", 2)):
        for name in ("cat", "dog"):
            (parted / part / name).mkdir(parents=True)
            for file in sorted((folder / name).glob(f"p{index}_*")):
                file.rename(parted / part / name / file.name)
    data = ImageFolder(str(parted), size=16)
    data.setup()
    assert {part: len(cases) for part, cases in data.cases.items()} == {"train": 4, "val": 4, "test": 4}
    assert {case.name.split("/")[0] for case in data.cases["test"]} == {"test"}


def test_a_table_with_groups_parts_and_several_labels(folder):
    rows = [
        {"image": f"cat/p{index // 2}_{index}.png", "label": label, "group": f"g{index // 2}", "part": part}
        for index, (label, part) in enumerate(
            [("a|b", "train"), ("", "train"), ("b", "val"), ("a", "val"), ("a", "test"), ("c|a", "test")]
        )
    ]
    data = ImageFolder(str(table(folder / "t.csv", rows)), multi_label=True, size=16, num_workers=0)
    data.setup()
    assert data.labels.names == ("a", "b", "c")
    assert [case.classes for case in data.cases["train"]] == [(0, 1), ()]
    assert data.target(data.cases["test"][1]).tolist() == [1, 0, 1]
    rows[1]["part"] = "val"
    with pytest.raises(UserError, match="'g0' is parted"):
        ImageFolder(str(table(folder / "t.csv", rows)), multi_label=True).setup()


def test_bad_images_and_tables_are_told_together(folder):
    whole = (folder / "cat" / "p0_0.png").read_bytes()
    (folder / "cat" / "p0_0.png").write_bytes(whole[:-30])
    (folder / "dog" / "p0_1.png").write_bytes(b"")
    with pytest.raises(UserError, match="2 problems in the data") as caught:
        ImageFolder(str(folder)).setup()
    assert "p0_0.png" in str(caught.value)
    with pytest.raises(UserError, match=r"column, which .* needs"):
        ImageFolder(str(table(folder / "t.csv", [{"image": "a", "lable": "b"}]))).setup()
    with pytest.raises(UserError, match="does not name"):
        ImageFolder(str(folder), labels=["cat", "cow"]).setup()
    with pytest.raises(UserError, match="Did you mean"):
        ImageFolder(str(folder.parent / "imagse")).setup()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; its first line"),
        ("image;label\na;b\n", "separates its columns by ';'"),
        ("image,label\ncat/p0_0.png,cat\ncat/p1_2.png,cat\n", "all images of .* have the class 'cat'"),
        ("image,label\ncat/p0_0.png,cat\ndog/p1.png,dog\ncat/p0_0.png,cat\n", "line 4: cat/p0_0.png stands in line 2"),
        ("image,label\ncat/p0_0.png,cat\ncat/p0_0.png,dog\n", "with the label 'cat', and here with 'dog'"),
        ("image,label\ncat/p0_0.png,cat|dog\ncat/p1_2.png,\n", "labels of several classes, as 'cat|dog'"),
        ("image,label\ncat/p0_0.png,cat\ndog/gone.png,dog\n", "gone.png: no such file"),
        ("image,label,part\ncat/p0_0.png,cat,training\n", "none of train, val, test"),
        ("image,label\na.nii.gz,cat\nb.nii,dog\n", "names volumes. .*MedMNIST's form"),
    ],
)
def test_what_is_wrong_with_a_table_is_told(text, message, folder):
    (folder / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        ImageFolder(str(folder / "t.csv")).setup()


def test_masks_beside_the_images_are_no_cases(tmp_path):
    for name in ("a/1", "a/1_mask", "a/1_mask_1", "b/2_img", "b/2_SEG", "b/3_mask"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / f"{name}.png")
    with pytest.raises(UserError, match="3 of 6 images are named as masks of others, as a/1_mask of a/1"):
        list_folders(tmp_path, "set")
    for name in ("a/1_mask", "a/1_mask_1", "b/2_SEG"):
        (tmp_path / f"{name}.png").unlink()
    assert [row[0] for row in list_folders(tmp_path, "set")] == ["a/1", "b/2_img", "b/3_mask"], "a name, no pair"


def test_folders_of_volumes_are_told_what_to_do(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scan.nii.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds volumes\. .*MedMNIST's form"):
        ImageFolder(str(tmp_path)).setup()


def test_blanks_around_the_names_of_columns_are_left_out(folder):
    rows = [f"{name}/p{index // 2}_{index}.png, {name}" for name in ("cat", "dog") for index in range(6)]
    (folder / "t.csv").write_text("\n".join([" image, label ", *rows]))
    data = ImageFolder(str(folder / "t.csv"), split={"val": 0.3})
    data.setup()
    assert data.labels.names == ("cat", "dog")


def test_the_centre_crop_keeps_the_shape_of_the_network():
    image = np.zeros((40, 80, 1), np.uint8)
    image[10:30, 30:50] = 255  # the middle 20 x 20
    kept = ClassPreprocessing((10, 10), (0.0,), (1.0,), crop=0.5).prepare(image)
    assert kept.min() == 1.0, "nothing but the middle"
    squeezed = ClassPreprocessing((10, 10), (0.0,), (1.0,)).prepare(image)
    assert 0.1 < squeezed.mean() < 0.15, "the whole image"


@pytest.mark.parametrize("name", sorted(CLASS_AUGMENT))
@pytest.mark.parametrize("channels", [1, 3])
def test_every_augmentation_is_a_function_of_the_seed_alone(name, channels):
    preprocessing = ClassPreprocessing((24, 32), (0.5,) * channels, (0.25,) * channels)
    image = np.random.default_rng(0).integers(0, 256, (40, 50, channels), np.uint8)
    augment = build_class_augmenter([{"name": name, "p": 0.5 if "flip" in name else 1.0}], preprocessing)
    first = augment(image, np.random.default_rng(5))
    np.random.rand(3), torch.rand(3)
    assert torch.equal(first, augment(image, np.random.default_rng(5)))
    assert first.shape == (channels, 24, 32)
    others = [augment(image, np.random.default_rng(seed)) for seed in range(6, 12)]
    assert any(not torch.equal(first, other) for other in others)


def test_repeats_give_copies_that_are_augmented_differently(folder):
    data = ImageFolder(str(folder), size=16, augment=["random_resized_crop"], batch_size=10, repeats=2, num_workers=0)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    names = batch["case"]
    assert names[::2] == names[1::2]
    assert (len(names), len(set(names))) == (10, 5)
    images = batch["image"]
    assert not any(torch.equal(images[place], images[place + 1]) for place in range(0, 10, 2))
    assert torch.equal(images, next(iter(data.train_dataloader()))["image"])
    with pytest.raises(UserError, match="repeats"):
        ImageFolder(str(folder), repeats=0)


def test_no_recipe_asks_for_a_magnitude_that_timm_cuts():
    entries = [
        entry
        for path in packaged_recipes().values()
        for entry in yaml.safe_load(path.read_text())["data"]["init_args"].get("augment") or ()
        if isinstance(entry, dict) and entry["name"] == "randaugment"
    ]
    assert len(entries) == 3
    for entry in entries:
        change = _policy(entry["config"], (0, 0, 0), 224).ops[0]
        assert change.magnitude <= (change.magnitude_max or 10)


def test_augmentation_leaves_the_global_generators_alone():
    augment = build_class_augmenter(
        ["randaugment", "augmix", {"name": "erasing", "mode": "pixel", "p": 1.0}],
        ClassPreprocessing((24, 24), (0.5,), (0.25,)),
    )
    torch.manual_seed(0), np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0), np.random.seed(0)
    augment(np.zeros((24, 24, 1), np.uint8), np.random.default_rng(0))
    assert (torch.rand(1), np.random.rand()) == expected


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "randaugment", "config": "rnd-m9"}, "timm knows no"),
        ({"name": "randaugment", "config": "rand-mX"}, "knows no section 'mX'"),
        ({"name": "randaugment", "config": "rand-m15-n2"}, "takes magnitude 15 as 10; add mmax15"),
        ({"name": "randaugmnt"}, "Did you mean 'randaugment'"),
        ({"name": "random_resized_crop", "scale": [1, 0.5]}, "smaller number first"),
        ({"name": "erasing", "mode": "noise"}, "const, rand or pixel"),
        ({"name": "flip_horizontal", "swap_labels": [["a", "b"]]}, "for masks"),
    ],
)
def test_an_augmentation_that_cannot_be_is_told(entry, message):
    with pytest.raises(UserError, match=message):
        build_class_augmenter([entry], ClassPreprocessing((24, 24), (0.5,), (0.25,)))


def test_volumes_are_augmented_by_seed(tmp_path):
    file = npz(tmp_path / "adrenalmnist3d.npz", parts(), (12, 12, 12))
    data = MedMNIST(str(file), augment=["mirror", {"name": "affine", "p": 1.0}], batch_size=4, num_workers=0)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    once, again = (data.on_after_batch_transfer(dict(batch), 0)["image"] for _ in range(2))
    assert once.shape == (4, 1, 12, 12, 12)
    assert torch.equal(once, again)
    assert not torch.equal(once, batch["image"])
