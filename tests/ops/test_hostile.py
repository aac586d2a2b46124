"""Arguments that nobody gives by intent: out of range, on two devices, sharing memory, of absurd sizes; and no memory.

Each of them crashed, hung or read foreign memory once. What is refused is refused with the argument's name.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from alitok_fast.ops.cached_attention import cached_attention
from alitok_fast.ops.decode_weights import LayerWeights, pack_weights
from alitok_fast.ops.vq_lookup import vq_lookup

ops = torch.ops.alitok


# ---- indices ----


@pytest.mark.parametrize("index", [-1, 8, 9000, 2**40, -(2**63), 2**63 - 1])
def test_vq_lookup_backward_checks_indices(cpu_isa, index):
    indices = torch.tensor([0, 1, 2, index])
    arguments = torch.zeros(4, 16), torch.tensor(1.0), torch.zeros(4, 16), torch.zeros(8, 16), indices, 0.25
    with pytest.raises(ValueError, match=f"indices: expected a value in 0..7, got {index}"):
        ops.vq_lookup_backward(*arguments)


def test_vq_lookup_checks_indices_that_were_changed_before_backward():
    """Through NumPy, which autograd's version counter does not see."""
    z, codebook = torch.randn(64, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    result = vq_lookup(z, codebook)
    result.indices.numpy()[5] = 2**40
    with pytest.raises(ValueError, match="indices: expected a value in 0..7, got 1099511627776"):
        result.loss.backward()


# ---- devices ----


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


RULE = torch.tensor(1.0), torch.tensor(0), torch.tensor(1.0, dtype=torch.float64)  # of sample_tokens: keeps all
ATTENTION = torch.ones(1, 1, 3, 1, 8), torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8)
DECODE = (
    torch.zeros(1, dtype=torch.uint8), torch.zeros(1), torch.zeros(4, 2), torch.zeros(4, 1, 2),
    torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, 1, 4, 2), torch.zeros(1, 1, 1, 4, 2), torch.tensor(0),
)  # fmt: skip


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: ops.swiglu(torch.ones(64), meta(64)), "up"),
        (lambda: ops.add_rms_norm(torch.ones(4, 64), None, meta(64), 1e-5, 0.0, None), "weight"),
        (lambda: ops.add_rms_norm_backward(None, torch.ones(4, 64), meta(4, 64), torch.ones(64), 1e-5, 0.0, None),
         "grad_normed"),
        (lambda: ops.int8_linear(torch.ones(2, 64), meta(1, 1, 2176, dtype=torch.uint8), None, 32, torch.float32),
         "weight"),
        (lambda: ops.quantized_linear(torch.ones(2, 64), meta(8, 64, dtype=torch.int8),
                                      meta(8, 1, dtype=torch.bfloat16), None), "weight"),
        (lambda: ops.sample_tokens(torch.zeros(2, 8), None, *RULE, torch.tensor(0), torch.arange(2),
                                   meta(dtype=torch.int64)), "step"),
        (lambda: ops.cached_attention(*ATTENTION, meta(1, dtype=torch.int64), None, None, None, 1e-5, None, 0.3, None),
         "positions"),
        (lambda: ops.prefix_attention(torch.ones(1, 4, 3, 1, 8), 0, meta(8), meta(8), 1e-5, None, 0.3, 0.0, None),
         "q_norm_weight"),
        (lambda: ops.prefix_attention_backward(meta(1, 4, 1, 8), torch.ones(1, 4, 3, 1, 8), torch.ones(1, 4, 1, 8),
                                               torch.ones(1, 1, 4), 0, None, None, 1e-5, None, 0.3, 0.0, None),
         "grad_out"),
        (lambda: ops.vq_lookup(torch.zeros(4, 8), meta(5, 8), 0.25, True), "codebook"),
        (lambda: ops.vq_lookup_backward(torch.zeros(4, 8), torch.tensor(1.0), torch.zeros(4, 8), meta(5, 8),
                                        torch.zeros(4, dtype=torch.int64), 0.25), "codebook"),
        (lambda: ops.decode(*DECODE[:1], meta(1), *DECODE[2:], None, 1, 4, 4, 4, 1e-5), "vectors"),
        (lambda: ops.decode_tokens(*DECODE, None, torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1).long(), None,
                                   *RULE, meta(dtype=torch.int64), torch.arange(1), torch.zeros(1).long(), 1, 1, 1, 4,
                                   4, 4, 1e-5), "seeds"),
    ],
)  # fmt: skip
def test_a_meta_tensor_beside_a_real_one_is_refused(call, argument):
    """Their fake kernels would make real results that nobody fills."""
    with pytest.raises(ValueError, match=f"^{argument}: expected the device of .*, got "):
        call()


