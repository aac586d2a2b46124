"""examples/diffusers_pipeline, gradio_demo.py and comfyui: pictures are those of alitok_fast.Pipeline, bit for bit."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision_here import import_or_skip

from alitok_fast import Pipeline, load_generator, load_tokenizer
from alitok_fast.pipelines.reconstruction import reconstruct

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
LIMIT = 120  # seconds
WRONG_NAME = "labels: expected a number in 0..9 or a class name, such as bag, ..., got 'bagg'"


def example(path: str) -> ModuleType:
    """An example as a module, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"example_{path.replace('/', '_')[:-3]}", EXAMPLES / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained("demo")


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """(150, 200, 3) uint8."""
    return pytest.importorskip("skimage.data").astronaut()[100:250, 100:300]


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """For processes: this checkout's package in one thread, a torchvision that can be imported, caches of their own."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import torchvision_here\ntorchvision_here.import_or_skip('torchvision')\n")
    path = f"{site}:{ROOT}:{ROOT / 'tests'}"
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hub")}


def printed(environment: dict[str, str], *words: object) -> str:
    """What Python prints with these arguments, in a process of its own."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def command(monkeypatch):
    """command(path, *words): run an example as Python runs a script, in this process."""

    def run(path: str, *words: object) -> None:
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / path), *map(str, words)])
        runpy.run_path(str(EXAMPLES / path), run_name="__main__")

    return run


