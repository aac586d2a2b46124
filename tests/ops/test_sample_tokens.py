"""sample_tokens against its definition, in float64 where float32 could decide a near-tie either way."""

import math

import pytest
import torch

from alitok_fast._library import use_reference
from alitok_fast.ops.sample_tokens import guided_logits, gumbel_noise, sample_tokens

INF, NAN = math.inf, math.nan
NATIVE_AND_REFERENCE = pytest.mark.parametrize("reference", [False, True], ids=["native", "reference"])


def random_logits(rows, codes, dtype=torch.float32, spread=3.0, seed=0):
    return (spread * torch.randn(rows, codes, generator=torch.Generator().manual_seed(seed))).to(dtype)


def draw_on(device, logits, **arguments):
    """sample_tokens with all tensors on `device`; the ids on the CPU."""
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    return sample_tokens(logits.to(device), **moved).cpu()


def assert_is_the_draw(
    ids, logits, *, guidance_scale=None, temperature=1.0, top_k=None, top_p=None, seed, image_ids, step
):
    """`ids` maximise the float64 scores, up to the rounding of float32, among the codes that are kept."""
    scale = None if guidance_scale is None else torch.as_tensor(guidance_scale, dtype=torch.float32)
    x = guided_logits(logits, scale).double()
    kept = may_be_kept = x > -INF
    if top_k is not None:
        kept = may_be_kept = kept & (x >= x.topk(min(top_k, x.shape[1])).values[:, -1:])
    if top_p is not None and temperature > 0:
        probability = (x / temperature).masked_fill(~kept, -INF).softmax(-1)
        # The probability of all larger logits; equal ones share a fate. Sums of rounded weights know it to 1e-6.
        order = x.argsort(descending=True)
        mass = torch.nn.functional.pad(probability.gather(1, order).cumsum(1), (1, 0))
        above = mass.gather(1, torch.searchsorted(-x.gather(1, order), -x))
        kept, may_be_kept = kept & (above < top_p - 1e-6), may_be_kept & (above < top_p + 1e-6)
    noise = gumbel_noise(torch.tensor(seed), image_ids, torch.tensor(step), x.shape[1], torch.float64)
    scores = x + temperature * noise
    rounding = 8 * 2.0**-24 * (x[may_be_kept].abs().max() + 23 * temperature)
    chosen = ids[:, None]
    assert may_be_kept.gather(1, chosen).all()
    assert (scores.gather(1, chosen) >= scores.masked_fill(~kept, -INF).amax(1, keepdim=True) - rounding).all()


@NATIVE_AND_REFERENCE
@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"temperature": 1e-30},
        {"temperature": 1e30},
        {"top_k": 1},
        {"top_k": 50},
        {"top_p": 0.9},
        {"top_p": 1e-9},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("guidance", [None, 4.5, "each"])
