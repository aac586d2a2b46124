"""State outside the checkpoint (rotary table, exact dtypes) is right however a model is made, moved and filled."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.func import functional_call

from alitok_fast.models import Generator, Tokenizer, load_generator, save_model
from alitok_fast.models.discriminator import Discriminator
from alitok_fast.models.rope import rope_table

REDUCED = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def filled(model: torch.nn.Module, like: torch.nn.Module, **options) -> torch.nn.Module:
    model.load_state_dict(like.state_dict(), **options)
    return model


def on_meta(like):
    with torch.device("meta"):
        return type(like)(like.config)


def by_default_device(like):
    with default_device("meta"):
        return type(like)(like.config)


def poisoned(model):
    """`to_empty` may find old memory that is right by chance."""
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return model


def nested(like):
    with torch.device("meta"):
        holder = torch.nn.ModuleDict({"inner": type(like)(like.config)})
    holder.load_state_dict({f"inner.{name}": value for name, value in like.state_dict().items()}, assign=True)
    return holder["inner"]


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda like: pickle.loads(pickle.dumps(like)),
    "share_memory": lambda like: copy.deepcopy(like).share_memory(),
    "meta, to_empty": lambda like: filled(poisoned(on_meta(like)), like),
    "cpu, to_empty": lambda like: filled(poisoned(type(like)(like.config)), like),
    "meta, assign": lambda like: filled(on_meta(like), like, assign=True),
    "default device meta, assign": lambda like: filled(by_default_device(like), like, assign=True),
    "default device meta, to_empty": lambda like: filled(poisoned(by_default_device(like)), like),
    "device argument, assign": lambda like: filled(type(like)(like.config, device="meta"), like, assign=True),
    "nested, assign": nested,
    "skip_init": lambda like: filled(torch.nn.utils.skip_init(type(like), like.config), like),
    "to meta and back": lambda like: filled(poisoned(copy.deepcopy(like).to("meta")), like),
    "bfloat16 and back": lambda like: filled(copy.deepcopy(like).to(torch.bfloat16).float(), like),
    "half and back": lambda like: filled(copy.deepcopy(like).half().float(), like),
    "double and back": lambda like: copy.deepcopy(like).double().float(),
    "double": lambda like: copy.deepcopy(like).double().to(torch.float32),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_generator_made_in_any_way_computes_the_same(tiny_generator, way):
    gen = tiny_generator()
    tokens, labels = torch.randint(gen.config.codebook_size, (2, gen.config.num_tokens)), torch.tensor([1, 2])
    other = way(gen).eval()
    assert other.rope.dtype == torch.float32 and torch.equal(other.rope, rope_table(gen.config))
    with torch.no_grad():
        assert torch.equal(other(tokens, labels), gen(tokens, labels))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("stage", [1, 2])
def test_a_tokenizer_made_in_any_way_computes_the_same(tiny_tokenizer, stage, way):
    model = tiny_tokenizer(stage)
    if stage == 1:
        model.quantize.embed_prob.uniform_()
    other = way(model).eval()
    tokens = torch.randint(model.config.codebook_size, (2, model.config.num_tokens))
    assert torch.equal(other.decode(tokens), model.decode(tokens))
    assert all(torch.equal(other.state_dict()[name], value) for name, value in model.state_dict().items())


def test_share_memory_shares_the_table_too(tiny_generator):
    gen = tiny_generator().share_memory()
    assert gen.rope.is_shared() and gen.output.weight.is_shared()


def test_a_model_made_in_inference_mode_moves(tiny_generator):
    with torch.inference_mode():
        gen = tiny_generator()
    assert torch.equal(gen.to(torch.bfloat16).rope, rope_table(gen.config))


def test_functional_call_takes_other_weights(tiny_generator):
    gen, other = tiny_generator(), tiny_generator()
    other.output.weight.data.mul_(2)
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(
            functional_call(on_meta(gen).eval(), dict(other.state_dict()), (tokens, None)), other(tokens, None)
        )


@pytest.mark.parametrize("dtype", REDUCED)
def test_reduced_weights_assigned_leave_the_exact_parts_exact(tiny_generator, dtype):
    gen = tiny_generator()
    low = on_meta(gen).eval()
    low.load_state_dict({name: value.to(dtype) for name, value in gen.state_dict().items()}, assign=True)
    assert low.dtype == dtype and low.output.weight.dtype == low.embeddings.weight.dtype == torch.float32
    assert low.blocks[1].attn.q_norm.weight.dtype == torch.float32
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    with torch.no_grad():
        assert low(tokens, None).dtype == torch.float32


@pytest.mark.parametrize("dtype", REDUCED)
def test_gradients_are_moved_with_their_parameters(tiny_generator, dtype):
    gen = tiny_generator()
    gen(torch.zeros(1, 3, dtype=torch.int64), None).sum().backward()
    gen.to(dtype)
    assert all(p.grad.dtype == p.dtype for p in gen.parameters())
    assert gen.output.weight.grad.dtype == torch.float32 and gen.blocks[0].attn.qkv.weight.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_is_the_users_affair(tiny_generator, tiny_tokenizer, dtype):
    gen, tokenizer = tiny_generator(), tiny_tokenizer(1)
    tokens, images = torch.zeros(2, 21, dtype=torch.int64), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected, pictures = gen(tokens, None), tokenizer(images).reconstruction
    with default_dtype(dtype), torch.no_grad():
        made, made_tokenizer = Generator(gen.config).eval(), Tokenizer(tokenizer.config).eval()
        parts = (made, made_tokenizer, Discriminator(channels=32))
        assert {v.dtype for m in parts for v in (*m.parameters(), *m.buffers())} == {torch.float32}
        assert torch.equal(filled(made, gen)(tokens, None), expected)
        assert torch.equal(filled(made_tokenizer, tokenizer)(images).reconstruction, pictures)
        assert torch.equal(made_tokenizer.encode(images), tokenizer.encode(images))


def test_a_device_context_counts(tiny_generator):
    """Of two devices that this test has, "meta" is the other one."""
    gen = tiny_generator()
    with torch.device("meta"):
        assert Generator(gen.config, device="cpu").rope.device == gen.rope.device
        assert Generator(gen.config, device="cpu").output.weight.device == gen.rope.device


def test_fully_sharded_weights(tiny_generator, tmp_path):
    """FSDP2, made on "meta" and filled on the device, with one process."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    gen = tiny_generator()
    tokens, labels = torch.randint(gen.config.codebook_size, (2, 21)), torch.tensor([1, 2])
    with torch.no_grad():
        expected = gen(tokens, labels)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh

        sharded = on_meta(gen).eval()
        mesh = init_device_mesh("cpu", (1,))
        for block in sharded.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        sharded.to_empty(device="cpu")
        for name, parameter in sharded.named_parameters():
            parameter.data.to_local().copy_(gen.state_dict()[name])
        assert torch.equal(sharded.rope, rope_table(gen.config))
        with torch.no_grad():
            torch.testing.assert_close(sharded(tokens, labels), expected)
        for number, model in enumerate((sharded, torch.nn.parallel.DistributedDataParallel(gen))):
            loaded = load_generator(save_model(tmp_path / str(number), model)).state_dict()
            assert all(torch.equal(loaded[name], value) for name, value in gen.state_dict().items())
    finally:
        dist.destroy_process_group()


def test_loading_runs_no_initialisers():
    """They import torch._dynamo and sympy: twice the time that everything else takes."""
    program = (
        "import sys; from alitok_fast.models import load_generator, load_tokenizer\n"
        "load_generator('demo'); load_tokenizer('demo')\n"
        "sys.exit(', '.join(name for name in ('torch._dynamo', 'sympy') if name in sys.modules))"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    run = subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True)
    assert run.stderr.strip() == ""


def test_initialisers_run_on_a_real_device():
    """The same draws as ever: a seed means what it meant."""
    from alitok_fast.config import generator_preset

    torch.manual_seed(0)
    weight = Generator(generator_preset("demo")).blocks[0].attn.qkv.weight
    assert 0.0195 < weight.std() < 0.0205
