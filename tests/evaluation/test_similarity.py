"""SSIM is scikit-image's with Wang's settings; LPIPS is its library's, on pixels of uint8."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision_here import import_or_skip, smooth_pictures

from alitok_fast.evaluation.similarity import Lpips, ssim


def worse(images: Tensor, by: int) -> Tensor:
    noise = torch.randint(-by, by + 1, images.shape, generator=torch.Generator().manual_seed(by))
    return (images + noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("shape", [(11, 11), (32, 32), (17, 40)])
@pytest.mark.parametrize("by", [1, 20, 255])
def test_ssim_is_that_of_scikit_image(shape: tuple[int, int], by: int) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    images = smooth_pictures(3, 40)[:, :, : shape[0], : shape[1]]
    other = worse(images, by)
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=0)
    expected = [
        metrics.structural_similarity(a.numpy(), b.numpy(), **options) for a, b in zip(images, other, strict=True)
    ]
    got = ssim(images, other)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert got.dtype == torch.float64 and (got < 0.9999).all()


def test_equal_images_have_1() -> None:
    flat = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    for images in (smooth_pictures(2, 32), flat, flat + 255):
        torch.testing.assert_close(ssim(images, images), torch.ones(len(images), dtype=torch.float64))
    c1 = (0.01 * 255) ** 2
    torch.testing.assert_close(ssim(flat, flat + 255), torch.tensor([c1 / (255**2 + c1)], dtype=torch.float64))


@pytest.mark.filterwarnings("ignore::UserWarning")  # torchvision's, about how lpips names its weights
@pytest.mark.parametrize("net, model", [("squeeze", "squeezenet1_1"), ("alex", "alexnet")])
def test_lpips_is_its_librarys(tmp_path: Path, net: str, model: str) -> None:
    library, models = import_or_skip("lpips"), import_or_skip("torchvision").models
    torch.manual_seed(0)
    file = tmp_path / "trunk.pth"
    trunk = getattr(models, model)(weights=None)
    torch.save(trunk.state_dict(), file)
    theirs = library.LPIPS(pretrained=True, net=net, pnet_rand=True, verbose=False)
    names = {name: "features." + name.partition(".")[2] for name in theirs.net.state_dict()}
    theirs.net.load_state_dict({name: trunk.state_dict()[there] for name, there in names.items()})
    images = smooth_pictures(2, 64)
    other, lpips = worse(images, 40), Lpips.load(net, file)
    with torch.no_grad():
        expected = theirs(images / 127.5 - 1, other / 127.5 - 1).flatten()
    torch.testing.assert_close(lpips(images, other), expected, rtol=1e-4, atol=1e-6)
    assert (expected > 1e-3).all() and lpips.facts["network"] == net and lpips.facts["library"].startswith("lpips ")
    trunk.features[0].bias.data += 1
    torch.save(trunk.state_dict(), file)
    assert Lpips.load(net, file).facts["weights"] != lpips.facts["weights"]


@pytest.mark.parametrize(
    ("images", "other", "error", "message"),
    [
        ((1, 3, 16, 16), (1, 3, 16, 8), ValueError, r"reconstruction: expected shape .*16, 16\), got .*16, 8\)"),
        ((3, 16, 16), (3, 16, 16), ValueError, r"images: expected shape \(B, C, H, W\), got \(3, 16, 16\)"),
        ((1, 3, 10, 16), (1, 3, 10, 16), ValueError, "images: expected at least 11 pixels a side"),
    ],
)  # fmt: skip
def test_other_pairs_are_refused(images, other, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ssim(*(torch.zeros(shape, dtype=torch.uint8) for shape in (images, other)))


def test_floats_are_refused() -> None:
    images = torch.zeros(1, 3, 16, 16)
    with pytest.raises(TypeError, match="images: expected uint8, got torch.float32"):
        ssim(images, images)
    with pytest.raises(TypeError, match="reconstruction: expected uint8, got torch.float32"):
        ssim(images.to(torch.uint8), images)
