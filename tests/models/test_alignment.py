"""Prefix tokens, causal or bidirectional encoder and decoder, auxiliary head, buffer tokens: what each setting does."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from alitok_fast._library import use_reference
from alitok_fast.config import GeneratorConfig, TokenizerConfig, generator_preset, tokenizer_preset
from alitok_fast.inference.image_decoder import ImageDecoder
from alitok_fast.inference.memory import plan
from alitok_fast.inference.packed_generator import PackedGenerator
from alitok_fast.inference.params import SamplingParams
from alitok_fast.inference.sampler import sample
from alitok_fast.inference.streaming import on_rows
from alitok_fast.models import Generator, Tokenizer, load_generator, load_tokenizer, save_model, stage2_from_stage1
from alitok_fast.models.loading import convert
from alitok_fast.models.rope import rope_table
from alitok_fast.models.tokenizer import aux_target
from alitok_fast.pipelines.completion import complete, grow
from alitok_fast.pipelines.pipeline import Pipeline
from alitok_fast.storage.checkpoint import read_checkpoint, recognise, write_released
from alitok_fast.testing import step_logits

PREFIXES = [0, 1, 4, 7]  # beside the tiny grid's 1 + 4
SETTINGS = ("prefix_tokens", "causal_encoder", "causal_decoder", "auxiliary_loss", "num_buffer_tokens")
STRUCTURES = [
    dict(zip(SETTINGS, values, strict=True))
    for values in itertools.product((None, 0, 4), (False, True), (None, False, True), (True, False), (0, 1, 3))
][::5]  # 22 of 108, in which every value stands beside others


def named(values: dict) -> str:
    return "-".join(str(value) for value in values.values())


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


# --- sizes and keys -------------------------------------------------------------------------------------------------


def test_the_papers_text_is_expressible():
    """16 prefix tokens, which stand for the first row, and 64 buffer tokens; the released weights have 17 and 32."""
    with torch.device("meta"):
        model = Tokenizer(replace(tokenizer_preset("256"), prefix_tokens=16, num_buffer_tokens=64))
        gen = Generator(replace(generator_preset("b"), prefix_tokens=16))
    assert model.config.num_tokens == gen.config.num_tokens == 272
    assert model.decoder.latent_token_positional_embedding.shape == (64 + 272, 1024)
    images = torch.rand(1, 3, 256, 256)
    assert torch.equal(aux_target(images, model.config), images[:, :, :16])


def test_the_automatic_prefix_follows_the_grid():
    assert replace(tokenizer_preset("256"), image_size=512).num_prefix_tokens == 33
    assert replace(generator_preset("b"), grid=4).num_prefix_tokens == 5
    explicit = replace(tokenizer_preset("256"), prefix_tokens=17)
    assert replace(explicit, image_size=512).num_prefix_tokens == 17


def test_what_a_setting_leaves_out_is_in_no_file(tiny_tokenizer):
    whole, bare = (shapes_of(tiny_tokenizer(1, auxiliary_loss=on)) for on in (True, False))
    head = {
        f"decoder.{name}" for name in ("ffn_aux.0.weight", "ffn_aux.0.bias", "conv_out_aux.weight", "conv_out_aux.bias")
    }
    assert whole.keys() - bare.keys() == head and not bare.keys() - whole.keys()
    assert tiny_tokenizer(1, prefix_tokens=0).state_dict().keys() == bare.keys()
    two = shapes_of(tiny_tokenizer(2))
    assert two.keys() - shapes_of(tiny_tokenizer(2, num_buffer_tokens=0)).keys() == {"decoder.class_embedding"}
    assert shapes_of(tiny_tokenizer(2, causal_encoder=True, causal_decoder=True, auxiliary_loss=False)) == two


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("structure", STRUCTURES, ids=named)
def test_every_structure_encodes_decodes_and_learns(tiny_tokenizer, stage, structure):
    model = tiny_tokenizer(stage, **structure)
    config = model.config
    images = torch.rand(2, 3, 16, 16)
    tokens = model.encode(images)
    assert tokens.shape == (2, config.num_tokens) == (2, config.num_prefix_tokens + 16)
    assert model.decode(tokens).shape == images.shape
    out = model.train()(images)
    assert (out.aux is None) == (stage == 2 or structure["prefix_tokens"] == 0 or not structure["auxiliary_loss"])
    loss = (out.reconstruction - images).square().mean() + out.vq.loss
    if out.aux is not None:
        target = aux_target(images, config)
        assert out.aux.shape == target.shape
        loss = loss + (out.aux - target).square().mean()
    loss.backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unused == []  # DistributedDataParallel would wait for them


# --- who sees whom --------------------------------------------------------------------------------------------------


def lively(model: Tokenizer) -> Tokenizer:
    """With weights so large that what a position sees shows: those at the start of training hardly mix anything."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def features_after(model: Tokenizer, images: Tensor, latent: int, patch: int | None = None) -> tuple[Tensor, Tensor]:
    """z (B, N, code_dim) before and after a change of one latent token, or of one patch of the images."""
    before = lively(model).features(images)
    if patch is None:
        model.latent_tokens.data[latent] = 2 * torch.randn(16)
    else:
        row, column = divmod(patch, model.config.grid)
        images = images.clone()
        images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 0.5
    return before, model.features(images)


