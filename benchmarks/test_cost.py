"""The model of a step: its sums, its order, its numbers and what it refuses."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from alitok_fast.config import GENERATORS
from cost import predict, sources
from costs import cpu as of_cpu
from costs import gpu as of_gpu
from costs.cpu import Cpu, cpu_step
from costs.gpu import LAUNCHES, Gpu, gpu_step, persistent_step
from costs.parts import Work, weight_bytes
from costs.reports import EPYC, REPORTS, ceilings_of, cpu_of
from floor import Machine, step_weights, tokens_floor

B = GENERATORS["b"]
EPYC_CPU = cpu_of(ceilings_of(REPORTS / EPYC[0]))
DEVICES = pytest.mark.parametrize("device", [Gpu(), EPYC_CPU], ids=["gpu", "cpu"])


def seconds(device, *work, launches: str = "present", **options) -> float:
    return predict(Work(B, *work, **options), device, launches).seconds


@pytest.mark.parametrize("size", ["b", "l", "xl"])
@pytest.mark.parametrize("weights", ["bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("batch", [1, 8, 16, 64, 256])
def test_terms_add_up(size, weights, batch):
    work = Work(GENERATORS[size], batch, weights)
    for step in (gpu_step(work, Gpu(), LAUNCHES["present"]), persistent_step(work, Gpu(), 1e-6, True)):
        assert sum(step.terms().values()) == pytest.approx(step.seconds)
        assert sum(phase.seconds for phase in step.phases) == pytest.approx(step.seconds)
        assert len({phase.name for phase in step.phases}) == len(step.phases)


@pytest.mark.parametrize("size", ["b", "l", "xl"])
def test_weights_are_those_of_the_floor(size):
    work = Work(GENERATORS[size], 1)
    outputs = [outputs * inputs for outputs, inputs in work.matrices().values()]
    assert work.config.num_layers * sum(outputs) + work.head_weights == step_weights(work.config)


def test_scales_are_bytes_too():
    assert weight_bytes(4, 128, "int8") == 4 * 128 + 4 * 2 * 2
    assert weight_bytes(4, 65, "float8_e4m3fn") == 4 * 65 + 4 * 2 * 2
    assert weight_bytes(4, 128, "bfloat16") == 4 * 128 * 2


@pytest.mark.parametrize("batch", [1, 8, 64, 256])
def test_no_prediction_is_below_the_floor(batch):
    device, machine = Gpu(), Machine(Gpu().bf16_flops, Gpu().read_bytes)
    floor = tokens_floor(B, batch, 2 * step_weights(B), 2, machine) / B.num_tokens
    for launches in LAUNCHES:
        assert seconds(device, batch, launches=launches) > floor
    assert persistent_step(Work(B, batch), device, 0.0, True).seconds > floor


@DEVICES
def test_more_work_takes_more_time(device):
    old = "5e0ba55"
    for batch in (2, 4, 8, 16, 64, 128, 256, 512):
        assert seconds(device, batch, launches=old) > seconds(device, batch // 2, launches=old)
    for window in (2, 4, 8, 16):
        assert seconds(device, 1, window=window, launches=old) > seconds(device, 1, window=window // 2, launches=old)
    by_batch = [seconds(device, batch) for batch in (8, 16, 24, 32, 48, 64, 96, 128)]
    assert by_batch == sorted(by_batch)
    assert seconds(device, 8, position=272.0) > seconds(device, 8, position=0.0)


def test_eight_inputs_are_predicted_slower_than_sixteen():
    """By its author's estimate, the kernel that takes 9 inputs and more would be the faster one for fewer, too."""
    assert seconds(Gpu(), 4) > seconds(Gpu(), 8)
    clusters = replace(LAUNCHES["present"], cluster_rows=1)
    assert gpu_step(Work(B, 4), Gpu(), clusters).seconds < seconds(Gpu(), 4)


def test_8_bit_weights_are_not_slower_than_16():
    """By the numbers that are assumed of the kernel by clusters; with many inputs, products are those of bfloat16."""
    for batch in (1, 8, 64):
        bfloat16, int8 = (gpu_step(Work(B, batch, w), Gpu(), LAUNCHES["present"]) for w in ("bfloat16", "int8"))
        assert int8.seconds < bfloat16.seconds
    bfloat16, int8 = (gpu_step(Work(B, 256, w), Gpu(), LAUNCHES["present"]) for w in ("bfloat16", "int8"))
    assert int8.seconds == bfloat16.seconds


@DEVICES
def test_a_faster_device_takes_less_time(device):
    work = Work(B, 64)
    now = predict(work, device).seconds
    faster = replace(device, read_bytes=2 * device.read_bytes, bf16_flops=2 * device.bf16_flops)
    assert predict(work, faster).seconds < now


def test_every_number_has_a_source():
    assert set(of_gpu.SOURCES) == {field.name for field in fields(Gpu)}
    assert set(of_cpu.SOURCES) == {field.name for field in fields(Cpu)}
    for device in (Gpu(), EPYC_CPU):
        assert len(sources(device).splitlines()) == 1 + len(fields(device))


