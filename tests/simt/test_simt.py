"""The emulation itself: what it computes, and that it catches what it claims to catch."""

import pytest
import torch

ONE = {"y": ((1,), torch.float32)}


@pytest.mark.parametrize("sanitizer", ["address", pytest.param("thread", marks=pytest.mark.slow)])
def test_blocks_shared_memory_and_barriers(simt, sanitizer):
    x = torch.randn(150, generator=torch.Generator().manual_seed(0))
    result = simt.program("selftest", sanitizer).run(
        {"kernel": 0, "x": x, "n": 150}, {"y": ((3,), torch.float32)}, schedules=5
    )
    expected = torch.stack([part.sum() for part in x.split(64)])
    torch.testing.assert_close(result["y"], expected)


@pytest.mark.parametrize("sanitizer", ["address", pytest.param("thread", marks=pytest.mark.slow)])
def test_clusters(simt, sanitizer):
    x = torch.randint(-9, 10, (6, 32), generator=torch.Generator().manual_seed(1)).float()
    got = simt.program("selftest", sanitizer).run({"kernel": 16, "x": x, "n": 192}, {"y": ((2, 3, 32), torch.float32)})
    sums = x.view(2, 3, 32).sum(1, keepdim=True)
    assert torch.equal(got["y"], sums + 100 * torch.arange(3)[None, :, None])


@pytest.mark.parametrize(("kernel", "dtype"), [(2, torch.bfloat16), (3, torch.float16), (5, torch.float32)])
def test_matrix_instructions(simt, kernel, dtype):
    generator = torch.Generator().manual_seed(kernel)
    k = 8 if dtype == torch.float32 else 16
    # Small integers: every product and sum is exact, so a transposed or shifted fragment cannot hide.
    a = torch.randint(-8, 9, (16, k), generator=generator).to(dtype)
    b = torch.randint(-8, 9, (k, 8), generator=generator).to(dtype)
    result = simt.program("selftest").run({"kernel": kernel, "a": a, "b": b, "n": 0}, {"y": ((16, 8), torch.float32)})
    assert torch.equal(result["y"], a.float() @ b.float())


# The sum that is there before, the first products (the others are zero), and what a matrix unit of sm_80 makes of them.
# Everything is exact in float64, and most of it would be another float if sums were rounded to nearest or term by term.
TINY = 2.0**-12  # its square is one bit below a float's last at 1
TRUNCATED = [
    (1.0, [(TINY, TINY / 2)] * 4, 1.0),  # each term is cut off at 2^-24, before they are added
    (1.0, [(TINY, TINY)] * 2, 1 + 2.0**-23),  # kept below 2^-24, and added before the sum is cut off
    (1.0, [(TINY, 1.5 * TINY)] * 4, 1 + 2.0**-22),
    (1.0, [(TINY, TINY)] * 3, 1 + 2.0**-23),  # the sum is cut off, where nearest would be the next float
    (-1.0, [(-TINY, TINY)] * 3, -1 - 2.0**-23),  # towards zero
    (-1.0, [(TINY, TINY / 2)], -1.0),  # terms are cut off towards zero too
    (-1.0, [(TINY, TINY)], -1 + 2.0**-24),
    (0.0, [(1.0, 1.0), (TINY, TINY / 2), (-1.0, 1.0)], 0.0),  # nothing is kept beyond what the largest term allows
    (2.0**-24, [(1.5, 1.5)] + [(TINY, TINY)] * 3, 2.25 + 2.0**-22),  # 1.5 * 1.5 counts as 1 to 2
    (1.0, [(TINY, TINY), *[(0.0, 0.0)] * 7, (TINY, TINY)], 1.0),  # 16 products are two steps, each of them cut off
    (1.0, [(2.0**80, 2.0**80)], float("inf")),
    (2.0**-149, [(2.0**-60, 2.0**-60), (-(2.0**-60), 2.0**-60)], 0.0),
]


@pytest.mark.parametrize(("start", "products", "expected"), TRUNCATED)
@pytest.mark.parametrize(("kernel", "dtype"), [(2, torch.bfloat16), (5, torch.float32)])
def test_matrix_instructions_truncate(simt, kernel, dtype, start, products, expected):
    depth = 8 if dtype == torch.float32 else 16
    if dtype == torch.float32:  # steps of 4 products
        products = [pair for i, pair in enumerate(products) if not 3 < i < 8]
    a, b = torch.zeros(16, depth, dtype=dtype), torch.zeros(depth, 8, dtype=dtype)
    for k, (x, y) in enumerate(products):
        a[3, k], b[k, 5] = x, y
    case = {"kernel": kernel, "a": a, "b": b, "n": 0, "start": start}
    got = simt.program("selftest").run(case, {"y": ((16, 8), torch.float32)}, schedules=1)["y"]
    assert got[3, 5].item() == expected
    assert got[3, 4].item() == got[15, 5].item() == start


