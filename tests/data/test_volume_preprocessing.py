"""To the network's grid and back: exact where nothing changes, right where something does."""

import itertools

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from visattn.data.geometry import Geometry
from visattn.data.intensity import Normalise, body_mask, otsu
from visattn.data.network_grid import to_network
from visattn.data.resample import linear_matrix, resample, resample_labels
from visattn.data.volume_preprocessing import VolumePreprocessing
from visattn.errors import UserError

NONE = (Normalise("none"),)
CODES = ["".join(code) for axes in itertools.permutations(("RL", "AP", "SI")) for code in itertools.product(*axes)]


def geometry_of(code, shape, zooms=(1.0, 2.0, 3.0)):
    """Axes that run along the directions of `code`."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, letter in enumerate(code):
        world = next(i for i, pair in enumerate(("LR", "PA", "IS")) if letter in pair)
        affine[world, axis] = zooms[axis] * (1 if letter in "RAS" else -1)
    return Geometry(shape, affine)


def simple(**options):
    return VolumePreprocessing(("t1",), NONE, **options)


# Resampling


@pytest.mark.parametrize(("old", "new"), [(5, 9), (9, 5), (7, 7), (1, 4), (4, 1), (30, 31), (31, 30), (100, 7)])
def test_matrices_average(old, new):
    matrix = linear_matrix(old, new)
    assert matrix.shape == (new, old)
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(new))
    assert (matrix >= 0).all()


@pytest.mark.parametrize(("old", "new"), [(5, 9), (6, 12), (10, 13)])
def test_growing_is_linear_interpolation(old, new):
    x = torch.randn(1, 1, old)
    expected = F.interpolate(x, new, mode="linear", align_corners=False)
    torch.testing.assert_close(x[0] @ linear_matrix(old, new).T, expected[0], rtol=1e-5, atol=1e-6)


def test_shrinking_averages_and_does_not_alias():
    stripes = torch.tensor([0.0, 1.0]).repeat(32)
    small = linear_matrix(64, 16) @ stripes
    assert (small - 0.5)[1:-1].abs().max() < 1e-6
    assert ((linear_matrix(64, 16) @ torch.arange(64.0)) - (torch.arange(16.0) * 4 + 1.5))[2:-2].abs().max() < 1e-4


def test_axes_are_not_mixed_up():
    torch.manual_seed(0)
    volume = torch.randn(2, 4, 5, 6)
    expected = F.interpolate(volume[None], (7, 9, 8), mode="trilinear", align_corners=False)[0]
    torch.testing.assert_close(resample(volume, (7, 9, 8)), expected, rtol=1e-4, atol=1e-5)
    assert resample(volume, (4, 5, 6)) is volume


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((300, 41, 37), (290, 37, 41)),  # several blocks and products along each axis, growing and shrinking
        ((37, 300, 41), (9, 290, 45)),
        ((41, 37, 300), (70, 37, 33)),  # one axis is copied
        ((29, 310, 13), (29, 310, 13)),
        ((1, 5, 70), (3, 1, 70)),
    ],
)
def test_blocks_join_to_the_resampled_volume(order, old, new):
    """Whichever axis runs along the file's memory, also against the wanted direction, and with NaN in it."""
    rng = np.random.default_rng(0)
    source = rng.standard_normal([old[axis] for axis in np.argsort(order)]).astype(np.float32).transpose(order)
    for view in (source, source[::-1, :, ::-1], source[:, ::-1]):
        out = np.full(new, np.nan, np.float32)
        to_network(view, out)
        np.testing.assert_allclose(out, resample(torch.from_numpy(view.copy()), new), atol=1e-5)
        if old == new:
            assert np.array_equal(out, view)
    holed = source.copy()
    holed[-1, -1, -1], holed[0, 1, 2] = np.nan, -np.inf
    to_network(holed, out)
    finite = np.isfinite(holed)
    holed[~finite] = holed[finite].mean(dtype=np.float64)
    np.testing.assert_allclose(out, resample(torch.from_numpy(holed), new), atol=1e-5)


