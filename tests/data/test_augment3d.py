import numpy as np
import pytest
import torch

from visattn.data.augment3d import AUGMENT3D, Affine, Augmenter3d, Blur, Gamma, LowResolution, Noise, build_augmenter3d
from visattn.errors import UserError
from visattn.labels import Labels

LABELS = Labels.from_config({"background": 0, "left": 1, "right": 2, "tumour": 3})
SHAPE = (17, 13, 19)  # primes, so that a swapped axis cannot pass


def volume(shape=SHAPE, batch=1):
    rng = np.random.default_rng(3)
    image = torch.from_numpy(rng.standard_normal((batch, 2, *shape), np.float32))
    target = torch.from_numpy(rng.integers(0, 4, (batch, *shape), np.uint8))
    return image, target


def spacings(batch=1, mm=(1.0, 1.0, 1.0)):
    return [mm] * batch


def blob(shape, at):
    place = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    return torch.from_numpy(np.exp(-((place - at) ** 2).sum(-1) / 8).astype(np.float32))


def centroid(image):
    weights = image.double() / image.double().sum()
    return np.array(
        [float((weights.sum([a for a in range(3) if a != axis]) * torch.arange(n)).sum()) for axis, n in
         enumerate(image.shape)]
    )  # fmt: skip


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_mirror_is_an_exact_flip_and_swaps_labels(axis):
    image, target = volume()
    augmenter = build_augmenter3d(
        [{"name": "mirror", "axes": [axis], "swap_labels": [["left", "right"]], "p": 1}], LABELS
    )
    changed, indices = augmenter(image.clone(), target.clone(), spacings(), SHAPE, [(0,)])
    assert torch.equal(changed, image.flip(axis - 3))
    swapped = torch.tensor([0, 2, 1, 3], dtype=torch.uint8)[target.long()]
    assert torch.equal(indices, swapped.flip(axis - 3))


def test_without_augmentation_the_middle_of_what_was_cut_is_left():
    image, target = volume((21, 15, 19))
    changed, indices = Augmenter3d([], LABELS)(image, target, spacings(), SHAPE, [(0,)])
    assert torch.equal(changed, image[:, :, 2:-2, 1:-1])
    assert torch.equal(indices, target[:, 2:-2, 1:-1])


@pytest.mark.parametrize("mm", [(1.0, 1.0, 1.0), (2.0, 1.0, 1.5)])
def test_rotation_keeps_distances_in_mm_and_zoom_multiplies_them(mm):
    shape, at = (41, 61, 51), np.array([25.0, 36.0, 20.0])
    image = blob(shape, at)[None, None]
    middle = (np.array(shape) - 1) / 2
    before = np.linalg.norm((at - middle) * mm)
    directions = []
    for seed in range(3):
        for zoom in (1.0, 1.25):
            augmenter = Augmenter3d([Affine(rotate=40, scale=(zoom, zoom), p=1)], LABELS)
            changed, _ = augmenter(image, torch.zeros(1, *shape, dtype=torch.uint8), spacings(1, mm), shape, [(seed,)])
            moved = (centroid(changed[0, 0]) - middle) * mm
            assert np.linalg.norm(moved) == pytest.approx(zoom * before, rel=0.02)
        directions.append(moved / np.linalg.norm(moved))
    assert np.abs(directions[0] - directions[1]).max() > 0.05, "it did turn, and otherwise with another seed"


def test_shift_moves_by_a_share_of_the_side():
    shape = (21, 31, 25)
    image = blob(shape, (np.array(shape) - 1) / 2)[None, None]
    augmenter = Augmenter3d([Affine(rotate=0, scale=(1, 1), shift=0.2, p=1)], LABELS)
    moves = []
    for seed in range(20):
        changed, _ = augmenter(image, torch.zeros(1, *shape, dtype=torch.uint8), spacings(), shape, [(seed,)])
        moves.append((centroid(changed[0, 0]) - (np.array(shape) - 1) / 2) / shape)
    assert np.abs(moves).max() <= 0.21
    assert (np.abs(moves).max(axis=0) > 0.08).all()


def test_thick_slices_are_not_mixed():
    shape = (9, 33, 33)
    image = torch.arange(9.0)[:, None, None].expand(shape)[None, None].contiguous()
    augmenter = Augmenter3d([Affine(rotate=45, scale=(1, 1), p=1)], LABELS)
    zeros = torch.zeros(1, *shape, dtype=torch.uint8)
    thick, _ = augmenter(image, zeros, spacings(1, (5, 1, 1)), shape, [(1,)])
    assert torch.allclose(thick[..., 8:-8, 8:-8], image[..., 8:-8, 8:-8], atol=1e-4)
    thin, _ = augmenter(image, zeros, spacings(1, (2, 1, 1)), shape, [(1,)])
    assert not torch.allclose(thin[..., 8:-8, 8:-8], image[..., 8:-8, 8:-8], atol=0.5)


def test_image_and_labels_move_together_and_no_label_is_invented():
    shape = (40, 32, 36)
    target = torch.zeros(1, *shape, dtype=torch.uint8)
    target[0, 10:30, 8:20, 12:30] = 3
    target[0, 12:20, 10:16, 14:20] = 255
    image = (target == 3).float()[:, None]
    augmenter = build_augmenter3d(
        [{"name": "affine", "rotate": 30, "p": 1}, {"name": "elastic", "p": 1}, {"name": "mirror", "p": 0.5}], LABELS
    )
    for seed in range(4):
        changed, indices = augmenter(image, target, spacings(1, (1, 1.5, 1)), shape, [(seed,)])
        assert set(indices.unique().tolist()) == {0, 3, 255}
        assert float(((changed[:, 0] > 0.5) == (indices == 3)).float().mean()) > 0.99
        still = float(((image[:, 0] > 0.5) == (indices == 3)).float().mean())
        assert still < 0.99, "it did move"


