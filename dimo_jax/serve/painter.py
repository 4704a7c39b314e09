"""One thread that draws: requests which wait for the same network are drawn in one call of it.

A call takes one of a few batch sizes, all compiled beforehand. The pictures of a request are the
same alone and beside others, but for rounding: each is a function of its class, its temperature,
the request's seed and its place in the request.
"""

import collections
import dataclasses
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from dimo_jax.serve.requests import Model, Request
from dimo_jax.types import Array, UInt8

__all__ = ["Busy", "Drawn", "Painter"]

_MAX_WAITING = 32  # times the images of the largest batch
_GROWTH = 4  # from one batch size to the next

_Key = tuple[str, int]  # model and steps: what one compiled function serves


class Busy(Exception):
  """Too much is waiting, or the server is being stopped."""


@dataclasses.dataclass(frozen=True)
class Drawn:
  """A request's pictures.

  Attributes:
    seconds: that the network call took, which `num_images` pictures shared.
  """

  images: UInt8[np.ndarray, "n h w c"]
  seconds: float
  num_images: int


class _Job(NamedTuple):
  request: Request
  result: "Future[Drawn]"


class Painter:
  """Draws what is submitted, in the order of arrival but for what fits into a call."""

  def __init__(self, models: Mapping[str, Model], max_images: int):
    """Nothing is compiled yet.

    Args:
      max_images: of one request, and of one call.
    """
    self.models, self.max_images = models, max_images
    self.batch_sizes = [max_images]
    while self.batch_sizes[0] > 1:
      self.batch_sizes.insert(0, max(1, self.batch_sizes[0] // _GROWTH))
    self._functions: dict[_Key, dict[int, Callable[..., Array]]] = {}
    self._waiting: collections.deque[_Job] = collections.deque()
    self._changed = threading.Condition()
    self._closed = False
    self._thread = threading.Thread(target=self._work, name="painter", daemon=True)

  def warm_up(self) -> Iterator[tuple[int, int]]:
    """Compiles every function and runs it once.

    Yields:
      (compiled so far, all) after each.
    """
    keys = [(name, steps) for name, model in self.models.items() for steps in model.steps]
    total, done = len(keys) * len(self.batch_sizes), 0
    for name, steps in keys:
      functions = self._functions.setdefault((name, steps), {})
      artifact = self.models[name].artifact
      request = Request(name, (0,), 0, steps, artifact.temperature)
      for num in self.batch_sizes:
        size, function = artifact.batch_fn(num, steps)
        functions[size] = function
        np.asarray(function(*_rows([request], size)))
        done += 1
        yield done, total

  def start(self) -> None:
    """Begins to draw; to be called once it is warm."""
    self._thread.start()

  def submit(self, request: Request) -> "Future[Drawn]":
    """Queues a checked request.

    Raises:
      Busy: come again later.
    """
    result: Future[Drawn] = Future()
    with self._changed:
      num_waiting = sum(len(job.request.labels) for job in self._waiting)
      if self._closed:
        raise Busy("the server is stopping")
      if num_waiting + len(request.labels) > _MAX_WAITING * self.max_images:
        raise Busy(f"{num_waiting} pictures are waiting; try again in a moment")
      self._waiting.append(_Job(request, result))
      self._changed.notify()
    return result

  def close(self) -> None:
    """Draws what waits, and ends the thread."""
    with self._changed:
      self._closed = True
      self._changed.notify()
    if self._thread.is_alive():
      self._thread.join()

  def _work(self) -> None:
    while jobs := self._next():
      jobs = [job for job in jobs if job.result.set_running_or_notify_cancel()]
      try:
        self._draw(jobs)
      except Exception as error:  # such as too little memory: the next call may have enough
        traceback.print_exc()
        for job in jobs:
          job.result.set_exception(error)

  def _next(self) -> list[_Job]:
    """The oldest job, and all that fit beside it; none once closed."""
    with self._changed:
      self._changed.wait_for(lambda: self._waiting or self._closed)
      chosen: list[_Job] = []
      left: list[_Job] = []
      num = 0
      for job in self._waiting:
        fits = not chosen or (
          _key(job.request) == _key(chosen[0].request)
          and num + len(job.request.labels) <= self.max_images
        )
        (chosen if fits else left).append(job)
        num += fits * len(job.request.labels)
      self._waiting = collections.deque(left)
      return chosen

  def _draw(self, jobs: list[_Job]) -> None:
    requests = [job.request for job in jobs]
    num = sum(len(request.labels) for request in requests)
    if not num:  # all were cancelled
      return
    functions = self._functions[_key(requests[0])]
    size = min(size for size in functions if size >= num)
    rows = _rows(requests, size)
    began = time.perf_counter()
    images = np.asarray(functions[size](*rows))
    seconds = time.perf_counter() - began
    ends = np.cumsum([len(request.labels) for request in requests])
    for job, own in zip(jobs, np.split(images[:num], ends[:-1]), strict=True):
      job.result.set_result(Drawn(own, seconds, num))


def _key(request: Request) -> _Key:
  return request.model, request.steps


def _rows(requests: list[Request], size: int) -> list[np.ndarray]:
  """Labels, seeds, indices and, where there are any, temperatures, repeated up to `size` rows."""
  nums = [len(request.labels) for request in requests]
  labels = np.array([label for request in requests for label in request.labels], np.int32)
  seeds = np.repeat(np.array([request.seed for request in requests], np.uint32), nums)
  indices = np.concatenate([np.arange(num, dtype=np.uint32) for num in nums])
  rows = [labels, seeds, indices]
  if requests[0].temperature is not None:
    rows.append(np.repeat(np.array([r.temperature for r in requests], np.float32), nums))
  return [np.resize(row, size) for row in rows]
