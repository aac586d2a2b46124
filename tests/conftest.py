"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision_here import import_or_skip, smooth_pictures

from alitok_fast.config import GeneratorConfig, TokenizerConfig
from alitok_fast.models import Generator, Tokenizer, save_model

ROOT = Path(__file__).resolve().parents[1]
CPU_ISAS = ("scalar", "avx2", "avx512", "amx")


def pytest_configure() -> None:
    """Started in the background by a script, a process ignores Ctrl-C, and so do those that it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests go first, so that several processes (`--dist loadfile`) end at the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """After an illegal access on a GPU every later test of the process would fail too: pytest-xdist starts another."""
    report = yield
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(70)
    return report


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of reference outputs: $ALITOK_GOLDEN, else shared/golden beside the checkout; none skips the test."""
    folder = Path(os.environ.get("ALITOK_GOLDEN", ROOT.parent / "shared" / "golden"))
    if not folder.is_dir():
        pytest.skip(f"no golden outputs in {folder} (set ALITOK_GOLDEN)")
    return folder


@pytest.fixture(params=CPU_ISAS)
def cpu_isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set that this machine has, in turn; native operators use it for the length of the test."""
    choose_isa(request.param, request)
    return request.param


def choose_isa(isa: str, request: pytest.FixtureRequest) -> None:
    from alitok_fast import _C

    best = "amx" if _C.detected_amx() else _C.detected_cpu_isa()
    if CPU_ISAS.index(isa) > CPU_ISAS.index(best):
        pytest.skip(f"this machine has no {isa}")
    request.addfinalizer(lambda: _C.set_cpu_isa(""))
    _C.set_cpu_isa(isa)


def torch_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return torch.device(name)


CUDA = pytest.param("cuda", marks=pytest.mark.device)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each kind of device that operators run on."""
    return torch_device(request.param)


@pytest.fixture
def cuda() -> torch.device:
    return torch_device("cuda")


@pytest.fixture(params=[*CPU_ISAS, CUDA])
def target(request: pytest.FixtureRequest) -> torch.device:
    """Each set of kernels: the instruction sets of the CPU, and CUDA."""
    if request.param == "cuda":
        return torch_device("cuda")
    choose_isa(request.param, request)
    return torch.device("cpu")


@pytest.fixture(scope="session")
def recipe_module(golden: Path):
    """recipe.py, which draws tensors from their names."""
    spec = importlib.util.spec_from_file_location("golden_recipe", golden / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def recipe(recipe_module):
    """recipe(name) -> {key: tensor}: the weights behind the golden outputs, drawn from their names."""
    return lambda name: {key: torch.from_numpy(value) for key, value in recipe_module.state_dict(name).items()}


TINY_TOKENIZER = TokenizerConfig(
    image_size=16,
    patch_size=4,
    codebook_size=32,
    code_dim=8,
    encoder_width=16,
    encoder_layers=2,
    encoder_heads=2,
    decoder_width=24,
    decoder_layers=2,
    decoder_heads=3,
    num_buffer_tokens=3,
)
TINY_GENERATOR = GeneratorConfig(
    width=32,
    num_layers=2,
    num_heads=2,
    grid=4,
    codebook_size=32,
    num_classes=10,
    hidden_multiple=8,
    guidance_scale=3.0,
    guidance_power=1.0,
)


@pytest.fixture
def tiny_tokenizer():
    """tiny_tokenizer(stage=2, **changes) -> Tokenizer for 16x16 images, random weights, evaluation mode."""

    def make(stage: int = 2, **changes) -> Tokenizer:
        torch.manual_seed(0)
        model = Tokenizer(TokenizerConfig.from_dict({**TINY_TOKENIZER.to_dict(), "stage": stage, **changes}))
        torch.nn.init.normal_(model.quantize.embedding.weight)
        return model.eval()

    return make


@pytest.fixture
def tiny_generator():
    """tiny_generator(**changes) -> Generator of 21 tokens, random weights, evaluation mode."""

    def make(**changes) -> Generator:
        torch.manual_seed(0)
        model = Generator(GeneratorConfig.from_dict({**TINY_GENERATOR.to_dict(), **changes}))
        for parameter in model.parameters():  # the output layer starts at zero, which would hide every mistake
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        return model.eval()

    return make


@pytest.fixture
def tiny_folder(tmp_path: Path, tiny_tokenizer, tiny_generator) -> Path:
    """A pipeline folder with both tiny models and class names c0 .. c9."""
    folder = tmp_path / "tiny"
    save_model(folder / "tokenizer", tiny_tokenizer())
    save_model(folder / "generator", tiny_generator(), {"classes": [f"c{i}" for i in range(10)]})
    return folder


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory) -> Path:
    """A file of weights for torch-fidelity's InceptionV3: random, with statistics of batches that keep the activations
    of every layer near 1."""
    module = import_or_skip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.torch, "load", lambda *arguments, **options: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = module.FeatureExtractorInceptionV3("fresh", ["2048"], str(path))
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean over batches
            layer.train()
    network(smooth_pictures(4))
    torch.save(network.eval().state_dict(), path)
    return path


HUB = """
import torch

dependencies = ["torch"]


class Mean(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, images):
        return images.mean((2, 3)) * self.scale


def mean(pretrained=True):
    return Mean()


def maps(pretrained=True):
    return torch.nn.Identity()
"""


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """A folder for torch.hub with the network `mean`, whose features are those of the three colours."""
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "hubconf.py").write_text(HUB)
    return folder
