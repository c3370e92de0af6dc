"""Synthetic heads: the same everywhere, lesions of the volume asked for, on the inside of the skull."""

import hashlib
import json
import math

import numpy as np
import pytest
from scipy import ndimage

from visattn.cli import main
from visattn.data import nifti
from visattn.data import phantom_head as phantom_head_module
from visattn.data._phantom_space import Space, draw_scan
from visattn.data.phantom_head import (
    LARGEST_ML,
    SMALLEST_ML,
    lesion_volumes,
    phantom_head,
    write_heads,
)
from visattn.data.phantom_volumes import read_phantom
from visattn.data.volume_case import phantom_cases

TOUCHING = np.ones((3, 3, 3), int)  # 26 neighbours


def digest(index, seed):
    image, labels, geometry = phantom_head(index, seed)
    return hashlib.sha256(image.tobytes() + labels.tobytes() + geometry.affine.tobytes()).hexdigest()[:20]


def test_the_same_on_every_machine():
    """Found with and without AVX; a head that changes makes every published number of the phantom void."""
    assert digest(3, 20240) == "b05c2838b98d2a0c7fc1"


@pytest.mark.parametrize("index", [0, 3])
def test_lesions_have_the_volume_asked_for_and_lie_apart(index):
    wanted = lesion_volumes(index, 20240)
    image, labels, geometry = phantom_head(index, 20240)
    assert image.shape == (1, *geometry.shape)
    assert labels.shape == geometry.shape
    assert (image.dtype, labels.dtype) == (np.float32, np.uint8)
    parts, count = ndimage.label(labels, TOUCHING)
    found = sorted(np.bincount(parts.ravel())[1:] * geometry.voxel_ml)
    assert count == len(wanted)
    np.testing.assert_allclose(found, sorted(wanted), atol=geometry.voxel_ml)


def test_lesions_are_bright():
    image, labels, _ = phantom_head(3, 20240)
    white = np.median(image[0][image[0] > np.percentile(image[0], 50)])
    assert np.median(image[0][labels > 0]) > 1.3 * white


@pytest.mark.parametrize("index", [6, 8])
def test_lesions_hang_on_the_skull(index):
    """Drawn again as far as the cavity: the lesion begins at its wall and bulges inwards, nothing lies outside."""
    rng = np.random.default_rng((20240, index))
    phantom_head_module._lesions(rng)
    scan = draw_scan(rng)
    inside, _ = phantom_head_module._cavity(Space(rng, scan))
    _, labels, _ = phantom_head(index, 20240)
    depth = inside[labels > 0]
    assert 0 < depth.min() < 1
    assert np.count_nonzero(depth < 2) * scan.geometry.voxel_ml > 0.05
    assert depth.max() > 5


def test_no_threshold_finds_them():
    image, labels, _ = phantom_head(3, 20240)
    best = max(
        2 * (labels[image[0] > at] > 0).sum() / ((image[0] > at).sum() + labels.sum())
        for at in np.percentile(image, np.linspace(80, 99.9, 60))
    )
    assert best < 0.5


def test_volumes_are_log_uniform_and_numbers_as_said():
    heads = [lesion_volumes(index, 5) for index in range(1500)]
    logs = np.log([ml for head in heads for ml in head])
    low, high = math.log(SMALLEST_ML), math.log(LARGEST_ML)
    assert low <= logs.min() < low + 0.1
    assert high - 0.1 < logs.max() <= high
    shares, _ = np.histogram(logs, 5, (low, high))
    np.testing.assert_allclose(shares / len(logs), 0.2, atol=0.04)
    numbers = np.bincount([len(head) for head in heads]) / len(heads)
    np.testing.assert_allclose(numbers, [0.2, 0.6, 0.13, 0.07], atol=0.04)


def test_another_index_and_another_seed_give_another_head():
    assert len({digest(0, 1), digest(1, 1), digest(0, 2)}) == 3


def test_the_word_phantom():
    case = phantom_cases()[1]
    assert case.name == case.group == "head_0001"
    image, labels, geometry = read_phantom(case.name)
    again = phantom_head(1, 20240)
    assert np.array_equal(image, again[0])
    assert np.array_equal(labels, again[1])
    assert geometry.same_grid(again[2])
    image[:] = 0  # what is kept for the next caller stays as it is
    assert np.array_equal(read_phantom(case.name)[0], again[0])


def test_written_heads_read_back_exactly(tmp_path):
    assert main(["phantom", str(tmp_path / "heads"), "--kind", "head", "--count", "2", "--seed", "4"]) == 0
    description = json.loads((tmp_path / "heads/dataset.json").read_text())
    assert description["labels"] == {"background": 0, "meningioma": 1}
    assert description["numTraining"] == 2
    for index in range(2):
        image, labels, geometry = phantom_head(index, 4)
        stored, own = nifti.read(tmp_path / f"heads/imagesTr/head_{index:04d}_0000.nii.gz")
        assert np.array_equal(stored, image[0])
        assert own.same_grid(geometry)
        assert np.array_equal(own.affine, geometry.affine)
        assert np.array_equal(nifti.read_labels(tmp_path / f"heads/labelsTr/head_{index:04d}.nii.gz")[0], labels)


@pytest.mark.slow
def test_headers_differ_and_every_head_holds(tmp_path):
    """Orientation, tilt, voxel sizes; and lesions of the volume asked for in forty heads."""
    orientations, oblique, anisotropic = set(), 0, 0
    for index in range(40):
        _, labels, geometry = phantom_head(index, 20240)
        wanted = lesion_volumes(index, 20240)
        parts, count = ndimage.label(labels, TOUCHING)
        assert count == len(wanted)
        found = np.sort(np.bincount(parts.ravel())[1:] * geometry.voxel_ml)
        np.testing.assert_allclose(found, np.sort(wanted), atol=geometry.voxel_ml)
        assert all(64 <= side <= 128 for side in geometry.shape)
        assert all(1.7 < zoom < 3 for zoom in geometry.zooms)
        orientations.add(geometry.orientation)
        unit = np.abs(geometry.affine[:3, :3] / np.array(geometry.zooms))
        oblique += unit.max(axis=0).min() < math.cos(math.radians(5))
        anisotropic += max(geometry.zooms) > 1.1 * min(geometry.zooms)
    assert len(orientations) > 15
    assert oblique > 20
    assert 20 < anisotropic < 40
    write_heads(tmp_path, 0, 0)
    assert json.loads((tmp_path / "dataset.json").read_text())["numTraining"] == 0


@pytest.mark.slow
def test_the_recipe_runs_on_written_heads(tmp_path):
    write_heads(tmp_path / "heads", 5, 1)
    small = ["--data.size", "[16, 16, 16]", "--data.batch_size", "2", "--data.cache_dir", str(tmp_path / "cache")]
    network = ["--model.network.filters", "[4, 6, 8]", "--model.loss.deep_supervision", "[0.7, 0.3]"]
    trainer = ["--trainer.max_epochs", "1", "--trainer.precision", "32-true", "--trainer.accelerator", "cpu"]
    start = ["fit", "--config", "meningioma_agunet", "--data.root", str(tmp_path / "heads"), "--data.num_workers", "0"]
    assert main([*start, "--run", str(tmp_path / "run"), *small, *network, *trainer]) == 0
    assert (tmp_path / "run/checkpoints/best.ckpt").is_file()
    assert "meningioma" in (tmp_path / "run/report.html").read_text()
