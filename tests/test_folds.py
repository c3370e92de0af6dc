"""`visattn fit --folds`: dividing, starting, stopping, continuing and pooling, with children that pretend to train."""

import fcntl
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from visattn import folds
from visattn.cli import main
from visattn.errors import UserError
from visattn.folds_file import Folds, read_folds, write_folds
from visattn.folds_pool import write_pooled
from visattn.labels import Labels
from visattn.metrics import SegmentationMetrics, summarise
from visattn.recipe import parse_overrides, resolve
from visattn.scored import Input, read_scored, write_cases, write_inputs, write_summary

SMALL = ["--model.network.backbone", "resnet10t", "--data.size", "64", "--trainer.accelerator", "cpu"]

# Writes what a trained and scored fold leaves behind: every mask is "predicted" as it is.
CHILD = """
import json, os, signal, sys, time
from pathlib import Path
number, run, how = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
with (run.parent / "log").open("a") as log:
    print(number, *sys.argv[4:], file=log)
split = json.loads((run.parent / "splits.json").read_text())[number]
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
if how == "fail":
    sys.exit(7)
(run / "checkpoints/last.ckpt").touch()
if how == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    (run / "waiting").touch()
    time.sleep(60)
(run / "checkpoints/best.ckpt").touch()
if how == "others":
    split = {**split, "val": split["val"][1:], "train": split["train"] + split["val"][:1]}
(run / "splits.json").write_text(json.dumps(split))
root = "DATA"
rows = [f"{case},{case},polyp,val,{0.5 + number / 10}" for case in split["val"]]
(run / "cases.csv").write_text("\\n".join(["case,group,class,split,dice", *rows]) + "\\n")
labels = {"labels": {"background": 0, "polyp": 255}, "regions": {}, "ignore": []}
about = {"labels": labels, "best_epoch": 3, "seconds": 2.5, "data": {"description": "made up"}}
cases = [{"case": c, "group": c, "root": root, "image": None, "truth": f"{root}/masks/{c}.png",
          "prediction": f"{root}/masks/{c}.png"} for c in split["val"]]
(run / "inputs.json").write_text(json.dumps({"cases": cases}))
(run / "summary.json").write_text(json.dumps(about))
"""


@pytest.fixture
def fake(monkeypatch, polyps):
    """How each fold behaves ("ok" where not named), in place of training."""
    how: dict[int, str] = {}

    def command(state, number, resumed):
        words = [sys.executable, "-c", CHILD.replace("DATA", str(polyps)), str(number), str(state.run(number))]
        return [*words, how.get(number, "ok"), *(["resumed"] if resumed else [])]

    monkeypatch.setattr(folds, "command", command)
    monkeypatch.setattr("visattn.task.SegmentationTask.configure_model", lambda self: None)  # half of the time
    monkeypatch.setattr("visattn.folds_pool.write_report", lambda folder: folder / "report.html")
    return how


def fit(polyps: Path, run: Path, *more: str, chosen: str = "all") -> int:
    arguments = ["fit", "--config", "polyp_pranet", "--run", str(run), "--data.root", str(polyps), *SMALL]
    return main([*arguments, "--folds", chosen, *more])


def started(run: Path) -> list[str]:
    return (run / "log").read_text().splitlines()


def test_all_folds_are_trained_in_order_and_pooled(fake, polyps, tmp_path, capfd):
    run = tmp_path / "run"
    assert fit(polyps, run, "--data.folds", "3") == 0
    assert started(run) == ["0", "1", "2"]
    assert json.loads((run / "folds.json").read_text())["runs"] == ["fold-0", "fold-1", "fold-2"]
    splits = json.loads((run / "splits.json").read_text())
    names = sorted(path.stem for path in (polyps / "images").iterdir())
    assert sorted(name for split in splits for name in split["val"]) == names
    assert all(sorted(split["train"] + split["val"]) == names for split in splits)
    pooled = read_scored(run)
    assert sorted(row["case"] for row in pooled.rows) == names
    assert {row["split"] for row in pooled.rows} == {"val"}
    assert [entry["means"]["polyp/dice"] for entry in pooled.summary["folds"]] == [0.5, 0.6, 0.7]
    assert pooled.summary["means"]["mean/dice"] == pytest.approx(0.6)
    assert pooled.summary["recipe"] == "polyp_pranet"
    assert pooled.summary["seconds"] == 7.5
    assert (run / "overlays").is_dir()
    entry = next(iter(pooled.inputs.values()))
    assert entry.truth == polyps / "masks" / f"{entry.case}.png"
    assert "pooled: Dice 0.6000" in capfd.readouterr().err