# ---- shared memory ----


class Decode:
    """Arguments of decode and decode_tokens, any of which a test may replace."""

    def __init__(self, **changes):
        width, codes, capacity = 8, 12, 6
        z = torch.zeros
        layer = LayerWeights(
            z(width), z(3 * width, width), z(3 * width), z(4), z(4), z(width, width), z(width), z(width),
            z(5, width), z(5, width), z(width, 5),
        )  # fmt: skip
        p = pack_weights([layer], z(width), z(codes, width), z(codes), z(codes, width), z(9, 2, 2), torch.float32)
        self.sizes = p.hidden, p.codes, p.dtype.itemsize, p.activation_dtype.itemsize, p.norm_eps
        self.arguments = {
            "arena": p.arena, "vectors": p.vectors, "embeddings": p.embeddings, "rope": p.rope,
            "ids": z(2, 1, dtype=torch.int64), "keys": z(1, 2, 2, capacity, 4), "values": z(1, 2, 2, capacity, 4),
            "positions": z(2, dtype=torch.int64), "slots": None, "tokens": z(2, capacity, dtype=torch.int64),
            "prompt_lengths": z(2, dtype=torch.int64), "schedule": None, "temperature": torch.ones(2),
            "top_k": z(2, dtype=torch.int64), "top_p": torch.ones(2).double(), "seeds": z(2, dtype=torch.int64),
            "image_ids": torch.arange(2), "passes_done": z(2, dtype=torch.int64), "passes": 3, "window": 1,
        } | changes  # fmt: skip

    def tokens(self):
        return ops.decode_tokens(*self.arguments.values(), *self.sizes)

    def step(self):
        names = list(self.arguments)[:9]
        return ops.decode(*(self.arguments[n] for n in names), *self.sizes)


def within(other: torch.Tensor, like: torch.Tensor, at: int = 0) -> torch.Tensor:
    """Like `like`, lying in the memory of `other`."""
    return other.view(-1)[at:].view(like.dtype)[: like.numel()].view(like.shape)


@pytest.mark.parametrize(
    "name",
    ["ids", "values", "positions", "tokens", "prompt_lengths", "temperature", "top_k", "top_p", "seeds", "image_ids",
     "passes_done", "rope"],
)  # fmt: skip
def test_decode_tokens_refuses_arguments_within_its_keys(name):
    plain, memory = Decode().arguments, torch.full((400,), 1.0 if name in ("temperature", "top_p") else 0.0)
    keys = memory[:96].view(1, 2, 2, 6, 4)
    with pytest.raises(ValueError, match=rf"^(keys|{name}): expected memory of its own.* (keys|{name}) has too"):
        Decode(**{name: within(memory, plain[name], 94), "keys": keys}).tokens()


@pytest.mark.parametrize(
    ("written", "other"),
    [("ids", "image_ids"), ("tokens", "seeds"), ("positions", "prompt_lengths"), ("passes_done", "top_k")],
)
def test_decode_tokens_refuses_what_it_would_change(written, other):
    plain = Decode().arguments
    inside = plain[written].view(-1)[: plain[other].numel()].view(plain[other].shape)
    with pytest.raises(ValueError, match=f"^{written}: expected memory of its own, .* got some that {other} has too"):
        Decode(**{written: plain[written], other: inside}).tokens()


@pytest.mark.parametrize("name", ["ids", "positions", "rope", "embeddings", "vectors", "values"])
def test_decode_refuses_arguments_within_its_keys(name):
    plain, memory = Decode().arguments, torch.zeros(400)
    keys = memory[:96].view(1, 2, 2, 6, 4)
    with pytest.raises(ValueError, match=rf"^(keys|values): expected memory of its own.* (keys|{name}) has too"):
        Decode(keys=keys, **{name: within(memory, plain[name], 94)}).step()