@pytest.mark.parametrize("prefix", [None, 0])
@torch.no_grad()
def test_in_a_causal_encoder_latents_see_patches_and_earlier_latents(tiny_tokenizer, prefix):
    images = torch.rand(1, 3, 16, 16)
    before, after = features_after(tiny_tokenizer(causal_encoder=True, prefix_tokens=prefix), images, latent=9)
    assert torch.equal(before[:, :9], after[:, :9])
    assert ((before - after)[:, 9:].abs().amax(-1) > 0).all()
    before, after = features_after(tiny_tokenizer(causal_encoder=True, prefix_tokens=prefix), images, 0, patch=15)
    assert ((before - after).abs().amax(-1) > 0).all()  # the first latent sees the last patch


@torch.no_grad()
def test_in_a_bidirectional_encoder_all_see_all(tiny_tokenizer):
    before, after = features_after(tiny_tokenizer(), torch.rand(1, 3, 16, 16), latent=9)
    assert ((before - after).abs().amax(-1) > 0).all()


@torch.no_grad()
def test_patches_of_a_causal_encoder_see_each_other_and_no_latents(tiny_tokenizer):
    """What each layer gives for the patches: with the mask written out, and whatever the latents are."""
    model = lively(tiny_tokenizer(causal_encoder=True))
    seen = []
    model.encoder.transformer[-1].register_forward_hook(lambda module, given, out: seen.append(out[:, :16]))
    images = torch.rand(1, 3, 16, 16)
    model.features(images)
    model.latent_tokens.data.normal_()
    model.features(images)
    assert torch.equal(seen[0], seen[1])
    images[:, :, 12:, 12:] = 0.5
    model.features(images)
    assert ((seen[1] - seen[2]).abs().amax(-1) > 0).all()


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("causal", [None, False, True])
@pytest.mark.parametrize("prefix", [None, 0])
@torch.no_grad()
def test_a_decoder_is_causal_as_it_is_set_whatever_its_stage(tiny_tokenizer, stage, causal, prefix):
    model = lively(tiny_tokenizer(stage, causal_decoder=causal, prefix_tokens=prefix))
    tokens = torch.randint(model.config.codebook_size, (1, model.config.num_tokens))
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % model.config.codebook_size
    moved = (model.decode(tokens) - model.decode(changed)).abs()[0].amax(0).unfold(0, 4, 4).unfold(1, 4, 4).amax((2, 3))
    expected = stage == 1 if causal is None else causal
    assert model.config.decoder_is_causal == expected
    assert moved.flatten()[-1] > 0 and (moved.flatten()[:-1] > 0).any() == (not expected)
    if not expected:
        with pytest.raises(ValueError, match="decode_rows: expected a causal decoder"):
            model.decode_rows(tokens)
        return
    n = model.config.num_prefix_tokens
    for given, rows in ((n, 0), (n + 3, 0), (n + 4, 1), (n + 11, 2), (n + 16, 4)):
        part = model.decode_rows(tokens[:, :given])
        assert part.shape == (1, 3, 4 * rows, 16)
        torch.testing.assert_close(part, model.decode(tokens)[:, :, : 4 * rows], atol=1e-5, rtol=0)


def test_a_second_stage_may_have_either_decoder(tiny_tokenizer):
    first = tiny_tokenizer(1, causal_decoder=True, causal_encoder=True, prefix_tokens=0, auxiliary_loss=False)
    images = torch.rand(1, 3, 16, 16)
    for causal in (None, False, True):
        second = stage2_from_stage1(first, num_buffer_tokens=0, causal_decoder=causal).eval()
        assert second.config.decoder_is_causal == bool(causal)
        assert second.config.causal_encoder and second.decoder.class_embedding is None
        assert torch.equal(first.encode(images), second.encode(images))