def test_five_folds_where_nothing_is_said_and_a_test_share_stays_aside(fake, polyps, tmp_path):
    assert fit(polyps, tmp_path / "run", "--data.split.test", "0.25", "--data.group_by", "^phantom_00(.)") == 2
    assert fit(polyps, tmp_path / "run", "--data.split.test", "0.25") == 0
    splits = json.loads((tmp_path / "run" / "splits.json").read_text())
    assert len(splits) == 5
    aside = splits[0]["test"]
    assert len(aside) == 3
    for split in splits:
        assert split["test"] == aside
        assert not set(aside) & {*split["train"], *split["val"]}
    assert len(read_scored(tmp_path / "run").rows) == 9


def test_some_folds_wait_for_the_others(fake, polyps, tmp_path, capfd):
    run = tmp_path / "run"
    assert fit(polyps, run, "--data.folds", "4", chosen="2,0,2") == 0
    assert started(run) == ["0", "2"]
    assert "pooled scores and ensemble wait for fold-1, fold-3" in capfd.readouterr().err
    assert not (run / "cases.csv").exists()
    (run / "fold-1" / "checkpoints").mkdir(parents=True)
    (run / "fold-1" / "checkpoints" / "last.ckpt").touch()  # fold 1 was killed some time after
    assert fit(polyps, run, "--data.folds", "4", "--ckpt_path", "last") == 0
    assert started(run) == ["0", "2", "1 resumed", "3"]
    assert len(read_scored(run).rows) == 12


def test_a_failing_fold_ends_the_command_and_keeps_the_others(fake, polyps, tmp_path, capfd):
    run = tmp_path / "run"
    fake[1] = "fail"
    assert fit(polyps, run, "--data.folds", "3") == 7
    error = capfd.readouterr().err
    assert "fold-1 failed (exit code 7). Continue with:" in error
    assert started(run) == ["0", "1"]
    assert folds.finished(run / "fold-0")
    del fake[1]
    words = error.splitlines()[-1].split()
    assert words[:2] == ["visattn", "fit"]
    assert main(words[1:]) == 0  # the very command that was printed
    assert started(run) == ["0", "1", "1", "2"]
    assert read_scored(run).summary["recipe"] == "polyp_pranet"


def test_a_child_that_is_killed_is_told_by_its_signal_and_continued(fake, polyps, tmp_path, capfd):
    run = tmp_path / "run"
    fake[0] = "die"
    assert fit(polyps, run, "--data.folds", "2") == 137
    assert "fold-0 failed (exit code 137)" in capfd.readouterr().err
    del fake[0]
    assert fit(polyps, run, "--data.folds", "2", "--ckpt_path", "last") == 0
    assert started(run) == ["0", "0 resumed", "1"]