def test_decode_takes_neighbours_in_one_allocation():
    memory = torch.zeros(2, 1, 2, 2, 6, 4)
    whole = Decode(keys=memory[0], values=memory[1])
    whole.step(), whole.tokens()
    assert whole.arguments["positions"].tolist() == [3, 3]


def test_a_prompt_length_far_below_zero_is_none():
    Decode(positions=torch.tensor([2, 1]), prompt_lengths=torch.tensor([-(2**63), 0])).tokens()


def test_a_prompt_length_far_above_all_is_everything():
    everything = Decode(prompt_lengths=torch.tensor([2**63 - 1, 0]))
    everything.tokens()
    assert everything.arguments["positions"].tolist() == [-1, 3]


def interleaved(rows=3, heads=2, capacity=5):
    """Keys and values that lie row by row, or head by head, in one allocation."""
    yield torch.zeros(rows, 2, heads, capacity, 8).unbind(1)
    yield torch.zeros(rows, heads, 2, capacity, 8).unbind(2)
    yield [part[:, :, :capacity] for part in torch.zeros(rows, 2, heads, capacity + 3, 8).unbind(1)]
    yield [part.transpose(0, 1) for part in torch.zeros(heads, 2, rows, capacity, 8).unbind(1)]


def test_cached_attention_takes_caches_that_interleave():
    qkv, position = torch.randn(3, 1, 3, 2, 8), torch.tensor([0, 1, 2])
    expected = cached_attention(qkv, torch.zeros(3, 2, 5, 8), torch.zeros(3, 2, 5, 8), position)
    for keys, values in interleaved():
        assert torch.equal(cached_attention(qkv, keys, values, position), expected)


@pytest.mark.parametrize("shift", [0, 1, 8, 16, 39])
@pytest.mark.parametrize("gap", [0, 1, 100])
def test_cached_attention_refuses_caches_that_overlap(shift, gap):
    qkv, memory, positions = torch.randn(3, 1, 3, 2, 8), torch.zeros(3 * 2 * 200), torch.tensor([0, 0, 0])
    strides = (2 * (40 + gap), 40 + gap, 8, 1)
    keys = memory.as_strided((3, 2, 5, 8), strides)
    for at in (shift, (40 + gap) + shift, 2 * (40 + gap) - shift, 3 * (40 + gap) + shift):
        with pytest.raises(ValueError, match="^values: expected memory of its own, .* got some that keys has too"):
            cached_attention(qkv, keys, memory.as_strided((3, 2, 5, 8), strides, at), positions)


@pytest.mark.parametrize("shape", [(1, 2, 5, 8), (3, 1, 5, 8)])
def test_cached_attention_refuses_caches_that_are_expanded(shape):
    keys, values = (torch.zeros(shape).expand(3, 2, 5, 8) for _ in range(2))
    with pytest.raises(ValueError, match="^keys: expected memory of its own for each element"):
        cached_attention(torch.randn(3, 1, 3, 2, 8), keys, values, torch.tensor([0, 0, 0]))


@pytest.mark.parametrize("name", ["qkv", "positions", "slots", "rope", "q_norm_weight", "arrivals"])
@pytest.mark.parametrize("at", [0, 238])
def test_cached_attention_refuses_arguments_within_its_keys(name, at):
    memory = torch.zeros(1000)
    arguments = {
        "qkv": torch.randn(3, 1, 3, 2, 8), "keys": memory[:240].view(3, 2, 5, 8), "values": torch.zeros(3, 2, 5, 8),
        "positions": torch.tensor([0, 1, 2]), "slots": torch.tensor([1, 2, 0]), "rope": torch.zeros(5, 4, 2),
        "q_norm_weight": torch.ones(8), "k_norm_weight": torch.ones(8), "arrivals": torch.zeros(6, dtype=torch.int32),
    }  # fmt: skip
    arguments[name] = within(memory, arguments[name], at)
    with pytest.raises(ValueError, match=rf"^(keys|arrivals): expected memory of its own, .* (keys|{name}) has too"):
        cached_attention(**arguments)


# ---- sizes ----

HUGE = 2**62


