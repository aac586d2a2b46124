"""The CUDA kernel of cached_attention, emulated, against the reference."""

import pytest
import torch

from alitok_fast.ops.cached_attention import cached_attention_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def inputs(rows, heads, dim, capacity, position, dtype, cache_dtype, norm_and_rope):
    generator = torch.Generator().manual_seed(dim + position)
    arguments = {
        "qkv": torch.randn(rows, 1, 3, heads, dim, generator=generator).to(dtype),
        "keys": torch.randn(rows, heads, capacity, dim, generator=generator).to(cache_dtype),
        "values": torch.randn(rows, heads, capacity, dim, generator=generator).to(cache_dtype),
        "positions": torch.full((rows,), position),
        "slots": None,
        "q_norm_weight": None,
        "k_norm_weight": None,
        "norm_eps": 1e-5,
        "rope": None,
        "scale": dim**-0.5,
    }
    # Nothing behind the position may count, whatever is there.
    for cache in (arguments["keys"], arguments["values"]):
        cache[:, :, position:] = torch.nan
    if norm_and_rope:
        arguments["q_norm_weight"] = 1 + 0.1 * torch.randn(dim, generator=generator)
        arguments["k_norm_weight"] = 1 + 0.1 * torch.randn(dim, generator=generator)
        angles = torch.randn(capacity, dim // 2, generator=generator)
        arguments["rope"] = torch.stack([angles.cos(), angles.sin()], -1)
        arguments["rope"][0] = 0
    return arguments


def run(simt, arguments, sanitizer="address", patches=(), split=False, **layout):
    """`split` gives the kernel counters, with which it may share the keys among blocks."""
    qkv, keys = arguments["qkv"], arguments["keys"]
    rows, columns, _, heads, dim = qkv.shape
    scalars = {"rows": rows, "columns": columns, "heads": heads, "head_dim": dim}
    scalars |= {"slots": keys.shape[0], "capacity": keys.shape[2]}
    kinds = {"dtype": DTYPES.index(qkv.dtype), "cache_dtype": DTYPES.index(keys.dtype)}
    tensors = {name: value for name, value in arguments.items() if name not in ("norm_eps", "slots")}
    tensors["slots_of_rows"] = arguments["slots"]
    outputs = {"out": ((rows, columns, heads, dim), qkv.dtype)}
    if not layout:
        outputs |= {name: (tuple(keys.shape), keys.dtype) for name in ("keys", "values")}
    if split:
        count = rows * columns * heads
        tensors["arrivals"] = torch.zeros(count, dtype=torch.int32)
        outputs["arrivals"] = ((count,), torch.int32)
    inputs = {**tensors, **scalars, **kinds, **layout}
    result = simt.program("cached_attention", sanitizer, patches).run(inputs, outputs, schedules=3 if split else 2)
    if split:
        assert not result["arrivals"].any(), "arrivals: not zero afterwards"
    return result


def check(simt, arguments, split=False, patches=()):
    result = run(simt, arguments, split=split, patches=patches)
    dtype, cache_dtype = arguments["qkv"].dtype, arguments["keys"].dtype
    quantised = cache_dtype == torch.float8_e4m3fn
    expected = cached_attention_reference(**arguments)  # appends to the caches in place
    assert torch.equal(result["out"].isnan(), expected.isnan()), "out: error, NaN elsewhere"
    error = (result["out"].double() - expected.double()).nan_to_num().abs().max()
    # A rounding of the new key that goes the other way moves a quantised key by a sixteenth.
    assert error < TOLERANCE[dtype] * (30 if quantised else 1), f"out: error {error:.3g}"
    # The reference's rsqrt and the kernel's may round differently by a unit in the last place.
    unit = 2.0**-4 if quantised else 2 * TOLERANCE[dtype]
    # Behind the position there are NaNs still.
    for name, tolerance in (("keys", unit), ("values", 0)):
        torch.testing.assert_close(
            result[name].double(), arguments[name].double(), rtol=tolerance, atol=tolerance, equal_nan=True
        )


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize(
    ("rows", "heads", "dim", "capacity", "position", "norm_and_rope"),
    [
        (1, 1, 8, 1, 0, True),
        (1, 2, 24, 30, 29, True),
        (2, 1, 48, 21, 0, True),
        (1, 1, 64, 100, 64, False),
        (1, 2, 80, 300, 290, True),
        (1, 1, 128, 9, 4, False),
        (1, 1, 128, 90, 89, True),
    ],
)
def test_matches_reference(simt, dtype, quantised, rows, heads, dim, capacity, position, norm_and_rope):
    cache_dtype = torch.float8_e4m3fn if quantised else dtype
    check(simt, inputs(rows, heads, dim, capacity, position, dtype, cache_dtype, norm_and_rope))


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    ("rows", "heads", "dim", "capacity", "position"),
    [(1, 2, 24, 700, 650), (1, 1, 48, 1058, 1057), (2, 1, 80, 520, 513)],
)
def test_long_caches_match_reference(simt, dtype, quantised, split, rows, heads, dim, capacity, position):
    """Alone a block needs several tiles for them; with counters several blocks share them."""
    cache_dtype = torch.float8_e4m3fn if quantised else dtype
    check(simt, inputs(rows, heads, dim, capacity, position, dtype, cache_dtype, True), split=split)


