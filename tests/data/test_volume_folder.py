import json
import shutil

import nibabel
import numpy as np
import pytest
import torch

from visattn.data import volume_cache
from visattn.data.geometry import Geometry
from visattn.data.intensity import Normalise
from visattn.data.patches import PatchKey, PatchSampler
from visattn.data.spacing import median_spacing
from visattn.data.volume_folder import VolumeFolder
from visattn.data.volume_preprocessing import VolumePreprocessing
from visattn.data.volume_statistics import foreground_statistics, turned_spacing
from visattn.data.volumes import find_training_cases
from visattn.errors import UserError
from visattn.labels import Labels

LABELS = {"background": 0, "front": 1, "back": 2}
COUNT = 8
LPS = np.array([[0.0, -1.1, 0.1, 7], [-0.9, 0.0, 0.0, 3], [0.0, 0.1, 2.0, -5], [0, 0, 0, 1]])  # oblique, anisotropic


def draw(index: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(index)
    shape = tuple(int(n) for n in rng.integers(14, 20, 3))
    label = np.zeros(shape, np.uint8)
    i, j, k = (int(n) for n in rng.integers(3, 6, 3))
    label[i : i + 6, j : j + 4, k : k + 5] = 1
    label[i : i + 6, j + 4 : j + 6, k : k + 5] = 2
    image = 100 + 50 * label + rng.normal(0, 5, shape)
    return image.astype(np.float32), label


def write(folder, index, image, label, affine=LPS):
    for kind, array in (("images", image), ("labels", label)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, affine), folder / kind / f"case_{index}.nii.gz")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("volumes")
    for index in range(COUNT):
        write(folder, index, *draw(index))
    return folder


@pytest.fixture
def data(written, tmp_path):
    return shutil.copytree(written, tmp_path / "data")


def module(root, cache, **arguments):
    given = {"patch": [12, 16, 12], "split": {"val": 0.25}, "num_workers": 0, "batch_size": 2, **arguments}
    return VolumeFolder(str(root), given.pop("labels", LABELS), cache_dir=str(cache), **given)


def ready(root, cache, **arguments):
    made = module(root, cache, **arguments)
    made.setup("fit")
    return made


def test_batches(data, tmp_path):
    made = ready(data, tmp_path / "cache", iterations_per_epoch=5, augment=["affine", "mirror"])
    assert {part: len(cases) for part, cases in made.cases.items()} == {"train": 6, "val": 2, "test": 0}
    batches = list(made.train_dataloader())
    assert len(batches) == 5
    assert batches[0]["image"].shape == (2, 1, 12, 16, 12)
    assert batches[0]["image"].dtype == torch.float32
    assert batches[0]["target"].shape == (2, 12, 16, 12)
    assert batches[0]["target"].dtype == torch.uint8
    assert batches[0].keys() == {"image", "target", "case"}
    inside = torch.cat([b["image"][:, 0][b["target"] == 2] for b in batches])
    outside = torch.cat([b["image"][:, 0][b["target"] == 0] for b in batches])
    assert float(inside.mean()) > float(outside.mean()) + 2, "image and target lie on each other"
    (batch,) = list(made.val_dataloader())[:1]
    case = made.cases["val"][0]
    assert batch["case"] == [case.name]
    truth = made.read_case(case)[1]
    assert np.array_equal(batch["truth"][0], truth)
    assert batch["image"][0].shape[1:] == batch["target"][0].shape == batch["plan"][0].size
    assert np.array_equal(
        batch["plan"][0].labels_native(
            torch.from_numpy(np.eye(3, dtype=np.float32)[batch["target"][0]]).movedim(-1, 0)
        ),
        truth,
    )
    assert made.transfer_batch_to_device(batch, torch.device("cpu"), 0) is batch


def test_order_and_patches_depend_on_seed_epoch_and_position_alone(data, tmp_path):
    arguments = {"iterations_per_epoch": 4, "augment": ["affine", "noise"]}
    first = list(ready(data, tmp_path / "cache", **arguments).train_dataloader())
    made = ready(data, tmp_path / "cache", **arguments, num_workers=2)
    loader = made.train_dataloader()
    again = list(loader)
    assert all(
        torch.equal(a["image"], b["image"]) and a["case"] == b["case"] for a, b in zip(first, again, strict=True)
    )
    loader.batch_sampler.set_epoch(1)
    assert not torch.equal(next(iter(loader))["image"], first[0]["image"])
    made = ready(data, tmp_path / "cache", **arguments)
    made.load_state_dict({"epoch": 0, "batches": 3})
    rest = list(made.train_dataloader())
    assert len(rest) == 1
    assert torch.equal(rest[0]["image"], first[3]["image"])


