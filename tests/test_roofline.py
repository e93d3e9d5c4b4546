"""Seconds from work: identities of the roofline, and what a job takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgepeft import hardware, roofline
from edgepeft.hardware import Hardware
from edgepeft.profile import OPERATIONS
from edgepeft.roofline import Work, seconds


@pytest.fixture
def gpu() -> Hardware:
    return replace(
        hardware.load("a100-40gb"),
        reached={"matmul": 0.5, "thin": 0.5, "elementwise": 0.5, "optimizer": 0.25},
        call_seconds=1e-5,
        watts=400.0,
        price=2.0,
    )


def test_the_slower_of_computing_and_moving_counts(gpu: Hardware) -> None:
    flops, moved = 312e12, 1555e9
    assert seconds({"matmul.bf16": Work(1, int(flops), 0)}, gpu) == pytest.approx(2.0)
    assert seconds({"matmul.bf16": Work(1, int(flops), int(moved * 1.5))}, gpu) == pytest.approx(3.0)
    assert seconds({"elementwise": Work(1, 0, int(moved))}, gpu) == pytest.approx(2.0)
    assert seconds({"optimizer": Work(1, 0, int(moved))}, gpu) == pytest.approx(4.0)


def test_classes_add_up(gpu: Hardware) -> None:
    one, two = {"matmul.bf16": Work(1, 10**14, 0)}, {"elementwise": Work(1, 0, 10**12)}
    assert seconds(one | two, gpu) == pytest.approx(seconds(one, gpu) + seconds(two, gpu))


def test_a_gpu_waits_for_its_calls_and_a_cpu_makes_them_itself(gpu: Hardware) -> None:
    small = {"elementwise": Work(1000, 0, 1000)}
    assert seconds(small, gpu) == pytest.approx(0.01)
    assert seconds({"elementwise": Work(1000, 0, 1555 * 10**9)}, gpu) == pytest.approx(2.0)
    cpu = replace(gpu, kind="cpu")
    assert seconds({"elementwise": Work(1000, 0, 1555 * 10**9)}, cpu) == pytest.approx(2.01)


def test_a_dtype_that_is_not_native_is_multiplied_in_fp32() -> None:
    t4 = hardware.load("t4-16gb")
    work = Work(1, 10**13, 0)
    assert seconds({"matmul.bf16": work}, t4) == seconds({"matmul.fp32": work}, t4)
    assert seconds({"matmul.fp16": work}, t4) < seconds({"matmul.fp32": work}, t4)


def test_what_is_sent_takes_the_interconnect_or_memory(gpu: Hardware) -> None:
    gpu = replace(gpu, reached={"sending": 0.5})
    assert roofline.sending_seconds(300e9, gpu) == pytest.approx(2.0)
    assert roofline.sending_seconds(0, replace(gpu, interconnect=None)) == 0
    cpu = replace(gpu, kind="cpu", interconnect=None)
    assert roofline.sending_seconds(cpu.bandwidth, cpu) == pytest.approx(2.0)


def test_work_in_between_is_affine() -> None:
    low, high = {"matmul.bf16": Work(2, 20, 200)}, {"matmul.bf16": Work(4, 40, 300), "view": Work(1, 0, 0)}
    assert roofline.along(low, high, 0.0) == low | {"view": Work(0, 0, 0)}
    assert roofline.along(low, high, 1.0) == high
    assert roofline.along(low, high, 3.0)["matmul.bf16"] == Work(8, 80, 500)


def test_a_job_takes_hours_energy_and_money(gpu: Hardware) -> None:
    assert roofline.job(1800, 2.0, gpu) == roofline.Job(hours=1.0, energy_wh=400.0, price=2.0)
    bare = replace(gpu, watts=None, price=None)
    assert roofline.job(1800, 2.0, bare) == roofline.Job(hours=1.0, energy_wh=None, price=None)


@pytest.mark.parametrize("name", hardware.names())
def test_every_profile_can_be_timed(name: str) -> None:
    device = hardware.load(name)
    for operation in OPERATIONS:
        assert 0 < roofline.reached(device, operation) <= 1
        assert 0 < seconds({f"{operation}.fp32": Work(1, 10**9, 10**6)}, device) < 60


def test_a_share_of_one_dtype_comes_before_that_of_all() -> None:
    """And what the profile states before what is usual; a dtype that is not native is computed in fp32."""
    device = replace(hardware.load("cpu-x86-16gb"), flops={"fp32": 1e11, "bf16": 2e11})
    assert roofline.reached(device, "attention", "fp32") != roofline.reached(device, "attention", "bf16")
    stated = replace(device, reached={"thin": 0.3, "thin.bf16": 0.1})
    assert roofline.reached(stated, "thin", "bf16") == 0.1
    assert roofline.reached(stated, "thin", "fp32") == roofline.reached(stated, "thin", "fp16") == 0.3
    assert roofline.reached(replace(device, reached={"attention": 0.2}), "attention", "fp32") == 0.2