# Up to 320 keys are one tile for each of the four warps of a block, which take a quarter each.
@pytest.mark.parametrize("position", [0, 1, 2, 3, 4, 62, 63, 64, 65, 318, 319, 320, 321, 639, 640, 644, 799])
def test_positions_at_the_edges_of_tiles(simt, position):
    check(simt, inputs(1, 1, 8, 800, position, torch.float32, torch.float32, False))


# Capacity 700 is up to 3 blocks of at least 256 keys; 9000 is 32, and beyond 8192 keys their shares grow.
@pytest.mark.parametrize(
    ("capacity", "position"),
    [(700, position) for position in (0, 1, 254, 255, 256, 257, 510, 511, 512, 513, 699)]
    + [(9000, position) for position in (8190, 8191, 8192, 8999)],
)
def test_positions_at_the_edges_of_shares(simt, capacity, position):
    check(simt, inputs(1, 1, 8, capacity, position, torch.float32, torch.float32, False), split=True)


def test_short_caches_are_not_split(simt):
    """The same bits with counters and without; and a share that is all -inf is not NaN where it is one of several."""
    arguments = inputs(2, 2, 8, 512, 511, torch.float32, torch.float32, False)
    alone, counted = run(simt, arguments), run(simt, arguments, split=True)
    assert torch.equal(alone["out"], counted["out"])
    for split in (False, True):
        few = inputs(1, 1, 8, 700, 699, torch.float32, torch.float32, False)
        few["qkv"][:, :, 0] = 1
        few["keys"][:, :, :400] = -torch.inf
        check(simt, few, split=split)


@pytest.mark.parametrize("quantised", [False, True])
def test_blocks_of_many_rows_have_less_memory(simt, quantised):
    cache_dtype = torch.float8_e4m3fn if quantised else torch.float32
    check(simt, inputs(17, 16, 128, 60, 58, torch.float32, cache_dtype, False))


def test_the_outcome_does_not_depend_on_which_block_is_last(simt):
    """`run` compares the bits under three orders of the blocks: first to last, last to first, shuffled."""
    run(simt, inputs(2, 2, 48, 1000, 950, torch.bfloat16, torch.bfloat16, True), split=True)


def only_float32(*patches):
    """One kernel of six: it is compiled in half of the time."""
    others = [("case CachedAttentionDtype::bfloat16: return launch_for_cache<__nv_bfloat16>(p, stream);", ""),
              ("case CachedAttentionDtype::float16: return launch_for_cache<__half>(p, stream);", "default: return;"),
              ("if (p.cache_dtype == CachedAttentionDtype::e4m3) return launch<T, e4m3>(p, stream);", "")]  # fmt: skip
    return [("cached_attention_cuda.cu", *patch) for patch in [*others, *patches]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("is_last(p.arrivals + query_number(p), blocks)", "is_last(p.arrivals + query_number(p), splits)", "arrivals"),
        ("total += __expf(__ldcg(share) - largest) *", "total += __expf(-largest) *", "out: error"),
        ("largest) * __ldcg(share + 1);", "largest);", "out: error"),
        ("* p.splits + split)", "+ split)", "exit code|out: error"),
        ("fresh = split == blocks - 1;", "fresh = split == splits - 1;", "out: error"),
        ("const int begin = split * share,", "const int begin = 0 * share,", "out: error"),
        ("if (split >= blocks) return;", "", "exit code|out: error|arrivals"),
        ("if (tid == 0) mine[0] =", "if (split == 0) mine[0] =", "out: error"),
    ],
)
def test_seeded_bugs_of_shares_are_caught(simt, old, new, message):
    arguments = inputs(1, 2, 16, 1000, 600, torch.float32, torch.float32, False)
    with pytest.raises(AssertionError, match=message):
        check(simt, arguments, split=True, patches=only_float32((old, new)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    cp_async_wait<1>();  // for keys", "    // for keys", "out: error"),
        ("    cp_async_wait<1>();  // for values", "    // for values", "out: error"),
        ("    cp_async_wait<1>();  // for values", "    cp_async_wait<2>();  // for values", "out: error"),
        ("    __syncwarp();  // the values have been read", "", "out: error"),
        ("store_pairs(in_tile, x, dim);", "store_pairs(in_tile, x, 0);", "out: error"),
        ("first == 0 && warp == 0 ? fresh : 0", "0", "exit code|out: error"),
        ("first == 0 && warp == 0 ? fresh : 0", "warp == 0 ? fresh : 0", "exit code|out: error"),
        ("begin + warp_begin - fresh", "begin + warp_begin", "out: error"),
        ("min(warp_share, count - warp_begin)", "warp_share", "exit code|out: error"),
        ("    sum *= rescale;\n", "", "out: error"),
        ("accumulator[d] *= rescale", "accumulator[d] *= 1", "out: error"),
        ("__expf(warp_largest[w] - largest) * of_warp[w]", "of_warp[w]", "out: error"),
        ("< chunks ? c + turn : c + turn - chunks", "< chunks ? c + turn : c", "out: error"),
        ("if (kPass * k >= count) break;", "if (kPass * (k + 1) > count) break;", "out: error"),
        ("even < head_dim ? even : 0;", "even;", "exit code|out: error"),
    ],
)
def test_seeded_bugs_of_tiles_are_caught(simt, old, new, message):
    """All of them wrong with 64 channels and three tiles."""
    arguments = inputs(1, 1, 64, 800, 700, torch.float32, torch.float32, True)
    with pytest.raises(AssertionError, match=message):
        check(simt, arguments, patches=only_float32((old, new)))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("position", [-1, 600, 2**31 + 5])
