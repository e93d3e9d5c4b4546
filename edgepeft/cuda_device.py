"""What decides how much a CUDA build of PyTorch allocates: an architecture and a version. Plain data: no torch here."""

from __future__ import annotations

from dataclasses import dataclass

# The workspace that PyTorch gives each of its cuBLAS handles, of which there is one a thread: PyTorch since, major
# compute capabilities (None: all others), bytes. aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize:
# ":4096:2:16:8", and 32 MiB on Hopper, and since pull request 175344 on Blackwell. Newest first.
_BLAS_WORKSPACES: tuple[tuple[tuple[int, int], frozenset[int] | None, int], ...] = (
    ((2, 12), frozenset({9, 10, 12}), 32 << 20),
    ((2, 0), frozenset({9}), 32 << 20),
    ((2, 0), None, (4096 * 2 + 16 * 8) << 10),
    ((1, 11), None, 4096 << 10),
)
BLAS_THREADS = 2
"""Threads that train, each with a workspace: forward and backward run in one of their own."""


@dataclass(frozen=True)
class Device:
    """What decides how much a CUDA build of PyTorch allocates.

    Attributes:
        capability: the device's compute capability, for example (7, 5) of a T4.
        version: PyTorch's major and minor version.
    """

    capability: tuple[int, int] = (8, 0)
    version: tuple[int, int] = (2, 13)

    @property
    def blas_workspace_bytes(self) -> int:
        """Of one thread's cuBLAS handle."""
        for since, majors, size in _BLAS_WORKSPACES:
            if self.version >= since and (majors is None or self.capability[0] in majors):
                return size
        return 0

    @property
    def has_flash(self) -> bool:
        """FlashAttention 2 runs from Ampere on (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp)."""
        return self.capability >= (8, 0)
