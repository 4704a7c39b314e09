"""The web application: the page, its two files, and one address that draws."""

import asyncio
import base64
import io
import json
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jinja2
import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dimo_jax.build import NUM_SEEDS
from dimo_jax.evaluation import pictures
from dimo_jax.serve.painter import Busy, Painter
from dimo_jax.serve.requests import TEMPERATURES, parse_request
from dimo_jax.types import UInt8, UserError

__all__ = ["MAX_BODY_BYTES", "make_app"]

MAX_BODY_BYTES = 2**16
_FOLDER = Path(__file__).parent
_FILES = {"page.css": "text/css", "page.js": "text/javascript"}
_MAX_BUTTONS = 20  # classes that each get one
_SHOWN_CLASSES = 8  # drawn at first, where there are more classes than pictures
_HEADERS = {
  "content-security-policy": (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src"
    " 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
  ),
  "x-content-type-options": "nosniff",
  "referrer-policy": "no-referrer",
  "cross-origin-resource-policy": "same-origin",
  "cross-origin-opener-policy": "same-origin",
  "cache-control": "no-store",
}


def make_app(painter: Painter, title: str, allowed_hosts: Sequence[str] = ("*",)) -> Starlette:
  """The application around a painter that is warm.

  Args:
    title: of the page.
    allowed_hosts: what browsers may call this server; "*" is anything.
  """
  html = _render(painter, title)
  texts = {name: (_FOLDER / name).read_text(encoding="utf-8") for name in _FILES}

  async def page(request: HTTPRequest) -> Response:
    del request
    return HTMLResponse(html)

  async def file(request: HTTPRequest) -> Response:
    name = request.url.path.removeprefix("/")
    return Response(texts[name], media_type=_FILES[name])

  async def draw(request: HTTPRequest) -> Response:
    _check_origin(request)
    try:
      asked = parse_request(await _json(request), painter.models, painter.max_images)
    except UserError as error:
      raise HTTPException(HTTPStatus.BAD_REQUEST, str(error)) from error
    try:
      drawn = await asyncio.wrap_future(painter.submit(asked))
    except Busy as error:
      raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from error
    except Exception as error:  # the painter has printed it
      text = "the pictures could not be drawn; the server's console says why"
      raise HTTPException(HTTPStatus.INTERNAL_SERVER_ERROR, text) from error
    images = await run_in_threadpool(_encode, drawn.images)
    return JSONResponse(
      images | {"steps": asked.steps, "seconds": drawn.seconds, "images_in_call": drawn.num_images}
    )

  return Starlette(
    routes=[
      Route("/", page),
      *(Route(f"/{name}", file) for name in _FILES),
      Route("/draw", draw, methods=["POST"]),
    ],
    middleware=[
      Middleware(_Headers),
      Middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts), www_redirect=False),
    ],
    exception_handlers={HTTPException: _answer},
  )


def _render(painter: Painter, title: str) -> str:
  """The page with the controls that these models have."""
  name, model = next(iter(painter.models.items()))
  num_classes = model.artifact.num_classes
  num_shown = min(painter.max_images, num_classes if num_classes <= _MAX_BUTTONS else 0)
  num_shown = num_shown or min(painter.max_images, _SHOWN_CLASSES)
  template = (_FOLDER / "page.html").read_text(encoding="utf-8")
  environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
  return environment.from_string(template).render(
    title=title,
    models=painter.models,
    first=name,
    temperature=model.artifact.temperature,
    temperatures=TEMPERATURES,
    stepped=next((n for n, m in painter.models.items() if len(m.steps) > 1), None),
    num_classes=num_classes,
    buttons=range(num_classes if num_classes <= _MAX_BUTTONS else 0),
    labels=", ".join(str(i * max(num_classes, 1) // num_shown) for i in range(num_shown)),
    num_shown=num_shown,
    max_images=painter.max_images,
    max_seed=NUM_SEEDS - 1,
  )


def _check_origin(request: HTTPRequest) -> None:
  """Other sites' pages may not draw here; programs, which name no origin, may."""
  origin = request.headers.get("origin")
  if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
    raise HTTPException(HTTPStatus.FORBIDDEN, f"origin {origin[:80]!r} may not draw here")


async def _json(request: HTTPRequest) -> Any:
  kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
  if kind != "application/json":
    raise HTTPException(
      HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
      f"content-type={kind[:80]!r} must be 'application/json'",
    )
  body = bytearray()
  async for chunk in request.stream():
    body += chunk
    if len(body) > MAX_BODY_BYTES:
      raise HTTPException(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the request is over {MAX_BODY_BYTES} bytes long"
      )
  try:
    return json.loads(body)
  except (ValueError, RecursionError) as error:
    raise HTTPException(HTTPStatus.BAD_REQUEST, "the request is no JSON") from error


def _encode(images: UInt8[np.ndarray, "n h w c"]) -> dict[str, Any]:
  """Each picture in its own size, and all in a grid."""
  singles = [image[..., 0] if image.shape[-1] == 1 else image for image in images]
  return {"images": [_png(image) for image in singles], "grid": _png(pictures.tile(images))}


def _png(pixels: np.ndarray) -> str:
  stream = io.BytesIO()
  Image.fromarray(pixels).save(stream, "PNG")
  return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


async def _answer(request: HTTPRequest, error: Exception) -> Response:
  del request
  assert isinstance(error, HTTPException)
  return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


class _Headers:
  """Adds the same headers to every answer."""

  def __init__(self, app: ASGIApp):
    self._app = app

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    async def send_with_headers(message: Message) -> None:
      if message["type"] == "http.response.start":
        MutableHeaders(scope=message).update(_HEADERS)
      await send(message)

    await self._app(scope, receive, send_with_headers)