def test_on_a_device_the_same_is_done_after_the_transfer(data, tmp_path, monkeypatch):
    arguments = {"iterations_per_epoch": 1, "augment": ["affine", "gamma", "mirror"]}
    (loaded,) = list(ready(data, tmp_path / "cache", **arguments).train_dataloader())
    made = ready(data, tmp_path / "cache", **arguments)
    monkeypatch.setattr(made, "_on_device", lambda: True)
    (raw,) = list(made.train_dataloader())
    assert raw["image"].shape[2:] == made.cut
    late = made.on_after_batch_transfer(raw, 0)
    assert torch.equal(late["image"], loaded["image"])
    assert torch.equal(late["target"], loaded["target"])


def test_oversampled_patches_are_centred_on_every_class(data, tmp_path):
    made = ready(data, tmp_path / "cache", patch=[3, 3, 3], oversample=1.0, orientation=None)
    patches = [made._sets["train"][PatchKey(i % 6, 0, i)]["target"] for i in range(60)]
    middles = [int(patch[1, 1, 1]) for patch in patches]
    assert set(middles) == {1, 2}, "no patch reaches the border here, so every middle is foreground"
    assert 15 < middles.count(2) < 45, "classes come alike, though one has half the voxels"
    made = ready(data, tmp_path / "cache", patch=[3, 3, 3], oversample=0.0, orientation=None)
    middles = [int(made._sets["train"][PatchKey(i % 6, 0, i)]["target"][1, 1, 1]) for i in range(60)]
    assert middles.count(0) > 40


def test_small_volumes_lie_where_prediction_puts_them(data, tmp_path):
    made = ready(data, tmp_path / "cache", patch=[31, 30, 25])
    sample = made._sets["train"][PatchKey(0)]
    entry = made._sets["train"].entries[0]
    from visattn.inference3d import plan_windows

    start = [-starts[0] for starts in plan_windows(entry.plan.size, (31, 30, 25)).starts]
    inner = tuple(slice(low, low + size) for low, size in zip(start, entry.plan.size, strict=True))
    assert np.array_equal(sample["image"][(slice(None), *inner)], entry.array("image"))
    assert float(sample["image"].abs().sum()) == pytest.approx(float(np.abs(entry.array("image")).sum()), rel=1e-5)


