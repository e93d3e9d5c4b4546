"""What one clock computes, of processors by their instruction sets and of GPUs by their compute capability."""

from __future__ import annotations

from collections.abc import Iterable

# FLOP (or int8 OP) per core and clock. A multiply-add counts as two. Where the flags do not tell how many units there
# are, the smaller number is taken: one 512-bit unit (server parts often have two), two 128-bit units on Arm.
OF_CORES: dict[str, dict[str, int]] = {
    "fp32": {"sse2": 8, "avx": 16, "fma": 32, "avx512f": 32, "asimd": 16},
    "fp16": {"avx512_fp16": 64, "asimdhp": 32},
    "bf16": {"avx512_bf16": 64, "amx_bf16": 1024, "bf16": 32},
    "int8": {"sse2": 16, "avx2": 64, "avx_vnni": 128, "avx512_vnni": 128, "amx_int8": 2048}
    | {"asimd": 32, "asimddp": 64, "i8mm": 128},
}

# FLOP (or int8 OP) per multiprocessor and clock: fp32 outside tensor cores; 16 bit, accumulated in fp32, and int8 on
# them, dense. Each is that of the shipped profile which has least. 7.0 has no tensor cores for int8.
OF_MULTIPROCESSORS: dict[tuple[int, int], tuple[int, int, int]] = {
    (7, 0): (128, 1024, 512),
    (7, 5): (128, 512, 2048),  # 16 bit of GeForce cards, half of a T4's
    (8, 0): (128, 2048, 4096),
    (8, 6): (256, 512, 1024),
    (8, 7): (256, 2048, 4096),
    (8, 9): (256, 512, 2048),
    (9, 0): (256, 4096, 8192),
    (12, 0): (256, 512, 2048),
}
_LEAST = tuple(min(column) for column in zip(*OF_MULTIPROCESSORS.values(), strict=True))


def of_core(flags: Iterable[str]) -> dict[str, int]:
    """FLOP per clock of the widest instruction set, by dtype; of fp32 without any a scalar multiply-add."""
    found = set(flags)
    return {"fp32": 2} | {
        dtype: max(rate for flag, rate in rates.items() if flag in found)
        for dtype, rates in OF_CORES.items()
        if not found.isdisjoint(rates)
    }


def of_multiprocessor(capability: tuple[int, int]) -> dict[str, int]:
    """FLOP per clock, by native dtype; of a compute capability that is not known the least there is."""
    fp32, half, int8 = OF_MULTIPROCESSORS.get(capability, _LEAST)
    rates = {"fp32": fp32}
    if capability >= (7, 0):
        rates |= {"fp16": half, "int8": int8}
    if capability >= (8, 0):
        rates["bf16"] = half
    return rates