@pytest.mark.parametrize(
    "prefix, columns", [(None, [0, 0, 1, 2, 3]), (4, [0, 1, 2, 3]), (2, [0, 1]), (0, []), (7, [0, 0, 0, 0, 1, 2, 3])]
)
def test_what_the_prefix_stands_for(tiny_tokenizer, prefix, columns):
    images = torch.rand(2, 3, 16, 16)
    target = aux_target(images, tiny_tokenizer(1, prefix_tokens=prefix).config)
    assert target.shape == (2, 3, 4, 4 * len(columns))
    for i, column in enumerate(columns):
        assert torch.equal(target[..., 4 * i : 4 * i + 4], images[:, :, :4, 4 * column : 4 * column + 4])


# --- the generator of such tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [None, *PREFIXES])
def test_rotary_rows_of_prefix_and_image(prefix):
    """Pair by pair, from the definition: without a prefix the image's rows begin at position 0 of both axes."""
    config = GeneratorConfig(width=32, num_heads=2, grid=4, prefix_tokens=prefix)
    table, count, dim = rope_table(config).double(), config.num_prefix_tokens, config.head_dim
    assert table.shape == (1 + count + 16, dim // 2, 2) and not table[0].any()
    for position, pair in itertools.product(range(count), range(dim // 2)):
        angle = torch.tensor(position * 10000.0 ** (-2 * pair / dim), dtype=torch.float64)
        torch.testing.assert_close(
            table[1 + position, pair], torch.stack([angle.cos(), angle.sin()]), atol=1e-5, rtol=0
        )
    for row, column, pair in itertools.product(range(4), range(4), range(dim // 2)):
        along, index = (row, pair) if pair < dim // 4 else (column, pair - dim // 4)
        angle = torch.tensor((count + along) * 10000.0 ** (-4 * index / dim), dtype=torch.float64)
        found = table[1 + count + 4 * row + column, pair]
        torch.testing.assert_close(found, torch.stack([angle.cos(), angle.sin()]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_steps_agree_with_the_forward_pass(tiny_generator, prefix):
    gen = tiny_generator(prefix_tokens=prefix)
    count = gen.config.num_tokens
    assert count == prefix + 16
    tokens, labels = torch.randint(32, (2, count)), torch.tensor([3, 7])
    with torch.no_grad():
        whole = gen(tokens, labels)
    assert whole.shape == (2, count + 1, 32)
    for model in (gen, PackedGenerator(gen)):
        cache, fed = model.new_cache(2), torch.cat([model.condition_ids(labels, 2)[:, None], tokens[:, :-1]], 1)
        assert cache.keys.shape[3] == count
        torch.testing.assert_close(step_logits(model, fed, cache), whole[:, :-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_sampling_has_the_length_of_the_sequence(tiny_generator, prefix):
    gen = tiny_generator(prefix_tokens=prefix)
    tokens = sample(gen, [1, 2, 3], seed=5)
    assert tokens.shape == (3, prefix + 16)
    with use_reference():
        assert torch.equal(sample(gen, [1, 2, 3], seed=5), tokens)
    again = sample(gen, [1, 2, 3], seed=5, prompt_tokens=tokens[:, : prefix + 4])
    assert torch.equal(again, tokens)
    caches = 2 * 2 * 2 * 32 * 4 * gen.config.num_tokens  # two rows, keys and values, layers, width, bytes
    assert plan(gen).bytes_per_image - plan(tiny_generator(prefix_tokens=0)).bytes_per_image == caches * prefix // (
        prefix + 16
    )


@pytest.mark.parametrize("prefix", [0, 4])
def test_a_pipeline_of_such_models_samples_completes_and_grows(tiny_tokenizer, tiny_generator, tmp_path, prefix):
    save_model(tmp_path / "tokenizer", tiny_tokenizer(prefix_tokens=prefix, num_buffer_tokens=0))
    save_model(tmp_path / "generator", tiny_generator(prefix_tokens=prefix))
    pipe = Pipeline.from_pretrained(tmp_path)
    assert pipe([1, 2]).pixels.shape == (2, 16, 16, 3)
    photo = (torch.rand(20, 20, 3) * 255).byte().numpy()
    for rows in (0, 2, 4):
        assert complete(pipe, [photo], 1, rows, 1, SamplingParams()).width > 3 * 16
    causal = tiny_tokenizer(2, prefix_tokens=prefix, num_buffer_tokens=0, causal_decoder=True)
    frames = grow(pipe, causal, [1], SamplingParams())
    assert len(frames) == 5
    with pytest.raises(ValueError, match=f"stage1: expected num_prefix_tokens {prefix} as in .*, got 5"):
        grow(pipe, tiny_tokenizer(1), [1], SamplingParams())
    with pytest.raises(ValueError, match="tokenizer: expected a causal decoder"):
        on_rows(tiny_tokenizer(1, causal_decoder=False), print)


def test_sequences_of_another_layout_are_refused(tiny_tokenizer, tiny_generator):
    with pytest.raises(ValueError, match="generator: expected num_prefix_tokens 5 as in the tokenizer, got 0"):
        Pipeline(tiny_tokenizer(), tiny_generator(prefix_tokens=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_image_decoder_takes_every_structure(tiny_tokenizer, dtype):
    model = tiny_tokenizer(2, prefix_tokens=0, num_buffer_tokens=0, causal_decoder=True)
    tokens = torch.randint(32, (2, 16))
    images = ImageDecoder(model, dtype)(tokens)
    assert (images - model.decode(tokens)).abs().max() < (1e-6 if dtype == torch.float32 else 0.2)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("structure", STRUCTURES, ids=named)
def test_folders_and_files_of_ours_keep_the_settings(tmp_path, tiny_tokenizer, stage, structure):
    model = tiny_tokenizer(stage, **structure)
    folder = save_model(tmp_path / "folder", model)
    for source in (folder, convert(folder, tmp_path / "file.pth")):
        loaded = load_tokenizer(source)
        assert loaded.config == model.config
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("prefix", [0, 4])
def test_the_generators_prefix_is_kept(tmp_path, tiny_generator, prefix):
    gen = tiny_generator(prefix_tokens=prefix)
    assert load_generator(save_model(tmp_path / "g", gen)).config == gen.config


@pytest.mark.parametrize(
    "changes",
    [
        dict(stage=2, num_buffer_tokens=0),
        dict(stage=2, num_buffer_tokens=64, prefix_tokens=16),
        dict(stage=2, num_buffer_tokens=1, prefix_tokens=0),
        dict(stage=1, prefix_tokens=0),
        dict(stage=1, prefix_tokens=16),
        dict(stage=1, auxiliary_loss=False),
        dict(stage=1, auxiliary_loss=False, prefix_tokens=40),
    ],
    ids=named,
)
def test_shapes_tell_prefix_buffers_and_head(changes):
    config = replace(tokenizer_preset("256"), **changes)
    with torch.device("meta"):
        state = Tokenizer(config).state_dict()
    assert recognise(state) == config


def test_a_bare_file_of_another_attention_needs_its_config(tmp_path, tiny_tokenizer):
    """No shape tells what attention sees: the file alone is read as published models are."""
    model = tiny_tokenizer(2, causal_encoder=True, causal_decoder=True)
    path = write_released(tmp_path / "bare.safetensors", model.state_dict())
    assert read_checkpoint(path, model.config).config.causal_encoder
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(load_tokenizer(path, config=model.config).encode(images), model.encode(images))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(prefix_tokens=4), "num_prefix_tokens: expected 5, as in model.safetensors, got 4"),
        (dict(num_buffer_tokens=0), "num_buffer_tokens: expected 3, as in model.safetensors, got 0"),
        (dict(prefix_tokens=-1), "prefix_tokens: expected an integer >= 0, got -1"),
        (dict(prefix_tokens="16"), "prefix_tokens: expected an integer >= 0, got '16'"),
        (dict(causal_encoder=1), "causal_encoder: expected True or False, got 1"),
        (dict(causal_encoder=None), "causal_encoder: expected True or False, got None"),
        (dict(causal_decoder="no"), "causal_decoder: expected True or False, got 'no'"),
        (dict(prefix_tokens=10**7), "prefix_tokens: expected at most 65536, got 10000000"),
    ],
)
def test_a_config_of_another_structure_is_refused(tmp_path, tiny_tokenizer, changes, message):
    folder = save_model(tmp_path / "t", tiny_tokenizer())
    description = json.loads((folder / "config.json").read_text())
    description["config"].update(changes)
    (folder / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        load_tokenizer(folder)


def test_a_head_that_the_config_denies_is_named(tmp_path, tiny_tokenizer):
    folder = save_model(tmp_path / "t", tiny_tokenizer(1))
    description = json.loads((folder / "config.json").read_text())
    description["config"]["auxiliary_loss"] = False
    (folder / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="has_auxiliary_head: expected True, as in model.safetensors, got False"):
        load_tokenizer(folder)


def test_configurations_of_before_and_of_now_are_the_same_files():
    """Settings that earlier releases do not know are written only where they are not at their default."""
    later = {"prefix_tokens", "causal_encoder", "causal_decoder", "auxiliary_loss"}
    for config in (tokenizer_preset("256"), generator_preset("b")):
        assert not later & config.to_dict().keys()
        assert type(config).from_dict(config.to_dict()) == config
    changed = TokenizerConfig(prefix_tokens=0, causal_encoder=True, causal_decoder=False, auxiliary_loss=False)
    assert later <= changed.to_dict().keys() and TokenizerConfig.from_dict(changed.to_dict()) == changed
