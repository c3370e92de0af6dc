"""`na1d`, `na2d` and `na3d` with the arguments of NATTEN 0.21.7, so that code moves over by changing the import.

Names, order and defaults are those of NATTEN's documentation (https://natten.org/operations, MIT). What tunes its
kernels has no counterpart here: giving it raises.

Legend: B batch, *S spatial axes, N positions, H query heads, G key heads, R = H / G, D head dim, V head dim of value,
n additional keys.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from visattn.attention._backend import BACKENDS, scaled_dot_product_lse
from visattn.attention.neighborhood import neighborhood_attention


def _merge_additional(
    query: Tensor, keys: Tensor, values: Tensor, scale: float | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Lets every query attend to `keys` (B, n, G, D) too, as if they had been in its window."""
    groups, repeat = keys.shape[-2], query.shape[-2] // keys.shape[-2]
    rows = (
        torch.unflatten(query.flatten(1, -3), -2, (groups, repeat)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    )  # (B, G, R * N, D)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    more, more_lse = scaled_dot_product_lse(rows, keys.transpose(1, 2), values.transpose(1, 2), None, scale)
    tokens = rows.shape[2] // repeat
    more = torch.unflatten(more, 2, (repeat, tokens)).permute(0, 3, 1, 2, 4).reshape(out.shape)
    more_lse = torch.unflatten(more_lse, 2, (repeat, tokens)).permute(0, 3, 1, 2).reshape(lse.shape)
    total = torch.logaddexp(lse, more_lse)
    share, other = (lse - total).exp().unsqueeze(-1), (more_lse - total).exp().unsqueeze(-1)
    return (out * share + more * other).to(out.dtype), total


def _check_additional(key: Tensor, value: Tensor, keys: Tensor | None, values: Tensor | None) -> None:
    if (keys is None) != (values is None):
        raise ValueError("additional_keys and additional_values must be given together")
    if keys is None or values is None:
        return
    for name, more, like in (("additional_keys", keys, key), ("additional_values", values, value)):
        if more.dim() != 4 or (more.shape[0], *more.shape[2:]) != (like.shape[0], *like.shape[-2:]):
            wanted = f"(B={like.shape[0]}, n, heads={like.shape[-2]}, channels={like.shape[-1]})"
            raise ValueError(f"{name} must be {wanted}, got {tuple(more.shape)}")
    if keys.shape[1] != values.shape[1]:
        raise ValueError(f"as many additional values as keys are needed, got {values.shape[1]} and {keys.shape[1]}")


def _operator(rank: int) -> Callable[..., Any]:
    def operator(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = 1,
        dilation: int | Sequence[int] | None = 1,
        is_causal: bool | Sequence[bool] | None = False,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        backend: str | None = None,
        q_tile_shape: Sequence[int] | None = None,
        kv_tile_shape: Sequence[int] | None = None,
        backward_q_tile_shape: Sequence[int] | None = None,
        backward_kv_tile_shape: Sequence[int] | None = None,
        backward_kv_splits: Sequence[int] | None = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: str | None = None,
        torch_compile: bool = False,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        tuning = {
            "attention_kwargs": attention_kwargs,
            "q_tile_shape": q_tile_shape,
            "kv_tile_shape": kv_tile_shape,
            "backward_q_tile_shape": backward_q_tile_shape,
            "backward_kv_tile_shape": backward_kv_tile_shape,
            "backward_kv_splits": backward_kv_splits,
            "backward_use_pt_reduction": backward_use_pt_reduction,
            "run_persistent_kernel=False": not run_persistent_kernel,
            "kernel_schedule": kernel_schedule,
            "torch_compile": torch_compile,
        }
        given = [name for name, setting in tuning.items() if setting]
        if given:
            raise ValueError(f"na{rank}d: {', '.join(given)} would tune natten's own kernels: leave it out")
        if backend is not None and backend not in BACKENDS:
            raise ValueError(f"na{rank}d: backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
        if query.dim() != rank + 3:
            raise ValueError(
                f"na{rank}d takes (B, *S, heads, channels) with {rank} spatial axes, got {tuple(query.shape)}"
            )
        _check_additional(key, value, additional_keys, additional_values)
        scale = scale or None  # natten takes 0 for "not given" as well
        settings: dict[str, Any] = {
            "stride": 1 if stride is None else stride,
            "dilation": 1 if dilation is None else dilation,
            "is_causal": False if is_causal is None else is_causal,
            "scale": scale,
            "backend": backend or "auto",
        }
        if additional_keys is None and not return_lse:
            plain: Tensor = neighborhood_attention(query, key, value, kernel_size, **settings)
            return plain
        out, lse = neighborhood_attention(query, key, value, kernel_size, **settings, return_lse=True)
        if additional_keys is not None and additional_values is not None:
            out, lse = _merge_additional(query, additional_keys, additional_values, scale, out, lse)
        return (out, lse) if return_lse else out

    operator.__name__ = operator.__qualname__ = f"na{rank}d"
    operator.__doc__ = f"""{rank}-D neighbourhood attention with the signature of `natten.na{rank}d`.

        Args:
            query: (B, *S, H, D) with {rank} spatial axes.
            key: (B, *S, G, D).
            value: (B, *S, G, V).
            kernel_size: See `neighborhood_attention`, as for stride, dilation, is_causal, scale and return_lse.
            additional_keys: (B, n, G, D) that every query attends to as well, or None.
            additional_values: (B, n, G, V), together with `additional_keys`.
            backend: None or one of `neighborhood_attention`'s.
            (the others): only as natten's defaults.

        Returns:
            (B, *S, H, V), and with `return_lse` also (B, *S, H).

        Raises:
            ValueError: If something does not fit, or an argument would tune natten's kernels.
        """
    return operator


na1d = _operator(1)
na2d = _operator(2)
na3d = _operator(3)
