"""The HTTP service: routes in the shape that clients of image APIs know, over an `Engine`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from importlib import resources
from typing import Any, Optional, Union

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from alitok_fast import __version__
from alitok_fast.models import Tokenizer
from alitok_fast.pipelines.pipeline import Pipeline
from alitok_fast.serving import schemas
from alitok_fast.serving.errors import add_handlers, fault
from alitok_fast.serving.limits import Gate
from alitok_fast.serving.metrics import CONTENT_TYPE, Metrics
from alitok_fast.serving.photographs import base64_png, png
from alitok_fast.serving.request import EngineClosedError
from alitok_fast.serving.service import Service
from alitok_fast.serving.settings import ServeSettings
from alitok_fast.serving.waiting import Client

PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
FAULTS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.Error, "description": description}
    for status, description in {
        400: "A field is wrong.",
        401: "The key is missing or wrong.",
        404: "Another model is served.",
        408: "The body came too slowly.",
        413: "The body is too large.",
        415: "The body is not called JSON.",
        500: "The server is at fault.",
        503: "Too many requests wait, too many large bodies are read, or the server is not ready or about to stop.",
        504: "The request took too long.",
    }.items()
}
PICTURE: dict[str, Any] = {"description": "The image, or JSON.", "content": {"image/png": {}}}
EVENTS: dict[str, Any] = {
    "description": "JSON, a file, or events.",
    "content": {"image/png": {}, "text/event-stream": {}},
}
_log = logging.getLogger("alitok_fast.serving")


def create_app(
    load: Callable[[], tuple[Pipeline, Tokenizer | None]],
    settings: ServeSettings | None = None,
    on_failure: Callable[[], None] | None = None,
    labels: Mapping[str, str] | None = None,
) -> FastAPI:
    """The service as an ASGI application.

    Args:
        load: called when the service starts, by the process that serves: the pipeline, and the causal tokenizer that
            paints rows, or None.
        settings: limits; where it listens is the business of who runs it.
        on_failure: called where `load` or the first image failed; the error is `app.state.error`.
        labels: of every metric, where several of these services run.

    Raises:
        ValueError: for settings out of range.
    """
    settings = settings or ServeSettings()
    keys = settings.keys()

    def service() -> Service:
        found: Service | None = app.state.service
        if found is None or not app.state.ready:
            raise EngineClosedError("engine: expected one that is ready, got one that is being made")
        return found

    async def make_ready() -> None:
        try:
            app.state.service = await asyncio.to_thread(lambda: Service(*load(), settings))
            await asyncio.to_thread(app.state.service.engine.warm_up)
            app.state.ready = True
            _log.info("ready: %s", app.state.service.name)
        except Exception as error:
            app.state.error = error
            _log.error("the model could not be made ready: %s", error)
            if on_failure is not None:
                on_failure()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        making = asyncio.create_task(make_ready())
        try:
            yield
        finally:
            making.cancel()
            if app.state.service is not None:
                app.state.ready = False
                await asyncio.to_thread(app.state.service.engine.close, True, settings.grace_seconds)

    def give_up() -> None:
        """End what still runs with an error, without waiting for it."""
        if app.state.service is not None:
            threading.Thread(target=app.state.service.engine.close, args=(False,), daemon=True).start()

    app = FastAPI(
        title="alitok_fast",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.give_up = give_up
    app.state.service, app.state.ready, app.state.error = None, False, None
    metrics = Metrics(lambda: app.state.service and app.state.service.engine.stats(), labels)
    app.add_middleware(
        Gate,
        keys=keys,
        hosts=settings.host_names(),
        max_body=int(settings.max_body_mb * 1e6),
        max_bodies=int(settings.max_bodies_mb * 1e6),
        stall_seconds=settings.stall_seconds,
        observe=metrics.observe,
    )
    add_handlers(app)
    _add_routes(app, service, metrics, settings)
    app.openapi = lambda: _description(app, bool(keys))  # type: ignore[method-assign]
    return app


def _add_routes(app: FastAPI, service: Callable[[], Service], metrics: Metrics, settings: ServeSettings) -> None:
    if settings.page:
        page = (resources.files("alitok_fast.serving") / "page.html").read_text(encoding="utf-8")

        @app.get("/", include_in_schema=False)
        async def index() -> HTMLResponse:
            headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
            return HTMLResponse(page, headers=headers)

    @app.get("/health", summary="Whether the process works", responses={503: FAULTS[503]})
    async def health() -> JSONResponse:
        made = app.state.service
        if app.state.error is not None or (made is not None and not made.engine.alive):
            return JSONResponse(fault(503, "engine: expected one that works, got one that has ended"), 503)
        return JSONResponse({"status": "ok"})

    @app.get("/ready", summary="Whether requests are answered", responses={503: FAULTS[503]})
    async def ready() -> JSONResponse:
        if not app.state.ready or not app.state.service.engine.alive:
            return JSONResponse(fault(503, "engine: expected one that is ready, got none yet"), 503)
        return JSONResponse({"status": "ready"})

    @app.get(
        "/metrics", summary="Metrics for Prometheus", response_class=Response,
        responses={200: {"content": {"text/plain": {}}}},
    )  # fmt: skip
    async def metrics_() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models", summary="The model that is served", responses=_faults(401, 503))
    async def models() -> schemas.Models:
        return schemas.Models(data=[service().model()])

    @app.get("/v1/models/{model:path}", summary="The model that is served", responses=_faults(401, 404, 503))
    async def model(model: str) -> schemas.Model:
        service().check_model(model)
        return service().model()

    async def images(asked: schemas.ImagesRequest, request: Request) -> Any:
        client = Client(request, settings.timeout)
        if asked.stream:
            events = await service().events(asked, client)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        answer, done = await service().images(asked, client)
        if asked.response_format == "png":
            info = service().settings_of(answer, done[0])
            return Response(await asyncio.to_thread(png, done[0].pixels, info), media_type="image/png")
        return await service().pictures(asked, answer, done)

    asking: dict[str, Any] = dict(response_model=Union[schemas.Images, None], response_model_exclude_none=True)  # noqa: UP007
    answers = {200: EVENTS, **FAULTS}

    @app.post("/v1/images/generations", summary="New images of a class", responses=answers, **asking)
    async def generations(asked: schemas.GenerationRequest, request: Request) -> Any:
        return await images(asked, request)

    @app.post("/v1/images/completions", summary="A picture's upper part, completed", responses=answers, **asking)
    async def completions(asked: schemas.CompletionRequest, request: Request) -> Any:
        return await images(asked, request)

    @app.post("/v1/tokens", summary="A picture's tokens", responses=FAULTS)
    async def tokens(asked: schemas.TokensRequest, request: Request) -> schemas.Tokens:
        return await service().tokens(asked, Client(request, settings.timeout))

    @app.post(
        "/v1/reconstructions", summary="A picture, encoded and decoded; or decoded tokens",
        response_model=Optional[schemas.Reconstructed], responses={200: PICTURE, **FAULTS},  # noqa: UP045
    )  # fmt: skip
    async def reconstructions(asked: schemas.ReconstructionRequest, request: Request) -> Any:
        answer, pixels, crop = await service().reconstruction(asked, Client(request, settings.timeout))
        if asked.response_format == "png":
            return Response(await asyncio.to_thread(png, pixels), media_type="image/png")
        picture = {"b64_json": await asyncio.to_thread(base64_png, pixels)}
        if crop is not None and asked.return_crop:
            picture["crop_b64_json"] = await asyncio.to_thread(base64_png, crop)
        return answer.model_copy(update={"data": [picture]})


def _faults(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: FAULTS[status] for status in statuses}


def _description(app: FastAPI, with_keys: bool) -> dict[str, Any]:
    """The OpenAPI description: faults have our shape, so the framework's own (422) goes."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in made["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
                if with_keys:
                    operation["security"] = [{"key": []}]
        for name in ("HTTPValidationError", "ValidationError"):
            made["components"]["schemas"].pop(name, None)
        if with_keys:
            made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = made
    return app.openapi_schema
