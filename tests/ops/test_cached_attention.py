"""cached_attention: native against the reference, and against prefix_attention over the whole sequence."""

import pytest
import torch

from alitok_fast._library import use_reference
from alitok_fast.ops.cached_attention import cached_attention
from alitok_fast.ops.prefix_attention import prefix_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def make(rows=2, heads=3, dim=48, capacity=20, dtype=torch.float32, cache_dtype=None, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    angles = torch.randn(capacity, dim // 2, generator=generator)
    rope = torch.stack([angles.cos(), angles.sin()], -1)
    rope[0] = 0
    caches = torch.full((2, rows, heads, capacity, dim), torch.nan).to(cache_dtype or dtype)
    weights = 1 + 0.1 * torch.randn(2, dim, generator=generator)
    qkv = torch.randn(rows, capacity, 3, heads, dim, generator=generator).to(dtype)
    options = {"q_norm_weight": weights[0], "k_norm_weight": weights[1], "rope": rope}
    return qkv.to(device), caches.to(device), {name: option.to(device) for name, option in options.items()}


def step(qkv, caches, options, position, source=None):
    """Position `source` of qkv, by default `position` too."""
    source = position if source is None else source
    positions = torch.full((len(qkv),), position, device=qkv.device)
    return cached_attention(qkv[:, source : source + 1].contiguous(), *caches, positions, **options).squeeze(1)


def run(qkv, caches, options):
    """Every position in turn; (R, L, H, D)."""
    return torch.stack([step(qkv, caches, options, position) for position in range(qkv.shape[1])], 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "heads", "dim", "capacity"), [(1, 1, 8, 1), (2, 3, 48, 20), (3, 1, 80, 37), (1, 2, 128, 5)]
)
def test_all_steps_equal_causal_attention(target, dtype, rows, heads, dim, capacity):
    qkv, caches, options = make(rows, heads, dim, capacity, dtype, device=target)
    got = run(qkv, caches, options)
    with use_reference():
        expected = prefix_attention(qkv.double(), 0, **options)
        rounded = prefix_attention(qkv, 0, **options)
    bound = 3 * (rounded.double() - expected).abs().max() + EPSILON[dtype]
    assert (got.double() - expected).abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_cache_equals_reference(target, dtype):
    qkv, caches, options = make(dtype=dtype, cache_dtype=torch.float8_e4m3fn, device=target)
    other = caches.clone()
    got = run(qkv, caches, options)
    with use_reference():
        expected = run(qkv, other, options)
    torch.testing.assert_close(got, expected, rtol=EPSILON[dtype], atol=0.05)
    # Against exact caches the error is that of rounding to four significant bits, no more.
    qkv, exact, options = make(dtype=dtype, device=target)
    assert (got.float() - run(qkv, exact, options).float()).abs().max() < 0.25


def test_e4m3_rounding_is_torchs(target):
    large, small = torch.linspace(-460, 460, 4001), torch.linspace(-0.04, 0.04, 4001)
    values = torch.cat([large, small, torch.logspace(-12, 3, 8000)])
    values = torch.cat([values, values.new_zeros(-len(values) % 8)]).view(-1, 1, 1, 8)
    rows = len(values)
    caches = torch.zeros(2, rows, 1, 1, 8, dtype=torch.float8_e4m3fn, device=target)
    qkv = values.expand(rows, 3, 1, 8).unsqueeze(1).contiguous().to(target)
    cached_attention(qkv, caches[0], caches[1], torch.zeros(rows, dtype=torch.int64, device=target))
    expected = values.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(caches[0].cpu().view(torch.uint8), expected.view(torch.uint8))


def test_position_outside_gives_nan_and_writes_nothing(device):
    qkv, caches, options = make(device=device)
    caches.zero_()
    for position in (-1, 20):
        out = step(qkv, caches, options, position, source=0)
        assert out.isnan().all() and not caches.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("capacity", [20, 600])
def test_a_window_equals_single_steps(target, dtype, cache_dtype, capacity):
    """To the last bit, result and cache: rows at their own positions, in slots of their own, some at rest."""
    qkv, caches, options = make(3, 2, 48, capacity, dtype, cache_dtype, device=target)
    _, windowed, _ = make(5, 2, 48, capacity, dtype, cache_dtype, device=target)
    windowed.zero_()
    begins, width, slots = [capacity - 5, -1, 3], 5, torch.tensor([4, 0, 2], device=target)
    arrivals = torch.zeros(3 * width * 2, dtype=torch.int32, device=target)
    for row, begin in enumerate(begins):
        for position in range(max(begin, 0)):
            one = qkv[row : row + 1, position : position + 1].contiguous()
            at = torch.tensor([position], device=target)
            cached_attention(one, *windowed, at, slots=slots[row : row + 1], **options)
    alone, expected = windowed.clone(), []
    fed = torch.stack([qkv[row, max(begin, 0) : max(begin, 0) + width] for row, begin in enumerate(begins)])
    for column in range(width):
        at = torch.tensor([begin + column if begin >= 0 else -1 for begin in begins], device=target)
        counters = arrivals[:6] if capacity > 512 else None
        one = fed[:, column : column + 1].contiguous()
        expected.append(cached_attention(one, *alone, at, slots=slots, arrivals=counters, **options))
    positions = torch.tensor(begins, device=target)
    got = cached_attention(fed, *windowed, positions, slots=slots, arrivals=arrivals, **options)
    assert got[1].isnan().all() and not got[[0, 2]].isnan().any()
    if capacity <= 512:  # else more queries share the keys among fewer blocks
        assert torch.equal(got[[0, 2]], torch.cat(expected, 1)[[0, 2]])
    else:
        torch.testing.assert_close(got, torch.cat(expected, 1), rtol=1e-2, atol=1e-2, equal_nan=True)
    assert torch.equal(windowed.float(), alone.float()) and not arrivals.any()
    assert not windowed[:, [0, 1, 3]].float().any(), "no one's slots"


def test_columns_behind_the_end_and_slots_outside_rest(target):
    qkv, caches, options = make(device=target)
    caches.zero_()
    positions, fed = torch.tensor([18, 18], device=target), qkv[:, :4].contiguous()
    got = cached_attention(fed, *caches, positions, slots=torch.tensor([1, 2], device=target), **options)
    assert got[1].isnan().all() and got[0, 2:].isnan().all() and not got[0, :2].isnan().any()
    assert not caches[:, 0].any() and not caches[:, 1, :, :18].any() and caches[:, 1, :, 18:].any()


def test_strided_cache_and_no_rows(device):
    qkv, caches, options = make(device=device)
    wide = torch.full((2, 4, 3, 25, 48), torch.nan, device=device)
    view = wide[:, ::2, :, :20]
    torch.testing.assert_close(run(qkv, view, options), run(qkv, caches, options), rtol=0, atol=0)
    assert wide[:, 1::2].isnan().all() and wide[:, :, :, 20:].isnan().all()
    empty = step(qkv[:0], caches[:, :0], options, 0)
    assert empty.shape == (0, 3, 48)


def test_counters_share_the_keys_and_are_zeros_again(device):
    """On a GPU up to three blocks a row and head; results within rounding, and the same bits in every run."""
    qkv, caches, options = make(rows=2, heads=3, capacity=600, device=device)
    others, arrivals = caches.clone(), torch.zeros(6, dtype=torch.int32, device=device)
    alone, shared = run(qkv, caches, options), run(qkv, others, options | {"arrivals": arrivals})
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(others, caches) and not arrivals.any()
    assert torch.equal(run(qkv, others, options | {"arrivals": arrivals}), shared)
    step(qkv, others, options | {"arrivals": arrivals}, position=600, source=0)
    assert not arrivals.any()


@pytest.mark.parametrize("counted", [False, True])
def test_opcheck(device, counted):
    qkv, caches, options = make(device=device)
    positions, slots = torch.tensor([3, 7], device=device), torch.tensor([1, 0], device=device)
    arguments = (qkv[:, :2].contiguous(), caches[0].zero_(), caches[1].zero_(), positions, slots)
    arguments += (options["q_norm_weight"], options["k_norm_weight"], 1e-5, options["rope"], 0.2)
    arguments += (torch.zeros(12, dtype=torch.int32, device=device) if counted else None,)
    torch.library.opcheck(torch.ops.alitok.cached_attention.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(qkv=a["qkv"].double()), "qkv: expected float32 or bfloat16 or float16, got float64"),
        (lambda a: a.update(qkv=a["qkv"][0]), "qkv: expected 5 dimensions"),
        (lambda a: a.update(keys=a["keys"][:1]), "values: expected size 1 along dimension 0"),
        (
            lambda a: a.update(keys=a["keys"][:1], values=a["values"][:1]),
            "keys: expected a sequence for each of the 2 rows, got shape",
        ),
        (lambda a: a.update(values=a["values"].to(torch.float8_e4m3fn)), "values: expected the dtype of keys"),
        (lambda a: a.update(positions=torch.tensor([0, 0]).int()), "positions: expected int64, got int32"),
        (lambda a: a.update(positions=torch.tensor(0)), r"positions: expected 1 dimensions, got shape \(\)"),
        (lambda a: a.update(positions=torch.arange(3)), "positions: expected size 2 along dimension 0"),
        (lambda a: a.update(slots=torch.arange(3)), "slots: expected size 2 along dimension 0"),
        (lambda a: a.update(slots=[0, 1]), "slots: expected a tensor or None, got list"),
        (lambda a: a.update(slots=torch.ones(2)), "slots: expected int64, got float32"),
        (lambda a: a.update(k_norm_weight=None), "k_norm_weight: expected given exactly when q_norm_weight is"),
        (lambda a: a.update(rope=a["rope"][:5]), r"rope: expected shape \(at least 20, 24, 2\), got \(5, 24, 2\)"),
        (lambda a: a.update(arrivals=torch.zeros(6)), "arrivals: expected int32, got float32"),
        (lambda a: a.update(arrivals=torch.zeros(3, dtype=torch.int32)), "arrivals: expected size 6 along dimension 0"),
    ],
)
def test_messages(change, message):
    qkv, caches, options = make()
    arguments = {"qkv": qkv[:, :1].contiguous(), "keys": caches[0], "values": caches[1]}
    arguments |= {"positions": torch.tensor([0, 0]), **options}
    change(arguments)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        cached_attention(**arguments)


