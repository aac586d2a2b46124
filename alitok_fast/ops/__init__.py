"""The operators, each a function that any PyTorch code can call.

    from alitok_fast.ops import prefix_attention
    help(prefix_attention)

| function | what it does | devices |
|---|---|---|
| `vq_lookup` | codebook lookup: nearest codes, loss, usage, closest features (`VQLookup`) | CPU, CUDA |
| `prefix_attention` | attention with a causal, bidirectional or prefix mask, forward and backward | CPU, CUDA |
| `cached_attention` | attention of one new position over a key/value cache | CPU, CUDA |
| `add_rms_norm` | residual addition, dropout and RMSNorm in one pass | CPU, CUDA |
| `swiglu` | silu(gate) * up | CPU, CUDA |
| `sample_tokens` | guidance, temperature, top-k, top-p, and one sample per image | CPU, CUDA |
| `quantized_linear` | a linear layer with 8-bit weights (`quantize_weight`, `dequantize_weight`) | CPU, CUDA |
| `linear` | a linear layer in bfloat16 over float32 weights, forward and backward | CPU |
| `bf16_linear` | one with packed bfloat16 weights (`pack_bf16`, `unpack_bf16`), for inference | CPU |
| `int8_linear` | one with 8-bit weights and activations (`pack_int8`, `unpack_int8`), for inference | CPU |
| `decode`, `decode_tokens` | whole steps of the generator (`pack_weights`, `unpack_weights`) | CPU |

`fused_linear` and `norm_head` are no functions here: their modules have the layers of a sampling step on a GPU. The
CUDA kernels have run on an H100 (docs/status.md), that of `norm_head` not yet. `alitok_fast.use_reference()` runs the
PyTorch references instead of the kernels.
docs/operators.md shows each operator with an example.

Each operator has a module of its own name, which holds its reference, fake kernel and gradient. The function hides the
module as an attribute of this package; `from alitok_fast.ops.vq_lookup import vq_lookup_reference` reaches into it.
"""

from alitok_fast.ops.add_rms_norm import add_rms_norm
from alitok_fast.ops.bf16_linear import bf16_linear, pack_bf16, unpack_bf16
from alitok_fast.ops.cached_attention import cached_attention
from alitok_fast.ops.decode import decode, decode_tokens
from alitok_fast.ops.decode_weights import LayerWeights, PackedWeights, pack_weights, unpack_weights
from alitok_fast.ops.int8_linear import int8_linear, pack_int8, unpack_int8
from alitok_fast.ops.linear import linear
from alitok_fast.ops.packed_linear import RowNorm
from alitok_fast.ops.prefix_attention import prefix_attention
from alitok_fast.ops.quantized_linear import dequantize_weight, quantize_weight, quantized_linear
from alitok_fast.ops.sample_tokens import sample_tokens
from alitok_fast.ops.swiglu import swiglu
from alitok_fast.ops.vq_lookup import VQLookup, vq_lookup

__all__ = [
    "LayerWeights",
    "PackedWeights",
    "RowNorm",
    "VQLookup",
    "add_rms_norm",
    "bf16_linear",
    "cached_attention",
    "decode",
    "decode_tokens",
    "dequantize_weight",
    "int8_linear",
    "linear",
    "pack_bf16",
    "pack_int8",
    "pack_weights",
    "prefix_attention",
    "quantize_weight",
    "quantized_linear",
    "sample_tokens",
    "swiglu",
    "unpack_bf16",
    "unpack_int8",
    "unpack_weights",
    "vq_lookup",
]