def test_labels_are_resampled_by_share():
    indices = torch.zeros(6, 6, 6, dtype=torch.uint8)
    indices[2:4, 2:4, 2:4] = 3
    assert resample_labels(indices, (6, 6, 6), [0, 3]) is indices
    large = resample_labels(indices, (12, 12, 12), [0, 3])
    assert set(large.unique().tolist()) == {0, 3}  # no 1 and no 2 in between
    assert 40 <= int((large == 3).sum()) <= 64  # 8 times the voxels, rounded at its corners
    assert (large[5:7, 5:7, 5:7] == 3).all()


# Orientation


@pytest.mark.parametrize("own", CODES)
def test_every_orientation_is_turned_and_turned_back(own):
    assert len(CODES) == 48
    shape = (2, 3, 4)
    array = np.arange(24, dtype=np.float32).reshape(shape)
    geometry = geometry_of(own, shape)
    assert geometry.orientation == own
    for wanted in ("RAS", "LPS", "SAL"):
        volume, plan = simple(orientation=wanted).forward(array[None], geometry)
        ornt = nibabel.orientations.ornt_transform(
            nibabel.orientations.axcodes2ornt(own), nibabel.orientations.axcodes2ornt(wanted)
        )
        assert np.array_equal(volume[0].numpy(), nibabel.orientations.apply_orientation(array, ornt))
        assert np.array_equal(plan.channel_native(volume[0]), array)
        assert np.array_equal(plan.labels_native(torch.stack([-volume[0], volume[0] - 11])), array > 5.5)
        zooms = dict(zip([min(x, {"R": "L", "P": "A", "S": "I"}.get(x, x)) for x in own], geometry.zooms, strict=True))
        assert plan.spacing == pytest.approx([zooms[min(x, {"R": "L", "P": "A", "S": "I"}.get(x, x))] for x in wanted])