def thin(*shape, dtype=torch.float32):
    """Of any sizes, with the memory of one element."""
    return torch.zeros(1, dtype=dtype).as_strided(shape, [0] * len(shape))


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: ops.int8_linear(torch.zeros(0, 64), meta_weight(), None, 2**63 - 1, torch.float32), "outputs"),
        (lambda: ops.int8_linear(thin(0, 2**63 - 1), meta_weight(), None, 32, torch.float32), "x"),
        (lambda: ops.int8_linear(torch.zeros(0, 64), meta_weight(), None, -1, torch.float32), "outputs"),
        (lambda: ops.prefix_attention(thin(0, 1, 3, HUGE, 128), 0, None, None, 1e-5, None, 1.0, 0.0, None), "qkv"),
        (lambda: ops.cached_attention(thin(0, 1, 3, HUGE, 8), thin(0, HUGE, 4, 8), thin(0, HUGE, 4, 8),
                                      torch.tensor([]).long(), None, None, None, 1e-5, None, 1.0, None), "qkv"),
        (lambda: ops.quantized_linear(thin(0, HUGE), thin(0, HUGE, dtype=torch.int8),
                                      thin(0, 1, dtype=torch.bfloat16), None), "x"),
        (lambda: ops.sample_tokens(thin(HUGE, 0), None, *RULE, torch.tensor(0), torch.arange(2),
                                   torch.tensor(0)), "logits"),
        (lambda: ops.vq_lookup(thin(0, HUGE), thin(1, HUGE), 0.25, True), "z"),
        (lambda: ops.add_rms_norm(thin(HUGE, 0), None, thin(0), 1e-5, 0.0, None), "x"),
        (lambda: ops.swiglu(thin(HUGE, 0), thin(HUGE, 0)), "gate"),
        (lambda: Decode(keys=thin(HUGE, 0, 2, 6, 4), values=thin(HUGE, 0, 2, 6, 4)).step(), "keys"),
        (lambda: Decode(ids=torch.zeros(0, 1, dtype=torch.int64), positions=torch.tensor([]).long(),
                        keys=thin(2**40, 0, 2, 6, 4), values=thin(2**40, 0, 2, 6, 4)).step(), "keys"),
    ],
)  # fmt: skip
def test_sizes_that_overflow_are_refused(call, argument):
    with pytest.raises(ValueError, match=f"^{argument}: expected "):
        call()


def meta_weight():
    return torch.zeros(1, 1, 2176, dtype=torch.uint8)


# ---- no memory ----

NO_MEMORY = """
import resource, torch
import alitok_fast.ops.decode
from alitok_fast.ops.decode_weights import LayerWeights, pack_weights
torch.set_num_threads(2)
codes, width, z = 1 << 21, 2, torch.zeros
layer = LayerWeights(z(width), z(3 * width, width), z(3 * width), z(2), z(2), z(width, width), z(width), z(width),
                     z(1, width), z(1, width), z(width, 1))
p = pack_weights([layer], z(width), z(codes, width), z(codes), z(codes, width), z(4, 1, 2), torch.bfloat16)
keys, values, zero = z(1, 1, 1, 4, 2), z(1, 1, 1, 4, 2), torch.zeros(1, dtype=torch.int64)
def call(position):
    torch.ops.alitok.decode_tokens(p.arena, p.vectors, p.embeddings, p.rope, zero[:, None].clone(), keys, values,
        torch.tensor([position]), None, torch.zeros(1, 4, dtype=torch.int64), zero, None, torch.ones(1), zero,
        torch.ones(1).double(), zero, zero, zero.clone(), 1, 1, p.hidden, p.codes, 2, 2, 1e-5)
call(0)  # threads and their stacks are there
for mib in (4, 12, 20, 28):  # the logits take 8 MiB, and each thread as much and more
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + mib * 2**20, resource.RLIM_INFINITY))
    try:
        call(1)
        print(mib, "worked")
    except (MemoryError, RuntimeError) as error:
        print(mib, type(error).__name__)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer ends a process without memory"
)
def test_a_thread_without_memory_does_not_leave_the_others_waiting():
    """An allocation is a mapping here, so that the limit counts it exactly."""
    run = subprocess.run(
        [sys.executable, "-c", NO_MEMORY],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert "4 MemoryError" in run.stdout and "12 MemoryError" in run.stdout, run.stdout
