"""`visattn doctor` on volumes: planted defects, each found under its code; sound sets without a warning."""

import inspect
import json
import shutil
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from visattn.cli import main
from visattn.data.volume_folder import VolumeFolder
from visattn.doctor import examine_folder
from visattn.doctor.volume_sets import KEYS

COUNT = 9
SHAPE = (18, 20, 16)
AFFINE = np.array([[1.0, 0, 0, -10], [0, 1.2, 0, -12], [0, 0, 2, -16], [0, 0, 0, 1]])
TILT = np.array([[0.8, 0.6, 0, 0], [-0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
RECIPE = """\
model:
  class_path: SegmentationTask
  init_args:
    network: {{name: unet3d}}
data:
  class_path: VolumeFolder
  init_args:
    root: {root}
    labels: {{background: 0, tumour: 1}}
    patch: [16, 16, 16]
    split: {split}
"""


def bad_volumes():
    sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
    try:
        import bad_volumes
    finally:
        sys.path.pop(0)
    return bad_volumes.CASES


BAD = bad_volumes()


def draw(index):
    """A smooth blob on noise, another one for each index, and a ball in it as the label."""
    rng = np.random.default_rng(index)
    places = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), -1)
    centre = np.array(SHAPE) / 2 + rng.uniform(-2, 2, 3)
    reach = np.sqrt((((places - centre) / rng.uniform(5, 8, 3)) ** 2).sum(-1))
    image = 300 * (reach < 1) + 100 * np.exp(-reach) + rng.normal(50, 6, SHAPE)
    spot = centre + rng.uniform(-2, 2, 3)
    label = (np.sqrt(((places - spot) ** 2).sum(-1)) < 2.6).astype(np.uint8)
    return (image + 200 * label).astype(np.float32), label


def save(path, array, affine=AFFINE, header=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, affine, header)
    image.set_sform(affine, 1)
    if header is None:
        image.set_qform(affine, 1)
    nibabel.save(image, path)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("volumes") / "set"
    for index in range(COUNT):
        image, label = draw(index)
        save(image_path(root, index), image)
        save(label_path(root, index), label)
    return root


@pytest.fixture
def sound(tmp_path, original):
    """A data set without anything to warn about."""
    return Path(shutil.copytree(original, tmp_path / "set"))


def image_path(root, index):
    return root / f"imagesTr/case{chr(97 + index)}_0000.nii.gz"


def label_path(root, index):
    return root / f"labelsTr/case{chr(97 + index)}.nii.gz"


def codes(root):
    return examine_folder(root).codes()


def test_a_sound_set_has_no_warning(sound, capsys):
    assert main(["doctor", str(sound)]) == 0
    said = capsys.readouterr().out
    assert "9 cases, 0 errors, 0 warnings" in said
    assert "nnunet" in said or "decathlon" in said


def with_image(change, affine=AFFINE):
    def plant(root):
        image, label = draw(2)
        save(image_path(root, 2), change(image, label), affine)

    return plant


def with_label(change, affine=AFFINE):
    def plant(root):
        save(label_path(root, 2), change(draw(2)[1]), affine)

    return plant


def both(affine):
    def plant(root):
        image, label = draw(2)
        save(image_path(root, 2), image, affine)
        save(label_path(root, 2), label, affine)

    return plant


def moved(*by):
    affine = AFFINE.copy()
    affine[:3, 3] += by
    return affine


def all_labels(change):
    def plant(root):
        for index in range(COUNT):
            save(label_path(root, index), change(draw(index)[1], index))

    return plant


def apart_forms(root):
    image, _ = draw(2)
    volume = nibabel.Nifti1Image(image, AFFINE)
    volume.set_sform(AFFINE, 1)
    volume.set_qform(moved(0, 0, 3), 1)
    nibabel.save(volume, image_path(root, 2))


def no_forms(root):
    for path, array in ((image_path(root, 2), draw(2)[0]), (label_path(root, 2), draw(2)[1])):
        volume = nibabel.Nifti1Image(array, None)
        volume.header["sform_code"] = volume.header["qform_code"] = 0
        nibabel.save(volume, path)


def nan_part(image, label):
    image[3:5, 4, 5] = np.nan
    image[9, 9, 9] = np.inf
    return image


def speck(label):
    label[1, 1, 1] = 1
    return label


def noisy(image):
    return image + np.random.default_rng(0).normal(0, 2, SHAPE).astype(np.float32)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def one_slice(root):
    image, label = draw(2)
    save(image_path(root, 2), image[:, :, 4:5])
    save(label_path(root, 2), label[:, :, 4:5])


def tiny(label):
    label[:] = 0
    label[9, 9, 9:12] = 1
    return label


def copy_of(index, change=lambda image: image):
    return lambda root: save(image_path(root, 2), change(draw(index)[0]))


def masked_and_flipped(root):
    for index in range(COUNT):
        image, label = draw(index)
        image[:, :, :9] = 0
        label[:] = 0
        label[8:12, 8:12, 10:14] = 1
        save(image_path(root, index), image)
        save(label_path(root, index), label[:, :, ::-1] if index == 2 else label)


def second_channel(affine=AFFINE, shape=None, but=None):
    def plant(root):
        for index in range(COUNT):
            image = draw(index)[0] if shape is None else np.ones(shape, np.float32) * np.arange(shape[2])
            place = affine if index == 2 else AFFINE
            if index != but:
                save(image_path(root, index).with_name(f"case{chr(97 + index)}_0001.nii.gz"), image[::-1].copy(), place)

    return plant


PLANTED = {
    "nothing in it": (lambda root: image_path(root, 2).write_bytes(b""), "empty-file"),
    "cut": (lambda root: cut(image_path(root, 2), 900), "truncated-file"),
    "text": (lambda root: image_path(root, 2).write_text("no volume " * 99), "not-a-volume"),
    "label cut": (lambda root: cut(label_path(root, 2), -9), "truncated-file"),
    "no label": (lambda root: label_path(root, 2).unlink(), "volume-incomplete"),
    "no image": (lambda root: image_path(root, 2).unlink(), "volume-incomplete"),
    "missing channel": (second_channel(but=2), "volume-incomplete"),
    "channel far away": (second_channel(moved(500, 0, 0)), "channel-elsewhere"),
    "channel on another grid": (second_channel(moved(0.5, 0.3, 0)), "channel-resampled"),
    "label of another size": (with_label(lambda label: label[:-1]), "grid-mismatch"),
    "label moved": (with_label(lambda label: label, moved(4, 0, 0)), "grid-mismatch"),
    "label mirrored in its header": (with_label(lambda label: label, AFFINE * [[-1], [1], [1], [1]]), "grid-mismatch"),
    "soft label": (with_label(lambda label: label * np.float32(0.5)), "label-not-whole"),
    "nan label": (with_label(lambda label: np.where(label, np.nan, 0).astype(np.float32)), "label-not-whole"),
    "empty label": (with_label(np.zeros_like), "mask-empty"),
    "full label": (with_label(np.ones_like), "mask-full"),
    "all labels empty": (all_labels(lambda label, i: label * 0), "all-masks-empty"),
    "most labels empty": (all_labels(lambda label, i: label * (i < 2)), "masks-mostly-empty"),
    "tiny label": (with_label(tiny), "label-tiny"),
    "speck": (with_label(speck), "label-specks"),
    "label as float": (with_label(lambda label: label.astype(np.float32)), "label-float"),
    "label beside the image": (masked_and_flipped, "label-on-background"),
    "constant": (with_image(lambda image, label: image * 0 + 5), "volume-constant"),
    "nan": (with_image(nan_part), "volume-nan"),
    "all nan": (with_image(lambda image, label: image * np.nan), "volume-not-finite"),
    "inverted": (with_image(lambda image, label: 1000 - image), "volume-outlier"),
    "exact copy": (copy_of(5), "volume-duplicate"),
    "scaled copy": (copy_of(5, lambda image: image * 3 + 10), "volume-near-duplicate"),
    "noisy copy": (copy_of(5, noisy), "volume-near-duplicate"),
    "same label twice": (lambda root: save(label_path(root, 2), draw(5)[1]), "mask-repeated"),
    "four axes": (with_image(lambda image, label: np.stack([image, image], -1)), "volume-axes|volume-incomplete"),
    "forms apart": (apart_forms, "header-contradiction"),
    "no forms": (no_forms, "header-no-position"),
    "shear": (both(AFFINE @ np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])), "affine-shear"),
    "micrometres": (both(AFFINE @ np.diag([1e-3, 1e-3, 1e-3, 1])), "spacing-odd"),
    "other spacing": (both(AFFINE @ np.diag([3, 3, 3, 1])), "spacing-mixed"),
    "other orientation": (both(AFFINE[:, [1, 0, 2, 3]]), "orientation-mixed"),
    "oblique": (both(TILT @ AFFINE), "oblique"),
    "single slice": (one_slice, "volume-thin"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_defects(sound, name):
    plant, code = PLANTED[name]
    plant(sound)
    found = codes(sound)
    assert any(one in found for one in code.split("|")), f"{code} is not among {sorted(found)}"


def test_every_bad_file_is_an_error(sound):
    """Whatever a reader refuses is told with the file, and the other cases are examined all the same."""
    names = {f"bad{number:02d}": name for number, name in enumerate(BAD)}
    for stem, name in names.items():
        (sound / f"imagesTr/{stem}_0000.nii.gz").write_bytes(BAD[name][0]())
        shutil.copy(label_path(sound, 2), sound / f"labelsTr/{stem}.nii.gz")
    report = examine_folder(sound)
    told = " ".join(
        place.path for finding in report.findings if finding.severity == "error" for place in finding.places
    )
    assert [name for stem, name in names.items() if f"{stem}_0000" not in told] == []
    assert "case" not in told
    assert report.exit_code == 1


def run_recipe(root, split, capsys, *more):
    path = root.parent / "recipe.yaml"
    path.write_text(RECIPE.format(root=root, split=split))
    code = main(["doctor", "--config", str(path), "--json", *more])
    report = json.loads(capsys.readouterr().out)
    return code, {finding["code"]: finding for finding in report["findings"]}


def test_a_recipe(sound, capsys):
    code, found = run_recipe(sound, "{val: 0.5}", capsys)
    assert code == 0
    assert "train 5, val 4" in found["parts"]["message"] or "train 4, val 5" in found["parts"]["message"]
    save(label_path(sound, 2), draw(2)[1] * 3)
    code, found = run_recipe(sound, "{val: 0.5}", capsys)
    assert code == 1
    assert "of values 3" in found["values-outside-labels"]["files"][0]["note"]


def test_a_copy_across_the_parts_of_a_recipe(sound, capsys):
    names = [f"case{chr(97 + index)}" for index in range(COUNT)]
    splits = sound.parent / "splits.json"
    splits.write_text(json.dumps({"train": names[:5], "val": names[5:]}))
    save(image_path(sound, 2), draw(7)[0])
    code, found = run_recipe(sound, f"{{files: {splits}}}", capsys)
    assert code == 1
    assert "train and val" in found["duplicate-across-parts"]["files"][0]["note"]
    save(image_path(sound, 2), draw(7)[0] * 2)
    code, found = run_recipe(sound, f"{{files: {splits}}}", capsys)
    assert "near-duplicate-across-parts" in found
    code, found = run_recipe(sound, f"{{files: {splits}, group_by: '^(....)'}}", capsys)
    assert "group-across-parts" in found


def test_label_that_no_case_holds(sound, capsys):
    _, found = run_recipe(sound, "{val: 0.5}", capsys, "--data.labels", "{background: 0, tumour: 1, oedema: 2}")
    assert "oedema (2)" in found["label-never-present"]["message"]


def test_keys_are_those_of_the_data_module():
    parameters = inspect.signature(VolumeFolder.__init__).parameters
    wanted = {name: p.default for name, p in parameters.items() if name != "self"}
    assert {name: None if value is inspect.Parameter.empty else value for name, value in wanted.items()} == KEYS


def test_case_folders_are_guessed(tmp_path, capsys):
    for index in range(2):
        image, label = draw(index)
        for name, array in (("t1c", image), ("flair", image[::-1].copy()), ("brainmask", label), ("seg", label)):
            save(tmp_path / f"set/p{index}/p{index}_{name}.nii.gz", array)
    assert main(["doctor", str(tmp_path / "set")]) == 0
    said = capsys.readouterr().out
    assert "'t1c': '{case}/{case}_t1c.nii.gz'" in said
    assert "'label': '{case}/{case}_seg.nii.gz'" in said
    assert "brainmask" not in said


def test_groups_table(sound, capsys, tmp_path):
    save(image_path(sound, 2), draw(5)[0])
    assert main(["doctor", str(sound), "--groups", str(tmp_path / "groups.csv")]) == 0
    rows = dict(line.split(",") for line in (tmp_path / "groups.csv").read_text().splitlines()[1:])
    assert rows["casec"] == rows["casef"] == "casec"
    assert len(set(rows.values())) == COUNT - 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hippocampus", "brats2015_examples"])
def test_no_false_error_on_published_volumes(real_data, name, capsys):
    assert main(["doctor", str(real_data / name)]) == 0
    assert "0 errors, 0 warnings" in capsys.readouterr().out
