"""What a pipeline is loaded from, and how: the options of commands, and the arguments of services.

Nothing here imports torch before something is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alitok_fast.models import Tokenizer
    from alitok_fast.pipelines.pipeline import Pipeline


def option(default: Any, help: str, *names: str) -> Any:
    """A field that is an option of a command, called as the field is unless `names` are given."""
    return field(default=default, metadata={"help": help, "names": names})


@dataclass(frozen=True)
class DeviceOptions:
    """Where a model runs, and in which precision."""

    device: str = option("cpu", "Device: cpu, cuda or cuda:N.")
    dtype: str = option("float32", "Precision of the models: float32, bfloat16 or float16.")
    weights: str = option("ema", "Of a checkpoint with averaged (EMA) weights, take 'ema' or 'raw'.")

    def load_tokenizer(self, name: str) -> Tokenizer:
        """The tokenizer called `name`; raises as `alitok_fast.load_tokenizer`."""
        from alitok_fast.device import check_device
        from alitok_fast.models import load_tokenizer
        from alitok_fast.models.loading import dtype_from_name

        dtype: Any = dtype_from_name(self.dtype)
        return load_tokenizer(name, check_device(self.device), dtype, weights=self.weights)


@dataclass(frozen=True)
class LoadOptions(DeviceOptions):
    """What a pipeline is loaded from, and what its weights are rounded to."""

    model: str = option("demo", "'demo', a folder, a hub repository, or a generator's checkpoint.")
    tokenizer: str | None = option(None, "The tokenizer, where --model is a generator alone.")
    weight_dtype: str | None = option(
        None,
        "Precision of the generator's matrices: float32, bfloat16 or int8 on a CPU; int8 or float8_e4m3fn on a GPU.",
    )
    activation_dtype: str | None = option(
        None,
        "int8 multiplies the matrices of --weight-dtype int8 on a CPU with 8-bit activations: faster for many images, "
        "and less exact.",
    )
    decode_dtype: str | None = option(
        None,
        "Precision of the step from tokens to pixels: float32, bfloat16 or float16, on a CPU also int8. "
        "If not given, bfloat16 where that is faster.",
    )

    def pipeline(self) -> Pipeline:
        """The pipeline; raises as `Pipeline.from_pretrained`."""
        from alitok_fast.device import check_device, local_device
        from alitok_fast.models.loading import dtype_from_name
        from alitok_fast.pipelines.pipeline import Pipeline

        dtype: Any = dtype_from_name(self.dtype)
        return Pipeline.from_pretrained(
            self.model,
            local_device(check_device(self.device)),
            dtype,
            self.tokenizer,
            dtype_from_name(self.weight_dtype, "weight_dtype"),
            dtype_from_name(self.decode_dtype, "decode_dtype"),
            weights=self.weights,
            activation_dtype=dtype_from_name(self.activation_dtype, "activation_dtype"),
        )

    def with_stage1(self, stage1: str | None = None) -> tuple[Pipeline, Tokenizer | None]:
        """The pipeline, and the causal tokenizer that paints rows: `stage1`, or that of the model's folder, or None."""
        from alitok_fast.models.loading import find_stage1

        found = find_stage1(self.model, stage1)
        causal = None if found is None else self.load_tokenizer(found)
        return self.pipeline(), causal