@pytest.mark.parametrize(
    "path, library", [("diffusers_pipeline/pipeline.py", "diffusers"), ("gradio_demo.py", "gradio")]
)
def test_help(path, library, command, capsys):
    import_or_skip(library)
    with pytest.raises(SystemExit) as ended:
        command(path, "--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"python examples/{path}" in text and "--model" in text


# ---- diffusers ----


@pytest.fixture(scope="module")
def diffusers() -> ModuleType:
    return import_or_skip("diffusers")


@pytest.fixture(scope="module")
def module(diffusers) -> ModuleType:
    return example("diffusers_pipeline/pipeline.py")


@pytest.fixture
def made(module) -> Any:
    """The pipeline of the demo's models, without a folder."""
    return module.AliTokPipeline(load_tokenizer("demo"), load_generator("demo"))


@pytest.fixture
def from_folder(diffusers, tmp_path, monkeypatch):
    """DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options), with a cache of this test alone."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield lambda folder, **options: diffusers.DiffusionPipeline.from_pretrained(
        folder, **{"trust_remote_code": True, **options}
    )
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        del sys.modules[name]


def pixels(output: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in output.images])


def test_diffusers_pipeline_samples_what_ours_does(made, pipe, diffusers):
    settings = {"guidance_scale": 2.0, "temperature": 0.9, "top_k": 50, "top_p": 0.9}
    want = pipe(["bag", "bag", "sandal", "sandal"], seed=5, **settings)
    output = made(["bag", "sandal"], num_images_per_prompt=2, generator=5, **settings)
    assert isinstance(output, diffusers.ImagePipelineOutput)
    assert np.array_equal(pixels(output), want.pixels)
    assert np.array_equal(pixels(made("bag", generator=5)), pipe("bag", seed=5).pixels)
    assert np.array_equal(pixels(made([8, 5], generator=0, batch_size=1)), pipe([8, 5]).pixels)


def test_diffusers_output_types_hold_the_same_pictures(made, pipe):
    want = pipe(["bag", 5], seed=1).pixels
    (pt,) = made(["bag", 5], generator=1, output_type="pt", return_dict=False)
    array = made(["bag", 5], generator=1, output_type="np").images
    assert pt.shape == (2, 3, 32, 32) and pt.dtype == torch.float32
    assert array.shape == (2, 32, 32, 3) and array.dtype == np.float32
    assert np.array_equal(pt.permute(0, 2, 3, 1).numpy(), array)
    assert np.array_equal(array, want.astype(np.float32) / 255)


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1, -1])
def test_a_torch_generator_gives_its_seed_and_moves_on(module, seed):
    generator = torch.Generator().manual_seed(seed)
    first, second, third = (module.seed_of(generator) for _ in range(3))
    assert first == seed and len({first, second, third}) == 3
    again = torch.Generator().manual_seed(seed)
    assert [module.seed_of(again) for _ in range(3)] == [first, second, third]


def test_without_a_generator_torch_draws_the_seed(made):
    torch.manual_seed(3)
    first, second = pixels(made("bag")), pixels(made("bag"))
    torch.manual_seed(3)
    assert np.array_equal(pixels(made("bag")), first) and not np.array_equal(first, second)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"class_labels": "bagg"}, ValueError, WRONG_NAME),
        ({"class_labels": 10}, ValueError, "labels: expected values in [0, 10), got 10"),
        ({"output_type": "latent"}, ValueError, "output_type: expected one of pil, np, pt, got 'latent'"),
        ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt: expected an integer from 1 on, got 0"),
        ({"generator": [0, 1]}, TypeError, "seed: expected an integer, got [0, 1]"),
        ({"top_p": 2}, ValueError, "top_p: expected None or a number in (0, 1], got 2"),
    ],
)
def test_diffusers_pipeline_refuses(made, settings, error, message):
    with pytest.raises(error) as caught:
        made(**{"class_labels": "bag", "generator": 0, **settings})
    assert message in str(caught.value)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_goes_through_diffusers_unchanged(made, pipe, from_folder, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    made.save_pretrained(first)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        from_folder(first, trust_remote_code=False)
    loaded = from_folder(first)
    assert set(loaded.components) == {"tokenizer", "generator"}
    loaded.save_pretrained(second)
    assert files(first) == files(second)
    assert {Path(name).suffix for name in files(first)} == {".json", ".safetensors", ".py", ".md"}
    want = pipe(["bag"], seed=2).pixels
    assert np.array_equal(pixels(loaded("bag", generator=2)), want)
    assert np.array_equal(pixels(from_folder(second)("bag", generator=2)), want)
    assert np.array_equal(Pipeline.from_pretrained(second)(["bag"], seed=2).pixels, want)
    with pytest.raises(ValueError, match="safe_serialization: expected True"):
        loaded.save_pretrained(tmp_path / "third", safe_serialization=False)
    assert not (tmp_path / "third").exists()


def test_what_the_page_shows_of_diffusers(made, pipe, from_folder, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "examples.md").read_text()
    (shown,) = re.findall(r"^    import torch\n    from diffusers .*\n(?:(?:    .*)?\n)*", page, re.MULTILINE)
    made.save_pretrained(tmp_path / "models" / "demo")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(textwrap.dedent(shown), "examples.md", "exec"), names)
    assert np.array_equal(pixels(names["output"]), pipe([8] * 4 + [5] * 4, guidance_scale=3, seed=0).pixels)
    assert (tmp_path / "bag.png").is_file() and (tmp_path / "models" / "copy" / "model_index.json").is_file()


@pytest.mark.parametrize("code", ["diffusers_pipeline", "diffusers_pipeline/pipeline.py"])
def test_custom_pipeline_by_path(made, pipe, from_folder, tmp_path, code):
    made.save_pretrained(tmp_path / "model")
    loaded = from_folder(tmp_path / "model", custom_pipeline=str(EXAMPLES / code))
    assert np.array_equal(pixels(loaded("bag", generator=2)), pipe(["bag"], seed=2).pixels)


def test_components_take_the_dtype_and_move(made, from_folder, tmp_path):
    made.save_pretrained(tmp_path / "model")
    loaded = from_folder(tmp_path / "model", dtype=torch.bfloat16)
    assert loaded.dtype == loaded.tokenizer.dtype == loaded.generator.dtype == torch.bfloat16
    want = Pipeline.from_pretrained("demo", dtype=torch.bfloat16)(["bag"], seed=2)
    assert np.array_equal(pixels(loaded("bag", generator=2)), want.pixels)
    loaded.to(torch.float32)
    rounded = Pipeline(loaded.tokenizer, loaded.generator)([8], seed=2)
    assert rounded.metadata["dtype"] == "float32"
    assert np.array_equal(pixels(loaded("bag", generator=2)), rounded.pixels)


def test_other_models_and_replaced_components(module, from_folder, tiny_folder, tmp_path, made, pipe):
    """Class names are those of the generator; a component that is replaced is the one that samples."""
    tiny = Pipeline.from_pretrained(tiny_folder)
    module.AliTokPipeline(tiny.tokenizer, tiny.generator).save_pretrained(tmp_path / "model")
    loaded = from_folder(tmp_path / "model")
    assert np.array_equal(pixels(loaded("c3", generator=1)), tiny(["c3"], seed=1).pixels)
    loaded.tokenizer, loaded.generator = made.tokenizer, made.generator
    assert np.array_equal(pixels(loaded("bag", generator=1)), pipe(["bag"], seed=1).pixels)


@pytest.mark.slow
def test_the_command_writes_a_folder_that_another_process_loads(diffusers, command, environment, pipe, tmp_path):
    folder = tmp_path / "model"
    command("diffusers_pipeline/pipeline.py", "--model", "demo", "--out", folder)
    program = (
        "import sys\nfrom diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "pipe(['bag', 'sandal'], generator=4).images[1].save(sys.argv[2])\n"
    )
    printed(environment, "-c", program, folder, tmp_path / "sandal.png")
    with Image.open(tmp_path / "sandal.png") as image:
        assert np.array_equal(np.asarray(image), pipe(["bag", "sandal"], seed=4).pixels[1])


# ---- Gradio ----


@pytest.fixture
def gradio_page(monkeypatch, tmp_path):
    pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    return example("gradio_demo.py").page("demo", "photos-64")


def test_the_page_has_the_classes_and_sends_no_statistics(gradio_page, pipe):
    config = gradio_page.get_config_file()
    (classes,) = [part["props"]["choices"] for part in config["components"] if part["type"] == "dropdown"]
    assert [tuple(choice) for choice in classes] == [(name, number) for number, name in enumerate(pipe.classes)]
    assert {"sample", "reconstruct"} <= {str(function["api_name"]) for function in config["dependencies"]}
    assert not gradio_page.analytics_enabled


@pytest.mark.slow
def test_the_page_answers_its_client(gradio_page, pipe, photo, tmp_path):
    client_module = pytest.importorskip("gradio_client")
    _, url, shared = gradio_page.launch(
        server_name="127.0.0.1", share=False, show_error=True, prevent_thread_lock=True, quiet=True
    )
    try:
        assert url.startswith("http://127.0.0.1:") and shared is None
        client = client_module.Client(
            url, verbose=False, download_files=str(tmp_path / "downloads"), analytics_enabled=False
        )
        shown = client.predict(8, 3, 2.0, 1.0, 50, 0.9, 2, api_name="/sample")
        want = pipe([8, 8], seed=3, guidance_scale=2.0, top_k=50, top_p=0.9).pixels
        for entry, expected in zip(shown, want, strict=True):
            with Image.open(entry["image"]) as image:
                assert np.array_equal(np.asarray(image), expected)
        Image.fromarray(photo).save(tmp_path / "photo.png")
        given = client_module.handle_file(str(tmp_path / "photo.png"))
        *_, back, text = client.predict(given, True, api_name="/reconstruct")
        result = reconstruct(load_tokenizer("photos-64"), photo, tile=True)
        with Image.open(back) as image:
            assert np.array_equal(np.asarray(image), result.image)
        assert text == f"{result.psnr:.2f} dB, {result.tokens.numel()} tokens"
        with pytest.raises(Exception, match="99 is not in the list of choices"):
            client.predict(99, 3, 2.0, 1.0, 0, 1.0, 2, api_name="/sample")
        with pytest.raises(Exception, match="seed: expected an integer in"):
            client.predict(8, 2**63, 2.0, 1.0, 0, 1.0, 2, api_name="/sample")
    finally:
        gradio_page.close()


def test_its_command_listens_on_this_machine_alone(command, monkeypatch):
    gradio = pytest.importorskip("gradio")
    launched = []
    monkeypatch.setattr(gradio.TabbedInterface, "launch", lambda page, **options: launched.append(options))
    command("gradio_demo.py", "--port", 7999)
    assert launched == [{"server_name": "127.0.0.1", "server_port": 7999, "share": False, "show_error": True}]


# ---- ComfyUI ----


@pytest.fixture
def nodes() -> ModuleType:
    module = example("comfyui/__init__.py")
    assert not [name for name in sys.modules if name.split(".")[0] in ("comfy", "comfy_execution", "folder_paths")]
    return module


KINDS = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}


def run_graph(nodes: ModuleType, graph: dict[str, dict[str, Any]], at: str) -> tuple[Any, ...]:
    """The outputs of node `at` of a graph in the format of ComfyUI's API, whose links are [node, output].

    As ComfyUI does it: inputs are checked against INPUT_TYPES, links against RETURN_TYPES, and FUNCTION is called on an
    object of the class. What a required widget is not given has its default, as on ComfyUI's page.
    """
    entry = graph[at]
    node = nodes.NODE_CLASS_MAPPINGS[entry["class_type"]]
    types, values = node.INPUT_TYPES(), {}
    declared = {**types["required"], **types.get("optional", {})}
    assert set(entry["inputs"]) <= set(declared)
    for name, (kind, *rest) in declared.items():
        options = rest[0] if rest else {}
        if isinstance(kind, list):
            value = entry["inputs"].get(name, kind[0])
            assert value in kind
        elif kind in KINDS:
            value = entry["inputs"].get(name, options.get("default"))
            assert isinstance(value, KINDS[kind])
            if "min" in options:
                assert options["min"] <= value <= options["max"]
        else:
            source, output = entry["inputs"][name]
            assert nodes.NODE_CLASS_MAPPINGS[graph[source]["class_type"]].RETURN_TYPES[output] == kind
            value = run_graph(nodes, graph, source)[output]
        values[name] = value
    result = getattr(node(), node.FUNCTION)(**values)
    assert isinstance(result, tuple) and len(result) == len(node.RETURN_TYPES)
    assert len(getattr(node, "RETURN_NAMES", result)) == len(result) and node.CATEGORY
    for kind, value in zip(node.RETURN_TYPES, result, strict=True):
        if kind == "IMAGE":
            assert value.ndim == 4 and value.shape[-1] in (3, 4) and value.dtype == torch.float32
            assert value.device.type == "cpu" and 0 <= value.min() and value.max() <= 1
    return result


MODEL = {"class_type": "AliTokLoadModel", "inputs": {"model": "demo"}}


def sampling(**inputs: Any) -> dict[str, dict[str, Any]]:
    return {"1": MODEL, "2": {"class_type": "AliTokSample", "inputs": {"pipeline": ["1", 0], **inputs}}}


def test_every_node_has_a_title_of_its_own(nodes):
    assert set(nodes.NODE_CLASS_MAPPINGS) == set(nodes.NODE_DISPLAY_NAME_MAPPINGS)
    assert len(set(nodes.NODE_DISPLAY_NAME_MAPPINGS.values())) == len(nodes.NODE_CLASS_MAPPINGS)


def test_the_sampling_node_samples_what_the_pipeline_does(nodes, pipe):
    (images,) = run_graph(nodes, sampling(label="bag", seed=6, count=3), "2")
    assert np.array_equal(images.numpy(), pipe(["bag"] * 3, seed=6).pixels.astype(np.float32) / 255)
    settings = {"guidance_scale": 0, "temperature": 0.8, "top_k": 40, "top_p": 0.95}
    (images,) = run_graph(nodes, sampling(label="5", seed=2**63 - 1, **settings), "2")
    want = pipe([5], seed=2**63 - 1, **settings).pixels
    assert np.array_equal(images.numpy(), want.astype(np.float32) / 255)


def test_the_sampling_node_refuses_a_name_that_no_class_has(nodes):
    with pytest.raises(ValueError) as caught:
        run_graph(nodes, sampling(label="bagg"), "2")
    assert str(caught.value) == WRONG_NAME


@pytest.mark.parametrize("tile", [True, False])
@pytest.mark.parametrize("channels", [3, 4])
def test_the_reconstructing_node_takes_pictures_as_comfyui_has_them(nodes, photo, tile, channels):
    class Photographs:
        CATEGORY, FUNCTION, RETURN_TYPES = "test", "open", ("IMAGE",)
        INPUT_TYPES = staticmethod(lambda: {"required": {}})

        def open(self):
            images = torch.from_numpy(np.stack([photo, photo[::-1]])).float() / 255
            return (torch.cat([images, torch.ones(*images.shape[:3], channels - 3)], -1),)

    nodes.NODE_CLASS_MAPPINGS["Photographs"] = Photographs
    graph = {
        "1": {"class_type": "AliTokLoadTokenizer", "inputs": {}},
        "2": {"class_type": "Photographs", "inputs": {}},
        "3": {
            "class_type": "AliTokReconstruct",
            "inputs": {"tokenizer": ["1", 0], "image": ["2", 0], "tile": tile},
        },
    }
    tokenizer = load_tokenizer("photos-64")
    results = [reconstruct(tokenizer, picture, tile) for picture in (photo, photo[::-1])]
    originals, images = run_graph(nodes, graph, "3")
    assert np.array_equal(originals.numpy(), np.stack([r.original for r in results]).astype(np.float32) / 255)
    assert np.array_equal(images.numpy(), np.stack([r.image for r in results]).astype(np.float32) / 255)
