"""decode: native against the reference, packing, and that a position depends on no window, batch, slot or thread."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from alitok_fast._library import use_reference
from alitok_fast.ops.decode import decode, decode_reference
from alitok_fast.ops.decode_weights import GROUP_INPUTS, LayerWeights, PackedWeights, pack_weights, unpack_weights

NARROW = "int8, narrow"  # int8 weights times 8-bit activations
DTYPES = [torch.float32, torch.bfloat16, torch.int8, NARROW]
# (layers, heads, head_dim, hidden, codes): a preset's head sizes, a matrix of one padded panel, odd everything.
SHAPES = [(2, 2, 48, 128, 96), (1, 1, 4, 3, 5), (2, 3, 10, 37, 70), (1, 2, 64, 72, 33), (1, 1, 80, 16, 32)]
POSITIONS = 19
# Of the activations alone: the reference reads the same rounded weights.
ERROR = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.int8: 3e-4, NARROW: 3e-2}


def make_layers(layers, heads, head_dim, hidden, codes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = heads * head_dim

    def matrix(outputs, inputs):
        return torch.randn(outputs, inputs, generator=generator) * inputs**-0.5

    def vector(n, center):
        return center + 0.1 * torch.randn(n, generator=generator)

    blocks = [
        LayerWeights(
            norm1=vector(width, 1),
            qkv=matrix(3 * width, width),
            qkv_bias=vector(3 * width, 0),
            q_norm=vector(head_dim, 1),
            k_norm=vector(head_dim, 1),
            proj=matrix(width, width),
            proj_bias=vector(width, 0),
            norm2=vector(width, 1),
            w1=matrix(hidden, width),
            w3=matrix(hidden, width),
            w2=matrix(width, hidden),
        )
        for _ in range(layers)
    ]
    return blocks, vector(width, 1), matrix(codes, width), vector(codes, 0)


def make(shape, dtype, seed=0) -> PackedWeights:
    generator = torch.Generator().manual_seed(seed + 1)
    _, heads, head_dim, _, codes = shape
    angles = torch.randn(POSITIONS, head_dim // 2, generator=generator)
    rope = torch.stack([angles.cos(), angles.sin()], -1)
    rope[0] = 0
    embeddings = torch.randn(codes + 3, heads * head_dim, generator=generator)
    narrow = torch.int8 if dtype == NARROW else None
    stored = narrow or dtype
    return pack_weights(*make_layers(*shape, seed), embeddings, rope, stored, activation_dtype=narrow)


def make_caches(shape, rows, dtype=torch.float32) -> Tensor:
    """Keys and values, poisoned."""
    layers, heads, head_dim, _, _ = shape
    return torch.full((2, layers, rows, heads, POSITIONS, head_dim), torch.nan, dtype=dtype)


def make_ids(shape, rows) -> Tensor:
    return torch.randint(shape[-1] + 3, (POSITIONS, rows), generator=torch.Generator().manual_seed(2))


def run(weights, ids, caches, step=decode) -> Tensor:
    """Logits of every position in turn, (positions, rows, codes)."""
    return torch.stack([one(weights, row, caches, position, step) for position, row in enumerate(ids)])


def one(weights, ids, caches, position, step=decode) -> Tensor:
    """One input of every row, all at the same position."""
    return step(weights, ids[:, None], *caches, torch.full((len(ids),), position)).squeeze(1)


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_reference(cpu_isa, shape, dtype):
    weights, rows = make(shape, dtype), 5
    ids, caches, expected_caches = make_ids(shape, rows), make_caches(shape, rows), make_caches(shape, rows)
    got = run(weights, ids, caches)
    expected = run(weights, ids, expected_caches.double(), decode_reference)
    assert error(got, expected) < ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bfloat16_cache(cpu_isa, dtype):
    shape, rows = SHAPES[0], 3
    weights, ids = make(shape, dtype), make_ids(shape, rows)
    caches, rounded = make_caches(shape, rows, torch.bfloat16), make_caches(shape, rows, torch.bfloat16)
    got = run(weights, ids, caches)
    expected = run(weights, ids, rounded, decode_reference)
    assert error(got, expected) < max(ERROR[dtype], 5e-3)
    assert error(caches.float(), rounded.float()) < max(ERROR[dtype], 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 17, 33])
def test_a_row_does_not_depend_on_the_others(cpu_isa, dtype, rows):
    """To the last bit: an image must not change with the batch that it is drawn in."""
    shape = SHAPES[0]
    weights, ids = make(shape, dtype), make_ids(shape, 40)
    whole = run(weights, ids[:3], make_caches(shape, 40))
    part = run(weights, ids[:3, -rows:].contiguous(), make_caches(shape, rows))
    assert torch.equal(part, whole[:, -rows:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 5, POSITIONS])
def test_a_window_equals_single_steps(cpu_isa, dtype, width):
    """Logits and cache to the last bit; rows that rest between them, and slots in another order."""
    shape, rows = SHAPES[0], 3
    weights, ids = make(shape, dtype), make_ids(shape, rows)
    caches, windowed = make_caches(shape, rows), make_caches(shape, 5)
    expected = run(weights, ids, caches)
    slots = torch.tensor([4, 0, 1, 3])
    for begin in range(0, POSITIONS, width):
        part = ids[begin : begin + width].T
        fed = torch.cat([part[:2], torch.full_like(part[:1], -(2**60)), part[2:]])  # row 2 rests
        got = decode(weights, fed, *windowed, torch.tensor([begin, begin, -1, begin]), slots)
        assert torch.equal(got[[0, 1, 3]].transpose(0, 1), expected[begin : begin + width])
    assert torch.equal(windowed[:, :, slots[[0, 1, 3]]], caches)
    assert windowed[:, :, [1, 2]].isnan().all()


def test_a_window_equals_the_reference():
    shape, rows = SHAPES[2], 4
    weights, ids = make(shape, torch.float32), make_ids(shape, rows).T.contiguous()
    caches, expected_caches = make_caches(shape, 6), make_caches(shape, 6).double()
    slots = torch.tensor([5, 1, 0, 2])
    for positions, width in (([0, 0, -1, 0], 4), ([4, -1, 0, 1], 2), ([3, 4, 2, 0], 15)):
        arguments = torch.tensor(positions), slots
        got = decode(weights, ids[:, :width].contiguous(), *caches, *arguments)
        expected = decode_reference(weights, ids[:, :width], *expected_caches, *arguments)
        active = torch.tensor(positions) >= 0
        assert expected[~active].isnan().all()
        assert error(got[active], expected[active]) < ERROR[torch.float32]


SCHEDULES = st.lists(  # passes: of each, which sequences take part, in which order of rows, and how far they look ahead
    st.tuples(st.lists(st.sampled_from(range(4)), min_size=1, max_size=4, unique=True), st.integers(1, 6)),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SCHEDULES, st.permutations(range(6)), st.sampled_from([torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_alone_and_in_any_company(cpu_isa, dtype, schedule, slots, cache_dtype):
    """Random windows, joins, leaves and slots, with wrong guesses that are overwritten later: the same bits."""
    shape, count = SHAPES[0], 4
    weights, ids = make(shape, dtype), make_ids(shape, count).T
    alone = [run(weights, ids[i][:, None], make_caches(shape, 1, cache_dtype)).squeeze(1) for i in range(count)]
    caches, reached = make_caches(shape, 6, cache_dtype), [0] * count
    for sequences, width in schedule:
        sequences = [i for i in sequences if reached[i] + width <= POSITIONS]
        if not sequences:
            continue
        right = {i: 1 + (reached[i] + i) % width for i in sequences}  # so many of the window's inputs
        fed = torch.stack([ids[i, reached[i] : reached[i] + width] for i in sequences])
        for row, i in enumerate(sequences):
            fed[row, right[i] :] = (fed[row, right[i] :] + 1) % shape[-1]
        positions, where = torch.tensor([reached[i] for i in sequences]), torch.tensor([slots[i] for i in sequences])
        logits = decode(weights, fed, *caches, positions, where)
        for row, i in enumerate(sequences):
            assert torch.equal(logits[row, : right[i]], alone[i][reached[i] : reached[i] + right[i]])
            reached[i] += right[i]
    unused = [slot for slot in range(6) if slot not in slots[:count]]
    assert caches[:, :, unused].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(dtype):
    shape = SHAPES[2]
    weights, ids = make(shape, dtype), make_ids(shape, 3)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(weights, ids, make_caches(shape, 3)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacking_gives_the_rounded_weights(shape, dtype):
    weights = make(shape, dtype)
    layers, norm, head, head_bias = make_layers(*shape)
    got_layers, got_norm, got_head, got_bias = unpack_weights(weights, shape[1], shape[2])
    assert torch.equal(got_norm, norm) and torch.equal(got_bias, head_bias)
    # bfloat16: half a unit in the last of eight bits. int8: half a step, the 127th part of the largest of the group,
    # rounded up to eight bits.
    tolerance = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.int8: 0.5 / 127 * (1 + 2.0**-7)}[weights.dtype]
    pairs = [(got_head, head)]
    for got_layer, layer in zip(got_layers, layers, strict=True):
        pairs += zip(vars(got_layer).values(), vars(layer).values(), strict=True)
    for got, expected in pairs:
        assert got.shape == expected.shape
        if expected.ndim == 1:
            assert torch.equal(got, expected)
            continue
        for actual, wanted in zip(got.split(GROUP_INPUTS, 1), expected.split(GROUP_INPUTS, 1), strict=True):
            limit = tolerance * wanted.abs().amax(-1, keepdim=True)
            assert ((actual - wanted).abs() <= limit).all()


def test_reference_is_the_explicit_choice():
    shape = SHAPES[0]
    weights, ids = make(shape, torch.bfloat16), make_ids(shape, 2)
    with use_reference():
        got = run(weights, ids, make_caches(shape, 2))
    assert torch.equal(got, run(weights, ids, make_caches(shape, 2), decode_reference))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(cpu_isa, dtype):
    shape = SHAPES[0]
    weights, ids = make(shape, dtype), torch.tensor([1, 2, 3])
    weights.embeddings[2, 5] = torch.inf
    logits = one(weights, ids, make_caches(shape, 3), 0)
    assert logits[1].isnan().any() and logits[[0, 2]].isfinite().all()


def test_opcheck():
    shape = SHAPES[0]
    weights, (keys, values) = make(shape, torch.bfloat16), make_caches(shape, 2).zero_()
    torch.library.opcheck(
        torch.ops.alitok.decode.default,
        (weights.arena, weights.vectors, weights.embeddings, weights.rope, torch.tensor([[1, 2], [3, 4]]), keys,
         values, torch.tensor([3, 5]), torch.tensor([1, 0]), weights.hidden, weights.codes,
         weights.dtype.itemsize, weights.activation_dtype.itemsize, weights.norm_eps),
    )  # fmt: skip


def test_no_rows():
    shape = SHAPES[0]
    ids, positions = torch.empty(0, 3, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    assert decode(make(shape, torch.float32), ids, *make_caches(shape, 0), positions).shape == (0, 3, 96)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": torch.tensor([[0, 0], [0, 99]])}, r"ids: expected a value in 0..98, got 99"),
        ({"ids": torch.tensor([[0, -1], [0, 0]])}, r"ids: expected a value in 0..98, got -1"),
        ({"ids": torch.tensor([[0.0], [1.0]])}, r"ids: expected int64, got float32"),
        ({"ids": torch.tensor([0, 1])}, r"ids: expected 2 dimensions, got shape \(2,\)"),
        ({"ids": torch.zeros(2, 0, dtype=torch.int64)}, r"ids: expected a column or more, got shape \(2, 0\)"),
        ({"ids": torch.zeros(2, 20, dtype=torch.int64)}, r"keys: expected a capacity of 20 or more, got 19"),
        (
            {"ids": torch.zeros(3, 2, dtype=torch.int64)},
            r"positions: expected size 3 along dimension 0, got shape \(2,\)",
        ),
        (
            {"ids": torch.zeros(3, 1, dtype=torch.int64), "positions": torch.zeros(3, dtype=torch.int64)},
            r"keys: expected a sequence for each of the 3 rows, got shape \(2, 2, 2, 19, 48\)",
        ),
        ({"positions": torch.tensor([0, POSITIONS - 1])}, r"positions: expected a value in -1..17, got 18"),
        ({"positions": torch.tensor([0, -2])}, r"positions: expected a value in -1..17, got -2"),
        ({"positions": torch.tensor([0.0, 1.0])}, r"positions: expected int64, got float32"),
        ({"positions": torch.tensor(0)}, r"positions: expected 1 dimensions, got shape \(\)"),
        ({"slots": torch.tensor([1, 1])}, r"slots: expected another one for each row, got slot 1 twice"),
        ({"slots": torch.tensor([0, 2])}, r"slots: expected a value in 0..1, got 2"),
        ({"slots": torch.tensor([0, -1])}, r"slots: expected a value in 0..1, got -1"),
        ({"slots": torch.tensor([0])}, r"slots: expected size 2 along dimension 0, got shape \(1,\)"),
        ({"keys": torch.zeros(2, 2, 2, 19, 48).half()}, r"keys: expected float32 or bfloat16, got float16"),
        ({"values": torch.zeros(2, 2, 2, 19, 48).bfloat16()}, r"values: expected float32, got bfloat16"),
        ({"values": torch.zeros(2, 2, 2, 18, 48)}, r"values: expected size 19 along dimension 3, got shape"),
        ({"keys": torch.zeros(2, 2, 19, 2, 48).transpose(2, 3)}, r"keys: expected a contiguous tensor, got"),
        ({name: torch.zeros(3, 2, 2, 19, 48) for name in ("keys", "values")}, r"arena: expected size \d+ along"),
    ],
)
def test_bad_arguments(changes, message):
    shape = SHAPES[0]
    keys, values = make_caches(shape, 2)
    ids, positions = torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 4])
    arguments = {"ids": ids, "keys": keys, "values": values, "positions": positions, **changes}
    with pytest.raises(ValueError, match=message):
        decode(make(shape, torch.float32), **arguments)
    assert keys.isnan().all() and values.isnan().all(), "nothing is written"


def test_8_bit_activations_are_the_rounded_ones():
    """One layer whose products show: as with activations that were rounded in groups of 64, and no further off."""
    shape = (1, 1, 64, 64, 32)
    wide, narrow = (make(shape, dtype) for dtype in (torch.int8, NARROW))
    ids = make_ids(shape, 16)
    exact = run(wide, ids, make_caches(shape, 16).double(), decode_reference)
    errors = [error(run(weights, ids, make_caches(shape, 16)), exact) for weights in (wide, narrow)]
    assert errors[0] < 1e-3 < errors[1] < 3e-2
    assert narrow.activation_dtype == torch.int8 and wide.activation_dtype == torch.int16


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-30, 1e30, torch.inf, torch.nan])
def test_8_bit_activations_of_any_size(cpu_isa, value):
    """Groups of zeros and of the smallest numbers are zeros; one that is not finite makes its own row NaN alone."""
    shape = (1, 1, 128, 64, 33)
    weights, ids = make(shape, NARROW), torch.tensor([1, 2, 3])
    weights.embeddings[2] = 0
    weights.embeddings[2, 70] = value
    logits = one(weights, ids, make_caches(shape, 3), 0)
    assert logits[[0, 2]].isfinite().all()
    assert logits[1].isfinite().all() == math.isfinite(value)


def test_unknown_activation_dtype():
    shape, rope = SHAPES[0], torch.zeros(POSITIONS, 24, 2)
    for dtype, wrong, expected in (
        (torch.int8, torch.float32, "int16 or int8"), (torch.float32, torch.int8, "float32"),
        (torch.bfloat16, torch.int16, "bfloat16"),
    ):  # fmt: skip
        given, got = (str(x).removeprefix("torch.") for x in (dtype, wrong))
        with pytest.raises(
            ValueError, match=f"activation_dtype: expected {expected} with weights in {given}, got {got}"
        ):
            pack_weights(*make_layers(*shape), torch.zeros(99, 96), rope, dtype, activation_dtype=wrong)


def test_unknown_weight_dtype():
    with pytest.raises(ValueError, match="dtype: expected float32, bfloat16 or int8, got float16"):
        make(SHAPES[0], torch.float16)
