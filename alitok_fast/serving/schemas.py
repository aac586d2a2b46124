"""What the HTTP service takes and gives, as pydantic models, from which its OpenAPI description is made.

The requests have the fields that clients of image APIs know (OpenAI's `images.generate`), and our settings beside them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from alitok_fast.inference.params import LARGEST, SEEDS
from alitok_fast.storage.text import shown

MOST_LETTERS = 1000  # of a class: names are compared letter by letter
MOST_TOKENS = 4096  # more than any image has: each wrong one is an error that is written out
UNKNOWN = "unknown_field"


class Asked(BaseModel):
    """A request: fields that are not known are refused."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, given: Any) -> Any:
        for name in given if isinstance(given, dict) else ():
            if name not in cls.model_fields:
                known = {"name": shown(name), "fields": ", ".join(cls.model_fields)}
                raise PydanticCustomError(UNKNOWN, "expected one of the fields {fields}, got {name}", known)
        return given


class ImagesRequest(Asked):
    """Fields that all requests for new images share."""

    prompt: int | str = Field(description="Class, by number or by name (`/v1/models` lists them).")
    model: str | None = Field(default=None, description="Name of the served model, where the client sends one.")
    n: int = Field(default=1, ge=1, le=1000, strict=True, description="Images; the server has a limit of its own.")
    size: str | None = Field(default=None, description="`auto`, or the model's `256x256`.")
    response_format: Literal["b64_json", "png"] = Field(
        default="b64_json", description="`b64_json`, or for a single image `png`: the file itself."
    )
    stream: bool = Field(
        default=False, strict=True, description="Send server-sent events: rows as they are drawn, then the images."
    )
    seed: int = Field(default=0, ge=-SEEDS, lt=SEEDS, strict=True, description="Key of the noise.")
    image_id: int = Field(
        default=0,
        ge=-SEEDS,
        lt=SEEDS - 1000,
        strict=True,
        description="Number of the first image, which with the seed keys its noise; the others count on.",
    )
    guidance_scale: float | None = Field(
        default=None, ge=0, le=LARGEST, strict=True, description="0 switches guidance off; null is the model's."
    )
    guidance_power: float | None = Field(
        default=None, gt=0, le=LARGEST, strict=True, description="Exponent of the schedule; null is the model's."
    )
    temperature: float = Field(
        default=1.0, ge=0, le=LARGEST, strict=True, description="0 takes the likeliest token at each step."
    )
    top_k: int | None = Field(
        default=None, ge=1, lt=SEEDS, strict=True, description="Sample from the k likeliest tokens; null is all."
    )
    top_p: float | None = Field(
        default=None, gt=0, le=1, strict=True, description="Sample from the smallest set with this probability."
    )
    return_tokens: bool = Field(default=False, strict=True, description="Give the images' tokens too.")
    user: str | None = Field(
        default=None, max_length=1000, description="Taken for the sake of clients that send it; not used."
    )

    @field_validator("prompt", mode="before")
    @classmethod
    def _number_or_name(cls, given: Any) -> Any:
        if isinstance(given, bool) or not isinstance(given, (int, str)):  # one error instead of one for each type
            raise PydanticCustomError("class", "input should be the number or the name of a class")
        if isinstance(given, str) and len(given) > MOST_LETTERS:
            raise PydanticCustomError("class", f"input should be a class of at most {MOST_LETTERS} characters")
        return given


class GenerationRequest(ImagesRequest):
    """A request for images of a class."""


class CompletionRequest(ImagesRequest):
    """A request to keep the upper part of a picture, and to complete it as an image of a class."""

    image: str = Field(description="The picture, base64 or a data URL; its centre crop is taken.")
    rows: int | None = Field(
        default=None, ge=0, strict=True, description="Rows of patches to keep; null is half of them."
    )


class TokensRequest(Asked):
    """A picture."""

    image: str = Field(description="The picture, base64 or a data URL; its centre crop is taken.")
    model: str | None = Field(default=None, description="Name of the served model, where the client sends one.")


class ReconstructionRequest(Asked):
    """A picture to encode and decode, or tokens to decode."""

    image: str | None = Field(default=None, description="The picture, base64 or a data URL; this or `tokens`.")
    tokens: list[int] | None = Field(
        default=None, max_length=MOST_TOKENS, description="The tokens of an image, instead of a picture."
    )
    model: str | None = Field(default=None, description="Name of the served model, where the client sends one.")
    response_format: Literal["b64_json", "png"] = Field(default="b64_json", description="As for generations.")
    return_crop: bool = Field(default=False, strict=True, description="Give the picture's crop too.")


class Image(BaseModel):
    """An image, and what it can be made again from."""

    b64_json: str = Field(description="PNG, base64.")
    seed: int
    image_id: int
    tokens: list[int] | None = None


class Images(BaseModel):
    """Images of one request."""

    created: int = Field(description="Seconds since 1970.")
    model: str
    prompt: int = Field(description="Number of the class.")
    class_name: str
    settings: dict[str, Any] = Field(description="All settings, the model's own filled in.")
    rows_kept: int | None = Field(default=None, description="Of a completion.")
    data: list[Image]


class Tokens(BaseModel):
    """The tokens of a picture."""

    model: str
    tokens: list[int]


class Reconstructed(BaseModel):
    """A picture from tokens; where it was encoded before, how close it came."""

    created: int
    model: str
    tokens: list[int]
    psnr: float | None = Field(
        default=None, description="Peak signal-to-noise ratio to the crop, in dB; null for tokens."
    )
    data: list[dict[str, str]] = Field(description="One image: `b64_json`; `crop_b64_json`, to which `psnr` refers.")


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["alitok_fast"] = "alitok_fast"
    image_size: int
    patch_size: int
    grid: int = Field(description="Rows of patches, and patches of a row.")
    num_tokens: int
    num_prefix_tokens: int
    codebook_size: int
    classes: list[str] = Field(description="Names, in the order of the numbers.")
    guidance_scale: float
    guidance_power: float
    max_n: int
    rows_while_sampling: bool = Field(description="Whether `stream` shows rows.")
    versions: dict[str, str]


class Models(BaseModel):
    """All models that are served: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Problem(BaseModel):
    """What was wrong."""

    message: str
    type: Literal["invalid_request_error", "authentication_error", "server_error", "overloaded_error", "timeout_error"]
    param: str | None = Field(description="The field that is at fault.")
    code: str | None = None


class Error(BaseModel):
    """An answer that is none."""

    error: Problem