def test_position_outside_is_nan_and_writes_nothing(simt, split, position):
    arguments = inputs(1, 1, 8, 600, 0, torch.float32, torch.float32, False)
    for cache in (arguments["keys"], arguments["values"]):
        cache[:] = 7
    arguments["positions"] = torch.tensor([position])
    result = run(simt, arguments, split=split)
    assert result["out"].isnan().all()
    assert torch.equal(result["keys"], arguments["keys"]) and torch.equal(result["values"], arguments["values"])


def window_inputs(dim, capacity, positions, columns, slots, dtype, cache_dtype):
    """Rows with positions and slots of their own; of each slot a sequence as long as its row's position."""
    rows = len(positions)
    arguments = inputs(rows, 2, dim, capacity, 0, dtype, cache_dtype, True)
    generator = torch.Generator().manual_seed(dim)
    arguments["qkv"] = torch.randn(rows, columns, 3, 2, dim, generator=generator).to(dtype)
    arguments["positions"], arguments["slots"] = torch.tensor(positions), torch.tensor(slots)
    for name in ("keys", "values"):
        cache = torch.full((rows + 1, 2, capacity, dim), torch.nan)
        for position, slot in zip(positions, slots, strict=True):
            if 0 <= slot <= rows:
                seen = max(min(position, capacity), 0)
                cache[slot, :, :seen] = torch.randn(2, seen, dim, generator=generator)
        arguments[name] = cache.to(cache_dtype)
    return arguments


def column_by_column(arguments):
    """The arguments of each column of a window as a step of its own, on the same caches."""
    for column in range(arguments["qkv"].shape[1]):
        positions = torch.where(arguments["positions"] < 0, -1, arguments["positions"] + column)
        yield {**arguments, "qkv": arguments["qkv"][:, column : column + 1].contiguous(), "positions": positions}


WINDOWS = [
    ([7, -1, 0], 3, [2, 0, 3]),
    ([29, 28, 12], 2, [0, 1, 2]),
    ([3, 4, 5], 4, [1, 9, -1]),
    ([90, 17, -1], 5, [3, 1, 0]),
]


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize(("positions", "columns", "slots"), WINDOWS)
def test_windows_match_reference_and_single_steps(simt, dtype, quantised, positions, columns, slots):
    """The latter to the last bit, result and cache; with rows at rest, columns behind the end and slots outside."""
    cache_dtype = torch.float8_e4m3fn if quantised else dtype
    capacity = 30 if max(positions) < 30 else 100
    arguments = window_inputs(24, capacity, positions, columns, slots, dtype, cache_dtype)
    together, steps, single = run(simt, arguments), [], dict(arguments)
    for step in column_by_column(arguments):
        done = run(simt, {**step, "keys": single["keys"], "values": single["values"]})
        steps.append(done["out"])
        single |= {name: done[name] for name in ("keys", "values")}
    assert torch.equal(together["out"].nan_to_num(7), torch.cat(steps, 1).nan_to_num(7))
    for name in ("keys", "values"):
        assert torch.equal(together[name].view(torch.uint8), single[name].view(torch.uint8))
    check(simt, arguments)


