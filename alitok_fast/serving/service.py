"""What the routes do: requests of the HTTP service in terms of the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alitok_fast import __version__
from alitok_fast.data.transforms import to_tensor
from alitok_fast.evaluation.psnr import psnr
from alitok_fast.inference.params import SamplingParams
from alitok_fast.models import Tokenizer
from alitok_fast.pipelines.pipeline import Pipeline
from alitok_fast.serving import schemas
from alitok_fast.serving.engine import Engine
from alitok_fast.serving.errors import FieldError, of_fields, status_and_body
from alitok_fast.serving.events import Watch, event
from alitok_fast.serving.photographs import PictureReader, base64_png
from alitok_fast.serving.request import GeneratedImage, QueueFullError
from alitok_fast.serving.settings import ServeSettings
from alitok_fast.serving.waiting import Client
from alitok_fast.storage.images import to_uint8

READERS = 2  # threads that read pictures which were sent
SETTINGS = ("guidance_scale", "guidance_power", "temperature", "top_k", "top_p", "seed")


class Service:
    """A pipeline, its engine, and what clients may ask of them. It makes the engine."""

    # Its methods raise FieldError for a request that is at fault; other errors are the server's.

    def __init__(self, pipe: Pipeline, stage1: Tokenizer | None, settings: ServeSettings) -> None:
        self.pipe, self.settings = pipe, settings
        self.engine = Engine(
            pipe,
            stage1=stage1,
            max_images=settings.max_images,
            max_queue=settings.max_queue,
            timeout=settings.timeout,
        )
        # Clients are not told where files of this machine are.
        self.name = settings.name or (Path(pipe.source).resolve().name if Path(pipe.source).exists() else pipe.source)
        self._max_n = min(settings.max_n, settings.max_queue)  # a request waits as a whole
        self._reader = PictureReader(int(settings.max_megapixels * 1e6))
        # Apart from what writes pictures: to read one may take a second, and nobody else should wait for it.
        self._readers = ThreadPoolExecutor(READERS, "alitok-pictures")
        self._reading: set[Future[np.ndarray]] = set()
        self._created = int(time.time())

    def model(self) -> schemas.Model:
        """What is served."""
        config, generator = self.pipe.tokenizer.config, self.pipe.generator.config
        return schemas.Model(
            id=self.name,
            created=self._created,
            image_size=config.image_size,
            patch_size=config.patch_size,
            grid=config.grid,
            num_tokens=config.num_tokens,
            num_prefix_tokens=config.num_prefix_tokens,
            codebook_size=config.codebook_size,
            classes=list(self.pipe.classes),
            guidance_scale=generator.guidance_scale,
            guidance_power=generator.guidance_power,
            max_n=self._max_n,
            rows_while_sampling=self.engine.stage1 is not None,
            versions={"alitok_fast": __version__, "torch": torch.__version__},
        )

    # ---- images ----

    async def images(self, asked: schemas.ImagesRequest, client: Client) -> tuple[schemas.Images, list[GeneratedImage]]:
        """The answer, whose pictures are not in it yet, and its images."""
        answer, prompt = await self._begin(asked, client)
        done = await client.answered(self._submit(asked, answer, prompt, client))
        return answer, done

    async def events(self, asked: schemas.ImagesRequest, client: Client) -> AsyncIterator[bytes]:
        """Server-sent events, once the request has been taken: rows as they are painted, then the finished images."""
        if self.engine.stage1 is None:
            raise FieldError("stream", "expected a server with a causal tokenizer (--stage1), got one without")
        answer, prompt = await self._begin(asked, client)
        watch = Watch(self.pipe.tokenizer.config.grid)
        watch.follow(self._submit(asked, answer, prompt, client, watch.on_rows))

        async def last(index: int, future: Future[GeneratedImage]) -> bytes:
            try:
                image = (await self.pictures(asked, answer, [future.result()])).data[0]
            except Exception as error:
                return event("error", index=index, **status_and_body(error)[1])
            rest = answer.model_dump(exclude={"data"}, exclude_none=True)
            return event("image_generation.completed", index=index, **image.model_dump(exclude_none=True), **rest)

        return watch.events(last, client)

    async def pictures(
        self, asked: schemas.ImagesRequest, answer: schemas.Images, done: Sequence[GeneratedImage]
    ) -> schemas.Images:
        """The answer with these images."""
        files = [await asyncio.to_thread(base64_png, one.pixels, self.settings_of(answer, one)) for one in done]
        data = [
            schemas.Image(
                b64_json=file,
                seed=one.params.seed,
                image_id=one.image_id,
                tokens=one.tokens.tolist() if asked.return_tokens else None,
            )
            for file, one in zip(files, done, strict=True)
        ]
        return answer.model_copy(update={"data": data})

    def settings_of(self, answer: schemas.Images, one: GeneratedImage) -> dict[str, Any]:
        """What an image can be made again from, for the text in its file."""
        return {**self.pipe.metadata(one.params), "model": self.name, "class_names": None, "label": one.label,
                "image_id": one.image_id, "rows_kept": answer.rows_kept}  # fmt: skip

    async def _begin(self, asked: schemas.ImagesRequest, client: Client) -> tuple[schemas.Images, torch.Tensor | None]:
        """Check a request, and encode the picture of a completion."""
        self.check_model(asked.model)
        size = self.pipe.tokenizer.config.image_size
        if asked.size not in (None, "auto", f"{size}x{size}"):
            raise FieldError("size", f"expected 'auto' or '{size}x{size}', got {asked.size!r}")
        if asked.n > self._max_n:
            raise FieldError("n", f"expected at most {self._max_n}, got {asked.n}")
        if asked.response_format == "png" and (asked.n > 1 or asked.stream):
            raise FieldError("response_format", "expected b64_json for several images or a stream, got png")
        with of_fields(labels="prompt"):
            (label,) = self.pipe.classes.ids(asked.prompt)
            params = SamplingParams(**{name: getattr(asked, name) for name in SETTINGS}).resolved(
                self.pipe.generator.config
            )
        answer = schemas.Images(
            created=int(time.time()),
            model=self.name,
            prompt=label,
            class_name=self.pipe.classes[label],
            settings=params.to_dict(),
            data=[],
        )
        if not isinstance(asked, schemas.CompletionRequest):
            return answer, None
        config = self.pipe.tokenizer.config
        rows = config.grid // 2 if asked.rows is None else asked.rows
        if rows > config.grid:
            raise FieldError("rows", f"expected at most {config.grid}, the rows of patches of an image, got {rows}")
        tokens, _ = await self._encode(asked.image, client)
        answer.rows_kept = rows
        return answer, tokens[: config.num_prefix_tokens + rows * config.grid]

    def _submit(
        self,
        asked: schemas.ImagesRequest,
        answer: schemas.Images,
        prompt: torch.Tensor | None,
        client: Client,
        on_rows: Callable[[int, int, np.ndarray], None] | None = None,
    ) -> list[Future[GeneratedImage]]:
        params, left = SamplingParams(**answer.settings), client.seconds_left()
        futures: list[Future[GeneratedImage]] = []
        try:
            for index in range(asked.n):
                futures.append(
                    self.engine.submit(
                        answer.prompt,
                        params,
                        image_id=asked.image_id + index,
                        prompt_tokens=prompt,
                        on_rows=None if on_rows is None else partial(on_rows, index),
                        timeout=left,
                    )
                )
        except BaseException:  # the queue is full: all or none
            for future in futures:
                future.cancel()
            raise
        return futures

    # ---- photographs ----

    async def tokens(self, asked: schemas.TokensRequest, client: Client) -> schemas.Tokens:
        """The tokens of a picture."""
        self.check_model(asked.model)
        tokens, _ = await self._encode(asked.image, client)
        return schemas.Tokens(model=self.name, tokens=tokens.tolist())

    async def reconstruction(
        self, asked: schemas.ReconstructionRequest, client: Client
    ) -> tuple[schemas.Reconstructed, np.ndarray, np.ndarray | None]:
        """A picture or tokens to pixels (H, W, 3) uint8, and the picture's crop; the answer has no picture yet."""
        self.check_model(asked.model)
        if (asked.image is None) == (asked.tokens is None):
            raise FieldError("image", f"expected image or tokens, got {'neither' if asked.image is None else 'both'}")
        crop = None
        if asked.image is not None:
            tokens, crop = await self._encode(asked.image, client)
        else:
            tokens = self._check_tokens(asked.tokens or [])
        (made,) = await client.answered([self.engine.call(lambda: self._decode(tokens, crop))])
        pixels, decibels = made
        answer = schemas.Reconstructed(
            created=int(time.time()), model=self.name, tokens=tokens.tolist(), psnr=decibels, data=[]
        )
        return answer, pixels, crop

    def _decode(self, tokens: torch.Tensor, crop: np.ndarray | None) -> tuple[np.ndarray, float | None]:
        """Pixels, and their PSNR to the crop; on the engine's thread, since torch keeps threads for each that calls."""
        pixels = to_uint8(self.pipe.image_decoder(tokens[None].to(self.pipe.tokenizer.device)))[0]
        if crop is None:
            return pixels, None
        decibels = float(psnr(*(torch.tensor(picture)[None].double() / 255 for picture in (crop, pixels))))
        return pixels, min(decibels, 999.0)  # of equal pictures it is infinite, which JSON has no number for

    def _check_tokens(self, tokens: list[int]) -> torch.Tensor:
        config = self.pipe.tokenizer.config
        if len(tokens) != config.num_tokens:
            raise FieldError("tokens", f"expected {config.num_tokens}, got {len(tokens)}")
        if bad := [token for token in tokens if not 0 <= token < config.codebook_size]:
            raise FieldError("tokens", f"expected numbers in [0, {config.codebook_size}), got {bad[0]}")
        return torch.tensor(tokens)

    async def _encode(self, picture: str, client: Client) -> tuple[torch.Tensor, np.ndarray]:
        """Tokens (N,) on the host of a picture that was sent, and its crop."""
        reading = self._readers.submit(self._reader.crop, picture, self.pipe.tokenizer.config.image_size)
        self._reading.add(reading)
        reading.add_done_callback(self._reading.discard)
        if len(self._reading) > self.settings.max_queue:
            reading.cancel()
            raise QueueFullError(f"queue: expected fewer than {self.settings.max_queue} pictures to read, got as many")
        (crop,) = await client.answered([reading])
        tokenizer = self.pipe.tokenizer
        work = self.engine.call(lambda: tokenizer.encode(to_tensor(crop[None]).to(tokenizer.device))[0].cpu())
        (tokens,) = await client.answered([work])
        return tokens, crop

    def check_model(self, name: str | None) -> None:
        """FieldError unless a request asks for the model that is served."""
        if name not in (None, self.name):
            raise FieldError("model", f"expected {self.name!r}, the model that is served, got {name!r}", status=404)
