"""Classifiers trained by recipe, from `visattn fit` to the scored folder."""

import csv
import json
import math
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from visattn import callbacks
from visattn.checkpoint import build_network, read_checkpoint
from visattn.class_labels import ClassLabels
from visattn.classification import ClassificationTask, mix
from visattn.cli import main
from visattn.data.image_folder import ImageFolder
from visattn.errors import UserError
from visattn.losses.classification import build_class_loss
from visattn.members import parse_checkpoint, parse_classifier
from visattn.networks.classifier import check_classifier, create_classifier
from visattn.optimizers import build_optimizer
from visattn.recipe import packaged_recipes

RECIPE = """
seed_everything: 0
model:
  class_path: ClassificationTask
  init_args:
    network: {name: resnet10t, pretrained: false}
    optimizer: {name: adamw, lr: 1e-3, weight_decay: 0.05}
    schedule: {name: cosine}
data:
  class_path: MedMNIST
  init_args: {root: phantom, flag: breastmnist, size: 32, batch_size: 20, num_workers: 0}
trainer: {max_epochs: 2, accelerator: cpu, precision: 32-true, limit_train_batches: 3}
"""
FOLDED = ["config.yaml", "metrics.csv", "cases.csv", "summary.json", "inputs.json", "curves.png", "report.html"]
CLASSIFIERS = sorted(name for name in packaged_recipes() if name.startswith(("medmnist", "imagenet")))


def fit(folder: Path, run: Path, *more: str) -> int:
    recipe = folder / "small.yaml"
    recipe.write_text("# Small\n" + RECIPE)
    return main(["fit", "--config", str(recipe), "--run", str(run), *more])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    assert fit(folder, folder / "run", "--model.ema", "0.9", "--model.mixing", "{mixup: 0.4, cutmix: 1.0}") == 0
    return folder / "run"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_the_scored_folder_is_complete_and_consistent(run):
    for name in FOLDED:
        assert (run / name).stat().st_size > 0, name
    rows, summary = rows_of(run / "cases.csv"), json.loads((run / "summary.json").read_text())
    assert len(rows) == summary["cases"] == 48
    assert summary["task"] == "classification"
    assert summary["labels"] == {"classes": ["round", "lobed", "hollow"], "multi_label": False}
    right = [row["truth"] == row["prediction"] for row in rows]
    assert summary["means"]["all/accuracy"] == pytest.approx(np.mean(right))
    for row in rows:
        shares = {name: float(row[f"p_{name}"]) for name in ("round", "lobed", "hollow")}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
        assert max(shares, key=lambda name: shares[name]) == row["prediction"]
    metrics = rows_of(run / "metrics.csv")
    assert {"val/auc", "val/acc", "val/loss", "train/loss"} <= metrics[0].keys()
    best = max(float(row["val/auc"]) for row in metrics)
    assert summary["means"]["all/auc"] == pytest.approx(best, abs=1e-6), "the best epoch, its average included"
    assert np.trace(np.array(summary["confusion"]["counts"])) == sum(right)
    page = (run / "report.html").read_text()
    assert "Balanced accuracy" in page
    assert "Synthetic images" in page


def test_the_checkpoint_brings_back_the_network_that_was_scored(run):
    checkpoint = read_checkpoint(run / "checkpoints" / "best.ckpt")
    labels, preprocessing = parse_classifier(checkpoint)
    assert labels.names == ("round", "lobed", "hollow")
    from visattn.data.medmnist import MedMNIST

    data = MedMNIST("phantom", flag="breastmnist", size=32)
    data.setup()
    assert preprocessing == data.preprocessing
    network = build_network(checkpoint)
    rows = {row["case"]: row for row in rows_of(run / "cases.csv")}
    for case in data.cases["val"][:5]:
        with torch.no_grad():
            shares = network(preprocessing.prepare(data.read_case(case))[None]).softmax(1)[0]
        assert float(rows[case.name]["p_lobed"]) == pytest.approx(float(shares[1]), abs=1e-4)
    with pytest.raises(UserError, match="masks need a segmentation network"):
        parse_checkpoint(checkpoint)


def test_validate_repeats_and_test_takes_other_cases(run, capsys):
    config = ["--config", str(run / "config.yaml"), "--run", str(run)]
    assert main(["validate", *config]) == 0
    assert rows_of(run / "validate" / "cases.csv") == rows_of(run / "cases.csv")
    assert main(["test", *config]) == 0
    summary = json.loads((run / "test" / "summary.json").read_text())
    assert summary["split"] == "test"
    assert re.search(rf"AUC +{summary['means']['all/auc']:.4f} ", capsys.readouterr().out)
    assert {row["split"] for row in rows_of(run / "test" / "cases.csv")} == {"test"}
    assert not {row["case"] for row in rows_of(run / "test" / "cases.csv")} & {
        row["case"] for row in rows_of(run / "cases.csv")
    }