def test_windows_over_shared_keys_match_reference(simt):
    for positions in ([650, 3], [511, 695]):
        arguments = window_inputs(16, 700, positions, 5, [1, 0], torch.float32, torch.float32)
        check(simt, arguments, split=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("before < column; before += kWarps / 2", "before < column - 1; before += kWarps / 2"),
        ("qkv - (column - before) * column_stride", "qkv - column * column_stride"),
        ("const int64_t at = first_position + before;", "const int64_t at = position;"),
        ("store_pairs((is_key ? keys : values) + at", "store_pairs((is_key ? values : keys) + at"),
        ("first_position >= p.capacity - column ||", "first_position >= p.capacity ||"),
        ("slot < 0 || slot >= p.slots) {", "slot < 0) {"),
        ("+ slot * p.slot_stride + head * p.head_stride;\n  Cache* v", "+ row * p.slot_stride + head;\n  Cache* v"),
        ("(row * p.columns + blockIdx.z) * p.heads", "(row + blockIdx.z) * p.heads"),
    ],
)  # fmt: skip
def test_seeded_bugs_of_windows_are_caught(simt, old, new):
    arguments = window_inputs(16, 40, [33, 38, 2], 4, [2, 0, 9], torch.float32, torch.float32)
    with pytest.raises((AssertionError, simt.Failure)):
        check(simt, arguments, patches=only_float32((old, new)))


@pytest.mark.slow
@pytest.mark.parametrize("split", [False, True])
def test_no_data_race(simt, split):
    arguments = inputs(1, 1, 16, 800, 700, torch.float32, torch.float32, True)
    run(simt, arguments, sanitizer="thread", split=split)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  __syncthreads();\n  return last;", "  return last;"),
        ("  __syncthreads();  // query,", "  // query,"),
        ("    __syncwarp();\n    float score", "    float score"),
        ("    __syncwarp();        // also for the weights", "    // also for the weights"),
        ("  __syncthreads();\n\n  largest = -FLT_MAX, sum = 0;", "  largest = -FLT_MAX, sum = 0;"),
    ],
)
def test_missing_barriers_are_races(simt, old, new):
    arguments = inputs(1, 1, 16, 800, 700, torch.float32, torch.float32, True)
    split = "last" in old
    with pytest.raises(simt.Failure, match="data race"):
        run(simt, arguments, sanitizer="thread", split=split, patches=only_float32((old, new)))


@pytest.mark.parametrize("split", [False, True])
def test_rows_beyond_two_to_the_31_elements(simt, split):
    arguments = inputs(2, 2, 16, 600, 566, torch.float32, torch.float32, True)
    near, far = run(simt, arguments, split=split), run(simt, arguments, split=split, slot_stride=2**31 + 64)
    assert torch.equal(near["out"], far["out"])


def error_at(simt, offset, dtype, cache_dtype, **options):
    """Of caches of head dim 24 so many bytes behind an aligned address; None where the check refuses them."""
    arguments = inputs(3, 1, 24, 5, 4, dtype, cache_dtype, True)
    shape = arguments["keys"].shape
    scalars = {"rows": shape[0], "columns": 1, "slots": shape[0], "heads": shape[1], "head_dim": shape[3]}
    scalars |= {"capacity": shape[2], "offset": offset}
    kinds = {"dtype": DTYPES.index(dtype), "cache_dtype": DTYPES.index(cache_dtype), **options}
    given = {name: value for name, value in arguments.items() if name not in ("norm_eps", "slots")} | scalars | kinds
    outputs = {"out": ((3, 1, 1, 24), dtype)}
    for name in ("keys", "values"):
        data = arguments[name].flatten().view(torch.uint8)
        given[name] = torch.cat([data.new_zeros(offset), data])
        outputs[name] = ((offset + len(data),), torch.uint8)
    program = simt.program("cached_attention")
    if not program.run(given, {"aligned": ((1,), torch.int32)})["aligned"].item():
        return None
    result = program.run(given, outputs)
    expected = cached_attention_reference(**arguments)
    for name in ("keys", "values"):
        stored = result[name][offset:].view(cache_dtype).view(shape).double()
        torch.testing.assert_close(stored, arguments[name].double(), rtol=2.0**-4, atol=2.0**-4, equal_nan=True)
    return (result["out"].double() - expected.double()).abs().max()


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_an_e4m3_cache_may_begin_at_eight_bytes(simt, dtype):
    """A layer behind an odd number of keys of 24 bytes begins there; the sanitizer sees every access."""
    assert error_at(simt, 8, dtype, torch.float8_e4m3fn) < 30 * TOLERANCE[dtype]
    assert error_at(simt, 4, dtype, torch.float8_e4m3fn) is None


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_other_caches_begin_at_sixteen_bytes(simt, dtype):
    assert error_at(simt, 16, dtype, dtype) < TOLERANCE[dtype]
    assert error_at(simt, 8, dtype, dtype) is None
    with pytest.raises(simt.Failure, match="misaligned address"):
        error_at(simt, 8, dtype, dtype, unchecked=True)
