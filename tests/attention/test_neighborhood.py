"""Neighbourhood attention against natten's outputs, a slow loop, and itself in every backend."""

import importlib.util
import inspect
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.export import Dim

from visattn.attention import _neighborhood_gathered as gathered
from visattn.attention import _neighborhood_tiles as tiles
from visattn.attention import _neighborhood_tiling as tiling
from visattn.attention import _neighborhood_traced as traced
from visattn.attention import na1d, na2d, na3d, neighborhood_attention
from visattn.attention._neighborhood_plan import boxes_of, turns_of, units_of, view_of
from visattn.attention._neighborhood_traced import neighborhood_traced
from visattn.attention._neighborhood_windows import Axis, axes_of, bounds
from visattn.attention.neighborhood import NeighborhoodAttention, attend

_SPEC = importlib.util.spec_from_file_location(
    "visattn_oracle_neighborhood", Path(__file__).resolve().parent.parent / "reference" / "neighborhood.py"
)
ORACLE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(ORACLE)

BACKENDS = ("reference", "torch")
PUBLIC = [
    "1d_k7",
    "1d_k8_s3_d2",
    "1d_k5_s4_causal",
    "2d_k7x7",
    "2d_k3x5_d4x2",
    "2d_k6x4_s2x4",
    "2d_k4x5_s4x2_d1x3_causalTF",
    "3d_k3x4x5_s1x2x5_d2x1x1_causalTFF",
]


class Setting(NamedTuple):
    """A random call: sizes, per axis every setting, batch, key heads, repeats, D, V, and whether it has a bias."""

    sizes: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    batch: int
    groups: int
    repeat: int
    width: int
    deep: int
    biased: bool

    @property
    def axes(self):
        return axes_of(len(self.sizes), self.kernel, self.stride, self.dilation, self.causal)

    def tensors(self, dtype=torch.float64, seed=0):
        """Query, key, value and bias (or None); the key and value are views with the heads in front."""
        random = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

        q = draw(self.batch, *self.sizes, self.groups * self.repeat, self.width)
        k = draw(self.batch, self.groups, *self.sizes, self.width).movedim(1, -2)
        v = draw(self.batch, self.groups, *self.sizes, self.deep).movedim(1, -2)
        rpb = draw(self.groups * self.repeat, *(2 * k - 1 for k in self.kernel)) if self.biased else None
        return q, k, v, rpb


