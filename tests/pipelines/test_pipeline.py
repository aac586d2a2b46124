"""Pipeline: labels in, pictures and everything needed to draw them again out. Streaming, public API."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import alitok_fast
from alitok_fast import Pipeline, SamplingParams, on_rows, prepare, sample, save_model
from alitok_fast.inference.image_decoder import fast_dtype
from alitok_fast.inference.quantized_generator import QuantizedGenerator
from alitok_fast.models.loading import convert
from alitok_fast.models.tokenizer import encoder_fingerprint
from alitok_fast.storage.images import to_uint8


@pytest.fixture
def pipe(tiny_folder) -> Pipeline:
    return Pipeline.from_pretrained(tiny_folder)


def test_pictures_are_the_decoded_tokens(pipe):
    out = pipe([1, "c2", "3"], seed=4)
    assert torch.equal(out.tokens, sample(pipe.generator, [1, 2, 3], seed=4))
    expected = to_uint8(pipe.image_decoder(out.tokens))
    assert np.array_equal(np.stack([np.asarray(image) for image in out.images]), expected)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.int8])
def test_pictures_are_decoded_in_the_dtype_asked_for(tiny_folder, dtype):
    pipe = Pipeline.from_pretrained(tiny_folder, decode_dtype=dtype)
    out = pipe([1, 2])
    expected = pipe.tokenizer.decode(out.tokens) if dtype == torch.float32 else pipe.image_decoder(out.tokens)
    assert np.array_equal(np.stack([np.asarray(image) for image in out.images]), to_uint8(expected))
    chosen = fast_dtype(torch.device("cpu")) if dtype is None else dtype
    assert out.metadata["decode_dtype"] == str(chosen).removeprefix("torch.")


def test_labels_and_ids_of_numpy(pipe):
    out = pipe(np.array([1, 2]), image_ids=np.array([7, 8]))
    assert torch.equal(out.tokens, pipe([1, 2], image_ids=[7, 8]).tokens)
    assert json.loads(json.dumps(out.metadata))["image_ids"] == [7, 8]
    for batch_size in (None, 1):
        with pytest.raises(ValueError, match="image_ids: expected 2, one per label, got 3"):
            pipe([1, 2], image_ids=[7, 8, 9], batch_size=batch_size)


def test_metadata_says_how_to_draw_again(pipe):
    out = pipe(["c5"], seed=9, guidance_scale=2.0, top_k=7)
    metadata = json.loads(json.dumps(out.metadata))
    assert metadata["versions"] == {"alitok_fast": alitok_fast.__version__, "torch": torch.__version__}
    assert (metadata["dtype"], metadata["device"], metadata["labels"]) == ("float32", "cpu", [5])
    keys = ("seed", "guidance_scale", "guidance_power", "temperature", "top_k", "top_p", "image_ids")
    again = pipe(metadata["labels"], **{key: metadata[key] for key in keys})
    assert torch.equal(again.tokens, out.tokens)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batch_size_does_not_change_the_pictures(pipe, batch_size):
    drawn = []
    out = pipe([0, 1, 2, 3, 4], batch_size=batch_size, on_batch=drawn.append)
    assert torch.equal(out.tokens, pipe([0, 1, 2, 3, 4]).tokens)
    assert sum(drawn) == 5 and max(drawn) <= batch_size


def test_labels_by_number_and_name(pipe):
    assert pipe.label_ids("c7") == pipe.label_ids(7) == pipe.label_ids("7") == pipe.label_ids(torch.tensor([7])) == [7]
    assert pipe.label_ids(["C1", " c2 ", 3]) == [1, 2, 3]
    assert pipe.classes[4] == "c4"


@pytest.mark.parametrize(
    "labels, error, message",
    [
        ("sofa", ValueError, r"labels: expected a number in 0..9 or a class name, such as c0, c1, .*, got 'sofa'"),
        (["c1", "10"], ValueError, r"labels: expected values in \[0, 10\), got 10"),
        (-1, ValueError, r"labels: expected values in \[0, 10\), got -1"),
        ([1.5], TypeError, "labels: expected integers or names, got 1.5"),
        ([True], TypeError, "labels: expected integers or names, got True"),
        ([], ValueError, "labels: expected at least one label, got none"),
    ],
)
def test_bad_labels(pipe, labels, error, message):
    with pytest.raises(error, match=message):
        pipe(labels)


def test_bad_batch_size(pipe):
    with pytest.raises(ValueError, match="batch_size: expected None or at least 1, got 0"):
        pipe([1], batch_size=0)


def test_models_that_do_not_fit_together(tiny_tokenizer, tiny_generator):
    with pytest.raises(ValueError, match="generator: expected grid 4 as in the tokenizer, got 5"):
        Pipeline(tiny_tokenizer(), tiny_generator(grid=5))
    with pytest.raises(ValueError, match="generator: expected codebook_size 32 as in the tokenizer, got 16"):
        Pipeline(tiny_tokenizer(), tiny_generator(codebook_size=16))


def test_generator_and_tokenizer_from_separate_files(tmp_path, tiny_folder, pipe):
    other = Pipeline.from_pretrained(tiny_folder / "generator", tokenizer=tiny_folder / "tokenizer")
    assert torch.equal(other([1]).tokens, pipe([1]).tokens)
    with pytest.raises(ValueError, match="path_or_name: expected a tokenizer, got a generator"):
        Pipeline.from_pretrained(tiny_folder / "generator")


def test_half_precision_is_recorded(tiny_folder):
    out = Pipeline.from_pretrained(tiny_folder, dtype=torch.bfloat16)([1, 2])
    assert out.metadata["dtype"] == "bfloat16"
    assert len(out.images) == 2


def test_prompts_are_kept_and_completed(pipe):
    photos = torch.rand(3, 3, 16, 16)
    prompt = pipe.tokenizer.encode(photos)[:, : pipe.tokenizer.config.num_prefix_tokens + 8]  # the upper half
    out = pipe([1, 2, 3], prompt_tokens=prompt, batch_size=2)
    assert torch.equal(out.tokens[:, : prompt.shape[1]], prompt)
    assert torch.equal(out.tokens, sample(pipe.generator, [1, 2, 3], prompt_tokens=prompt))
    assert not torch.equal(out.tokens, pipe([1, 2, 3]).tokens)
    with pytest.raises(ValueError, match="prompt_tokens: expected 2 rows, one per label, got 3"):
        pipe([1, 2], prompt_tokens=prompt)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.int8])
def test_weights_are_packed_as_asked(tiny_folder, weights):
    out = Pipeline.from_pretrained(tiny_folder, weight_dtype=weights)([1, 2])
    assert out.metadata["weight_dtype"] == str(weights).removeprefix("torch.")
    assert out.metadata["dtype"] == "float32"
    assert out.tokens.shape == (2, 21)


def test_weights_in_8_bits_beside_a_generator_that_is_not_on_the_cpu(tiny_generator):
    packed = prepare(tiny_generator().to("meta"), torch.int8)  # stands in for a GPU: only the device counts here
    assert isinstance(packed, QuantizedGenerator) and packed.weight_dtype == torch.int8
    with pytest.raises(ValueError, match="weight_dtype: expected int8 or float8_e4m3fn, got bfloat16"):
        prepare(tiny_generator().to("meta"), torch.bfloat16)


def test_loaded_weights_in_8_bits_are_the_only_ones_kept(tiny_folder, monkeypatch):
    """The device "meta" stands in for a GPU again."""
    from alitok_fast.pipelines import pipeline

    linears, original = [], pipeline.build

    def build(part):
        model = original(part)
        if part.kind == "generator":
            linears.extend(weakref.ref(module) for module in model.blocks.modules() if isinstance(module, nn.Linear))
        return model

    monkeypatch.setattr(pipeline, "build", build)
    pipe = Pipeline.from_pretrained(tiny_folder, "meta", torch.bfloat16, weight_dtype=torch.int8)
    gc.collect()
    assert linears and all(linear() is None for linear in linears)
    assert pipe.sampler.model is pipe.generator and pipe.generator.weight_dtype == torch.int8
    metadata = pipe.metadata(SamplingParams())
    assert (metadata["weight_dtype"], metadata["dtype"], metadata["device"]) == ("int8", "bfloat16", "meta")


def test_a_generator_in_8_bits_that_is_there_already(tiny_tokenizer, tiny_generator):
    gen = tiny_generator()
    quantised = QuantizedGenerator(gen, torch.int8)
    pipe = Pipeline(tiny_tokenizer(), quantised)
    out = pipe([1, 2])
    assert torch.equal(out.tokens, sample(quantised, [1, 2])) and out.metadata["weight_dtype"] == "int8"
    with pytest.raises(ValueError, match="weight_dtype: expected the generator's int8, got bfloat16"):
        Pipeline(tiny_tokenizer(), quantised, weight_dtype=torch.bfloat16)
    beside = Pipeline(tiny_tokenizer(), gen.to("cpu"), weight_dtype=torch.int8)
    assert beside.generator is gen and gen.blocks[0].mlp.w1.weight.dtype == torch.float32


@pytest.mark.device
@pytest.mark.parametrize("weights", [torch.int8, torch.float8_e4m3fn])
def test_weights_in_8_bits_on_cuda(cuda, tiny_folder, weights):
    out = Pipeline.from_pretrained(tiny_folder, cuda, torch.bfloat16, weight_dtype=weights)([1, 2])
    assert out.metadata["weight_dtype"] == str(weights).removeprefix("torch.")
    assert out.tokens.shape == (2, 21) and out.tokens.device.type == "cuda"


def test_weights_of_another_kind_are_refused(tiny_folder):
    with pytest.raises(ValueError, match="float16"):
        Pipeline.from_pretrained(tiny_folder, weight_dtype=torch.float16)


# --- streaming ------------------------------------------------------------------------------------------------------


def test_rows_appear_as_they_are_determined(tiny_tokenizer, tiny_generator):
    tokenizer, gen = tiny_tokenizer(1), tiny_generator()
    shown = []
    tokens = sample(gen, [1, 2], on_step=on_rows(tokenizer, lambda rows, images: shown.append((rows, images))))
    assert [rows for rows, _ in shown] == [1, 2, 3, 4]
    whole = tokenizer.decode(tokens)
    for rows, images in shown:
        torch.testing.assert_close(images, whole[:, :, : 4 * rows], atol=1e-5, rtol=0)


def test_rows_need_the_causal_decoder(tiny_tokenizer):
    with pytest.raises(
        ValueError, match="tokenizer: expected a causal decoder, as of stage 1, got a bidirectional one"
    ):
        on_rows(tiny_tokenizer(2), print)


# --- the package's face ---------------------------------------------------------------------------------------------


def test_import_is_light():
    program = "import sys, alitok_fast; print('torch' in sys.modules, alitok_fast.__version__)"
    root = Path(__file__).resolve().parents[2]
    out = subprocess.run([sys.executable, "-c", program], cwd=root, check=True, capture_output=True, text=True).stdout
    assert out.split() == ["False", alitok_fast.__version__]


def test_public_names():
    for name in alitok_fast.__all__:
        assert getattr(alitok_fast, name) is not None
        assert name in dir(alitok_fast)
    with pytest.raises(AttributeError, match="module 'alitok_fast' has no attribute 'pipline'"):
        alitok_fast.pipline  # noqa: B018


def test_a_stage1_tokenizer_draws_too(tmp_path, tiny_folder, tiny_tokenizer, pipe):
    stage1 = tiny_tokenizer(1)
    assert stage1.config == replace(pipe.tokenizer.config, stage=1)
    save_model(tmp_path / "stage1", stage1)
    out = Pipeline.from_pretrained(tiny_folder, tokenizer=tmp_path / "stage1")([1])
    assert out.images[0].size == (16, 16)


def test_an_unrelated_tokenizer_of_the_same_shape_is_refused(tmp_path, tiny_tokenizer, tiny_generator):
    tokenizer = tiny_tokenizer()
    trained_on = encoder_fingerprint(tokenizer.state_dict())
    save_model(tmp_path / "tokenizer", tokenizer)
    save_model(tmp_path / "generator", tiny_generator(), {"tokenizer": trained_on})
    Pipeline.from_pretrained(tmp_path)
    convert(tmp_path / "tokenizer", tmp_path / "rounded", dtype=torch.bfloat16)
    Pipeline.from_pretrained(tmp_path / "generator", tokenizer=tmp_path / "rounded")
    with torch.no_grad():
        tokenizer.decoder.ffn[0].bias += 1
    save_model(tmp_path / "tuned", tokenizer)
    Pipeline.from_pretrained(tmp_path / "generator", tokenizer=tmp_path / "tuned")  # a decoder changes no tokens
    with torch.no_grad():
        tokenizer.quantize.embedding.weight[0] += 1
    save_model(tmp_path / "other", tokenizer)
    with pytest.raises(ValueError, match=f"tokenizer: expected the one .* fingerprint {trained_on}, got .*other"):
        Pipeline.from_pretrained(tmp_path / "generator", tokenizer=tmp_path / "other")