def test_warp_functions(simt):
    x = torch.randint(-5, 6, (64,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    y = torch.zeros(64 * 8 + 1, dtype=torch.int32)
    spec = {"y": ((64 * 8 + 1,), torch.int32)}
    got = simt.program("selftest").run({"kernel": 6, "a": x, "y": y, "n": 0}, spec, schedules=1)["y"]
    assert got[-1] == x.sum()
    for i, row in enumerate(got[:-1].view(64, 8).tolist()):
        warp, lane = x[i // 32 * 32 :][:32].tolist(), i % 32
        half = lane // 16 * 16
        assert row[0] == warp[lane ^ 5]
        assert row[1] == warp[lane + 3 if lane + 3 < half + 16 else lane]
        assert row[2] & 0xFFFFFFFF == sum(1 << j for j in range(32) if warp[j] > 0)
        assert row[3] == max(warp)
        assert row[4] == (warp[7] if lane < 8 else sum(warp[8:]))
        assert row[5] & 0xFFFFFFFF == sum(1 << j for j in range(32) if warp[j] == warp[lane])
        assert row[6] == (x > 0).sum()


def test_sixteen_bit_rounding(simt):
    bits = torch.randint(0, 2**31 - 1, (4000,), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    edges = torch.tensor([0.0, -0.0, 65519.0, 65520.0, 6.1e-5, 5.96e-8, 2.98e-8, 2.9e-8, float("inf"), 1.00048828125])
    x = torch.cat([bits.view(torch.float32), edges, -torch.logspace(-9, 6, 500)]).nan_to_num(1.0)
    n = len(x)
    spec = {"bf16": ((n,), torch.bfloat16), "fp16": ((n,), torch.float16)}
    result = simt.program("selftest").run({"kernel": 7, "x": x, "n": n}, spec, schedules=1)
    assert torch.equal(result["bf16"], x.to(torch.bfloat16))
    assert torch.equal(result["fp16"], x.to(torch.float16))


@pytest.mark.parametrize(
    ("kernel", "sanitizer", "message"),
    [
        pytest.param(1, "thread", "data race", id="missing barrier", marks=pytest.mark.slow),
        pytest.param(13, "thread", "data race", id="two writers", marks=pytest.mark.slow),
        pytest.param(13, "address", "not the same under schedules", id="two writers, by schedule"),
        pytest.param(8, "address", "heap-buffer-overflow", id="past dynamic shared memory"),
        pytest.param(9, "address", "overflow|out of bounds", id="past static shared memory"),
        pytest.param(10, "address", "heap-buffer-overflow", id="past a tensor"),
        pytest.param(11, "address", "deadlock", id="barrier in a branch"),
        pytest.param(12, "address", "misaligned address", id="misaligned vector"),
        pytest.param(14, "address", "bytes of dynamic shared memory", id="too much shared memory"),
        pytest.param(17, "address", "before a cluster_sync", id="another block's memory too early"),
        pytest.param(18, "address", "of which threads have ended", id="another block's memory too late"),
        pytest.param(19, "address", "clusters of 3 blocks", id="a grid that is not whole clusters"),
        pytest.param(15, "address", "shared memory: expected a GPU with .* bytes for a block", id="too small a GPU"),
    ],
)
def test_catches(simt, kernel, sanitizer, message):
    with pytest.raises(simt.Failure, match=message):
        x = torch.ones(96 if kernel > 15 else 64)
        simt.program("selftest", sanitizer).run({"kernel": kernel, "x": x, "n": 64}, ONE)


def test_missing_barrier_and_missing_wait_leave_poison(simt):
    program = simt.program("selftest")
    assert program.run({"kernel": 1, "x": torch.ones(64), "n": 64}, ONE, schedules=1)["y"].isnan().all()
    ones = torch.ones(256, dtype=torch.float16)
    got = program.run({"kernel": 4, "a": ones, "b": ones[:128], "n": 0}, {"y": ((128,), torch.float32)}, schedules=1)
    assert got["y"].isnan().all()