def test_is_the_draw(device, rule, guidance, reference):
    for codes, batch in ((1, 2), (3, 5), (64, 3), (257, 7), (1024, 4)):
        logits = random_logits(batch * (1 if guidance is None else 2), codes)
        scale = torch.linspace(0, 16, batch) if guidance == "each" else guidance
        arguments = dict(guidance_scale=scale, **rule, seed=5, image_ids=torch.arange(batch) * 77, step=3)
        with use_reference(reference):
            ids = draw_on(device, logits, **arguments)
        assert ids.dtype == torch.int64
        assert_is_the_draw(ids, logits, **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codes", [1, 2, 4, 5, 63, 64, 65, 1021, 4096])
def test_every_instruction_set(target, codes, dtype):
    logits = random_logits(64, codes, dtype, spread=1.0)
    for rule in ({}, {"top_k": 30, "top_p": 0.8}):
        arguments = dict(guidance_scale=2.0, **rule, seed=-(2**63), image_ids=torch.arange(32) - 5, step=2**32 - 1)
        assert_is_the_draw(draw_on(target, logits, **arguments), logits, **arguments)


def test_instruction_sets_agree_exactly(request):
    from alitok_fast import _C

    request.addfinalizer(lambda: _C.set_cpu_isa(""))
    logits, images = random_logits(1, 4096).expand(300, -1), torch.arange(300)
    for rule in ({}, {"temperature": 0.9, "top_k": 500}, {"top_p": 0.7}):
        expected = sample_tokens(logits, **rule, seed=1, image_ids=images, step=0)
        _C.set_cpu_isa("scalar")
        assert torch.equal(sample_tokens(logits, **rule, seed=1, image_ids=images, step=0), expected)
        _C.set_cpu_isa("")


def test_an_image_is_the_same_in_any_batch(device):
    logits, images = random_logits(12, 300), torch.tensor([0, 1, -1, 2**32, 2**40 + 1, 7, 8, 9, 10, 11, 12, 2**63 - 1])
    together = draw_on(device, logits, seed=3, image_ids=images, step=9)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for part in order.split(5):
        assert torch.equal(draw_on(device, logits[part], seed=3, image_ids=images[part], step=9), together[part])


def test_each_image_has_its_own_settings(target):
    """As alone, to the last id, on every instruction set and device."""
    logits, images = random_logits(12, 300), torch.tensor([5, 5, 7, 2**40, -1, 0])
    each = {
        "guidance_scale": torch.tensor([1.0, 3.0, 0.0, 2.0, 8.0, 1.5]),
        "temperature": torch.tensor([0.0, 1.0, 0.5, 1.0, 2.0, 1.0]),
        "top_k": torch.tensor([0, 4, 0, 0, 20, 1000]),
        "top_p": torch.tensor([1.0, 1.0, 0.3, 1.0, 0.9, 0.5]).double(),
        "seed": torch.tensor([1, 2, 3, 2**62, -9, 0]),
        "step": torch.tensor([9, 9, 0, 2**32 - 1, 2, 3]),
    }
    for reference in (False, True):
        with use_reference(reference):
            together = draw_on(target, logits, image_ids=images, **each)
            for i in range(6):
                one = {name: value[i : i + 1] for name, value in each.items()}
                pair = logits[[i, 6 + i]]
                assert draw_on(target, pair, image_ids=images[i : i + 1], **one) == together[i]


@NATIVE_AND_REFERENCE
def test_images_with_bad_settings_are_marked(reference, cuda):
    """Where the values lie on a device, the host does not look."""
    logits, images = random_logits(4, 30), torch.arange(4)
    bad = {"temperature": torch.tensor([1.0, NAN, -1.0, INF]), "top_k": torch.tensor([0, -1, 5, 5]),
           "top_p": torch.tensor([1.0, 0.0, NAN, 2.0]).double()}  # fmt: skip
    for name, values in bad.items():
        with use_reference(reference):
            ids = draw_on(cuda, logits, image_ids=images, seed=0, step=0, **{name: values})
        wrong = torch.tensor([False, True, name != "top_k", name != "top_k"])
        assert torch.equal(ids == -1, wrong)


def test_every_part_of_the_key_counts():
    logits, images = torch.zeros(1, 64).expand(8192, -1), torch.arange(8192)
    keys = [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 2**32, 0), (0, 2**50, 0), (0, 0, 1), (0, 0, 2**31)]
    draws = [sample_tokens(logits, seed=seed, image_ids=images + first, step=step) for seed, first, step in keys]
    chance, deviation = 1 / 64, math.sqrt(1 / 64 / 8192)
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert abs((a == b).double().mean() - chance) < 5 * deviation


def chi_square_z(counts, probability):
    """How many standard deviations Pearson's statistic lies off its mean (Wilson and Hilferty 1931)."""
    used = probability > 0
    assert counts[~used].sum() == 0
    expected = probability[used] * counts.sum()
    assert expected.min() > 5
    statistic, freedom = ((counts[used] - expected).square() / expected).sum(), used.sum() - 1
    variance = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - variance)) / variance.sqrt()