@settings(max_examples=50, deadline=None)
@given(
    own=st.sampled_from(CODES),
    wanted=st.sampled_from([None, *CODES]),
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    crop=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_an_identity_predictor_returns_the_volume_exactly(own, wanted, shape, crop, seed):
    """Whatever orientation, crop and odd size: without resampling every voxel comes back to its place, bit for bit."""
    rng = np.random.default_rng(seed)
    array = np.zeros(shape, np.float32)
    low = [int(rng.integers(0, n)) for n in shape]
    part = tuple(slice(a, int(rng.integers(a, n)) + 1) for a, n in zip(low, shape, strict=True))
    array[part] = rng.standard_normal(array[part].shape)
    crop = crop and not array[np.ix_([0, -1], [0, -1], [0, -1])].any()  # the corners show the background's value
    volume, plan = simple(orientation=wanted, crop_foreground=crop).forward(array[None], geometry_of(own, shape))
    assert np.array_equal(plan.channel_native(volume[0]), array)
    labels = (array > 0).astype(np.uint8)
    there = plan.forward_labels(labels, [0, 1])
    assert np.array_equal(plan.labels_native(torch.stack([1.0 - there, there.float()])), labels)


# Spacing and size


def test_spacing_sets_the_number_of_voxels_and_comes_back():
    geometry = geometry_of("RAS", (20, 10, 8), (1.0, 2.0, 3.0))
    ramp = np.broadcast_to(np.arange(20, dtype=np.float32)[:, None, None], (20, 10, 8)).copy()
    volume, plan = simple(spacing=(2.0, 2.0, 1.0)).forward(ramp[None], geometry)
    assert volume.shape == (1, 10, 10, 24)
    assert plan.spacing == pytest.approx((2.0, 2.0, 1.0))
    np.testing.assert_allclose(volume[0, 2:-2, 5, 5], np.arange(10)[2:-2] * 2 + 0.5, rtol=1e-4)
    assert plan.channel_native(volume[0]).shape == (20, 10, 8)
    np.testing.assert_allclose(plan.channel_native(volume[0])[4:-4], ramp[4:-4], atol=0.05)


def test_a_sphere_keeps_its_volume_in_millimetres():
    shape, zooms = (40, 40, 20), (1.0, 1.0, 2.0)
    axes = [(np.arange(n) + 0.5) * z - 20 for n, z in zip(shape, zooms, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    inside = (np.square(grid).sum(axis=0) < 12**2).astype(np.uint8)
    preprocessing = simple(spacing=(1.6, 1.6, 1.6))
    _, plan = preprocessing.forward(inside[None].astype(np.float32), geometry_of("RAS", shape, zooms))
    there = plan.forward_labels(inside, [0, 1])
    assert float(there.sum()) * 1.6**3 == pytest.approx(float(inside.sum()) * 2, rel=0.03)
    back = plan.labels_native(torch.stack([1.0 - there, there.float()]))
    assert 2 * (back & inside).sum() / (back.sum() + inside.sum()) > 0.96


def test_whole_volumes_are_resized():
    array = np.random.default_rng(0).random((1, 16, 12, 9), np.float32)
    volume, plan = simple(size=(8, 12, 4)).forward(array, geometry_of("RAS", (16, 12, 9)))
    assert volume.shape == (1, 8, 12, 4)
    assert plan.spacing == pytest.approx((2.0, 2.0, 6.75))


def test_many_classes_come_back_as_the_largest():
    torch.manual_seed(0)
    _, plan = simple(spacing=(1.5, 1.5, 1.5)).forward(
        np.random.rand(1, 9, 8, 7).astype(np.float32), geometry_of("LPS", (9, 8, 7), (1, 1, 1))
    )
    scores = torch.randn(6, *plan.size)
    kept = scores.clone()
    result = plan.labels_native(scores)
    native = np.stack([plan.channel_native(score) for score in scores])
    assert np.array_equal(result, native.argmax(axis=0))
    assert torch.equal(scores, kept)


def test_cropping_follows_the_background_and_is_pasted_back():
    array = np.full((10, 9, 8), -3.0, np.float32)
    array[2:5, 3:9, 1:2] = 1.0
    volume, plan = simple(crop_foreground=True).forward(array[None], geometry_of("LPS", (10, 9, 8)))
    assert volume.shape == (1, 3, 6, 1)
    assert (volume == 1).all()
    back = plan.channel_native(volume[0], outside=-3.0)
    assert np.array_equal(back, array)
    constant, plan = simple(crop_foreground=True).forward(
        np.ones((1, 3, 3, 3), np.float32), geometry_of("RAS", (3, 3, 3))
    )
    assert constant.shape == (1, 3, 3, 3)


# Intensities


def test_zscore_uses_all_finite_voxels():
    values = torch.randn(6, 7, 8) * 3 + 10
    result = Normalise("zscore")(values)
    assert abs(float(result.mean())) < 1e-5
    assert float(result.std(correction=0)) == pytest.approx(1, abs=1e-4)
    values[0, 0, 0] = float("nan")
    values[0, 0, 1] = float("inf")
    result = Normalise("zscore")(values)
    assert result[0, 0, 0] == 0
    assert result[0, 0, 1] == 0
    assert torch.isfinite(result).all()
    assert abs(float(result.flatten()[2:].mean())) < 1e-5


@pytest.mark.parametrize(("mean", "spread"), [(0, 1), (-1e4, 1), (1e25, 1e24), (0, 3e30), (1e-9, 1e-12)])
def test_moments_are_those_of_float64(mean, spread):
    """Joined from parts whose own means differ; also where squares leave the range of float32."""
    values = np.random.default_rng(0).standard_normal((45, 67, 71)) * spread + mean
    values[: 45 // 2] += 3 * spread
    values = values.astype(np.float32)
    exact = values.astype(np.float64)
    scale = Normalise("zscore").fit(torch.from_numpy(values))
    assert scale.shift == pytest.approx(exact.mean(), rel=1e-6, abs=1e-6 * spread)
    assert scale.unit == pytest.approx(exact.std(), rel=1e-5)


@pytest.mark.parametrize("name", ["zscore", "zscore_masked", "percentile", "none"])
def test_constant_and_unknown_images_give_finite_values(name):
    assert torch.isfinite(Normalise(name)(torch.full((3, 3, 3), 7.25))).all()
    assert torch.equal(Normalise(name)(torch.full((3, 3, 3), float("nan"))), torch.zeros(3, 3, 3))
    assert Normalise("zscore")(torch.full((9, 9, 9), 0.1)).abs().max() == 0


def test_percentile_scales_to_0_and_1():
    values = torch.arange(1000.0).reshape(10, 10, 10)
    values[0, 0, 0] = -1e6
    result = Normalise("percentile", (1, 99))(values)
    assert result.min() == 0
    assert result.max() == 1
    assert result[5, 0, 0] == pytest.approx(0.5, abs=0.02)


def test_ct_uses_what_training_found():
    method = Normalise("ct", low=-100.0, high=300.0, mean=50.0, std=25.0)
    assert Normalise("ct").complete is False
    assert method.complete
    result = method(torch.tensor([-1000.0, 50.0, 1000.0]).reshape(3, 1, 1))
    assert result.flatten().tolist() == [-6.0, 0.0, 10.0]
    with pytest.raises(ValueError, match="not known yet"):
        Normalise("ct")(torch.zeros(1, 1, 1))


def head(size=24):
    """A bright ball with a dark hole and noise outside."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(size) - size / 2] * 3, indexing="ij"))
    radius = np.sqrt(np.square(grid).sum(axis=0))
    values = rng.uniform(0, 5, (size,) * 3)
    values[radius < 9] = 100 + rng.uniform(-5, 5, int((radius < 9).sum()))
    values[radius < 3] = 0
    return values.astype(np.float32), radius


def test_the_body_is_found_with_its_holes_and_without_the_noise():
    values, radius = head()
    values[0, 0, 0] = 110  # a bright speck outside
    assert 5 < otsu(values) < 95
    assert np.array_equal(body_mask(values), radius < 9)
    result = Normalise("zscore_masked")(torch.from_numpy(values))
    inside = result[torch.from_numpy(radius < 9)]
    assert abs(float(inside.mean())) < 1e-4
    assert float(inside.std(correction=0)) == pytest.approx(1, abs=1e-3)


def test_a_nan_does_not_spread_when_resampled():
    array = np.ones((1, 8, 8, 8), np.float32)
    array[0, 4, 4, 4] = np.nan
    volume, _ = simple(spacing=(2.0, 2.0, 2.0)).forward(array, geometry_of("RAS", (8, 8, 8), (1, 1, 1)))
    torch.testing.assert_close(volume, torch.ones(1, 4, 4, 4))


def test_input_is_left_alone():
    array = np.random.rand(2, 5, 6, 7).astype(np.float32)
    kept = array.copy()
    methods = (Normalise("zscore"), Normalise("none"))
    preprocessing = VolumePreprocessing(("a", "b"), methods)
    volume, _ = preprocessing.forward(array, geometry_of("RAS", (5, 6, 7)))
    volume += 1
    assert np.array_equal(array, kept)
    with pytest.raises(ValueError, match="expected 2 channels"):
        preprocessing.forward(array[:1], geometry_of("RAS", (5, 6, 7)))


# Configuration


def test_it_travels_as_plain_values():
    preprocessing = VolumePreprocessing(
        ("t1c", "flair"),
        (Normalise("percentile", (1.0, 99.0)), Normalise("ct", low=0.0, high=1.0, mean=0.5, std=0.25)),
        orientation="LPS",
        spacing=(1.0, 1.0, 3.0),
        patch=(64, 64, 16),
        crop_foreground=True,
    )
    config = preprocessing.to_config()
    assert config["rank"] == 3
    assert VolumePreprocessing.from_config(config) == preprocessing
    assert '"' not in str(config).replace("'", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"orientation": "RAX"}, "needs three different directions"),
        ({"orientation": "RLS"}, "needs three different directions"),
        ({"orientation": "RA"}, "needs three different directions"),
        ({"spacing": (1.0, 0.0, 1.0)}, "three numbers of mm above 0"),
        ({"spacing": (1.0, 1.0, 1.0), "size": (4, 4, 4)}, "give one of the two"),
        ({"patch": (4, 4)}, "three whole numbers of voxels"),
        ({"size": (4, 0, 4)}, "three whole numbers of voxels"),
        ({"channels": ()}, "needs different names"),
        ({"channels": ("a", "a")}, "needs different names"),
        ({"normalise": ()}, "0 methods for 1 channels"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        VolumePreprocessing(**{"channels": ("t1",), "normalise": NONE, **options})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("z-score", "Did you mean 'zscore'"),
        ({"name": "ct", "lo": 1}, "unknown key of data.normalise"),
        ({"name": "percentile", "percentiles": [99, 1]}, "two rising numbers"),
        ({"name": "ct", "std": 0}, "std must be above 0"),
    ],
)
def test_methods_are_checked(config, message):
    with pytest.raises(UserError, match=message):
        Normalise.from_config(config)
