import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from visattn.data.cases import find_cases
from visattn.data.splits import Split, find_groups
from visattn.errors import UserError
from visattn.labels import Labels
from visattn.survey import guess_group_by, guess_label_map, guess_labels, survey


def write(path, array, **keywords):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **keywords)
    return path


def pair(folder, stem, layout=("images", "masks"), shape=(20, 30), colour=True, values=(0, 255), suffix=".png"):
    """Write one image and its mask."""
    rng = np.random.default_rng(len(stem) + sum(stem.encode()))
    image = rng.integers(0, 256, (*shape, 3) if colour else shape, dtype=np.uint8)
    mask = np.full(shape, values[0], np.uint8)
    for number, value in enumerate(values[1:]):
        mask[3 + 4 * number : 6 + 4 * number, 5:20] = value
    write(folder / layout[0] / f"{stem}{suffix}", image)
    write(folder / layout[1] / f"{stem}.png", mask)


def test_counts_pairs_sizes_kinds_and_values(tmp_path):
    pair(tmp_path, "a")
    pair(tmp_path, "b", shape=(40, 24), colour=False)
    found = survey(tmp_path)
    assert [(one.name, one.part, one.usable) for one in found.pairs] == [("a", "train", True), ("b", "train", True)]
    assert found.sizes == {(20, 30): 1, (40, 24): 1}
    assert found.modes == {"RGB": 1, "L": 1}
    assert found.values == {0: 20 * 30 + 40 * 24 - 2 * 45, 255: 2 * 45}
    assert not found.grey  # one image has colour
    assert found.unpaired == found.unreadable == found.unequal == []


def test_what_is_wrong_is_listed_not_raised(tmp_path):
    for stem in ("a", "b", "c", "d", "e"):
        pair(tmp_path, stem)
    (tmp_path / "masks" / "a.png").unlink()
    (tmp_path / "images" / "b.png").unlink()
    write(tmp_path / "masks" / "c.png", np.zeros((10, 10), np.uint8))
    data = (tmp_path / "images" / "d.png").read_bytes()
    (tmp_path / "images" / "d.png").write_bytes(data[:-40])
    write(tmp_path / "images" / "e.bmp", np.zeros((20, 30, 3), np.uint8))
    found = survey(tmp_path)
    assert [line.partition(": ")[0].rpartition("/")[2] for line in found.unpaired] == ["e.png", "a.png", "b.png"]
    assert "shares its stem with e.bmp" in found.unpaired[0]
    assert [one.name for one in found.unequal] == ["c"]
    (line,) = found.unreadable
    assert "d.png" in line
    assert "truncated" in line
    assert [one.name for one in found.usable] == ["e"]


@pytest.mark.parametrize(
    ("folders", "parts"),
    [
        ({"": "abc"}, {"train": "abc"}),
        ({"train": "ab", "valid": "c", "test": "d"}, {"train": "ab", "val": "c", "test": "d"}),
        ({"TrainDataset": "ab", "TestDataset/one": "c", "TestDataset/two": "d"}, {"train": "ab", "test": "cd"}),
        ({"TestDataset/one": "c", "TestDataset/two": "d"}, {"train": "cd"}),
        ({"kvasir": "ab", "clinic": "c"}, {"train": "abc"}),
        ({"Training": "a", "Testing": "b"}, {"train": "a", "test": "b"}),
    ],
)
def test_parts(tmp_path, folders, parts):
    for folder, stems in folders.items():
        for stem in stems:
            pair(tmp_path / folder, stem)
    found = survey(tmp_path)
    assert {part: "".join(sorted(one.stem for one in found.of(part))) for part in found.parts} == parts


def test_cases_have_the_names_that_training_gives_them(tmp_path):
    for folder in ("train/one", "train/two", "val"):
        for stem in "ab":
            pair(tmp_path / folder, stem)
    found = survey(tmp_path)
    roots = [str(folder.path) for part in ("train", "val") for folder in found.parts[part]]
    assert sorted(one.name for one in found.pairs) == [case.name for case in find_cases(roots)]
    alone = survey(tmp_path / "val")
    assert [one.name for one in alone.pairs] == [case.name for case in find_cases([str(tmp_path / "val")])]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: None, "no such folder. Did you mean .*polyps"),
        (lambda root: root.write_text(""), "is a file"),
        (lambda root: (root / "pictures").mkdir(parents=True), "Found there: pictures"),
        (lambda root: write(root / "a_mask.png", np.zeros((4, 4), np.uint8)), "lie together"),
    ],
)
def test_a_folder_that_is_no_data_set(tmp_path, prepare, message):
    (tmp_path / "polyps").mkdir()
    prepare(tmp_path / "polips")
    with pytest.raises(UserError, match=message) as caught:
        survey(tmp_path / "polips")
    assert len(str(caught.value).splitlines()) <= 6


def test_the_folder_of_images_alone(tmp_path):
    pair(tmp_path / "polyps", "a")
    with pytest.raises(UserError, match="give the folder above, polyps"):
        survey(tmp_path / "polyps" / "images")


@pytest.mark.parametrize(("suffix", "tint", "grey"), [(".png", 0, True), (".png", 30, False), (".jpg", 0, True)])
def test_grey_in_three_channels(tmp_path, suffix, tint, grey):
    ramp = np.tile(np.arange(0, 200, 5, dtype=np.uint8), (40, 1))
    write(tmp_path / "images" / f"a{suffix}", np.stack([ramp + np.uint8(tint), ramp, ramp], -1))
    write(tmp_path / "masks" / "a.png", np.zeros((40, 40), np.uint8))
    assert survey(tmp_path).grey is grey