def test_a_first_fold_that_fails_at_once_leaves_no_folder(fake, polyps, tmp_path, monkeypatch):
    monkeypatch.setattr(folds, "command", lambda *_: [sys.executable, "-c", "raise SystemExit(2)"])
    assert fit(polyps, tmp_path / "run") == 2
    assert not (tmp_path / "run").exists()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").touch()
    assert fit(polyps, tmp_path / "own") == 2
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),  # a second and a half each
        pytest.param(signal.SIGHUP, 143, marks=pytest.mark.slow),
    ],
)
def test_signals_reach_the_child_and_its_code_is_returned(fake, polyps, tmp_path, capfd, number, code):
    run = tmp_path / "run"
    fake[1] = "wait"
    caught: list[int] = []  # so that a signal that nobody took over does not end pytest
    before = signal.signal(number, lambda got, _: caught.append(got))

    def send() -> None:
        for _ in range(600):
            if (run / "fold-1" / "waiting").exists():
                os.kill(os.getpid(), number)
                return
            time.sleep(0.02)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        assert fit(polyps, run, "--data.folds", "3") == code
    finally:
        sender.join()
        handler = signal.signal(number, before)
    assert not caught
    assert callable(handler)  # ours is given back
    assert handler(number, None) is None
    assert caught == [number]
    assert started(run) == ["0", "1"]
    assert "fold-1 stopped. Continue with:" in capfd.readouterr().err
    del fake[1]
    assert fit(polyps, run, "--data.folds", "3", "--ckpt_path", "last") == 0
    assert started(run) == ["0", "1", "1 resumed", "2"]


def test_a_child_that_divides_the_data_otherwise_is_found_out(fake, polyps, tmp_path, capfd):
    fake[1] = "others"
    assert fit(polyps, tmp_path / "run", "--data.folds", "2") == 2
    assert "the data changed while the folds were training" in capfd.readouterr().err


def test_only_one_command_trains_in_a_folder(fake, polyps, tmp_path, capfd):
    run = tmp_path / "run"
    assert fit(polyps, run, "--data.folds", "2", chosen="0") == 0
    with (run / folds.LOCK).open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert fit(polyps, run, "--data.folds", "2", "--ckpt_path", "last") == 2
    assert "another visattn fit is training there" in capfd.readouterr().err
    assert started(run) == ["0"]