@pytest.mark.parametrize(
    ("codes", "draws", "rule"),
    [
        (4096, 2**19, {}),
        (4096, 2**17, {"temperature": 1.8, "guidance_scale": 1.5}),
        (4096, 2**17, {"top_k": 300}),
        (4096, 2**17, {"top_p": 0.3, "temperature": 1.2}),
        (1024, 2**17, {"top_k": 400, "top_p": 0.8}),
    ],
    ids=str,
)
def test_distribution(device, codes, draws, rule):
    rows, chunk = random_logits(2 if "guidance_scale" in rule else 1, codes, spread=0.5), 2**12
    logits = rows.repeat_interleave(chunk, 0) if len(rows) > 1 else rows.expand(chunk, -1)
    counts = torch.zeros(codes, dtype=torch.int64)
    for images in torch.arange(draws).split(chunk):
        counts += draw_on(device, logits, **rule, seed=11, image_ids=images, step=4).bincount(minlength=codes)

    scale = torch.tensor(rule["guidance_scale"]) if "guidance_scale" in rule else None
    x = guided_logits(rows, scale)[0].double()
    if "top_k" in rule:
        x[x < x.topk(rule["top_k"]).values[-1]] = -INF

    def probability(temperature):
        p = (x / temperature).softmax(0)
        order = p.argsort(descending=True)
        left_out = p[order].cumsum(0) - p[order] >= rule.get("top_p", 1)
        p[order[left_out]] = 0
        return p / p.sum()

    temperature = rule.get("temperature", 1.0)
    assert abs(chi_square_z(counts, probability(temperature))) < 4
    if "top_p" not in rule:  # the test is sharp enough to see a temperature that is off (and top-p keeps other codes)
        assert chi_square_z(counts, probability(1.2 * temperature)) > 4


@NATIVE_AND_REFERENCE
def test_ties(device, reference):
    draw = dict(seed=0, image_ids=torch.arange(2000, device=device), step=0)
    logits = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, -INF], device=device).expand(2000, -1)
    with use_reference(reference):
        assert (sample_tokens(logits, temperature=0, **draw) == 1).all()
        assert sample_tokens(logits, top_k=1, **draw).unique().tolist() == [1, 3]
        assert sample_tokens(logits, top_k=3, **draw).unique().tolist() == [1, 2, 3, 4]
        assert sample_tokens(logits, top_p=0.1, **draw).unique().tolist() == [1, 3]
        assert sample_tokens(logits, top_p=0.9, **draw).unique().tolist() == [1, 2, 3, 4]
        assert sample_tokens(logits, top_k=100, top_p=1.0, **draw).unique().tolist() == [0, 1, 2, 3, 4]
        zeros = torch.tensor([-1.0, -0.0, 0.0], device=device).expand(2000, -1)
        assert (sample_tokens(zeros, temperature=0, **draw) == 1).all()


