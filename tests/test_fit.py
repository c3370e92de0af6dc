import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import visattn
from visattn import callbacks, fit
from visattn.base_task import initialise_from
from visattn.checkpoint import read_checkpoint
from visattn.cli import main
from visattn.errors import UserError
from visattn.metrics import case_metrics
from visattn.recipe import packaged_recipes, resolve
from visattn.task import SegmentationTask

SMALL = [
    "--model.network.backbone",
    "resnet10t",
    "--data.size",
    "64",
    "--data.batch_size",
    "4",
    "--data.num_workers",
    "0",
]
SMALL += ["--data.split.val", "0.34", "--trainer.precision", "32-true", "--trainer.accelerator", "cpu"]


def run_fit(polyps: Path, run: Path, *more: str, epochs: int = 2) -> int:
    arguments = ["fit", "--config", "polyp_pranet", "--run", str(run), "--data.root", str(polyps)]
    return main([*arguments, *SMALL, "--trainer.max_epochs", str(epochs), *more])


@pytest.fixture(scope="module")
def run(polyps, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert run_fit(polyps, folder) == 0
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_run_folder_is_complete(run):
    for name in ("config.yaml", "metrics.csv", "cases.csv", "summary.json", "splits.json", "curves.png", "report.html"):
        assert (run / name).stat().st_size > 0, name
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert list((run / "tensorboard").glob("events*"))
    assert [row["epoch"] for row in rows_of(run / "metrics.csv")] == ["0", "1"]
    overlays = {path.name.split("-")[0] for path in (run / "overlays").glob("*.png")}
    assert "worst" in overlays
    assert {row["split"] for row in rows_of(run / "cases.csv")} == {"val"}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["cases"] == len(rows_of(run / "cases.csv")) == 4
    assert summary["notice"] == visattn.NOTICE


def test_saved_config_starts_the_same_run_again(run, tmp_path):
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["init_args"]["optimizer"]["lr"] == 5e-4
    name, again = resolve([str(run / "config.yaml")], [])
    assert name == "polyp_pranet"  # not "config"
    assert fit.parse(again).resolved == saved


@pytest.mark.parametrize("text", ['{"recipe": "../../outside"}', '{"recipe": ".."}', '{"recipe": 3}', "[]", "{"])
def test_a_run_that_names_no_recipe_is_refused(text, tmp_path):
    (tmp_path / "config.yaml").write_text("model: {class_path: SegmentationTask}\n")
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run.json: not written by visattn fit"):
        resolve([str(tmp_path / "config.yaml")], [])


def test_checkpoint_carries_what_predict_needs(run, polyps):
    checkpoint = read_checkpoint(run / "checkpoints" / "best.ckpt")
    assert checkpoint.labels["labels"] == {"background": 0, "polyp": 255}
    assert checkpoint.network["backbone"] == "resnet10t"
    assert checkpoint.network["pretrained"] is False
    assert checkpoint.recipe["model"]["init_args"]["loss"]["name"] == "structure"
    assert str(polyps) in checkpoint.data["description"]


def test_cases_are_scored_on_exactly_what_predict_writes(run, polyps, tmp_path):
    assert (
        main(
            ["predict", str(polyps / "images"), "--checkpoint", str(run), "--output", str(tmp_path), "--device", "cpu"]
        )
        == 0
    )
    labels = visattn.load(run, device="cpu").labels
    for row in rows_of(run / "cases.csv"):
        truth = np.asarray(Image.open(polyps / "masks" / f"{row['case']}.png"))
        (written,) = tmp_path.rglob(f"{row['case']}.png")
        predicted = np.asarray(Image.open(written))
        kept = np.asarray(Image.open(run / "masks" / f"{row['case']}.png"))
        assert kept.dtype == np.uint8
        assert (kept != predicted).mean() < 1e-3, "a batch of several may round otherwise than one image"
        scores = case_metrics(labels.encode(predicted, "p"), labels.encode(truth, "t"), labels)[0]
        if row["dice"] == "":
            assert scores["dice"] is None
        else:
            assert float(row["dice"]) == pytest.approx(scores["dice"], abs=1e-6)


def test_validate_repeats_the_scores_of_fit(run, polyps, capsys):
    assert main(["validate", "--config", str(run / "config.yaml"), "--run", str(run)]) == 0
    summary = json.loads((run / "validate" / "summary.json").read_text())
    assert summary["recipe"] == "polyp_pranet"
    assert rows_of(run / "validate" / "cases.csv") == rows_of(run / "cases.csv")
    dice = next(entry for entry in summary["metrics"] if entry["metric"] == "dice")
    assert re.search(rf"Dice +{dice['mean']:.4f} ", capsys.readouterr().out)


def test_a_checkpoint_of_other_labels_is_not_scored(run, capsys):
    other = ["--data.labels", "{background: 0, adenoma: 255}"]
    assert main(["validate", "--config", str(run / "config.yaml"), "--run", str(run), *other]) == 2
    assert "are not the labels of" in capsys.readouterr().err


def test_early_stopping_by_a_known_score(polyps, tmp_path):
    stop = "[{class_path: EarlyStopping, init_args: {monitor: val/dice, mode: max, patience: 1, min_delta: 2.0}}]"
    assert run_fit(polyps, tmp_path / "run", "--trainer.callbacks", stop, epochs=6) == 0
    assert len(rows_of(tmp_path / "run" / "metrics.csv")) == 2


def test_resumed_run_equals_uninterrupted_run_bit_for_bit(polyps, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_fit(polyps, whole, epochs=3) == 0
    start = callbacks.RandomState.on_train_epoch_start

    def die(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise RuntimeError("pulled the plug")
        start(self, trainer, pl_module)

    monkeypatch.setattr(callbacks.RandomState, "on_train_epoch_start", die)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run_fit(polyps, broken, epochs=3)
    monkeypatch.undo()
    torch.manual_seed(12345)  # whatever happened in between must not matter
    assert run_fit(polyps, broken, "--ckpt_path", "last", epochs=3) == 0
    first, second = (torch.load(folder / "checkpoints/last.ckpt", weights_only=True) for folder in (whole, broken))
    assert first["global_step"] == second["global_step"]
    for key, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][key]), key
    for index, state in first["optimizer_states"][0]["state"].items():
        assert all(
            torch.equal(value, second["optimizer_states"][0]["state"][index][key]) for key, value in state.items()
        )
    table = [[{**row, "seconds": ""} for row in rows_of(folder / "metrics.csv")] for folder in (whole, broken)]
    assert table[0] == table[1]


def test_finished_or_missing_runs_are_named(run, polyps, tmp_path, capsys):
    assert run_fit(polyps, run) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert run_fit(polyps, tmp_path / "none", "--ckpt_path", "last") == 2
    assert "no such checkpoint" in capsys.readouterr().err
    root = ["--trainer.default_root_dir", str(tmp_path / "empty")]
    assert main(["fit", "--config", "polyp_pranet", "--ckpt_path", "last", *root]) == 2
    assert "no run of 'polyp_pranet'" in capsys.readouterr().err


def test_a_recipe_of_another_network_is_told_and_leaves_the_run_as_it_was(run, polyps, capsys):
    before = (run / "config.yaml").read_bytes()
    other = ["--ckpt_path", "last", "--model.network.backbone", "resnet18"]
    assert run_fit(polyps, run, *other) == 2
    assert "config.yaml of its run folder" in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == before
    arguments = ["--config", str(run / "config.yaml"), "--run", str(run), "--model.network.backbone", "resnet18"]
    assert main(["validate", *arguments]) == 2
    assert "entries differ" in capsys.readouterr().err


def test_a_run_without_validation_says_why_it_has_no_best_checkpoint(polyps, tmp_path, capsys):
    assert run_fit(polyps, tmp_path / "run", "--trainer.limit_val_batches", "0", epochs=1) == 2
    assert "no epoch was validated" in capsys.readouterr().err


def test_mistakes_leave_no_run_folder(polyps, tmp_path, capsys):
    for number, wrong in enumerate(
        (
            ["--data.root", str(tmp_path / "nowhere")],
            ["--model.loss.name", "strcture"],
            ["--model.network.backbone", "resnet10"],
            ["--trainer.max_epoch", "3"],
            ["--data.size", "abc"],
            ["--seed_everything", "-1"],
            ["--model.loss.deep_supervision", "[1, 1]"],
            ["--trainer.callbacks", "[{class_path: EarlyStopping, init_args: {monitor: val/dcie}}]"],
            ["--trainer.callbacks", "[{class_path: EarlyStopping, init_args: {monitr: val/dice}}]"],
            ["--data.split.files", "3"],
            ["--model.optimizer.lr", "-1"],
            ["--model.optimizer.betas", "3"],
            ["--model.schedule", "{name: step, milestones: abc}"],
            ["--model.backbone_lr_factor", "-1"],
        )
    ):
        folder = tmp_path / f"run{number}"
        assert run_fit(polyps, folder, *wrong) == 2
        error = capsys.readouterr().err
        assert len(error.strip().splitlines()) <= 6
        assert "Traceback" not in error
        assert not folder.exists()


def test_non_finite_loss_names_step_and_cases(polyps, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(SegmentationTask, "forward", lambda self, images: self.network(images * float("nan")))
    assert run_fit(polyps, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "loss became nan at epoch 0, step 0" in error
    assert "phantom" in error


def test_init_from_reports_what_was_loaded(run, polyps, tmp_path, capfd):
    best = str(run / "checkpoints" / "best.ckpt")
    code = run_fit(
        polyps,
        tmp_path / "tuned",
        "--model.init_from",
        best,
        "--model.freeze",
        "['backbone.*']",
        "--data.channels",
        "1",
        epochs=1,
    )
    assert code == 0
    error = capfd.readouterr().err
    assert "re-initialised (1)" in error  # the first convolution, which has one input channel now
    tuned, start = (read_checkpoint(path).state_dict for path in (tmp_path / "tuned" / "checkpoints/last.ckpt", best))
    frozen = [key for key in start if key.startswith("backbone.") and key.endswith("conv2.weight")]
    assert frozen
    assert all(torch.equal(tuned[key], start[key]) for key in frozen)
    with pytest.raises(UserError, match="another architecture"):
        initialise_from(torch.nn.Linear(2, 2), best)


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("model", {"class_path": "subprocess.Popen", "init_args": {"args": ["true"]}}),
        ("model", {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"}),
        ("data", {"class_path": "lightning.pytorch.demos.boring_classes.BoringDataModule"}),
        ("trainer", {"callbacks": [{"class_path": "lightning.pytorch.callbacks.LambdaCallback"}]}),
        ("trainer", {"callbacks": [{"class_path": "os.system"}]}),
        ("trainer", {"logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "x"}}}),
        ("trainer", {"strategy": {"class_path": "lightning.pytorch.strategies.FSDPStrategy"}}),
    ],
)
def test_the_parser_itself_refuses_classes_and_callables(section, value, monkeypatch):
    """The second lock: jsonargparse's policy holds even where the check of the recipe were passed by."""
    tree = resolve(["polyp_pranet"], [])[1]
    tree[section] = value
    monkeypatch.setattr(sys, "argv", ["visattn"])  # LightningCLI warns where both a command line and a tree are given
    with pytest.raises(Exception, match="not allowed"):
        fit.RecipeCLI(tree)


def test_a_callable_is_refused_before_import(tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_suffix('.sprung').touch()\ndef f(): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    fit.parse(resolve(["polyp_pranet"], [])[1])  # sets the policy
    from collections.abc import Callable

    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--call", type=Callable)
    with pytest.raises(Exception, match="not allowed"):
        parser.parse_args(["--call", "trap.f"])
    assert not (tmp_path / "trap.sprung").exists()


def test_print_config_is_complete_and_parses_again(tmp_path, capsys):
    assert main(["fit", "--config", "polyp_pranet", "--data.size", "96", "--print_config"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(text)
    assert main(["fit", "--config", str(tmp_path / "printed.yaml"), "--print_config"]) == 0
    assert capsys.readouterr().out == text
    assert yaml.safe_load(text)["data"]["init_args"]["size"] == 96


@pytest.mark.slow  # two processes start lightning: half a minute on two cores
def test_two_processes_share_one_run_and_score_every_case_once(polyps, tmp_path):
    root = tmp_path / "runs"
    arguments = ["fit", "--config", "polyp_pranet", "--data.root", str(polyps), *SMALL, "--trainer.max_epochs", "1"]
    arguments += ["--trainer.devices", "2", "--trainer.default_root_dir", str(root)]
    environment = {key: value for key, value in os.environ.items() if key not in {"VISATTN_RUN", "LOCAL_RANK"}}
    subprocess.run([sys.executable, "-m", "visattn", *arguments], check=True, env=environment, timeout=280)
    (run,) = (root / "polyp_pranet").iterdir()
    cases = [row["case"] for row in rows_of(run / "cases.csv")]
    assert len(cases) == len(set(cases)) == 4
    assert {path.stem for path in (run / "masks").iterdir()} == set(cases), "each process writes its own"


@pytest.mark.slow  # real networks, as the recipes say
@pytest.mark.parametrize("name", sorted(name for name in packaged_recipes() if name.startswith("polyp")))
def test_every_recipe_of_images_runs_as_written_but_for_size_and_epochs(name, tmp_path):
    arguments = ["fit", "--config", name, "--run", str(tmp_path / "run"), "--data.size", "64"]
    assert main([*arguments, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3"]) == 0
    assert (tmp_path / "run" / "report.html").is_file()