def test_brightness_is_that_of_the_pixels(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(low, high, (16, 16), dtype=np.uint8) for low, high in ((0, 30), (100, 250))]
    for number, image in enumerate(images):
        write(tmp_path / "images" / f"{number}.png", image)
        write(tmp_path / "masks" / f"{number}.png", np.zeros((16, 16), np.uint8))
    pixels = np.concatenate(images) / 255
    assert survey(tmp_path).brightness == pytest.approx((pixels.mean(), pixels.std()), abs=1e-3)


def test_what_a_caller_keeps_and_how_far_it_is(tmp_path):
    for stem in "abc":
        pair(tmp_path, stem)
    told = []
    found = survey(tmp_path, told.append, lambda image: image.shape)
    assert [one.kept for one in found.pairs] == [(20, 30, 3)] * 3
    assert told == [3, 3, 3]


def test_nothing_imports_torch():
    code = "import sys, visattn.survey, visattn.init; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


NOISY = {0: 900, 1: 40, 3: 20, 8: 5, 247: 4, 251: 30, 255: 300}
SOFT = {value: 3 for value in range(256)} | {0: 9000, 255: 4000}


@pytest.mark.parametrize(
    ("values", "labels", "ignore"),
    [
        ({0: 9, 255: 2}, {"background": 0, "foreground": 255}, None),
        ({0: 9, 1: 2}, {"background": 0, "foreground": 1}, None),
        ({1: 9, 2: 2}, {"background": 1, "foreground": 2}, None),
        (NOISY, {"background": 0, "foreground": 255}, None),
        (SOFT, {"background": 0, "foreground": 255}, None),
        ({0: 9, 1: 2, 2: 1}, {"background": 0, "label_1": 1, "label_2": 2}, None),
        ({0: 9, 1: 2, 2: 1, 4: 1}, {"background": 0, "label_1": 1, "label_2": 2, "label_3": 4}, None),
        ({0: 9, 128: 2, 255: 1}, {"background": 0, "label_1": 128, "label_2": 255}, None),
        (
            {0: 900, 4: 9, 118: 9, 120: 99, 125: 9, 251: 9, 255: 90},
            {"background": 0, "label_1": 120, "label_2": 255},
            None,
        ),
        ({0: 9, 1: 2, 255: 1}, {"background": 0, "foreground": 1}, 255),
        ({0: 9, 1: 2, 2: 2, 255: 1}, {"background": 0, "label_1": 1, "label_2": 2}, 255),
        ({0: 9, 600: 2, 601: 1}, {"background": 0, "label_1": 600, "label_2": 601}, None),
        ({value: 5 for value in range(41)}, {"background": 0, "foreground": list(range(1, 41))}, None),
    ],
)
def test_labels_from_mask_values(values, labels, ignore):
    guess = guess_label_map([values])
    assert (guess.labels, guess.ignore) == (labels, ignore)
    assert guess_labels(values) == labels
    assert guess.why
    # Whatever is guessed, training must read every value.
    Labels.from_config(guess.labels, None, guess.ignore).encode(np.array(list(values)), "mask")


def test_masks_of_both_habits():
    guess = guess_label_map([{0: 5, 1: 3}, {0: 5, 255: 3}])
    assert guess.labels == {"background": 0, "foreground": [1, 255]}
    assert guess.doubts


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({0: 100}, "nothing to learn"),
        ({}, "no values"),
        ({-1: 5, 0: 3}, "no labels"),
        ({value: 5 for value in range(256)}, "grey images or probabilities"),
    ],
)
def test_values_that_are_no_labels(values, message):
    with pytest.raises(UserError, match=message):
        guess_label_map([values])


def test_the_folder_names_the_class():
    assert guess_labels({0: 5, 255: 3}, "Kvasir-SEG") == {"background": 0, "polyp": 255}
    assert guess_labels({0: 5, 1: 3, 2: 1}, "Kvasir-SEG") == {"background": 0, "label_1": 1, "label_2": 2}


def names(pattern, people, images):
    return [pattern.format(person, image) for person in range(people) for image in range(images)]


@pytest.mark.parametrize(
    ("stems", "groups"),
    [
        (names("patient{:03d}_slice{}", 4, 5), 4),
        (names("Patient {}.frame{:03d}", 4, 5), 4),
        (names("lv_sub-{:02d}_T{}", 4, 5), 4),
        (names("site{1}_case{0}_x", 4, 5), 4),  # one person from several sites
        (names("patient{}_video{}_3", 4, 5), 4),  # the person comes before the video
        ([f"Image_{number:02d}{side}" for number in range(7) for side in "LR"], 7),
        (names("TCGA_CS_49{:02d}_{}", 9, 3), 9),
        ([f"ISIC_{number:07d}" for number in range(20)], None),
        ([f"case_{number}" for number in range(20)], None),
        ([str(number) for number in range(20)], None),
        (names("benign ({1})", 1, 9) + names("malignant ({1})", 1, 9), None),
        (names("patient1_{1}", 1, 20), None),  # one group cannot be divided
        ([*names("patient{}_{}", 4, 5), "other"], None),  # group_by must match every file
        ([f"cju{number}qkwl35" for number in range(9)], None),
    ],
)
def test_groups_from_names(tmp_path, stems, groups):
    guess = guess_group_by(stems)
    if groups is None:
        assert guess is None
        return
    assert guess is not None
    expression, why = guess
    assert f"{groups} groups" in why
    for stem in stems:
        for part in ("images", "masks"):
            path = tmp_path / part / f"{stem}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(cv2.imencode(".png", np.zeros((2, 2), np.uint8))[1].tobytes())
    found = find_groups(find_cases([str(tmp_path)]), Split(group_by=expression).group_by)
    assert len(set(found)) == groups
