import json
import logging
import pickle

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from visattn.data import DATA
from visattn.data.image_mask_folder import ImageMaskFolder
from visattn.data.images import read_image, read_mask
from visattn.data.phantom import write_phantom
from visattn.errors import UserError
from visattn.labels import IGNORE

LABELS = {"background": 0, "polyp": 255}
STRONG = [
    {"name": "affine", "rotate": 180, "p": 1},
    "flip_horizontal",
    {"name": "elastic", "p": 0.3},
    {"name": "colour", "p": 1},
    {"name": "noise", "p": 0.5},
    {"name": "cutout", "p": 0.5},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty images with masks, of 48 x 60 pixels."""
    root = tmp_path_factory.mktemp("phantom")
    write_phantom(root, 20, seed=11, size=(48, 60))
    return str(root)


def module(folder, **keywords):
    data = ImageMaskFolder(
        **{"root": folder, "labels": LABELS, "size": 32, "batch_size": 4, "num_workers": 0, **keywords}
    )
    data.setup("fit")
    return data


def batches(data, epoch=0):
    loader = data.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)
    return list(loader)


def equal(one, two):
    return len(one) == len(two) and all(
        torch.equal(a["image"], b["image"]) and torch.equal(a["target"], b["target"]) and a["case"] == b["case"]
        for a, b in zip(one, two, strict=True)
    )


def test_table_names_the_class():
    path, _, name = DATA["ImageMaskFolder"].rpartition(".")
    assert path == ImageMaskFolder.__module__
    assert name == ImageMaskFolder.__name__


def test_training_batches(folder):
    data = module(folder, augment=STRONG)
    found = batches(data)
    assert len(found) == 4  # 18 cases in fours, the rest waits for another epoch
    for batch in found:
        assert batch["image"].shape == (4, 3, 32, 32)
        assert batch["image"].dtype == torch.float32
        assert batch["target"].shape == (4, 32, 32)
        assert batch["target"].dtype == torch.uint8
        assert set(batch["target"].unique().tolist()) <= {0, 1}
        assert len(batch["case"]) == 4
    assert 0.3 < torch.cat([batch["image"] for batch in found]).std() < 3


def test_validation_batches_are_native_whole_and_plain(folder):
    data = module(folder, augment=STRONG, split={"val": 0.3})
    found = list(data.val_dataloader())
    assert [len(batch["case"]) for batch in found] == [3, 3]
    cases = {case.name: case for case in data.cases["val"]}
    for batch in found:
        assert batch["image"].shape[1:] == (3, 32, 32)
        for name, target, path, group in zip(
            batch["case"], batch["target"], batch["path"], batch["group"], strict=True
        ):
            assert torch.equal(target, torch.tensor(read_mask(cases[name].mask) // 255).to(torch.uint8))
            assert path == str(cases[name].image)
            assert group == name
    assert sorted(name for batch in found for name in batch["case"]) == sorted(cases)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 mistrusts it beside threads
@pytest.mark.parametrize("cache", [True, False])
def test_samples_do_not_depend_on_workers(folder, cache):
    alone = module(folder, augment=STRONG, cache=True)
    shared = module(folder, augment=STRONG, num_workers=2, cache=cache)
    loader = shared.train_dataloader()
    for epoch in (0, 1):  # workers live on, so the epoch must reach them
        loader.batch_sampler.set_epoch(epoch)
        assert equal(batches(alone, epoch), list(loader))
    assert not equal(batches(alone, 0), batches(alone, 1))


def test_sets_can_be_sent_to_another_process(folder):  # as workers that are not forked need
    data = module(folder, augment=STRONG)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        copy = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
        one, two = (collate([dataset[0]]) for dataset, collate in ((loader.dataset, loader.collate_fn), copy))
        assert torch.equal(one["image"], two["image"])


def test_a_case_looks_different_in_every_epoch(folder):
    data = module(folder, augment=STRONG)
    seen = set()
    for epoch in range(5):
        for batch in batches(data, epoch):
            for image in batch["image"]:
                assert image.numpy().tobytes() not in seen
                seen.add(image.numpy().tobytes())


def test_seed_decides_and_torch_is_left_alone(folder):
    assert equal(batches(module(folder, augment=STRONG, seed=5)), batches(module(folder, augment=STRONG, seed=5)))
    assert not equal(batches(module(folder, augment=STRONG, seed=5)), batches(module(folder, augment=STRONG, seed=6)))
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches(module(folder, augment=STRONG))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


class Recorder(L.LightningModule):
    """Notes what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append((self.current_epoch, sorted(batch), tuple(batch["image"].shape), batch["image"].sum().item()))
        return self.weight * 0

    def validation_step(self, batch, index):
        self.seen.append((self.current_epoch, sorted(batch)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def train(data, folder, epochs, ckpt_path=None):
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    recorder = Recorder()
    trainer.fit(recorder, data, ckpt_path=ckpt_path, weights_only=True)
    return recorder.seen, next((folder / "checkpoints").glob("*.ckpt"))


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*", "ignore:.*LeafSpec.*:FutureWarning", "ignore:The dirpath"
)
def test_lightning_sets_the_epoch_also_when_it_resumes(folder, tmp_path):
    whole, _ = train(module(folder, augment=STRONG), tmp_path / "whole", 3)
    _, checkpoint = train(module(folder, augment=STRONG), tmp_path / "half", 2)
    rest, _ = train(module(folder, augment=STRONG), tmp_path / "rest", 3, checkpoint)
    assert rest == [entry for entry in whole if entry[0] == 2]
    assert len({entry[3] for entry in whole if len(entry) == 4}) == 12  # no epoch repeats another
    assert whole[0][1] == ["case", "image", "target"]
    assert whole[4][1] == ["case", "group", "image", "path", "target"]


def test_scales_resize_on_the_device(folder):
    data = module(folder, size=128, scales=[0.75, 1.0, 1.25])
    found = [data.on_after_batch_transfer(batch, 0) for batch in batches(data)]
    assert len(found) == 12
    for start in range(0, 12, 3):
        three = found[start : start + 3]
        assert [batch["image"].shape[-1] for batch in three] == [96, 128, 160]
        assert len({tuple(batch["case"]) for batch in three}) == 1
        for batch in three:
            assert batch["target"].shape == (4, 1, *batch["image"].shape[-2:])
            assert batch["target"].dtype == torch.float32
    soft = found[2]["target"]
    assert ((soft > 0) & (soft < 1)).any()
    middle, large = found[1], found[2]
    resized = torch.nn.functional.interpolate(middle["image"], (160, 160), mode="bilinear", align_corners=True)
    assert torch.equal(large["image"], resized)


def test_scales_keep_classes_where_there_are_several_or_ignored_ones(folder):
    for keywords in ({"labels": {"background": 0, "a": 255, "b": 128}}, {"ignore": 7}):
        data = module(folder, size=128, scales=[1.25], **keywords)
        batch = data.on_after_batch_transfer(batches(data)[0], 0)
        assert batch["target"].shape == (4, 160, 160)
        assert batch["target"].dtype == torch.uint8
        assert set(batch["target"].unique().tolist()) <= {0, 1}


def test_one_scale_is_no_scale(folder):
    data = module(folder)
    batch = data.on_after_batch_transfer(batches(data)[0], 0)
    assert sorted(batch) == ["case", "image", "target"]
    assert batch["target"].dtype == torch.uint8


def test_devices_share_the_cases(folder, monkeypatch):
    data = module(folder, split={"val": 0.35})
    seen = {"train": [], "val": []}
    for rank in range(2):
        monkeypatch.setattr("visattn.data.image_mask_folder._rank", lambda rank=rank: (rank, 2))
        seen["train"].append([name for batch in batches(data) for name in batch["case"]])
        seen["val"].append([name for batch in data.val_dataloader() for name in batch["case"]])
    assert not set(seen["train"][0]) & set(seen["train"][1])
    assert sorted(seen["val"][0] + seen["val"][1]) == sorted(case.name for case in data.cases["val"])
    monkeypatch.setattr("visattn.data.image_mask_folder._rank", lambda: (0, 9))
    with pytest.raises(UserError, match="7 val cases for 9 devices"):
        data.val_dataloader()


def test_multiclass_regions_ignore_and_grey(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for number in range(6):
        mask = np.zeros((40, 40), np.uint8)
        mask[5:30, 5:30], mask[10:20, 10:20], mask[30:, 30:] = 1, 2, 9
        Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
        Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)).save(tmp_path / "images" / f"{number}.png")
    data = module(
        str(tmp_path),
        labels={"background": 0, "rim": 1, "core": 2},
        regions={"whole": ["rim", "core"], "core": ["core"]},
        ignore=9,
        channels=1,
        augment=["colour"],
        size=[32, 64],
    )
    batch = batches(data)[0]
    assert batch["image"].shape == (4, 1, 32, 64)
    assert set(batch["target"].unique().tolist()) == {0, 1, 2, IGNORE}
    assert data.labels.channels == 2
    assert data.preprocessing.to_config() == {"size": [32, 64], "mean": [0.449], "std": [0.226], "channels": 1}


def test_attributes_for_report_and_checkpoint(folder, tmp_path):
    data = module(folder, split={"val": 0.2, "test": 0.1})
    assert {part: len(cases) for part, cases in data.cases.items()} == {"train": 14, "val": 4, "test": 2}
    assert data.description == folder
    assert len(data.fingerprint) == 64
    data.write_splits(tmp_path / "splits.json")
    assert json.loads((tmp_path / "splits.json").read_text())["val"] == [case.name for case in data.cases["val"]]
    again = module(folder, split={"files": str(tmp_path / "splits.json")}, seed=9)
    assert again.cases == data.cases
    image, truth = data.read_case(data.cases["val"][0])
    assert np.array_equal(image, read_image(data.cases["val"][0].image))
    assert truth.shape == (48, 60)
    assert sum(len(batch["case"]) for batch in data.test_dataloader()) == 2


def test_phantom_says_that_it_is_one():
    data = module("phantom")
    assert data.description == "phantom (embedded, synthetic)"
    assert {part: len(cases) for part, cases in data.cases.items()} == {"train": 180, "val": 20, "test": 0}
    first = module("phantom", seed=1)
    assert first.fingerprint == data.fingerprint  # the set is the same whatever the recipe's seed
    assert first.cases["val"] != data.cases["val"]
    image, truth = data.read_case(data.cases["val"][0])
    assert image.shape[:2] == truth.shape
    with pytest.raises(UserError, match="no test cases"):
        data.test_dataloader()


def test_test_root_is_read_for_testing_only(folder, tmp_path):
    for name in ("ETIS", "CVC-300"):
        write_phantom(tmp_path / "TestDataset" / name, 3, seed=1, size=(40, 44))
    data = ImageMaskFolder(root=str(tmp_path / "gone"), test_root=str(tmp_path / "TestDataset"), labels=LABELS, size=32)
    data.setup("test")
    found = [batch for batch in data.test_dataloader()]
    assert sorted(group for batch in found for group in batch["group"]) == ["CVC-300"] * 3 + ["ETIS"] * 3
    assert all(target.shape == (40, 44) for batch in found for target in batch["target"])
    fitted = module(folder, test_root=str(tmp_path / "TestDataset"))
    assert not any("ETIS" in case.name for part in ("train", "val") for case in fitted.cases[part])


def test_setup_reads_the_data_once(folder, monkeypatch):
    data = module(folder)
    monkeypatch.setattr("visattn.data.image_mask_folder.find_cases", lambda *_: pytest.fail("read again"))
    data.setup("fit")
    data.setup("validate")


def test_cache_says_what_it_takes_and_stops_at_half_the_memory(folder, caplog, monkeypatch):
    with caplog.at_level(logging.INFO, "visattn"):
        module(folder)
    assert "keeping 20 decoded images in memory (0 MB)" in caplog.text
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    data = module(folder)
    assert "too much to keep" in caplog.text
    assert equal(batches(data), batches(module(folder, cache=False)))


def test_masks_without_any_foreground_are_an_error(tmp_path):
    for name, mode in (("images", "RGB"), ("masks", "L")):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new(mode, (20, 20)).save(tmp_path / name / f"{number}.png")
    with pytest.raises(UserError, match="none of the 4 masks holds anything but 'background'"):
        module(str(tmp_path))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"size": 0}, "data.size"),
        ({"size": [32, 32, 32]}, "data.size"),
        ({"batch_size": 0}, "data.batch_size"),
        ({"num_workers": -1}, "data.num_workers"),
        ({"mean": [0.5]}, "data.mean: needs 3"),
        ({"std": [1, 0, 1]}, "data.std: needs 3 numbers above 0"),
        ({"scales": [0]}, "data.scales"),
        ({"root": []}, "data.root"),
        ({"labels": {"a": 0}}, "labels"),
        ({"augment": ["afine"]}, "Did you mean 'affine'"),
        ({"split": {"fold": 1, "flods": 3}}, "Did you mean 'folds'"),
    ],
)
def test_mistakes_are_explained_before_any_file_is_read(keywords, message):
    with pytest.raises(UserError, match=message):
        ImageMaskFolder(**{"root": "nowhere", "labels": LABELS, **keywords})


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("kvasir_seg", LABELS),
        ("cvc_clinicdb", LABELS),
        ("isic2017", {"skin": 0, "lesion": 255}),
        ("dsb2018_nuclei", {"background": 0, "nucleus": 255}),
        ("chase_db1", {"background": 0, "vessel": 255}),
    ],
)
def test_a_few_cases_of_real_sets_load_unmodified(real_data, tmp_path, name, labels):
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
        for path in sorted((real_data / name / part).iterdir())[:3]:
            (tmp_path / part / path.name).symlink_to(path)
    data = module(str(tmp_path), labels=labels, split={"val": 0.4}, batch_size=2)
    assert {part: len(cases) for part, cases in data.cases.items()} == {"train": 2, "val": 1, "test": 0}
    assert batches(data)[0]["target"].unique().tolist() == [0, 1]
    for batch in data.val_dataloader():
        assert batch["target"][0].shape == read_image(batch["path"][0]).shape[:2]


@pytest.mark.slow  # decodes 343 images
def test_real_sets_load_whole(real_data):
    roots = [str(real_data / "kvasir_seg"), str(real_data / "cvc_clinicdb")]
    data = module(roots, split={"val": 0.2, "group_by": "^(.{1,2})"}, size=64)
    assert sum(len(cases) for cases in data.cases.values()) == sum(
        len(list((real_data / name / "images").iterdir())) for name in ("kvasir_seg", "cvc_clinicdb")
    )
    assert {case.name.partition("/")[0] for case in data.cases["train"]} == {"kvasir_seg", "cvc_clinicdb"}
    target = torch.cat([batch["target"] for batch in batches(data)])
    assert set(target.unique().tolist()) == {0, 1}