@st.composite
def random_settings(draw, largest=(40, 11, 6), fits=False):
    rank = draw(st.integers(1, 3))
    axes = []
    for _ in range(rank):
        size = draw(st.integers(2 if fits else 1, largest[rank - 1]))
        kernel = draw(st.integers(2, size if fits else 7))
        dilation = draw(st.integers(1, size // kernel if fits else 4))
        axes.append((size, kernel, draw(st.integers(1, kernel)), dilation, draw(st.booleans())))
    widths = draw(st.sampled_from([(3, 3), (4, 4), (2, 5)]))
    batch, groups, repeat, biased = (draw(st.integers(1, 2)) for _ in range(4))
    return Setting(*zip(*axes, strict=True), batch, groups, repeat, *widths, biased == 2)


def forget():
    """Drops what is kept between calls."""
    tiling.tiling_of.cache_clear()
    tiles._program.cache_clear()


def call(setting, backend, rpb, q, k, v, lse=True):
    if backend == "traced":
        return neighborhood_traced(q, k, v, setting.axes, q.shape[-1] ** -0.5, rpb, lse)
    if backend == "gathered":  # what a GPU takes
        return gathered.neighborhood_gathered(q, k, v, setting.axes, q.shape[-1] ** -0.5, rpb), None
    return attend(q, k, v, setting.axes, None, rpb, backend, lse)


def gradients(setting, backend, q, k, v, rpb, lse=True):
    """Out, lse and the gradients of a weighted sum of both."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v, rpb) if x is not None]
    out, rows = call(setting, backend, inputs[3] if rpb is not None else None, *inputs[:3], lse)
    total = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)).sum()
    if lse:
        total = total + (rows * torch.linspace(1, 2, rows.numel(), dtype=rows.dtype).reshape(rows.shape)).sum()
    return [out, *([rows] if lse else []), *torch.autograd.grad(total, inputs)]


class TestGolden:
    @staticmethod
    def outputs(golden, variant, backend, **changed):
        case = golden("gna", variant)
        note = json.loads(case.facts["note"])
        shapes = [note["query_shape"], note["kv_shape"], note["kv_shape"]]
        made = zip(note["seeds_qkv"], shapes, strict=True)
        q, k, v = (torch.from_numpy(case.fill.make_input(seed, shape)) for seed, shape in made)
        names = ("kernel_size", "stride", "dilation", "is_causal")
        arguments = {name: note[name] for name in names} | changed
        out, lse = neighborhood_attention(q, k, v, **arguments, backend=backend, return_lse=True)
        return case.error(0, "out", out), case.error(0, "lse", lse)

    @pytest.mark.parametrize("variant", PUBLIC)
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_natten(self, golden, variant, backend):
        assert max(self.outputs(golden, variant, backend)) <= 1

    @pytest.mark.parametrize(
        ("variant", "changed"),
        [
            ("1d_k7", {"is_causal": True}),
            ("1d_k7", {"kernel_size": 6}),
            ("1d_k8_s3_d2", {"stride": 2}),
            ("1d_k8_s3_d2", {"dilation": 1}),
            ("2d_k7x7", {"scale": 0.26}),
            ("2d_k6x4_s2x4", {"kernel_size": (4, 6)}),
            ("2d_k3x5_d4x2", {"dilation": (3, 2)}),
            ("1d_k5_s4_causal", {"stride": 3}),
        ],
    )
    def test_natten_pins_every_setting(self, golden, variant, changed):
        assert min(self.outputs(golden, variant, "torch", **changed)) > 100

    @pytest.mark.parametrize(("variant", "dilation"), [("na_k7", 1), ("na_k7_d2", 2)])
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_official_module(self, golden, variant, dilation, backend):
        case = golden("medvitv2", variant)
        block = case.load_into(NeighborhoodAttention(64, 2, dilation=dilation, backend=backend, small_maps="error"))
        for index in case.cases:
            assert case.error(index, "out", block(case.input(index))) <= 1

    def test_official_module_pins_the_bias(self, golden):
        case = golden("medvitv2", "na_k7")
        block = case.load_into(NeighborhoodAttention(64, 2))
        with torch.no_grad():
            block.rpb.copy_(block.rpb.flip(1))
        assert case.error(0, "out", block(case.input(0))) > 100


class TestDefinition:
    @pytest.mark.parametrize("backend", [*BACKENDS, "traced"])
    @given(setting=random_settings(largest=(20, 6, 4)), seed=st.integers(0, 99))
    @settings(max_examples=25, deadline=None)
    def test_loops_agree(self, backend, setting, seed):
        """The oracle knows clipped windows as well: a group that is smaller than the window is seen whole."""
        q, k, v, rpb = setting.tensors(seed=seed)
        want = ORACLE.attention(q, k, v, setting.kernel, setting.stride, setting.dilation, setting.causal, rpb=rpb)
        for value, wanted in zip(call(setting, backend, rpb, q, k, v), want, strict=True):
            np.testing.assert_allclose(value.numpy(), wanted, rtol=1e-11, atol=1e-12)

    @given(setting=random_settings(), seed=st.integers(0, 99), lse=st.booleans())
    @settings(max_examples=25, deadline=None)
    def test_backends_agree_forward_and_backward(self, setting, seed, lse):
        tensors = setting.tensors(seed=seed)
        wanted = gradients(setting, "reference", *tensors, lse=lse)
        for backend in ("torch", "traced"):
            for value, want in zip(gradients(setting, backend, *tensors, lse=lse), wanted, strict=True):
                torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-11)

    @given(setting=random_settings(largest=(60, 20, 9)), seed=st.integers(0, 99))
    @settings(max_examples=30, deadline=None)
    def test_all_tiles_at_once_agree_forward_and_backward(self, setting, seed):
        setting = setting._replace(repeat=1)
        tensors = setting.tensors(seed=seed)
        wanted = gradients(setting, "reference", *tensors, lse=False)
        for value, want in zip(gradients(setting, "gathered", *tensors, lse=False), wanted, strict=True):
            torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-11)

    @pytest.mark.parametrize(
        ("sizes", "kernel", "dilation", "most"), [((56, 56), 7, 1, 4), ((56, 56), 7, 8, 1), ((4, 19, 16), 3, 3, 3)]
    )
    def test_gradients_are_collected_only_where_a_query_saw_the_key(self, sizes, kernel, dilation, most):
        """Others hold it too: tiles that reach further at borders, or repeat it for missing ones."""
        axes = axes_of(len(sizes), kernel, 1, dilation)
        plan = gathered.plan_of(sizes, axes, 1, torch.device("cpu"), torch.float32)
        assert plan.key.real.shape[:2] == (math.prod(sizes), most)

    def test_tiles_are_computed_at_once_where_that_takes_little_memory(self, monkeypatch):
        """Few operators on a GPU, for which `meta` stands; pieces for volumes, several queries a key, large batches."""
        calls = []
        monkeypatch.setattr(tiles, "neighborhood_gathered", lambda query, *_: calls.append(query.shape) or query)

        def taken(sizes, kernel, batch=1, groups=2, device="meta", lse=False):
            calls.clear()
            q = torch.empty(batch, *sizes, 2, 8, device=device)
            k = torch.empty(batch, *sizes, groups, 8, device=device)
            tiles.neighborhood_tiles(q, k, k, axes_of(len(sizes), kernel), 1.0, None, lse)
            return bool(calls)

        assert taken((28, 28), 7)
        assert not taken((28, 28), 7, device="cpu")
        assert not taken((28, 28), 7, lse=True)
        assert not taken((28, 28), 7, groups=1)
        assert not taken((28, 28), 7, batch=1100)
        assert not taken((24, 24, 24), 5)

    @given(setting=random_settings(), seed=st.integers(0, 99), elements=st.integers(1, 5000), share=st.integers(0, 3))
    @settings(max_examples=40, deadline=None)
    def test_the_size_of_a_piece_does_not_matter(self, setting, seed, elements, share):
        tensors = setting.tensors(seed=seed)
        wanted = gradients(setting, "torch", *tensors)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiling, "PIECE", elements)
            patch.setattr(tiling, "SHARE", share)
            forget()
            found = gradients(setting, "torch", *tensors)
            forget()
        for value, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-11)

    @given(setting=random_settings(largest=(40, 14, 9)), seed=st.integers(0, 99), tile=st.integers(1, 4))
    @settings(max_examples=25, deadline=None)
    def test_the_size_of_a_traced_tile_does_not_matter(self, setting, seed, tile):
        """Small tiles: one stride group each, many of them, and short dilation groups that begin one key earlier."""
        q, k, v, rpb = setting.tensors(seed=seed)
        wanted = call(setting, "reference", rpb, q, k, v)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(traced, "TILE", dict.fromkeys((1, 2, 3), tile))
            for value, want in zip(call(setting, "traced", rpb, q, k, v), wanted, strict=True):
                torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-11)

    def test_a_short_dilation_group_may_begin_one_key_earlier(self):
        setting = Setting((17, 9), (8, 8), (8, 8), (2, 1), (False, False), 1, 1, 1, 4, 4, False)
        q, k, v, _ = setting.tensors()
        wanted = call(setting, "reference", None, q, k, v)
        for backend in ("torch", "traced"):
            for value, want in zip(call(setting, backend, None, q, k, v), wanted, strict=True):
                torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-11)

    @given(setting=random_settings(largest=(60, 20, 9)), tile=st.integers(1, 6))
    @settings(max_examples=30, deadline=None)
    def test_tiles_that_are_added_in_one_turn_do_not_overlap(self, setting, tile):
        """In-place addition to memory that overlaps itself is right by luck on one thread only."""
        shape = (setting.batch, *setting.sizes, setting.groups, 2)
        numbers = torch.arange(int(np.prod(shape))).reshape(shape)
        units, _ = units_of(setting.sizes, setting.axes, 16, 2, 10**tile)
        for box in boxes_of(units, setting.batch, setting.groups, 1, 2, 10**tile):
            view = view_of((shape, numbers.stride()), box, units[box.unit], setting.axes, "k")
            turns = turns_of(view, units[box.unit])
            found = [numbers.as_strided(target.sizes, target.strides, target.offset).flatten() for _, target in turns]
            assert all(len(each.unique()) == len(each) for each in found)
            every = numbers.as_strided(view.sizes, view.strides, view.offset).flatten()
            assert torch.equal(torch.cat(found).sort().values, every.sort().values)

    @given(setting=random_settings(largest=(30, 12, 6), fits=True))
    @settings(max_examples=30, deadline=None)
    def test_a_position_moves_the_queries_that_see_it_and_no_other(self, setting):
        q, k, v, _ = setting.tensors()
        place = tuple(size // 2 for size in setting.sizes)
        moved = v.clone()
        moved[(0, *place)] += 1
        before, after = (call(setting, "torch", None, q, k, each)[0] for each in (v, moved))
        change = (after - before).abs().sum((-1, -2))[0] > 0
        per_axis = zip(setting.sizes, setting.kernel, setting.stride, setting.dilation, setting.causal, strict=True)
        sees = [
            [at in ORACLE.keys_of(p, *axis) for p in range(axis[0])] for at, axis in zip(place, per_axis, strict=True)
        ]
        for position in np.ndindex(*setting.sizes):
            assert bool(change[position]) == all(see[p] for see, p in zip(sees, position, strict=True))

    @given(setting=random_settings(largest=(30, 10, 6)), tile=st.integers(1, 9))
    @settings(max_examples=30, deadline=None)
    def test_boxes_cover_every_query_once(self, setting, tile):
        units, _ = units_of(setting.sizes, setting.axes, 16, 2, 10**tile)
        seen = np.zeros((*setting.sizes, setting.groups), dtype=int)
        for box in boxes_of(units, 1, setting.groups, 1, 16, 100 * tile):
            unit = units[box.unit]
            for index in np.ndindex(*box.sizes):
                _, *lead, head = (start + i for start, i in zip(box.starts, index, strict=True))
                group, which = lead[: len(unit.runs)], lead[len(unit.runs) :]
                along = []
                for (first, _), run, g, t, d in zip(
                    unit.groups, unit.runs, group, which, setting.dilation, strict=True
                ):
                    x = run.query_start + t * run.queries + np.arange(run.queries)
                    along.append(first + g + d * x)
                seen[(*np.ix_(*along), head)] += 1
        assert (seen == 1).all()


class TestProperties:
    @given(
        axes=st.lists(
            st.tuples(st.integers(2, 4), st.integers(1, 4), st.integers(1, 2), st.booleans(), st.integers(1, 4)),
            min_size=1,
            max_size=3,
        ),
        seed=st.integers(0, 9),
    )
    @settings(max_examples=30, deadline=None)
    def test_translation_moves_the_output_away_from_the_borders(self, axes, seed):
        """Shifted by whole stride groups and dilation steps, positions that see no border keep their value."""
        kernel, stride, dilation, causal, extra = zip(*axes, strict=True)
        stride = tuple(min(s, k) for s, k in zip(stride, kernel, strict=True))
        steps = [s * d for s, d in zip(stride, dilation, strict=True)]
        reach = [k * d for k, d in zip(kernel, dilation, strict=True)]
        sizes = tuple(2 * r + step + more for r, step, more in zip(reach, steps, extra, strict=True))
        setting = Setting(sizes, kernel, stride, dilation, causal, 1, 1, 1, 3, 3, True)
        q, k, v, rpb = setting.tensors(seed=seed)
        dims = list(range(1, 1 + len(steps)))
        before, _ = call(setting, "torch", rpb, q, k, v)
        after, _ = call(setting, "torch", rpb, *(x.roll(steps, dims) for x in (q, k, v)))
        inside = tuple(slice(r + step, size - r) for size, r, step in zip(setting.sizes, reach, steps, strict=True))
        inside = (slice(None), *inside)
        torch.testing.assert_close(after[inside], before.roll(steps, dims)[inside], rtol=1e-11, atol=1e-12)

    @pytest.mark.parametrize("sizes", [(9,), (5, 7), (3, 4, 5)])
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_window_that_covers_the_map_is_full_attention(self, sizes, backend):
        q, k, v = torch.randn(3, 2, *sizes, 2, 8, dtype=torch.float64)
        out = neighborhood_attention(q, k, v, sizes, stride=[min(2, size) for size in sizes], backend=backend)
        flat = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
        full = torch.nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2).reshape(out.shape)
        torch.testing.assert_close(out, full)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_stride_equal_to_the_kernel_is_attention_within_blocks(self, backend):
        q, k, v = torch.randn(3, 1, 12, 15, 2, 8, dtype=torch.float64)
        out = neighborhood_attention(q, k, v, (4, 5), stride=(4, 5), backend=backend)

        def blocks(x):
            return x.reshape(3, 4, 3, 5, 2, 8).permute(0, 2, 4, 1, 3, 5).reshape(9, 2, 20, 8)

        want = torch.nn.functional.scaled_dot_product_attention(blocks(q), blocks(k), blocks(v))
        want = want.reshape(3, 3, 2, 4, 5, 8).permute(0, 3, 1, 4, 2, 5).reshape(1, 12, 15, 2, 8)
        torch.testing.assert_close(out, want)

    def test_dilation_is_plain_attention_of_every_group(self):
        q, k, v = torch.randn(3, 2, 13, 11, 2, 4, dtype=torch.float64)
        out = neighborhood_attention(q, k, v, 3, dilation=(3, 2))
        for g in range(3):
            for h in range(2):
                part = neighborhood_attention(*(x[:, g::3, h::2] for x in (q, k, v)), 3)
                torch.testing.assert_close(out[:, g::3, h::2], part)

    def test_shared_key_heads_are_repeated(self):
        q = torch.randn(2, 9, 8, 6, 4, dtype=torch.float64)
        k, v = torch.randn(2, 2, 9, 8, 2, 4, dtype=torch.float64)
        want = neighborhood_attention(q, *(x.repeat_interleave(3, -2) for x in (k, v)), 5)
        torch.testing.assert_close(neighborhood_attention(q, k, v, 5), want)

    def test_no_position_sees_what_is_behind_it_on_a_causal_axis(self):
        q, k, v = torch.randn(3, 1, 10, 9, 1, 4, dtype=torch.float64)
        before = neighborhood_attention(q, k, v, 5, is_causal=(True, False))
        k[:, 6:], v[:, 6:] = 0, 0
        after = neighborhood_attention(q, k, v, 5, is_causal=(True, False))
        assert torch.equal(before[:, :6], after[:, :6])
        assert not torch.isclose(before[:, 6:], after[:, 6:]).any()

    def test_bounds_are_monotone_and_include_the_query(self):
        for members in range(1, 20):
            for kernel in range(2, 9):
                for stride in range(1, kernel + 1):
                    for causal in (False, True):
                        pairs = bounds(members, Axis(kernel, stride, 1, causal))
                        assert all(first <= x < last for x, (first, last) in enumerate(pairs))
                        assert all(last - first <= kernel for first, last in pairs)
                        assert list(pairs) == sorted(pairs)


class TestOperator:
    def test_every_argument_is_checked(self):
        good = torch.zeros(1, 6, 6, 2, 4)
        cases = [
            ({"kernel_size": 1}, "kernel_size must be an int >= 2"),
            ({"kernel_size": (3, 3, 3)}, "a tuple of 2"),
            ({"kernel_size": True}, "kernel_size must be an int"),
            ({"kernel_size": 3.0}, "kernel_size must be an int"),
            ({"kernel_size": 7}, "kernel_size can be at most 6"),
            ({"kernel_size": 3, "dilation": 3}, "kernel_size can be at most 2"),
            ({"kernel_size": 3, "stride": 4}, "stride must not exceed kernel_size"),
            ({"kernel_size": 3, "stride": 0}, "stride must be an int >= 1"),
            ({"kernel_size": 3, "dilation": (1, 0)}, "dilation must be an int >= 1"),
            ({"kernel_size": 3, "is_causal": 1}, "is_causal must be a bool"),
            ({"kernel_size": 3, "backend": "triton"}, "'auto', 'reference', 'torch', 'natten'"),
            ({"kernel_size": 3, "rpb": torch.zeros(2, 5, 6)}, r"\(2, 5, 5\)"),
            ({"kernel_size": 3, "query": good[0]}, "with 1 to 3 spatial axes"),
            ({"kernel_size": 3, "key": good[:, :5]}, "same batch and spatial sizes"),
            ({"kernel_size": 3, "query": good[..., :3]}, "same head dim"),
            ({"kernel_size": 3, "key": good[..., :1, :]}, "a divisor of the query's"),
            ({"kernel_size": 3, "value": good.double()}, "one floating type"),
            ({"kernel_size": 3, "query": good[:, :0], "key": good[:, :0], "value": good[:, :0]}, "only the batch"),
        ]
        for changed, message in cases:
            with pytest.raises(ValueError, match=message):
                neighborhood_attention(**({"query": good, "key": good, "value": good} | changed))

    def test_natten_is_used_only_with_its_library(self):
        x = torch.zeros(1, 6, 1, 8)
        with pytest.raises(ImportError, match="HAS_LIBNATTEN"):
            neighborhood_attention(x, x, x, 3, backend="natten")
        with pytest.raises(ValueError, match="no position bias"):
            neighborhood_attention(x, x, x, 3, rpb=torch.zeros(1, 5), backend="natten")

    @pytest.mark.parametrize(("operator", "rank"), [(na1d, 1), (na2d, 2), (na3d, 3)])
    def test_arguments_of_natten(self, operator, rank):
        names = (
            "query key value kernel_size stride dilation is_causal scale additional_keys additional_values "
            "attention_kwargs backend q_tile_shape kv_tile_shape backward_q_tile_shape backward_kv_tile_shape "
            "backward_kv_splits backward_use_pt_reduction run_persistent_kernel kernel_schedule torch_compile "
            "return_lse"
        )
        assert list(inspect.signature(operator).parameters) == names.split()
        x = torch.randn(3, 2, *(6,) * rank, 2, 4)
        want = neighborhood_attention(*x, 3, 2, 2, True, return_lse=True)
        for value, wanted in zip(operator(*x, 3, 2, 2, True, return_lse=True), want, strict=True):
            assert torch.equal(value, wanted)
        torch.testing.assert_close(operator(*x, 3, None, None, None), neighborhood_attention(*x, 3))
        for tuning in (
            {"q_tile_shape": (8,) * rank},
            {"backward_use_pt_reduction": True},
            {"run_persistent_kernel": False},
            {"kernel_schedule": "coop"},
            {"torch_compile": True},
            {"attention_kwargs": {"backend": "flex-fmha"}},
            {"backend": "cutlass-fna"},
        ):
            with pytest.raises(ValueError, match=next(iter(tuning))):
                operator(*x, 3, **tuning)
        with pytest.raises(ValueError, match=f"with {rank} spatial axes"):
            operator(*x[..., None], 3)

    def test_additional_keys_are_seen_by_every_query(self):
        q = torch.randn(2, 5, 6, 4, 3, dtype=torch.float64, requires_grad=True)
        k, v = torch.randn(2, 2, 5, 6, 2, 3, dtype=torch.float64)
        more_k, more_v = torch.randn(2, 2, 7, 2, 3, dtype=torch.float64)
        out, lse = na2d(q, k, v, (5, 6), additional_keys=more_k, additional_values=more_v, return_lse=True)
        rows = q.flatten(1, 2).transpose(1, 2)
        keys, values = (torch.cat([a.flatten(1, 2), b], 1).transpose(1, 2) for a, b in ((k, more_k), (v, more_v)))
        keys, values = keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1)
        scores = rows @ keys.mT / 3**0.5
        torch.testing.assert_close(lse.flatten(1, 2).transpose(1, 2), scores.logsumexp(-1))
        torch.testing.assert_close(out.flatten(1, 2).transpose(1, 2), scores.softmax(-1) @ values)
        wanted = torch.autograd.grad((scores.softmax(-1) @ values).square().sum(), q)[0]
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), q)[0], wanted)
        with pytest.raises(ValueError, match="given together"):
            na2d(q, k, v, 3, additional_keys=more_k)
        with pytest.raises(ValueError, match="heads=2"):
            na2d(q, k, v, 3, additional_keys=more_k[..., :1, :], additional_values=more_v)

    @pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("backend", [*BACKENDS, "traced"])
    def test_half_types_stay_near_float64(self, kind, backend):
        """Bounds: 1 % of the largest value in bfloat16, 0.2 % in float16, forward and backward."""
        setting = Setting((9, 10), (5, 4), (1, 2), (1, 2), (False, True), 2, 2, 2, 8, 8, True)
        tensors = [x.to(kind) for x in setting.tensors()]
        found = gradients(setting, backend, *tensors)
        wanted = gradients(setting, "reference", *(x.double() for x in tensors))
        assert [x.dtype for x in found] == [kind, torch.float32, *[kind] * 4]
        for value, want in zip(found, wanted, strict=True):
            assert (value.double() - want).abs().max() <= (0.01 if kind is torch.bfloat16 else 0.002) * want.abs().max()

    @pytest.mark.parametrize("kind", [torch.float32, torch.float16])
    @pytest.mark.parametrize("backend", [*BACKENDS, "traced"])
    def test_huge_scores_give_numbers(self, kind, backend):
        setting = Setting((9, 8), (3, 4), (1, 1), (2, 1), (False, False), 1, 1, 1, 8, 8, False)
        q, k, v, _ = setting.tensors(kind)
        for value in gradients(setting, backend, 3e2 * q, 3e2 * k, v, None):
            assert torch.isfinite(value).all()

    def test_bit_for_bit_repeatable(self):
        setting = Setting((17, 14), (7, 5), (1, 1), (1, 2), (False, False), 2, 2, 1, 8, 8, True)
        tensors = setting.tensors(torch.float32)
        for first, second in zip(*(gradients(setting, "torch", *tensors) for _ in range(2)), strict=True):
            assert torch.equal(first, second)

    def test_autocast_computes_in_its_type(self):
        q, k, v = torch.randn(3, 1, 8, 8, 2, 16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, lse = neighborhood_attention(q, k, v.bfloat16(), 3, return_lse=True)
        assert out.dtype is torch.bfloat16
        assert lse.dtype is torch.float32
        torch.testing.assert_close(out.float(), neighborhood_attention(q, k, v, 3), rtol=0.05, atol=0.03)


class TestMemory:
    """Peak memory beyond query, key and value, in multiples of their bytes; 8 in two dimensions, 12 in three."""

    @staticmethod
    def peak(sizes, kernel, heads, width, backward):
        q, k, v = (torch.randn(1, *sizes, heads, width, requires_grad=backward) for _ in range(3))
        forget()
        with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
            out = neighborhood_attention(q, k, v, kernel)
            if backward:
                out.sum().backward()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        assert events
        held = most = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        return most / (3 * q.numel() * 4)

    @pytest.mark.parametrize("backward", [False, True])
    @pytest.mark.parametrize(
        ("sizes", "kernel", "heads", "width", "limit"),
        [
            ((56, 56), 7, 2, 32, 8),
            ((14, 14), 7, 2, 32, 8),
            ((56, 56), 3, 2, 32, 8),
            ((56, 56), 31, 1, 32, 8),
            ((64, 64), 63, 1, 32, 8),
            ((24, 24, 24), 5, 2, 16, 12),
            ((16, 16, 16), 13, 2, 16, 12),
        ],
    )
    def test_limit(self, sizes, kernel, heads, width, limit, backward):
        assert self.peak(sizes, kernel, heads, width, backward) <= limit

    def test_the_measure_sees_what_is_allocated(self, monkeypatch):
        monkeypatch.setattr(tiling, "PIECE", 1 << 30)
        monkeypatch.setattr(tiling, "SHARE", 1 << 30)
        forget()
        assert self.peak((24, 24, 24), 5, 2, 16, True) > 12
        forget()


class TestModule:
    @pytest.mark.parametrize("sizes", [(3, 9), (14, 5), (1, 1)])
    @pytest.mark.parametrize("dilation", [1, 2])
    def test_pad_is_the_official_rule(self, sizes, dilation):
        """Zeros behind the map, before the projection, and taking part with its bias; then cropped."""
        block = NeighborhoodAttention(8, 2, kernel_size=5, dilation=dilation, small_maps="pad").double()
        torch.nn.init.normal_(block.qkv.bias)
        x = torch.randn(2, *sizes, 8, dtype=torch.float64)
        padded = torch.zeros(2, *(max(size, 5 * dilation) for size in sizes), 8, dtype=torch.float64)
        padded[:, : sizes[0], : sizes[1]] = x
        want = block(padded)[:, : sizes[0], : sizes[1]]
        torch.testing.assert_close(block(x), want)
        clipped = NeighborhoodAttention(8, 2, kernel_size=5, dilation=dilation).double()
        clipped.load_state_dict(block.state_dict())
        assert torch.allclose(clipped(x), want) == (padded.shape == x.shape)

    def test_error_refuses_small_maps(self):
        block = NeighborhoodAttention(8, 2, kernel_size=5, dilation=2, small_maps="error")
        assert block(torch.zeros(1, 10, 10, 8)).shape == (1, 10, 10, 8)
        with pytest.raises(ValueError, match="kernel_size can be at most 4"):
            block(torch.zeros(1, 10, 9, 8))

    def test_clip_lets_a_small_group_see_all_of_itself(self):
        block = NeighborhoodAttention(4, 1, kernel_size=5, rank=1, dilation=2, rel_pos_bias=False).double()
        x = torch.randn(1, 7, 4, dtype=torch.float64)
        q, k, v = block.qkv(x).unflatten(-1, (3, 4)).unbind(-2)
        for group in (0, 1):
            part = torch.nn.functional.scaled_dot_product_attention(*(each[:, group::2] for each in (q, k, v)))
            torch.testing.assert_close(block(x)[:, group::2], block.proj(part))

    @pytest.mark.parametrize(
        "settings", [{}, {"kernel_size": 4, "stride": 4, "dilation": 2}, {"is_causal": (True, False), "stride": 3}]
    )
    def test_exports_for_maps_smaller_than_a_window_too(self, settings):
        block = NeighborhoodAttention(8, 2, backend="torch", **settings).eval()
        shapes = ({0: Dim("batch", min=1, max=4), 1: Dim("height", min=2, max=40), 2: Dim("width", min=2, max=40)},)
        exported = torch.export.export(block, (torch.randn(2, 9, 10, 8),), dynamic_shapes=shapes, strict=False).module()
        for sizes in ((2, 2), (7, 40), (8, 9), (33, 17)):
            x = torch.randn(3, *sizes, 8)
            torch.testing.assert_close(exported(x), block(x), rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("small_maps", ["clip", "pad"])
    @pytest.mark.parametrize(("sizes", "query"), [((9, 8), (8, 0)), ((9, 8), (4, 5)), ((3, 9), (1, 7))])
    def test_attention_map_holds_the_weights_of_the_window(self, small_maps, sizes, query):
        """Weights times values are the output; the value of a position is its own here, so they are told apart."""
        block = NeighborhoodAttention(
            8, 2, kernel_size=(3, 4), stride=(1, 2), dilation=(2, 1), is_causal=(False, True), small_maps=small_maps
        )
        torch.nn.init.normal_(block.rpb)
        x = torch.randn(2, *sizes, 8)
        weights = block.attention_map(x, query)
        value = block._project(x)[2]
        torch.testing.assert_close(weights.flatten(2).sum(-1), torch.ones(2, 2))
        mixed = torch.einsum("bh...,b...hd->bhd", weights, value).flatten(1)
        torch.testing.assert_close(block.proj(mixed), block(x)[:, query[0], query[1]], rtol=1e-4, atol=1e-6)
        with pytest.raises(ValueError, match="index into the map"):
            block.attention_map(x, (9, 0))

    def test_settings_are_checked_and_shown(self):
        for changed in ({"num_heads": 3}, {"rank": 4}, {"small_maps": "shift"}, {"backend": "cuda"}, {"stride": 8}):
            with pytest.raises(ValueError, match=next(iter(changed))):
                NeighborhoodAttention(32, **changed)
        text = repr(NeighborhoodAttention(64, kernel_size=(7, 5), is_causal=(True, False), backend="torch"))
        assert "kernel_size=(7, 5)" in text
        assert "backend='torch'" in text
        assert "num_heads=2" in text

    def test_official_keys_and_initial_values(self):
        block = NeighborhoodAttention(64, 2)
        assert set(block.state_dict()) == {"rpb", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
        assert block.rpb.shape == (2, 13, 13)
        for weight in (block.rpb, block.qkv.weight, block.proj.weight):
            assert 0.015 < weight.std() < 0.025
        assert not block.qkv.bias.any()
        assert not block.proj.bias.any()