def test_a_checkpoint_of_other_classes_is_not_scored(run, capsys):
    config = ["--config", str(run / "config.yaml"), "--run", str(run), "--data.labels", "[lobed, round, hollow]"]
    assert main(["validate", *config]) == 2
    assert "are not the labels of" in capsys.readouterr().err


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch):
    more = [
        "--model.mixing",
        "{mixup: 0.4, cutmix: 1.0}",
        "--model.ema",
        "0.9",
        "--model.network.drop_path_rate",
        "0.2",
    ]
    more += ["--data.augment", "[{name: random_resized_crop}, {name: randaugment}, {name: erasing, mode: pixel}]"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert fit(tmp_path, whole, *more) == 0
    start = callbacks.RandomState.on_train_batch_start

    def die(self, trainer, module, batch, index):
        if trainer.current_epoch == 1:
            raise RuntimeError("pulled the plug")
        start(self, trainer, module, batch, index)

    monkeypatch.setattr(callbacks.RandomState, "on_train_batch_start", die)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        fit(tmp_path, broken, *more)
    monkeypatch.undo()
    torch.manual_seed(12345), np.random.seed(12345)
    assert fit(tmp_path, broken, *more, "--ckpt_path", "last") == 0
    first, second = (torch.load(folder / "checkpoints/last.ckpt", weights_only=True) for folder in (whole, broken))
    for part in ("state_dict", "visattn_raw"):
        for key, value in first[part].items():
            assert torch.equal(value, second[part][key]), key
    assert rows_of(whole / "cases.csv") == rows_of(broken / "cases.csv")


@pytest.mark.slow
def test_folds_are_pooled(tmp_path):
    more = ["--folds", "all", "--data.folds", "2", "--trainer.max_epochs", "1", "--model.mixing", "{mixup: 0.5}"]
    assert fit(tmp_path, tmp_path / "run", *more) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    rows = rows_of(tmp_path / "run" / "cases.csv")
    assert len(rows) == len({row["case"] for row in rows}) == 168
    assert [entry["cases"] for entry in summary["folds"]] == [84, 84]
    assert summary["means"]["all/accuracy"] == pytest.approx(
        np.mean([row["truth"] == row["prediction"] for row in rows])
    )
    assert "fold-1" in (tmp_path / "run" / "report.html").read_text()


def test_a_loss_that_is_no_number_stops_with_the_cases(tmp_path, capsys):
    assert fit(tmp_path, tmp_path / "run", "--model.optimizer.lr", "1e30") == 2
    assert "train_0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["--model.network.name", "resnet81"], "Did you mean"),
        (["--model.network.drop_pth_rate", "0.1"], "Did you mean 'drop_path_rate'"),
        (["--model.network.name", "va_pyramid3d_tiny"], "takes volumes"),
        (["--model.mixing", "{mixpu: 1}"], "Did you mean 'mixup'"),
        (["--data.batch_size", "7", "--model.mixing", "{mixup: 1}"], "must be even"),
        (["--model.loss", "{name: cross_entropie}"], "Did you mean 'cross_entropy'"),
        (["--model.layer_decay", "2"], "at most 1"),
        (["--data.flag", "brestmnist"], "Did you mean 'breastmnist'"),
        (["--trainer.callbacks", "[{class_path: EarlyStopping, init_args: {monitor: val/dice}}]"], "val/auc"),
    ],
)
def test_mistakes_are_told_in_a_few_lines(keys, message, tmp_path, capsys):
    assert fit(tmp_path, tmp_path / "run", *keys) == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.strip().splitlines()) <= 6
    assert not (tmp_path / "run").exists()


def test_mixing_says_how_much_of_which_class_is_in_an_image():
    images = torch.eye(4).view(4, 4, 1, 1).expand(4, 4, 6, 6).clone()  # channel k is the share of case k
    torch.manual_seed(3)
    for target in (torch.tensor([0, 1, 2, 3]), torch.eye(4)):
        for mixing in ({"mixup": 0.8, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}):
            for mode in ("batch", "pair", "elem"):
                settings = {"prob": 1.0, "switch_prob": 0.5, "mode": mode, **mixing}
                mixed, shares = mix(images.clone(), target, 4, settings)
                torch.testing.assert_close(mixed.mean(dim=(2, 3)), shares, atol=1e-5, rtol=0)
    volume = torch.rand(2, 1, 4, 4, 4)
    assert mix(volume, torch.tensor([0, 1]), 2, {"mixup": 1.0, "cutmix": 0.0, "prob": 1.0, "switch_prob": 0.5,
                                                "mode": "batch"})[0].shape == volume.shape  # fmt: skip


def test_mixing_is_checked_where_no_case_was_read_yet():
    """As before the folds of a recipe are trained."""
    for size in (4, 5):
        task = ClassificationTask({"name": "resnet10t"}, {"name": "adamw"}, mixing={"mixup": 0.5})
        task.data = ImageFolder("phantom", size=32, batch_size=size)
        with pytest.raises(UserError, match="must be even") if size % 2 else nullcontext():
            assert task.build(False) is not None


