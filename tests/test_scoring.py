import numpy as np
import pytest
import torch

from visattn.data import nifti
from visattn.data.geometry import Geometry
from visattn.data.intensity import Normalise
from visattn.data.volume_preprocessing import VolumePreprocessing
from visattn.labels import IGNORE, Labels
from visattn.losses import build_loss
from visattn.scoring import mask_name, resize_indices, score_images, score_volumes

CLASSES = Labels.from_config({"background": 0, "rim": 3, "core": 7}, ignore=9)
REGIONS = Labels.from_config({"background": 0, "rim": 3, "core": 7}, {"whole": ["rim", "core"], "core": ["core"]})
BINARY = Labels.from_config({"background": 0, "tumour": 5})
C, S = np.cos(0.3), np.sin(0.3)
OBLIQUE = np.array([[0.9 * S, -1.5 * C, 0, 4], [-0.9 * C, -1.5 * S, 0, 3], [0, 0, -2.5, -5], [0, 0, 0, 1]])
CPU = torch.device("cpu")


def case(labels, shape=(13, 17, 11), seed=0):
    """A volume whose values are its class indices, as a `VolumeSet` gives it."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, len(labels.names), shape).astype(np.uint8)
    geometry = Geometry(shape, OBLIQUE)
    preprocessing = VolumePreprocessing(("image",), (Normalise("none"),), "RAS")
    image, plan = preprocessing.forward(truth[None].astype(np.float32), geometry)
    if labels.ignore:
        truth[:2] = IGNORE
    classes = [*range(len(labels.names)), IGNORE]
    target = plan.forward_labels(truth, classes).numpy()
    return {
        "case": ["a/b"],
        "group": ["a"],
        "image": [image.numpy()],
        "target": [target],
        "truth": [truth],
        "plan": [plan],
        "geometry": [geometry],
    }


def knows(labels, sure=20.0):
    """A network that reads the class off the values; its second output is coarser and wrong."""

    def network(windows):
        indices = windows[:, 0].round().to(torch.uint8)
        logits = labels.onehot(indices, axis=1).float() * 2 * sure - sure
        return logits, -logits[..., ::2, ::2, ::2]

    return network


@pytest.mark.parametrize("labels", [CLASSES, REGIONS, BINARY])
@pytest.mark.parametrize("window", [None, (8, 8, 8), (16, 24, 16)])
def test_volumes_are_scored_on_their_own_voxels(labels, window, tmp_path):
    batch = case(labels)
    calls = []
    network = knows(labels)

    def counted(windows):
        calls.append(windows.shape)
        return network(windows)

    loss = build_loss({"name": "bce", "deep_supervision": [1.0, 0.0]}, labels)
    value, (outcome,) = score_volumes(counted, loss, batch, labels, CPU, window, calls=3)
    truth = batch["truth"][0]
    seen = truth != IGNORE
    assert np.array_equal(outcome.predicted[seen], truth[seen])
    assert outcome.truth is not None
    assert (outcome.case, outcome.group, outcome.probability) == ("a/b", "a", None)
    assert float(value) < 1e-6, "every window met its own target, and what lies outside counted for nothing"
    assert calls[0][2:] == (window or batch["plan"][0].size)
    assert outcome.units == {
        "spacing": pytest.approx(np.linalg.norm(OBLIQUE[:3, :3], axis=0)),
        "voxel_ml": pytest.approx(abs(np.linalg.det(OBLIQUE[:3, :3])) / 1000),
    }
    outcome.write(tmp_path, labels)
    values, geometry = nifti.read_labels(tmp_path / mask_name("a/b", 3))
    assert geometry.same_grid(batch["geometry"][0])
    assert np.array_equal(labels.encode(values, "written"), outcome.predicted)


def test_the_loss_is_the_mean_over_windows_also_when_memory_runs_short():
    batch = case(CLASSES, (16, 16, 24), seed=1)
    batch["image"][0] = np.random.default_rng(0).uniform(0, 2, batch["image"][0].shape).astype(np.float32)
    loss = build_loss({"name": "bce"}, CLASSES)

    def network(windows):
        return knows(CLASSES, 1.0)(windows)[0]

    def short(windows):
        if len(windows) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return network(windows)

    one, (first,) = score_volumes(network, loss, batch, CLASSES, CPU, (8, 8, 8), calls=4)
    other, (second,) = score_volumes(short, loss, batch, CLASSES, CPU, (8, 8, 8), calls=4)
    assert float(one) == pytest.approx(float(other), rel=1e-5)
    assert np.array_equal(first.predicted, second.predicted)
    halves = []
    for at in (slice(0, 8), slice(8, 16)):  # windows that do not overlap, by hand
        whole = {**batch, "target": [batch["target"][0]]}
        windows = torch.from_numpy(whole["image"][0][None, :, at])
        target = torch.from_numpy(whole["target"][0][None, at])
        halves.append(float(loss(network(windows), target)))
    assert float(one) == pytest.approx(np.mean(halves), rel=0.1)


def test_autocast_around_is_autocast_within():
    batch, seen = case(BINARY), []

    def network(windows):
        seen.append(torch.is_autocast_enabled("cpu"))
        return knows(BINARY)(windows)[0]

    loss = build_loss({"name": "bce"}, BINARY)
    score_volumes(network, loss, batch, BINARY, CPU, None)
    with torch.autocast("cpu", torch.bfloat16):
        score_volumes(network, loss, batch, BINARY, CPU, None)
    assert seen == [False, True]


def test_images_are_scored_at_their_own_size(tmp_path):
    truth = torch.zeros(20, 30, dtype=torch.uint8)
    truth[4:12, 10:20] = 1
    image = resize_indices(truth, (40, 60))[None].float()
    batch = {"image": image, "target": [truth], "case": ["x"], "group": ["g"]}
    loss = build_loss({"name": "bce"}, BINARY)
    value, (outcome,) = score_images(lambda x: (x * 40 - 20,), loss, batch, BINARY, CPU)
    assert np.array_equal(outcome.predicted, truth.numpy())
    assert outcome.probability.shape == (1, 20, 30)
    assert float(value) < 1e-6
    assert outcome.units == {}
    outcome.write(tmp_path, BINARY)
    assert (tmp_path / "x.png").is_file()
