"""Recipes that init writes for volumes: every layout, voxels of every shape, and a machine of any size."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from visattn.cli import main
from visattn.data.volume_folder import VolumeFolder
from visattn.errors import UserError
from visattn.init import write_recipe
from visattn.init.budget import CPU_SECONDS, choose_network
from visattn.init.machine import Machine
from visattn.init.volume_budget import plan_volume_budget
from visattn.init.volume_grid import plan_levels, plan_patch
from visattn.labels import Labels
from visattn.recipe import read_yaml, resolve
from visattn.recipe_cli import parse

CPU = Machine(2, 8 * 2**30)
LARGE = Machine(16, 128 * 2**30, "cuda", "H200", 140 * 2**30, 1, "bf16-mixed")
SMALL = Machine(4, 16 * 2**30, "cuda", "T4", 6 * 2**30, 1, "16-mixed")
LABELS = Labels.from_config({"background": 0, "a": 1, "b": 2})
THIN = np.array([[0, 0, -4.0, 7], [-0.8, 0, 0, 3], [0, 0.8, 0, -5], [0, 0, 0, 1]])  # axes P, S, L: 4 mm along L


def save(path, array, affine=THIN):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def pair(number, shape=(30, 34, 9), values=(1, 2), low=0.0, margin=0):
    rng = np.random.default_rng(number)
    label = np.zeros(shape, np.uint8)
    for at, value in enumerate(values):
        label[10 + 5 * at : 14 + 5 * at, 12:18, 3:6] = value
    image = (100 + 50 * label + rng.normal(0, 5, shape)).astype(np.float32)
    image[0, :, :] = low
    for axis in range(2):
        for side in (slice(None, margin), slice(shape[axis] - margin, None)) if margin else ():
            image[(slice(None),) * axis + (side,)] = 0
    return image, label


def decathlon(root, **options):
    for number in range(6):
        image, label = pair(number, **options)
        save(root / "imagesTr" / f"case_{number}.nii.gz", image)
        save(root / "labelsTr" / f"case_{number}.nii.gz", label)


def nnunet(root):
    for number in range(6):
        image, label = pair(number, low=-1000)
        for channel in range(2):
            save(root / "imagesTr" / f"c{number}_{channel:04d}.nii.gz", image - 50 * channel)
        save(root / "labelsTr" / f"c{number}.nii.gz", label)
    content = {"channel_names": {"0": "CT", "1": "PET"}, "labels": {"background": 0, "left_lung": 1, "right_lung": 2},
               "numTraining": 6, "file_ending": ".nii.gz"}  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(content))
    names = [f"c{number}" for number in range(6)]
    folds = [{"train": names[:4], "val": names[4:]}, {"train": names[2:], "val": names[:2]}]
    (root / "splits_final.json").write_text(json.dumps(folds))


def folders(root):
    for number in range(6):
        image, label = pair(number)
        save(root / "images" / f"p{number}.nii.gz", image)
        save(root / "masks" / f"p{number}_seg.nii.gz", label)


def bids(root):
    for subject in range(3):
        for session in range(2):
            image, label = pair(2 * subject + session)
            stem = f"sub-{subject}_ses-{session}"
            place = Path(f"sub-{subject}/ses-{session}/anat")
            save(root / place / f"{stem}_T1w.nii.gz", image)
            save(root / "derivatives" / "manual" / place / f"{stem}_dseg.nii.gz", label)


def case_folders(root):
    for number in range(6):
        image, label = pair(number)
        for name, array in (("t1", image), ("flair", image), ("seg", label)):
            save(root / f"pat{number}" / f"pat{number}_{name}.nii.gz", array)


LAYOUTS = (decathlon, nnunet, folders, bids, case_folders)


def written(folder, output, machine=CPU):
    code = write_recipe(folder, output, overwrite=True, machine=machine)
    return code, read_yaml(output.read_text(), "recipe")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_a_recipe_that_reads_its_data(tmp_path, layout, capsys):
    layout(tmp_path / "set")
    code, tree = written(tmp_path / "set", tmp_path / "r.yaml")
    assert code == 0
    arguments = tree["data"]["init_args"]
    assert tree["data"]["class_path"] == "VolumeFolder"
    assert arguments["spacing"] == pytest.approx([4, 0.8, 0.8])
    _, tree = resolve([str(tmp_path / "r.yaml")], [])
    parse(tree)
    data = VolumeFolder(**arguments, cache_dir=str(tmp_path / "cache"))
    data.setup("fit")
    count = {"train": len(data.cases["train"]), "val": len(data.cases["val"])}
    assert count["train"] + count["val"] == 6
    assert min(count.values()) >= 1
    assert "6 volumes with labels, all 30 x 34 x 9 voxels, PSL" in capsys.readouterr().out
    # Patches that the network can take: a window covers the thin axis, and strides along it come last.
    assert arguments["patch"][0] >= 8
    network = tree["model"]["init_args"]["network"]
    assert network["kernels"][0] == [1, 3, 3]
    assert network["strides"][0] == [1, 2, 2]


def test_what_dataset_json_and_splits_say_is_taken(tmp_path):
    nnunet(tmp_path / "set")
    _, tree = written(tmp_path / "set", tmp_path / "r.yaml", LARGE)
    arguments = tree["data"]["init_args"]
    assert arguments["labels"] == {"background": 0, "left_lung": 1, "right_lung": 2}
    assert arguments["channels"] == ["CT", "PET"]
    assert arguments["split"] == {"fold": 0}
    assert arguments["augment"][-1] == {"name": "mirror", "axes": [0], "swap_labels": [["left_lung", "right_lung"]]}
    assert tree["trainer"]["precision"] == "bf16-mixed"
    assert tree["model"]["init_args"]["optimizer"]["name"] == "sgd"


def test_ct_is_known_by_its_name_or_its_air(tmp_path):
    nnunet(tmp_path / "named")
    assert written(tmp_path / "named", tmp_path / "r.yaml")[1]["data"]["init_args"]["normalise"] == ["ct", "zscore"]
    for name, low, expected in (("air", -1000.0, "ct"), ("mri", 0.0, "zscore")):
        decathlon(tmp_path / name, low=low)
        assert written(tmp_path / name, tmp_path / "r.yaml")[1]["data"]["init_args"]["normalise"] == expected


def test_subjects_of_bids_and_patients_in_names_stay_together(tmp_path):
    bids(tmp_path / "bids")
    _, tree = written(tmp_path / "bids", tmp_path / "r.yaml")
    data = VolumeFolder(**tree["data"]["init_args"], cache_dir=str(tmp_path / "cache"))
    data.setup("fit")
    train, val = ({case.name.split("_")[0] for case in data.cases[part]} for part in ("train", "val"))
    assert not train & val


def test_a_margin_is_cut_where_it_is_worth_it(tmp_path):
    for name, margin in (("bare", 0), ("wide", 7)):
        decathlon(tmp_path / name, margin=margin)
        arguments = written(tmp_path / name, tmp_path / f"{name}.yaml")[1]["data"]["init_args"]
        assert arguments["crop_foreground"] is bool(margin)


def test_problems_are_told_and_the_recipe_is_written(tmp_path, capsys):
    decathlon(tmp_path / "set")
    (tmp_path / "set" / "labelsTr" / "case_3.nii.gz").unlink()
    path = tmp_path / "set" / "imagesTr" / "case_4.nii.gz"
    path.write_bytes(path.read_bytes()[:300])
    save(tmp_path / "set" / "labelsTr" / "case_5.nii.gz", np.zeros((4, 4, 4), np.uint8))
    code, _ = written(tmp_path / "set", tmp_path / "r.yaml")
    assert code == 1
    error = capsys.readouterr().err
    for number in (3, 4, 5):
        assert f"case_{number}" in error
    assert "3 problems to put right" in error


@pytest.mark.parametrize(
    ("values", "message"), [((), "nothing to learn"), (tuple(range(1, 3)), "2 volumes|1 volume|0 volumes")]
)
def test_what_nothing_can_be_learned_from_is_refused(tmp_path, values, message):
    decathlon(tmp_path / "set", values=values)
    if values:
        for path in sorted((tmp_path / "set" / "labelsTr").iterdir())[1:]:
            path.write_bytes(b"")
    with pytest.raises(UserError, match=message):
        write_recipe(tmp_path / "set", tmp_path / "r.yaml", machine=CPU)
    assert not (tmp_path / "r.yaml").exists()


@pytest.mark.parametrize("machine", [CPU, LARGE, SMALL])
@pytest.mark.parametrize(
    ("size", "spacing"),
    [
        ((36, 50, 37), (1, 1, 1)),
        ((170, 200, 170), (1, 1, 1)),
        ((320, 320, 24), (0.6, 0.6, 4)),
        ((15, 250, 250), (9, 1.5, 1.5)),
        ((512, 512, 300), (0.8, 0.8, 1.5)),
        ((3, 512, 512), (8, 0.4, 0.4)),
        ((5, 6, 4), (1, 1, 1)),
    ],
)
def test_a_plan_fits_the_machine_and_the_voxels(machine, size, spacing):
    budget = plan_volume_budget(LABELS, machine, np.array([size] * 50, float), spacing, 40, 10)
    network = budget.network
    filters = network.arguments["filters"]
    strides = network.arguments.get("strides", [[2] * 3] * (len(filters) - 1))
    kernels = network.arguments.get("kernels", [[3] * 3] * len(filters))
    for axis in range(3):
        step = int(np.prod([stride[axis] for stride in strides]))
        assert budget.patch[axis] % step == 0
        assert budget.patch[axis] < max(4, size[axis]) + step, "no window far larger than the volume"
    mm = np.array(spacing, float)
    for stride, kernel in zip([*strides, [1] * 3], kernels, strict=True):
        assert all(k == 3 for k, own in zip(kernel, mm, strict=True) if own < 2 * mm.min())
        mm = mm * stride
    memory = 0.8 * (machine.gpu_memory or machine.memory)
    assert budget.batch * np.prod(budget.patch) * network.pixel_bytes * 0.6 < memory
    assert budget.batch >= 2
    assert 1 <= budget.validate_every <= budget.epochs


def test_axes_of_long_voxels_are_mixed_when_the_others_are_as_long():
    levels = plan_levels((288, 288, 24), (0.6, 0.6, 4.0))
    assert levels.strides == ((2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2), (2, 2, 1))
    assert levels.kernels[:3] == ((3, 3, 1), (3, 3, 1), (3, 3, 3))
    assert plan_levels((64, 64, 64), (1, 1, 1)).plain
    assert plan_levels((64, 64, 64), (1, 1.9, 1)).plain, "nearly as long counts as equal"


def test_a_patch_is_a_cube_in_mm_as_far_as_the_volume_reaches():
    patch, levels = plan_patch((400, 400, 40), (1.0, 1.0, 4.0), lambda p, _: np.prod(p) <= 64 * 64 * 16)
    assert np.prod(patch) <= 64 * 64 * 16
    extent = np.array(patch) * (1, 1, 4)
    assert extent.max() / extent.min() < 1.6
    assert plan_patch((33, 50, 20), (1, 1, 1), lambda *_: True)[0] == (40, 56, 20)
    assert all(n % step == 0 for n, step in zip(patch, levels.multiple, strict=True))


def test_the_cost_of_a_network_is_what_was_counted():
    from visattn.networks import create_model

    for machine in (CPU, LARGE):
        for levels in (plan_levels((64, 64, 64), (1, 1, 1)), plan_levels((160, 160, 16), (1, 1, 5))):
            network = choose_network(LABELS, machine, levels)
            built = create_model(**network.arguments, in_channels=1, classes=3)
            count = sum(parameter.numel() for parameter in built.parameters())
            assert network.parameters == pytest.approx(count, rel=0.02)


def test_on_a_cpu_it_takes_about_half_an_hour_whatever_the_volumes(tmp_path):
    from visattn.init.volume_budget import affordable_spacing

    for size, spacing in (
        ((36, 50, 37), (1, 1, 1)),
        ((512, 512, 300), (0.8, 0.8, 1.5)),
        ((320, 320, 24), (0.6, 0.6, 4)),
    ):
        coarse = affordable_spacing(CPU, np.array([size] * 60, float), spacing)
        sizes = np.array([size] * 60) * spacing / np.array(coarse)
        assert all(new >= old for new, old in zip(coarse, spacing, strict=True))
        assert plan_volume_budget(LABELS, CPU, sizes, coarse, 48, 12).seconds < 2 * CPU_SECONDS
        assert affordable_spacing(LARGE, np.array([size] * 60, float), spacing) == list(spacing)


@pytest.mark.slow  # trains
@pytest.mark.parametrize("layout", [decathlon, nnunet])
def test_the_recipe_trains(tmp_path, layout):
    layout(tmp_path / "set")
    write_recipe(tmp_path / "set", tmp_path / "r.yaml", machine=CPU)
    words = ["fit", "--config", str(tmp_path / "r.yaml"), "--run", str(tmp_path / "run"), "--trainer.max_epochs", "2"]
    words += ["--data.iterations_per_epoch", "3", "--data.num_workers", "0", "--data.cache_dir", str(tmp_path / "c")]
    assert main([*words, "--trainer.check_val_every_n_epoch", "1", "--trainer.accelerator", "cpu"]) == 0
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").is_file()


@pytest.mark.slow
def test_real_volumes(real_data, tmp_path):
    code, tree = written(real_data / "hippocampus", tmp_path / "r.yaml", LARGE)
    assert code == 0
    arguments = tree["data"]["init_args"]
    assert arguments["labels"] == {"background": 0, "label_1": 1, "label_2": 2}
    assert arguments["patch"] == [40, 56, 40]
    assert arguments["spacing"] == [1, 1, 1]