def test_mixing_draws_from_torch_alone():
    settings = {"mixup": 0.8, "cutmix": 1.0, "prob": 1.0, "switch_prob": 0.5, "mode": "batch"}
    images, results = torch.rand(4, 3, 8, 8), []
    for seed in (0, 1):
        np.random.seed(seed)
        torch.manual_seed(7)
        results.append(mix(images.clone(), torch.arange(4), 4, settings)[0])
        after = np.random.rand()
        np.random.seed(seed)
        assert after == np.random.rand()
    assert torch.equal(*results)


def test_losses_against_torch_and_by_hand():
    torch.manual_seed(0)
    logits, target = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    one, several = ClassLabels.from_config(list("abc")), ClassLabels.from_config(list("abc"), True)
    smooth = build_class_loss({"name": "cross_entropy", "label_smoothing": 0.1}, one)
    torch.testing.assert_close(smooth(logits, target), F.cross_entropy(logits, target, label_smoothing=0.1))
    weighted = build_class_loss({"name": "cross_entropy", "class_weights": {"b": 3.0}}, one)
    weights = torch.tensor([1.0, 3.0, 1.0])
    torch.testing.assert_close(weighted(logits, target), F.cross_entropy(logits, target, weights))
    soft = torch.rand(5, 3).softmax(1)
    plain = build_class_loss({"name": "cross_entropy"}, one)
    torch.testing.assert_close(plain(logits, soft), F.cross_entropy(logits, soft))
    yes = (torch.rand(5, 3) > 0.5).float()
    bce = build_class_loss({"name": "bce", "label_smoothing": 0.2}, several)
    torch.testing.assert_close(bce(logits, yes), F.binary_cross_entropy_with_logits(logits, yes * 0.8 + 0.1))
    hot = build_class_loss({"name": "bce"}, one)
    torch.testing.assert_close(
        hot(logits, target), F.binary_cross_entropy_with_logits(logits, F.one_hot(target, 3).float())
    )
    with pytest.raises(UserError, match=r"\{name: bce\}"):
        build_class_loss({"name": "cross_entropy"}, several)


def test_layer_decay_slows_early_layers_and_timm_optimisers_are_known():
    network = create_classifier("vit_tiny_patch16_224", 3, 4, img_size=32)
    optimizer = build_optimizer({"name": "lamb", "lr": 1.0, "weight_decay": 0.1}, network, layer_decay=0.5)
    assert type(optimizer).__name__ == "Lamb"
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    own = dict(network.named_parameters())
    assert rate[id(own["head.weight"])] == 1.0
    assert rate[id(own["blocks.11.mlp.fc1.weight"])] == pytest.approx(0.5)
    assert rate[id(own["blocks.3.mlp.fc1.weight"])] == pytest.approx(0.5**9)
    assert decay[id(own["pos_embed"])] == 0 == decay[id(own["blocks.3.norm1.weight"])]
    assert decay[id(own["blocks.3.mlp.fc1.weight"])] == 0.1


def test_weights_of_a_file_are_taken_but_for_another_head(tmp_path):
    whole = create_classifier("resnet10t", 3, 5)
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    same = create_classifier("resnet10t", 3, 5, pretrained=tmp_path / "w.pth")
    other = create_classifier("resnet10t", 3, 2, pretrained=tmp_path / "w.pth")
    assert torch.equal(same.fc.weight, whole.fc.weight)
    assert torch.equal(other.layer1[0].conv1.weight, whole.layer1[0].conv1.weight)
    assert other.fc.weight.shape == (2, 512)
    with pytest.raises(UserError, match="not the weights of this network"):
        create_classifier("resnet18", 3, 5, pretrained=tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "va_biformer_small", "drop_path_rat": 0.1}, "Did you mean 'drop_path_rate'"),
        ({"name": "convnext_tiny.fb_in22kk"}, r"Did you mean 'convnext_tiny\.fb_in22k"),
        ({"name": "hf-hub:timm/resnet18"}, "unknown network"),
        ({"name": "resnet18", "checkpoint_path": "x"}, "is set by visattn"),
        ({"nam": "resnet18"}, "Did you mean 'name'"),
    ],
)
def test_a_network_that_cannot_be_is_told(config, message):
    with pytest.raises(UserError, match=message):
        check_classifier(config)


def test_the_task_is_the_one_of_the_recipe():
    assert ClassificationTask.scores[0] == "val/auc"
    with pytest.raises(UserError, match="give mixup or cutmix"):
        ClassificationTask({"name": "resnet10t"}, {"name": "adamw"}, mixing={"prob": 0.5})
    assert math.isclose(
        ClassificationTask({"name": "resnet10t"}, {"name": "sgd", "lr": 0.1}, mixing={"mixup": 1}).mixing["prob"], 1
    )


@pytest.mark.slow  # real networks, as the recipes say
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_recipe_of_classifiers_runs_as_written_but_for_size_and_epochs(name, tmp_path):
    assert len(CLASSIFIERS) == 5
    size = [] if "3d" in name else ["--data.size", "224" if "maxvit" in name else "128"]
    short = ["--data.batch_size", "4", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]
    short += ["--trainer.limit_val_batches", "2", "--data.num_workers", "0"]
    assert main(["fit", "--config", name, "--run", str(tmp_path / "run"), *size, *short]) == 0
    assert (tmp_path / "run" / "report.html").is_file()