def test_sampler_shares_cases_evenly_between_epochs_and_devices():
    whole = list(PatchSampler(5, 4, 5, seed=1))
    assert np.bincount([key.item for batch in whole for key in batch]).tolist() == [4] * 5
    halves = [list(PatchSampler(5, 2, 5, seed=1, rank=rank, world=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    assert len(PatchSampler(5, 4, None, seed=1)) == 1
    assert len(PatchSampler(50, 4, None, seed=1)) == 12


def test_what_was_read_and_prepared_once_is_not_again(data, tmp_path, monkeypatch):
    first = ready(data, tmp_path / "cache")

    def refuse(*args):
        raise AssertionError("read again")

    reads = []
    real = volume_cache.read_case
    with monkeypatch.context() as patch:
        patch.setattr(volume_cache, "read_case", refuse)
        again = ready(data, tmp_path / "cache")
        assert again.fingerprint == first.fingerprint
        ready(data, tmp_path / "cache", patch=[8, 8, 8])  # a patch changes no volume
    monkeypatch.setattr(volume_cache, "read_case", lambda case: reads.append(case.name) or real(case))
    image, label = draw(3)
    write(data, 3, image + 1, label)
    changed = ready(data, tmp_path / "cache")
    assert set(reads) == {"case_3"}
    assert changed.fingerprint != first.fingerprint
    ready(data, tmp_path / "cache", spacing=[2.0, 2.0, 2.0])
    assert len(set(reads)) == COUNT
    reads.clear()
    ready(data, tmp_path / "cache", labels={"background": 0, "both": [1, 2]})
    assert len(set(reads)) == COUNT


def test_damaged_entries_are_made_again(data, tmp_path):
    made = ready(data, tmp_path / "cache")
    entry = made._sets["train"].entries[0]
    expected = np.array(entry.array("image"))
    path = entry.folder / "image.npy"
    path.write_bytes(path.read_bytes()[:-9])
    again = ready(data, tmp_path / "cache")._sets["train"].entries[0]
    assert np.array_equal(again.array("image"), expected)
    (entry.folder / "target.npy").unlink()
    again = ready(data, tmp_path / "cache")._sets["train"].entries[0]
    assert again.array("target").any()
    assert not list((tmp_path / "cache").rglob("*.part")), "nothing half-made is left"


def test_processes_that_prepare_a_volume_at_once_share_it(data, tmp_path, monkeypatch):
    cache, keep, others = tmp_path / "cache", volume_cache.VolumeCache._keep, []
    entries = ready(data, cache)._sets["train"].entries
    twin = shutil.copytree(entries[0].folder, tmp_path / "twin")
    shutil.rmtree(cache / "volume")

    def late(self, folder, *arguments):
        if folder == entries[0].folder:  # another process has just finished the same
            shutil.copytree(twin, folder)
            others.append((folder / "image.npy").stat().st_ino)
        keep(self, folder, *arguments)

    monkeypatch.setattr(volume_cache.VolumeCache, "_keep", late)
    ready(data, cache)
    assert [(entries[0].folder / "image.npy").stat().st_ino] == others, "what the other made is in use and stays"
    assert not list(cache.rglob("*.part"))


def test_the_cache_is_kept_out_of_the_data(data, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="within the data set"):
        ready(data, data / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    VolumeFolder(str(data), LABELS, patch=[8, 8, 8]).setup("fit")
    assert (tmp_path / "home" / "visattn" / "volumes").is_dir()
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="cache_dir"):
        ready(data, blocked)


def test_problems_are_collected_and_name_the_files(data, tmp_path):
    image, label = draw(0)
    write(data, 0, image, label + 5)
    write(data, 1, draw(1)[0], label[:-1])
    with pytest.raises(UserError) as error:
        ready(data, tmp_path / "cache")
    text = str(error.value)
    assert text.startswith("2 problems in the data (8 cases)")
    assert "labels/case_0.nii.gz" in text
    assert "labels/case_1.nii.gz" in text


def test_empty_labels_and_missing_windows_are_told(data, tmp_path):
    with pytest.raises(UserError, match="holds anything but 'background'"):
        ready(data, tmp_path / "cache", labels={"background": [0, 1, 2], "other": 9})
    with pytest.raises(UserError, match=r"data\.patch"):
        ready(data, tmp_path / "cache", patch=None)
    wrongs = [
        ({"oversample": 2.0}, "oversample"),
        ({"batch_size": 0}, "batch_size"),
        ({"iterations_per_epoch": 0}, "iterations_per_epoch"),
        ({"normalise": "z"}, "zscore"),
        ({"normalise": ["zscore", "ct"]}, "normalise"),
        ({"spacing": [1.0, 2.0]}, "spacing"),
    ]
    for wrong, text in wrongs:
        with pytest.raises(UserError, match=text):
            ready(data, tmp_path / "cache", **wrong)


def test_statistics_come_from_the_training_cases_only(data, tmp_path):
    arguments = {"normalise": "ct", "spacing": "median"}
    first = ready(data, tmp_path / "cache", **arguments)
    method = first.preprocessing.normalise[0]
    assert method.complete
    values = np.concatenate([image[0][truth > 0] for image, truth in map(first.read_case, first.cases["train"])])
    assert method.mean == pytest.approx(float(values.mean(dtype=np.float64)), rel=1e-5)
    assert (method.low, method.high) == pytest.approx(tuple(np.percentile(values, [0.5, 99.5])), rel=1e-5)
    val = int(first.cases["val"][0].name[-1])
    image, label = draw(val)
    write(data, val, 3 * image, label, LPS @ np.diag([3, 1, 1, 1]))
    assert ready(data, tmp_path / "cache", **arguments).preprocessing == first.preprocessing
    train = int(first.cases["train"][0].name[-1])
    image, label = draw(train)
    write(data, train, 3 * image, label)
    changed = ready(data, tmp_path / "cache", **arguments)
    assert changed.preprocessing.normalise[0].mean > method.mean
    assert VolumePreprocessing.from_config(first.preprocessing.to_config()) == first.preprocessing


def test_median_spacing_follows_the_rule_for_thick_slices():
    assert median_spacing([(1, 1, 1), (2, 1, 1.5), (3, 1, 2)]) == (2, 1, 1.5)
    thick = [(4 + index, 0.5, 0.5) for index in range(11)]  # the median would be 9
    assert median_spacing(thick) == (5, 0.5, 0.5)
    assert median_spacing([(1, 0.5, 0.5), *[(9, 2, 2)] * 3, (1, 2, 2)]) == (2, 2, 2), "never finer than the others"
    geometry = Geometry((5, 6, 7), LPS)
    x, y, z = geometry.zooms
    assert turned_spacing(geometry, None) == pytest.approx((x, y, z))
    assert turned_spacing(geometry, "RAS") == pytest.approx((y, x, z))


def test_foreground_of_one_value_cannot_be_scaled(data):
    cases = find_training_cases(str(data))
    for index in range(COUNT):
        image, label = draw(index)
        write(data, index, np.zeros_like(image), label)
    with pytest.raises(UserError, match="'ct' needs"):
        foreground_statistics(cases, Labels.from_config(LABELS), [Normalise("ct")])


def test_the_checkpoints_preprocessing_wins_or_must_agree(data, tmp_path):
    arguments = {"normalise": "ct", "spacing": "median"}
    theirs = ready(data, tmp_path / "cache", **arguments).preprocessing
    for index in range(COUNT):
        image, label = draw(index)
        write(data, index, image + 7, label, LPS @ np.diag([2, 1, 1, 1]))
    made = module(data, tmp_path / "cache", **arguments)
    made.adopt(theirs.to_config(), "best.ckpt")
    made.setup("fit")
    assert made.preprocessing == theirs
    for wrong in ({"patch": [8, 8, 8]}, {"orientation": None}, {"normalise": "zscore"}, {"spacing": [9.0, 9.0, 9.0]},
                  {"channels": ["t1"]}):  # fmt: skip
        made = module(data, tmp_path / "cache", **{**arguments, **wrong})
        with pytest.raises(UserError, match=f"data.{next(iter(wrong))}"):
            made.adopt(theirs.to_config(), "best.ckpt")
    with pytest.raises(UserError, match="trained on images"):
        made.adopt({"size": [3, 3]}, "best.ckpt")


def test_a_test_root_is_prepared_as_the_checkpoint_says(data, tmp_path):
    theirs = ready(data, tmp_path / "cache", normalise="ct").preprocessing
    other = tmp_path / "other"
    for index in range(2):
        write(other, index, *draw(20 + index))
    made = module(data, tmp_path / "cache", normalise="ct", test_root=str(other))
    made.adopt(theirs.to_config(), "best.ckpt")
    made.setup("test")
    assert [batch["case"][0] for batch in made.test_dataloader()] == ["case_0", "case_1"]


def test_groups_folds_and_the_splits_of_nnunet(data, tmp_path):
    made = ready(data, tmp_path / "cache", split={"val": 0.25, "group_by": r"case_(\d)"})
    assert {case.group for cases in made.cases.values() for case in cases} == set("01234567")
    folds = module(data, tmp_path / "cache", split={"folds": 4}).find_folds()
    assert sorted(case.name for fold in folds for case in fold["val"]) == [f"case_{i}" for i in range(COUNT)]
    raw = tmp_path / "nnUNet_raw" / "Dataset001_x"
    for kind, ending in (("images", "_0000"), ("labels", "")):
        (raw / f"{kind}Tr").mkdir(parents=True)
        for path in (data / kind).iterdir():
            shutil.copy(path, raw / f"{kind}Tr" / path.name.replace(".nii", f"{ending}.nii"))
    content = {"channel_names": {"0": "t1"}, "labels": {"background": 0, "front": 1, "back": 2}, "numTraining": COUNT,
               "file_ending": ".nii.gz"}  # fmt: skip
    (raw / "dataset.json").write_text(json.dumps(content))
    names = [f"case_{i}" for i in range(COUNT)]
    splits = [{"train": names[:6], "val": names[6:]}, {"train": names[2:], "val": names[:2]}]
    (raw / "splits_final.json").write_text(json.dumps(splits))
    assert [case.name for case in ready(raw, tmp_path / "cache", split={"fold": 1}).cases["val"]] == names[:2]
    made = ready(raw, tmp_path / "cache", split=None)
    assert [case.name for case in made.cases["val"]] == names[6:]
    assert made.preprocessing.channels == ("t1",)
    folds = module(raw, tmp_path / "cache", split={"folds": 2}).find_folds()
    assert [[case.name for case in fold["val"]] for fold in folds] == [names[6:], names[:2]]
    assert len(ready(raw, tmp_path / "cache", split={"val": 0.5}).cases["val"]) == 4, "the recipe's own word counts"


def test_whole_volumes_of_one_size(data, tmp_path):
    made = ready(data, tmp_path / "cache", patch=None, size=[10, 12, 8], augment=["affine"])
    batch = next(iter(made.train_dataloader()))
    assert batch["image"].shape == (2, 1, 10, 12, 8)
    assert made.window == (10, 12, 8)