def test_operators_of_the_h100_give_the_fitted_numbers():
    """The chains that `make gpu` times, priced kernel by kernel."""
    device = Gpu()
    ours = device.node - device.early
    layer = sum(outputs * inputs for outputs, inputs in Work(B, 1).matrices().values())
    measured = {("bfloat16", 2): 12.5, ("bfloat16", 16): 18.0, ("bfloat16", 32): 25.0,
                ("int8", 2): 13.5, ("int8", 16): 17.2, ("int8", 32): 23.4, ("int8", 128): 64.8}  # fmt: skip
    for (weights, rows), microseconds in measured.items():
        work = Work(B, rows // 2, weights)
        # Four products and a copy, which is torch's: it and the product behind it begin late.
        chain = 2 * device.node + 3 * ours
        for outputs, inputs in work.matrices().values():
            latency, terms = of_gpu.product_terms(work, device, False, outputs, inputs)
            chain += latency + sum(terms.values())
        assert chain * 1e6 == pytest.approx(microseconds, rel=0.12)
    assert layer == 4 * 768 * 768 + 3 * 768 * 2048
    attention = {("bfloat16", 1): 3.31, ("bfloat16", 8): 5.5, ("bfloat16", 64): 23.6, ("bfloat16", 256): 81.4,
                 ("float8_e4m3fn", 1): 3.52, ("float8_e4m3fn", 8): 5.71, ("float8_e4m3fn", 64): 18.0,
                 ("float8_e4m3fn", 256): 63.3}  # fmt: skip
    for (cache, batch), microseconds in attention.items():
        _, terms = of_gpu.attention_terms(Work(B, batch, cache=cache, position=136), device)
        assert (ours + device.attention + sum(terms.values())) * 1e6 == pytest.approx(microseconds, rel=0.12)


def test_one_kernel_is_no_slower_with_weights_ahead():
    for batch in (1, 8, 64):
        in_phase, ahead = (persistent_step(Work(B, batch), Gpu(), 1e-6, how).seconds for how in (False, True))
        assert ahead < in_phase
    assert (
        persistent_step(Work(B, 1), Gpu(), 0.0, True).seconds < persistent_step(Work(B, 1), Gpu(), 1e-6, True).seconds
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(batch=0), "batch: expected an integer >= 1, got 0"),
        (dict(batch=1, window=0), r"window: expected an integer in 1..273, got 0"),
        (dict(batch=1, window=274), r"window: expected an integer in 1..273, got 274"),
        (dict(batch=1, weights="fp4"), "weights: expected one of float32, .*, got 'fp4'"),
        (dict(batch=1, cache="bf16"), "cache: expected None or one of .*, got 'bf16'"),
        (dict(batch=1, activations="int4"), "activations: expected None or int8, got 'int4'"),
        (dict(batch=1, position=273), r"position: expected None or a number in 0..272, got 273"),
        (dict(batch=1, window=8, position=266), r"position: expected None or a number in 0..265, got 266"),
    ],
)
def test_work_that_there_is_not(wrong, message):
    with pytest.raises(ValueError, match=message):
        Work(B, **wrong)


def test_machines_that_there_are_not():
    with pytest.raises(ValueError, match="read_bytes: expected a finite number above 0, got 0"):
        Gpu(read_bytes=0)
    with pytest.raises(ValueError, match="node: expected a finite number above 0, got nan"):
        Gpu(node=float("nan"))
    with pytest.raises(ValueError, match="stream_share: expected a finite number above 0, got -1"):
        replace(EPYC_CPU, stream_share=-1)
    with pytest.raises(ValueError, match="launches: expected one of 5e0ba55, present, got 'future'"):
        predict(Work(B, 1), Gpu(), "future")
    with pytest.raises(ValueError, match="weights: expected float32, bfloat16 or int8 on a CPU"):
        cpu_step(Work(B, 1, "float8_e4m3fn"), EPYC_CPU)
    with pytest.raises(ValueError, match="cache: expected float32 or bfloat16 on a CPU"):
        cpu_step(Work(B, 1, cache="int8"), EPYC_CPU)
    with pytest.raises(ValueError, match="activations: expected None beside bfloat16 weights"):
        cpu_step(Work(B, 1, activations="int8"), EPYC_CPU)
    with pytest.raises(ValueError, match="activations: expected None on a GPU"):
        gpu_step(Work(B, 1, "int8", activations="int8"), Gpu(), LAUNCHES["present"])
    with pytest.raises(ValueError, match="barrier: expected a finite number of seconds >= 0, got -1"):
        persistent_step(Work(B, 1), Gpu(), -1, True)


def test_formats_have_the_names_of_torch():
    for name in ("float32", "bfloat16", "int8", "float8_e4m3fn"):
        assert weight_bytes(1, 64, name) >= getattr(torch, name).itemsize * 64
