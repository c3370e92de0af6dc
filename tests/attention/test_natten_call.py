"""What is handed to natten's library, against its signature and rules as of release 0.21.7; no library is needed."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from visattn.attention import NeighborhoodAttention, _backend, na2d, neighborhood_attention


@pytest.fixture
def calls(monkeypatch):
    """A natten whose operators have the release's arguments in its order, refuse what it refuses, and are recorded."""
    seen = []

    def operator(rank):
        def na(
            query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None, additional_keys=None,
            additional_values=None, attention_kwargs=None, backend=None, q_tile_shape=None, kv_tile_shape=None,
            backward_q_tile_shape=None, backward_kv_tile_shape=None, backward_kv_splits=None,
            backward_use_pt_reduction=False, run_persistent_kernel=True, kernel_schedule=None, torch_compile=False,
            return_lse=False,
        ):  # fmt: skip
            assert query.dim() == rank + 3
            assert query.shape[-1] % 8 == value.shape[-1] % 8 == 0
            for setting in (kernel_size, stride, dilation, is_causal):
                assert isinstance(setting, tuple)
                assert len(setting) == rank
            assert all(type(value) is bool for value in is_causal)
            seen.append((kernel_size, stride, dilation, is_causal, scale))
            out, lse = neighborhood_attention(
                query, key, value, kernel_size, stride, dilation, is_causal, scale or None, None, "reference", True
            )
            return (out, lse.detach()) if return_lse else out  # natten gives its log-sum-exp no gradient

        return na

    module = SimpleNamespace(HAS_LIBNATTEN=True, na1d=operator(1), na2d=operator(2), na3d=operator(3))
    monkeypatch.setattr(_backend, "natten_module", lambda: module)
    return seen


def tensors(*sizes, heads=4, groups=2, width=8, deep=16, grad=False):
    shapes = (heads, width), (groups, width), (groups, deep)
    return [torch.randn(2, *sizes, *shape, dtype=torch.float64, requires_grad=grad) for shape in shapes]


@pytest.mark.parametrize("sizes", [(20,), (12, 14), (6, 8, 8)])
def test_every_setting_arrives(calls, sizes):
    rank = len(sizes)
    x = tensors(*sizes, grad=True)
    settings = (3, 4, 5)[:rank], (2, 1, 3)[:rank], (1, 2, 1)[:rank], (True, False, True)[:rank]
    found = neighborhood_attention(*x, *settings, scale=0.3, backend="natten")
    assert calls == [(*settings, 0.3)]
    wanted = neighborhood_attention(*x, *settings, scale=0.3, backend="torch")
    torch.testing.assert_close(found, wanted)
    for value, other in zip(
        torch.autograd.grad(found.square().sum(), x), torch.autograd.grad(wanted.square().sum(), x), strict=True
    ):
        torch.testing.assert_close(value, other)


def test_the_module_and_the_log_sum_exp(calls):
    block = NeighborhoodAttention(16, 2, kernel_size=3, rel_pos_bias=False, backend="natten").double()
    x = torch.randn(1, 8, 9, 16, dtype=torch.float64)
    other = NeighborhoodAttention(16, 2, kernel_size=3, rel_pos_bias=False, backend="torch").double()
    other.load_state_dict(block.state_dict())
    torch.testing.assert_close(block(x), other(x))
    y = tensors(7, 9)
    for value, wanted in zip(
        neighborhood_attention(*y, 3, backend="natten", return_lse=True),
        neighborhood_attention(*y, 3, backend="reference", return_lse=True),
        strict=True,
    ):
        torch.testing.assert_close(value, wanted)
    assert len(calls) == 2


def test_what_natten_would_get_wrong_is_refused(calls):
    """It gives the log-sum-exp no gradient, which the merge with additional keys needs as well."""
    x = tensors(7, 9, grad=True)
    with pytest.raises(ValueError, match="no gradient of the log-sum-exp"):
        neighborhood_attention(*x, 3, backend="natten", return_lse=True)
    more = [torch.randn(2, 5, 2, width, dtype=torch.float64) for width in (8, 16)]
    with pytest.raises(ValueError, match="no gradient of the log-sum-exp"):
        na2d(*x, 3, additional_keys=more[0], additional_values=more[1], backend="natten")
    with torch.no_grad():
        na2d(*x, 3, additional_keys=more[0], additional_values=more[1], backend="natten")
    with pytest.raises(ValueError, match="scale of 0"):
        neighborhood_attention(*x, 3, scale=0.0, backend="natten")
    with pytest.raises(ValueError, match="multiples of 8"):
        neighborhood_attention(*tensors(7, 9, width=12), 3, backend="natten")
    with pytest.raises(ValueError, match="multiples of 8"):
        neighborhood_attention(*tensors(7, 9, deep=12), 3, backend="natten")
    with pytest.raises(ValueError, match="larger than the map"):
        NeighborhoodAttention(16, 2, rel_pos_bias=False, backend="natten")(torch.randn(1, 5, 9, 16))
    assert len(calls) == 1


def test_auto_takes_natten_only_where_it_can_do_all(calls, monkeypatch):
    query = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert _backend.resolve("auto", query, "") == "natten"
    assert _backend.resolve("auto", query, "no position bias") == "torch"
    assert _backend.resolve("auto", SimpleNamespace(is_cuda=False, dtype=torch.float32), "") == "torch"
    assert _backend.resolve("auto", SimpleNamespace(is_cuda=True, dtype=torch.float64), "") == "torch"
    monkeypatch.setattr(_backend, "natten_module", lambda: None)
    assert _backend.resolve("auto", query, "") == "torch"


def test_our_operators_have_its_arguments(calls):
    ours, theirs = (list(inspect.signature(f).parameters.items()) for f in (na2d, _backend.natten_module().na2d))
    assert [(name, value.default) for name, value in ours] == [(name, value.default) for name, value in theirs]