def test_a_child_that_outlives_the_command_keeps_the_lock(tmp_path):
    """As when the command is killed with -9: its training goes on, and nobody may start a second one beside it."""
    script = "import os, sys, time; os.fork() and sys.exit(); time.sleep(0.5); open('done', 'w')"
    with folds._only_one(tmp_path) as lock, folds._Children() as children:
        assert children.run([sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); {script}"], lock) == 0
    with pytest.raises(UserError, match="another visattn fit"), folds._only_one(tmp_path):
        pass
    while not (tmp_path / "done").exists():
        time.sleep(0.02)
    time.sleep(0.1)
    with folds._only_one(tmp_path):
        pass


def test_continuing_asks_for_the_same_folds_data_and_recipe(fake, polyps, tmp_path, capfd):
    data = tmp_path / "data"
    shutil.copytree(polyps, data)
    run = tmp_path / "run"
    assert fit(data, run, "--data.folds", "3", chosen="0") == 0
    capfd.readouterr()
    again = ["--data.folds", "3", "--ckpt_path", "last"]
    for more, message in (
        (["--data.folds", "4", "--ckpt_path", "last"], "was divided into 3 folds, not 4"),
        ([*again, "--model.optimizer.lr", "0.5"], "model.optimizer.lr: 0.0005 there, 0.5 here"),
        ([*again, "--seed_everything", "3"], "another recipe"),
        (["--data.folds", "3"], "holds a run with folds"),
        (["--data.folds", "3", "--ckpt_path", "best"], "with --folds only last"),
    ):
        assert fit(data, run, *more) == 2
        error = capfd.readouterr().err
        assert message in error
        assert len(error.splitlines()) <= 6
    image = next((data / "masks").iterdir())
    image.write_bytes((data / "masks" / "phantom_0003.png").read_bytes())
    assert fit(data, run, *again) == 2
    assert "the data changed since the folds were made" in capfd.readouterr().err
    assert started(run) == ["0"]
    image.write_bytes((polyps / "masks" / image.name).read_bytes())
    (run / "splits.json").write_text("[]")
    assert fit(data, run, *again) == 2
    assert "does not hold the folds of this data" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("chosen", "more", "message"),
    [
        ("7", ["--data.folds", "5"], "there are 5 folds, 0 to 4"),
        ("0;1", [], "give all, or numbers of folds"),
        ("-1", [], "numbers of folds"),
        ("9999999999", [], "numbers of folds"),
        ("", [], "numbers of folds"),
        ("all", ["--data.folds", "1"], "at least 2"),
        ("all", ["--data.folds", "0"], "at least 2"),
        ("all", ["--data.folds", "many"], "at least 2"),
        ("all", ["--data.folds", "13"], "12 groups cannot be divided into 13 parts"),
        ("all", ["--data.folds", "100000"], "at most 1000"),
        ("all", ["--data.split.files", "splits.json"], "Add --data.split.files null"),
        ("all", ["--data.split", "3"], "must be a mapping"),
        ("all", ["--model.loss.name", "strcture"], "Did you mean 'structure'"),
        ("all", ["--model.network.backbone", "resnet10"], "resnet10"),
        ("all", ["--ckpt_path", "last"], "holds no run with folds"),
    ],
)
def test_mistakes_are_told_before_a_folder_is_made(polyps, tmp_path, capfd, chosen, more, message):
    arguments = ["fit", "--config", "polyp_pranet", "--run", str(tmp_path / "run"), "--data.root", str(polyps), *SMALL]
    assert main([*arguments, f"--folds={chosen}", *more]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 6
    assert not (tmp_path / "run").exists()


def test_several_processes_started_from_outside_are_refused(polyps, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert fit(polyps, tmp_path / "run") == 2
    assert "start it once, and set trainer.devices" in capfd.readouterr().err


def test_other_commands_say_what_to_do_with_a_run_with_folds(tmp_path, polyps, capfd):
    write_folds(Folds(tmp_path / "run", 3, "polyp_pranet", "00"), [])
    arguments = ["--config", "polyp_pranet", "--run", str(tmp_path / "run"), "--data.root", str(polyps), *SMALL]
    for command in (["validate", *arguments], ["fit", *arguments, "--ckpt_path", "last"]):
        assert main(command) == 2
        assert "a run with 3 folds, which has no checkpoint of its own" in capfd.readouterr().err
    assert main(["fit", *arguments]) == 2
    assert "--folds all --ckpt_path last" in capfd.readouterr().err


def test_short_keys_and_the_recipe_of_a_run_with_folds(tmp_path):
    assert parse_overrides(["--data.folds", "4", "--data.group_by=^(p.)"]) == [
        (["data", "split", "folds"], 4),
        (["data", "split", "group_by"], "^(p.)"),
    ]
    tree = resolve(["polyp_pranet"], ["--data.folds", "4"])[1]
    assert tree["data"]["init_args"]["split"]["folds"] == 4
    run = tmp_path / "run"
    write_folds(Folds(run, 2, "polyps_of_ours", "00"), [])
    (run / "fold-1").mkdir()
    for folder in (run, run / "fold-1"):
        (folder / "config.yaml").write_text(yaml.safe_dump(tree))
        assert resolve([str(folder / "config.yaml")], [])[0] == "polyps_of_ours"
    assert read_folds(run) == Folds(run, 2, "polyps_of_ours", "00")


def scored_fold(folder: Path, labels: Labels, cases: list[str], seed: int, everything: SegmentationMetrics) -> None:
    """A fold's scores of random masks, which are added to `everything` too."""
    rng = np.random.default_rng(seed)
    own = SegmentationMetrics(labels, suite="full")
    for case in cases:
        truth = rng.integers(0, 3, (9, 11)).astype(np.uint8)
        probability = rng.random((labels.channels, 9, 11)).astype(np.float32)
        if labels.activation == "softmax":
            probability /= probability.sum(axis=0)
        for metrics in (own, everything):
            metrics.update(case, labels.from_probabilities(probability, 0.5), truth, probability, group=case[:2])
    write_cases(folder / "cases.csv", own.rows(), "val")
    confusion, calibration = own.confusion(), own.calibration()
    summary = {"labels": labels.to_config(), "confusion": confusion, "calibration": calibration}
    write_summary(folder, summary | {"best_epoch": seed, "seconds": 1.0, "data": {}})
    write_inputs(folder, [])


@pytest.mark.parametrize("regions", [None, {"whole": ["rim", "core"], "core only": ["core"]}])
def test_pooled_scores_are_those_of_all_cases_scored_at_once(tmp_path, monkeypatch, regions):
    monkeypatch.setattr("visattn.folds_pool.write_report", lambda folder: None)
    labels = Labels.from_config({"background": 0, "rim": 1, "core": 2}, regions)
    everything = SegmentationMetrics(labels, suite="full")
    state = Folds(tmp_path, 3, "demo", "00")
    splits = [{"train": [], "val": [f"p{k}_{i}" for i in range(4 + k)], "test": ["t"]} for k in range(3)]
    for number, split in enumerate(splits):
        scored_fold(state.run(number), labels, split["val"], number, everything)
    assert write_pooled(state, splits) is None
    pooled = read_scored(tmp_path)
    expected = summarise(everything.rows())
    assert len(pooled.summary["metrics"]) == len(expected) > 30
    for entry, other in zip(pooled.summary["metrics"], expected, strict=True):
        assert (entry["name"], entry["metric"], entry["cases"]) == (other.name, other.metric, other.cases)
        # cases.csv holds six digits
        for key in ("mean", "low", "high"):
            value = getattr(other, key)
            if np.isnan(value):
                assert entry[key] is None
            else:
                assert entry[key] == pytest.approx(value, rel=1e-5, abs=1e-6)
    assert pooled.summary["confusion"] == everything.confusion()
    for name, wanted in everything.calibration().items():
        found = pooled.summary["calibration"][name]
        assert found["count"] == wanted["count"]
        assert found["ece"] == pytest.approx(wanted["ece"])
        for key in ("confidence", "frequency"):
            assert found[key] == pytest.approx(wanted[key])
    assert pooled.summary["data"]["counts"] == {"val": 15, "test": 1}
    assert pooled.labels == labels


def test_scores_that_are_not_the_folds_own_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("visattn.folds_pool.write_report", lambda folder: None)
    labels = Labels.from_config({"background": 0, "rim": 1, "core": 2})
    state = Folds(tmp_path, 2, "demo", "00")
    splits = [{"train": [], "val": ["p0_0", "p0_1"]}, {"train": [], "val": ["p1_0", "p1_1"]}]
    for number, split in enumerate(splits):
        scored_fold(state.run(number), labels, split["val"], number, SegmentationMetrics(labels, suite="full"))
    summary = json.loads((state.run(1) / "summary.json").read_text())
    (state.run(1) / "summary.json").write_text(json.dumps(summary | {"calibration": {"rim": {"count": [1]}}}))
    with pytest.raises(UserError, match="do not fit together"):
        write_pooled(state, splits)
    (state.run(1) / "summary.json").write_text(json.dumps(summary | {"labels": None}))
    with pytest.raises(UserError, match="other labels"):
        write_pooled(state, splits)
    with pytest.raises(UserError, match="holds other cases than the fold was to validate on"):
        write_pooled(state, [splits[0], {"train": [], "val": ["p1_0"]}])
    assert not (tmp_path / "summary.json").exists()


def test_inputs_of_the_pool_point_into_the_folds(tmp_path, monkeypatch):
    monkeypatch.setattr("visattn.folds_pool.write_report", lambda folder: None)
    monkeypatch.setattr("visattn.folds_pool.write_overlays", lambda *_: None)
    labels = Labels.from_config({"background": 0, "rim": 1, "core": 2})
    state = Folds(tmp_path, 2, "demo", "00")
    splits = [{"train": [], "val": [f"p{k}_0"]} for k in range(2)]
    for number, split in enumerate(splits):
        run = state.run(number)
        scored_fold(run, labels, split["val"], number, SegmentationMetrics(labels, suite="full"))
        name = split["val"][0]
        write_inputs(run, [Input(name, name[:2], "phantom", None, None, run / "masks" / f"{name}.png")])
    write_pooled(state, splits)
    entries = json.loads((tmp_path / "inputs.json").read_text())["cases"]
    assert [entry["prediction"] for entry in entries] == ["fold-0/masks/p0_0.png", "fold-1/masks/p1_0.png"]
