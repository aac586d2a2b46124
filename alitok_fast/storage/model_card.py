"""Model cards: what a model's page on the hub says of it, from its configuration and provenance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alitok_fast.config import GeneratorConfig, TokenizerConfig
from alitok_fast.storage.checkpoint import Checkpoint
from alitok_fast.storage.hub import require_hub
from alitok_fast.storage.text import shown

PAPER = "arXiv:2506.05289"
_MOST_CLASSES = 20  # that a card lists
_TASKS = {"tokenizer": "image-to-image", "generator": "unconditional-image-generation"}  # the hub knows no class labels

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ what }}
{% if description %}
{{ description }}
{% endif %}
## The model

| | |
|---|---|
{% for name, value in sizes.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}
## Use

With alitok_fast installed:

```python
{{ use }}
```

## Training
{% if training %}
| | |
|---|---|
{% for name, value in training.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}
{%- else %}
Nothing is recorded.
{% endif %}
{%- if metrics %}
## Results

Measured on {{ evaluated_on }}.

| metric | value |
|---|---|
{% for name, value in metrics.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}
{%- endif %}
## Licence

{{ license or "Not stated." }}

The architecture is AliTok's ([{{ paper }}](https://arxiv.org/abs/{{ paper.removeprefix("arXiv:") }})).
"""

_USE = {
    "tokenizer": """import torch
from alitok_fast import Tokenizer

tokenizer = Tokenizer.from_pretrained("{where}")
tokens = tokenizer.encode(torch.rand(2, 3, {image_size}, {image_size}))  # (B, {num_tokens}) int64, of images in [0, 1]
images = tokenizer.decode(tokens)  # (B, 3, {image_size}, {image_size})""",
    "generator": """from alitok_fast import Pipeline

pipe = Pipeline.from_pretrained("{where}", tokenizer="user/tokenizer")  # the one that it was trained with
pipe([0, 1, 2], seed=0).images[0].save("sample.png")  # by the numbers or names of classes""",
}


@dataclass(frozen=True)
class CardFields:
    """What a card says that neither configuration nor provenance tell.

    `license`: an identifier of the hub's, such as "apache-2.0". `metrics`: values by name, such as {"rFID": 0.86},
    measured on the data `evaluated_on`. `datasets`: ids of data sets on the hub that it was trained on. `tags` come
    after our own; `description` is a paragraph of markdown, `title` the heading.
    """

    license: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluated_on: str | None = None
    datasets: Sequence[str] = ()
    tags: Sequence[str] = ()
    description: str | None = None
    title: str | None = None

    def __post_init__(self) -> None:
        for name in ("license", "evaluated_on", "description", "title"):
            if not isinstance(getattr(self, name), str | None):
                raise TypeError(f"{name}: expected text, got {getattr(self, name)!r}")
        for name in ("datasets", "tags"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(item, str) for item in value):
                raise TypeError(f"{name}: expected a list of texts, got {value!r}")
        for name, value in self.metrics.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"metrics: expected a finite number for {name!r}, got {value!r}")
        if self.metrics and not self.evaluated_on:
            raise ValueError("evaluated_on: expected the data that metrics were measured on, got none")


def model_card(checkpoint: Checkpoint, fields: CardFields, where: str = "user/name") -> str:
    """The text of a card, metadata first; `where` is the repository or folder that its example loads.

    Raises ImportError without huggingface_hub.
    """
    hub = require_hub("a model card")
    config: Any = checkpoint.config
    kind = checkpoint.kind
    title = fields.title or f"AliTok {kind}"
    results = [
        hub.EvalResult(
            _TASKS[kind], _slug(fields.evaluated_on), fields.evaluated_on, _slug(name), value, metric_name=name
        )
        for name, value in fields.metrics.items()
    ]
    data = hub.ModelCardData(
        license=fields.license,
        library_name="alitok_fast",
        tags=list(dict.fromkeys(["alitok", f"image-{kind}", *fields.tags])),
        datasets=list(fields.datasets) or None,
        pipeline_tag=_TASKS[kind],
        **({"model_name": title, "eval_results": results} if results else {}),
    )
    lengths = {"image_size": getattr(config, "image_size", 0), "num_tokens": config.num_tokens}
    return str(
        hub.ModelCard.from_template(
            data,
            template_str=_TEMPLATE,
            title=title,
            what=_what(config),
            description=fields.description,
            sizes=_sizes(checkpoint),
            use=_USE[kind].format(where=where, **lengths),
            training=_training(checkpoint.provenance),
            metrics=fields.metrics,
            evaluated_on=fields.evaluated_on,
            license=fields.license,
            paper=PAPER,
        )
    )


def _slug(name: str | None) -> str:
    return "-".join(str(name).lower().split())


def _what(config: TokenizerConfig | GeneratorConfig) -> str:
    if isinstance(config, TokenizerConfig):
        decoder = "causal (stage 1)" if config.stage == 1 else "bidirectional (stage 2)"
        return (
            f"An image tokenizer: pictures of {config.image_size} x {config.image_size} pixels to {config.num_tokens} "
            f"tokens out of {config.codebook_size:,} codes, and back by a {decoder} decoder."
        )
    return (
        f"A decoder-only transformer that generates the {config.num_tokens} tokens of a picture, out of "
        f"{config.codebook_size:,} codes, from one of {config.num_classes:,} class labels. "
        "A tokenizer makes pixels of them."
    )


def _sizes(checkpoint: Checkpoint) -> dict[str, str]:
    count = sum(tensor.numel() for tensor in checkpoint.state.values())
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.state.values()})
    sizes = {"parameters": f"{count:,}", "precision": ", ".join(dtypes)}
    return sizes | {f"`{name}`": str(value) for name, value in checkpoint.config.to_dict().items()}


def _training(provenance: Mapping[str, Any]) -> dict[str, str]:
    """What is known of the training, as rows of a table; text from files is shown on one line."""
    rows = {}
    for name, value in provenance.items():
        if name == "classes" and isinstance(value, list):
            more = f", ... ({len(value):,})" if len(value) > _MOST_CLASSES else ""
            rows[name] = ", ".join(map(_cell, value[:_MOST_CLASSES])) + more
        elif isinstance(value, Mapping):
            rows |= {f"{name}: `{_cell(key)}`": _cell(inner) for key, inner in value.items()}
        elif value is not None:
            rows[name] = _cell(value)
    return rows


def _cell(value: object) -> str:
    text = shown(value if isinstance(value, str) else repr(value))
    return text.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")