@pytest.mark.device
@pytest.mark.parametrize(
    ("cache_dtype", "access"), [(torch.float32, 16), (torch.float16, 16), (torch.float8_e4m3fn, 8)]
)
def test_misaligned_cache_is_refused_on_cuda(cuda, cache_dtype, access):
    """On the CPU it does no harm."""
    positions = torch.zeros(2, dtype=torch.int64, device=cuda)
    qkv = torch.zeros(2, 1, 3, 3, 16, device=cuda, dtype=cache_dtype if cache_dtype == torch.float16 else torch.float32)
    flat, step = torch.zeros(4096, device=cuda).to(cache_dtype), access // 2 // cache_dtype.itemsize
    good = flat.as_strided((2, 3, 20, 16), (960 + 2 * step, 320, 16, 1))
    cached_attention(qkv, good, flat.clone().as_strided(good.shape, good.stride()), positions)
    for keys in (
        flat[step:].as_strided(good.shape, good.stride()),
        flat.as_strided(good.shape, (960 + step, 320, 16, 1)),
    ):
        message = f"keys: expected memory aligned to {access} bytes, strides that are multiples of {access} bytes"
        with pytest.raises(ValueError, match=message):
            cached_attention(qkv, keys, keys.clone(), positions)


def test_odd_layers_of_an_e4m3_cache_with_head_dim_24(device):
    """An odd number of rows, heads and positions, 24 bytes each: every second layer begins at 8 bytes, not at 16."""
    layers = torch.zeros(2, 2, 3, 1, 5, 24, device=device).to(torch.float8_e4m3fn)
    qkv, _, options = make(3, 1, 24, 5, device=device)
    first, second = (run(qkv, layers[:, layer], options) for layer in range(2))
    assert torch.equal(first, second)