def test_elastic_bends_by_what_it_says():
    shape = (40, 40, 40)
    ramp = torch.arange(40.0)[:, None, None].expand(shape)[None, None].contiguous()
    zeros = torch.zeros(1, *shape, dtype=torch.uint8)
    augmenter = build_augmenter3d([{"name": "elastic", "strength": 0.05, "p": 1}], LABELS)
    moves = [(augmenter(ramp, zeros, spacings(), shape, [(s,)])[0] - ramp)[..., 8:-8, 8:-8, 8:-8] for s in range(12)]
    spread = float(torch.stack(moves).std())
    assert 0.3 * 2 < spread < 2, "a spline of points that spread by 2 voxels spreads by less"


def test_what_is_cut_reaches_into_the_corners():
    patch, mm = (12, 20, 16), (1.0, 1.0, 1.5)
    augmenter = Augmenter3d([Affine(rotate=30, scale=(0.7, 1.4), p=1)], LABELS)
    cut = augmenter.reach(patch, mm)
    assert all((q - p) % 2 == 0 and q > p for q, p in zip(cut, patch, strict=True))
    ones = torch.ones(1, 1, *cut)
    for seed in range(30):
        changed, _ = augmenter(ones, torch.zeros(1, *cut, dtype=torch.uint8), spacings(1, mm), patch, [(seed,)])
        assert float(changed.min()) > 0.99
    assert Augmenter3d([], LABELS).reach(patch, mm) == patch


def test_a_sample_does_not_depend_on_its_batch():
    image, target = volume(batch=3)
    augmenter = build_augmenter3d([{"name": name, "p": 1} for name in AUGMENT3D], LABELS)
    seeds = [(1, 2, 3), (1, 2, 4), (1, 2, 5)]
    together = augmenter(image.clone(), target.clone(), spacings(3), SHAPE, seeds)
    alone = augmenter(image[1:2].clone(), target[1:2].clone(), spacings(), SHAPE, seeds[1:2])
    assert torch.equal(together[0][1], alone[0][0])
    assert torch.equal(together[1][1], alone[1][0])
    other = augmenter(image[1:2].clone(), target[1:2].clone(), spacings(), SHAPE, [(1, 2, 6)])
    assert not torch.equal(other[0], alone[0])


def test_intensities():
    image, rng = volume((16, 16, 16))[0][0] + 3, np.random.default_rng(0)
    changed = Gamma((2.0, 2.0), invert=0)(image, rng)
    assert torch.allclose(changed.mean((1, 2, 3)), image.mean((1, 2, 3)), atol=1e-4)
    assert torch.allclose(changed.std((1, 2, 3)), image.std((1, 2, 3)), atol=1e-4)
    order = image[0].flatten().argsort()
    assert (changed[0].flatten()[order].diff() >= -1e-5).all()
    skew = ((changed[0] - changed[0].mean()) ** 3).mean()
    inverted = Gamma((2.0, 2.0), invert=1)(image, rng)
    assert float(skew) > 0 > float(((inverted[0] - inverted[0].mean()) ** 3).mean())
    assert float((Noise((0.2, 0.2))(image, rng) - image).std()) == pytest.approx(0.2, rel=0.05)
    point = torch.zeros(1, 15, 15, 15)
    point[0, 7, 7, 7] = 1
    spread = Blur((1.0, 1.0))(point, rng)[0]
    assert float(spread.sum()) == pytest.approx(1, abs=1e-4)
    for axis in range(3):
        line = spread.sum([a for a in range(3) if a != axis])
        assert float((line * (torch.arange(15.0) - 7).square()).sum()) == pytest.approx(1, rel=0.05)
    coarse = LowResolution((0.5, 0.5))(image, rng)
    assert coarse.shape == image.shape
    assert float(coarse.std()) < float(image.std())
    constant = torch.full((1, 9, 7, 5), 2.0)
    for entry in (Gamma(), Blur(), LowResolution()):
        assert torch.allclose(entry(constant, rng), constant), "a constant stays finite and what it is"


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (["afine"], "Did you mean 'affine'"),
        (["flip_horizontal"], "augmentation of volumes"),
        ([{"name": "affine", "rotat": 3}], "Did you mean 'rotate'"),
        ([{"name": "affine", "rotate": 300}], "affine.rotate"),
        ([{"name": "gamma", "gamma": [1.5, 0.7]}], "smaller number first"),
        ([{"name": "mirror", "axes": [0, 3]}], "mirror.axes"),
        ([{"name": "mirror", "swap_labels": [["left", "right"]]}], "axes: [0]"),
        ([{"name": "mirror", "axes": [0], "swap_labels": [["left", "rigth"]]}], "Did you mean 'right'"),
        ([{"rotate": 3}], "name"),
    ],
)
def test_what_a_recipe_gets_wrong_is_told(config, text):
    with pytest.raises(UserError) as error:
        build_augmenter3d(config, LABELS)
    assert text in str(error.value)