@NATIVE_AND_REFERENCE
@pytest.mark.parametrize("rule", [{}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
def test_rows_that_are_no_distribution(device, reference, rule):
    rows = [[0, NAN, 1], [0, INF, 1], [-INF, -INF, -INF], [-NAN, -INF, 5], [-INF, 2, -INF], [-3e38, 3e38, 0]]
    with use_reference(reference):
        ids = draw_on(device, torch.tensor(rows), **rule, seed=0, image_ids=torch.arange(6), step=0)
    assert ids.tolist() == [-1, -1, -1, -1, 1, 1]


@NATIVE_AND_REFERENCE
def test_guidance_over_masked_codes(device, reference):
    c = [[1, -INF, -INF, 0], [NAN, -INF, 0, 0], [-INF, INF, 0, 0], [-INF, 3, -3.4e38, 0]]
    u = [[-INF, -INF, 0, 0], [-INF, 0, 0, 0], [INF, -INF, 0, 0], [-INF, -INF, -3.4e38, 0]]
    for scale in (0.0, 0.5, 3.0, -1.0):
        with use_reference(reference):
            draw = dict(seed=0, image_ids=torch.arange(4), step=0, guidance_scale=scale)
            ids = draw_on(device, torch.tensor(c + u), **draw)
        assert ids.tolist() == [3, -1, -1, 3]


def test_layouts():
    logits, draw = random_logits(6, 128), dict(seed=0, image_ids=torch.arange(6), step=0)
    expected = sample_tokens(logits, **draw)
    wide = torch.full((6, 3, 131), NAN)
    wide[:, 1, 1:129] = logits
    assert torch.equal(sample_tokens(wide[:, 1, 1:129], **draw), expected)
    assert torch.equal(sample_tokens(logits.T.contiguous().T, **draw), expected)
    apart = torch.stack([torch.arange(6), torch.full((6,), 99)], 1)[:, 0]
    assert torch.equal(sample_tokens(logits, seed=torch.tensor(0), image_ids=apart, step=torch.tensor(0)), expected)
    none = torch.empty(0, dtype=torch.int64)
    empty = sample_tokens(torch.empty(0, 7), seed=0, image_ids=none, step=0, guidance_scale=2.0)
    assert empty.shape == (0,) and empty.dtype == torch.int64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(4, 8).double()}, "logits: expected float32 or bfloat16 or float16, got float64"),
        ({"logits": torch.zeros(8)}, r"logits: expected 2 dimensions, got shape \(8,\)"),
        (
            {"logits": torch.zeros(4, 0)},
            r"logits: expected 1..2\^30 codes along the last dimension, got shape \(4, 0\)",
        ),
        ({"logits": torch.zeros(3, 8)}, r"logits: expected an even number of rows .*, got shape \(3, 8\)"),
        ({"guidance_scale": torch.ones(3)}, r"guidance_scale: expected shape \(\) or \(2,\), got shape \(3,\)"),
        ({"guidance_scale": torch.ones(2).double()}, "guidance_scale: expected float32, got float64"),
        ({"temperature": -1.0}, "temperature: expected 0 .* or a number in 1e-30..1e30, got -1"),
        ({"temperature": NAN}, "temperature: expected .*, got nan"),
        ({"temperature": INF}, "temperature: expected .*, got inf"),
        ({"top_k": 0}, "top_k: expected None or a number >= 1, got 0"),
        ({"top_p": 0.0}, r"top_p: expected None or a number in \(0, 1\], got 0"),
        ({"top_p": 1.5}, r"top_p: expected None or a number in \(0, 1\], got 1.5"),
        ({"seed": torch.tensor(1.0)}, "seed: expected int64, got float32"),
        ({"seed": 2**63}, "seed: expected a number in .*, got 9223372036854775808"),
        ({"step": -1}, r"step: expected a number in \[0, 4294967296\), got -1"),
        ({"step": torch.arange(3)}, r"step: expected shape \(\) or \(2,\), got shape \(3,\)"),
        ({"seed": torch.arange(3)}, r"seed: expected shape \(\) or \(2,\), got shape \(3,\)"),
        ({"temperature": torch.tensor([1.0, NAN])}, "temperature: expected .*, got -?nan"),
        ({"temperature": torch.ones(2).double()}, "temperature: expected float32, got float64"),
        ({"top_k": torch.tensor(-1)}, r"top_k: expected 0 \(all\) or more, got -1"),
        ({"top_p": torch.tensor([1.0, 0.0]).double()}, r"top_p: expected a number in \(0, 1\], got 0"),
        ({"image_ids": torch.arange(3)}, r"image_ids: expected shape \(\) or \(2,\), got shape \(3,\)"),
        ({"image_ids": torch.arange(2).int()}, "image_ids: expected int64, got int32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(change, message):
    arguments = dict(logits=torch.zeros(4, 8), guidance_scale=2.0, seed=0, image_ids=torch.arange(2), step=0)
    arguments.update(change)
    with pytest.raises(ValueError, match=message):
        sample_tokens(arguments.pop("logits"), **arguments)


def test_opcheck(device):
    seed, step, images = (t.to(device) for t in (torch.tensor(1), torch.tensor(2), torch.arange(3)))

    def settings(*values):
        dtypes = torch.float32, torch.int64, torch.float64
        return [torch.tensor(value, dtype=dtype, device=device) for value, dtype in zip(values, dtypes, strict=True)]

    few, many = random_logits(3, 20).to(device), random_logits(6, 20, torch.bfloat16).to(device)
    for arguments in (
        (few, None, *settings(1.0, 0, 1.0), seed, images, step),
        (many, torch.tensor(2.0, device=device), *settings(0.7, [5, 0, 2], 0.9), seed, images, step + images),
    ):
        torch.library.opcheck(torch.ops.alitok.sample_tokens, arguments)


def test_compiles_to_one_graph_and_draws_anew_each_step():
    logits, images = random_logits(8, 50), torch.arange(4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def draw(logits, step):
        return sample_tokens(2 * logits, guidance_scale=1.5, top_p=0.9, seed=6, image_ids=images, step=step)

    for step in range(4):
        expected = sample_tokens(2 * logits, guidance_scale=1.5, top_p=0.9, seed=6, image_ids=images, step=step)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            assert torch.equal(draw(logits, torch.tensor(step)), expected)
