"""decode: native against the reference, packing, and independence of a row from batch and threads."""

import pytest
import torch
from torch import Tensor

from alitok_fast._library import use_reference
from alitok_fast.ops.decode import decode, decode_reference
from alitok_fast.ops.decode_weights import GROUP_INPUTS, LayerWeights, PackedWeights, pack_weights, unpack_weights

DTYPES = [torch.float32, torch.bfloat16, torch.int8]
# (layers, heads, head_dim, hidden, codes): a preset's head sizes, a matrix of one padded panel, odd everything.
SHAPES = [(2, 2, 48, 128, 96), (1, 1, 4, 3, 5), (2, 3, 10, 37, 70), (1, 2, 64, 72, 33), (1, 1, 80, 16, 32)]
POSITIONS = 19
# Of the activations alone: the reference reads the same rounded weights.
ERROR = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.int8: 3e-4}


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
    return pack_weights(*make_layers(*shape, seed), embeddings, rope, dtype)


def make_caches(shape, rows, dtype=torch.float32) -> Tensor:
    """Keys and values, poisoned."""
    layers, heads, head_dim, _, _ = shape
    return torch.full((2, layers, rows, heads, POSITIONS, head_dim), torch.nan, dtype=dtype)


def make_ids(shape, rows) -> Tensor:
    return torch.randint(shape[-1] + 3, (POSITIONS, rows), generator=torch.Generator().manual_seed(2))


def run(weights, ids, caches, step=decode) -> Tensor:
    """Logits of every position in turn, (positions, rows, codes)."""
    return torch.stack([step(weights, row, *caches, torch.tensor(position)) for position, row in enumerate(ids)])


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
    assert error(caches.float(), rounded.float()) < 1e-2


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
    tolerance = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.int8: 0.5 / 127 * (1 + 2.0**-7)}[dtype]
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
    logits = decode(weights, ids, *make_caches(shape, 3), torch.tensor(0))
    assert logits[1].isnan().any() and logits[[0, 2]].isfinite().all()


def test_opcheck():
    shape = SHAPES[0]
    weights, (keys, values) = make(shape, torch.bfloat16), make_caches(shape, 2).zero_()
    torch.library.opcheck(
        torch.ops.alitok.decode.default,
        (weights.arena, weights.vectors, weights.embeddings, weights.rope, torch.tensor([1, 2]), keys, values,
         torch.tensor(3), weights.hidden, weights.codes, weights.dtype.itemsize, weights.norm_eps),
    )  # fmt: skip


def test_no_rows():
    shape = SHAPES[0]
    ids = torch.empty(0, dtype=torch.int64)
    assert decode(make(shape, torch.float32), ids, *make_caches(shape, 0), torch.tensor(0)).shape == (0, 96)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": torch.tensor([0, 99])}, r"ids: expected a value in 0..98, got 99"),
        ({"ids": torch.tensor([0, -1])}, r"ids: expected a value in 0..98, got -1"),
        ({"ids": torch.tensor([0.0, 1.0])}, r"ids: expected int64, got float32"),
        ({"ids": torch.tensor([0, 1, 2])}, r"keys: expected size 3 along dimension 1, got shape \(2, 2, 2, 19, 48\)"),
        ({"position": torch.tensor(POSITIONS)}, r"position: expected a value in 0..18, got 19"),
        ({"position": torch.tensor(-1)}, r"position: expected a value in 0..18, got -1"),
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
    arguments = {"ids": torch.tensor([0, 1]), "keys": keys, "values": values, "position": torch.tensor(0), **changes}
    with pytest.raises(ValueError, match=message):
        decode(make(shape, torch.float32), **arguments)


def test_unknown_weight_dtype():
    with pytest.raises(ValueError, match="dtype: expected float32, bfloat16 or int8, got float16"):
        make(SHAPES[0], torch.float16)
