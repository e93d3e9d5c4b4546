"""bitsandbytes' kernels, loaded without PyTorch's compiler."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


@cache
def bitsandbytes() -> Any:
    """``bitsandbytes.functional``; its kernels are known to PyTorch from then on.

    bitsandbytes decorates what it would run on devices without kernels of its own with ``torch.compile``, which alone
    takes an import of PyTorch's compiler: two seconds. CPUs and CUDA have their own.
    """
    compiler, torch.compile = torch.compile, _as_it_is  # type: ignore[assignment]  # for as long as it is imported
    try:
        from bitsandbytes import functional
    finally:
        torch.compile = compiler
    return functional


def _as_it_is(function: Any, **options: Any) -> Any:
    return function
