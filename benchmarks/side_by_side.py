"""Times our iteration and that of the released PyTorch networks in turn, on the same cores:

    git clone https://github.com/yuanzhi-zhu/DiMO && git clone https://github.com/tianweiy/DMD2
    python benchmarks/side_by_side.py dimo DiMO
    python benchmarks/side_by_side.py dmd2 DMD2

Needs requirements-torch.txt. The networks come from the clone; the iteration around them is written
here after the released training code: the same calls, losses, optimisers and average, clipped where
our config clips. Each side is a process of its own, both with the allocator's settings of
`dimo_jax.allocator`; they take turns, one iteration each, so that both see the same machine. Sizes
are those of configs/benchmark.py, with one fake-score update an iteration; float32, no dropout.
"""

import argparse
import contextlib
import copy
import importlib.util
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dimo_jax.allocator import keep_freed_memory

_NUM_WARMUP = 2
_NEEDED = {"dimo": "MaskGit_src/Network/transformer.py", "dmd2": "third_party/edm/training"}


def settings(method: str) -> Any:
  """The config of both sides."""
  from configs import benchmark

  config = benchmark.get_config(method)
  config.teacher.path = "random"
  config.dmd2.fake_rounds = 1
  return config


def ours(method: str) -> tuple[Callable[[], Any], int]:
  """One iteration of `dimo_jax`, as `python -m dimo_jax.benchmark` times it, and the parameters of
  its generator.
  """
  import jax

  from dimo_jax.benchmark import Setting
  from dimo_jax.build import build

  setting = Setting(build(settings(method)))
  program = setting.compile(1)
  num_parameters = sum(x.size for x in jax.tree.leaves(setting.params))
  return lambda: jax.block_until_ready(setting.iterate(program)), num_parameters


def released_dimo(clone: Path) -> tuple[Callable[[], None], dict[str, Any]]:
  """An iteration of Di[M]O with the released MaskGIT transformer, and its networks."""
  import torch
  from torch.nn import functional

  sys.path.insert(0, str(clone / "MaskGit_src"))
  from Network.transformer import MaskTransformer

  config = settings("dimo")
  model, dimo, optim = config.model, config.dimo, config.optim
  batch, side, mask_id = config.train.batch_size, 16, 1024
  num_tokens = side * side
  generator = MaskTransformer(
    img_size=16 * side,
    hidden_dim=model.hidden_dim,
    codebook_size=mask_id,
    depth=model.num_layers,
    heads=model.num_heads,
    mlp_dim=model.mlp_dim,
    dropout=0.0,
  )
  teacher, fake_score, average = (copy.deepcopy(generator) for _ in range(3))
  for network in (generator, fake_score):
    for frozen in (network.tok_emb.weight, network.pos_emb, network.bias):
      frozen.requires_grad_(False)
  for network in (teacher, average):
    network.requires_grad_(False)
  optimizers = [
    torch.optim.Adam(
      [p for p in network.parameters() if p.requires_grad],
      lr=options.learning_rate,
      betas=(options.b1, options.b2),
      eps=options.eps,
    )
    for network, options in ((generator, optim.generator), (fake_score, optim.fake_score))
  ]

  def masked_at(tokens, ratios):
    """(tokens with masks, the mask): exactly round(ratio * tokens) of each, at least one."""
    counts = (num_tokens * ratios).round().clamp(min=1)
    mask = torch.rand(batch, num_tokens).argsort(-1) < counts[:, None]
    mask = mask.view(batch, side, side)
    return torch.where(mask, mask_id, tokens), mask

  def generate():
    labels = torch.randint(0, 1000, (batch,))
    random_tokens = torch.randint(0, mask_id, (batch, side, side))
    tokens, _ = masked_at(random_tokens, torch.full((batch,), dimo.r_init))
    logits = generator(tokens, labels, noise_emb_perturb=dimo.sigma)
    drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
    return logits, drawn.view(batch, side, side), labels

  def masked_again(tokens):
    return masked_at(tokens, torch.arccos(torch.rand(batch)) * 2 / torch.pi)

  def guided_teacher(tokens, labels):
    dropped = torch.arange(2 * batch) >= batch
    both = teacher(tokens.repeat(2, 1, 1), labels.repeat(2), drop_label=dropped)
    conditional, unconditional = both.chunk(2)
    return unconditional + dimo.teacher_guidance * (conditional - unconditional)

  def update(network, optimizer, options, loss):
    loss.backward()
    if options.clip_norm:
      torch.nn.utils.clip_grad_norm_(network.parameters(), options.clip_norm)
    for parameter in network.parameters():
      if parameter.grad is not None:
        torch.nan_to_num(parameter.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=parameter.grad)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

  def iterate():
    logits, tokens, labels = generate()
    noised, mask = masked_again(tokens)
    with torch.no_grad():
      target = guided_teacher(noised, labels).softmax(-1)
      gradient = fake_score(noised, labels).softmax(-1) - target
      gradient = torch.where(mask.view(batch, -1, 1), gradient, 0.0)
    wanted = (logits - gradient).detach()
    loss = 0.5 * functional.mse_loss(logits, wanted, reduction="sum") / batch
    update(generator, optimizers[0], optim.generator, loss)

    with torch.no_grad():
      _, tokens, labels = generate()
    noised, mask = masked_again(tokens)
    predicted = fake_score(noised, labels)
    hard = torch.where(mask, tokens, -1).view(-1)
    loss = functional.cross_entropy(
      predicted.flatten(0, 1), hard, ignore_index=-1, label_smoothing=dimo.label_smoothing
    )
    update(fake_score, optimizers[1], optim.fake_score, loss)
    with torch.no_grad():
      for mean, parameter in zip(average.parameters(), generator.parameters(), strict=True):
        mean.lerp_(parameter, 1 - config.train.ema_decay)

  networks = {"generator": generator, "fake_score": fake_score, "average": average}
  return iterate, networks | {"teacher": teacher}


def released_dmd2(clone: Path) -> tuple[Callable[[], None], dict[str, Any]]:
  """An iteration of DMD2 with the released EDM networks, and its networks."""
  import torch
  from torch import nn
  from torch.nn.functional import softplus

  sys.path.insert(0, str(clone))
  from third_party.edm.training.networks import EDMPrecond

  config = settings("dmd2")
  dmd2, denoiser, optim = config.dmd2, config.denoiser, config.optim
  batch, side, num_classes = config.train.batch_size, config.data.image_size, 10
  generator = EDMPrecond(
    img_resolution=side,
    img_channels=3,
    label_dim=num_classes,
    sigma_data=0.5,
    model_type="DhariwalUNet",
    augment_dim=0,
    model_channels=denoiser.model_channels,
    channel_mult=list(denoiser.channel_mult),
    num_blocks=denoiser.num_blocks,
    attn_resolutions=list(denoiser.attn_resolutions),
    dropout=0.0,
  )
  teacher, fake_score = copy.deepcopy(generator), copy.deepcopy(generator)
  teacher.requires_grad_(False)
  width = denoiser.model_channels * denoiser.channel_mult[-1]
  critic = nn.Sequential(
    nn.Conv2d(width, width, 4, stride=2, padding=1),
    nn.GroupNorm(dmd2.critic_groups, width),
    nn.SiLU(),
    nn.Conv2d(width, width, 4, stride=4),
    nn.GroupNorm(dmd2.critic_groups, width),
    nn.SiLU(),
    nn.Conv2d(width, 1, 1),
  )
  guidance = nn.ModuleList([fake_score, critic])
  optimizers = [
    torch.optim.AdamW(
      network.parameters(),
      lr=options.learning_rate,
      betas=(options.b1, options.b2),
      eps=options.eps,
      weight_decay=options.weight_decay,
    )
    for network, options in ((generator, optim.generator), (guidance, optim.fake_score))
  ]
  num_levels = 1000
  ramp = torch.linspace(0, 1, num_levels)
  table = (0.002 ** (1 / 7) + ramp * (80.0 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
  real = torch.rand(batch, 3, side, side) * 2 - 1
  real_labels = torch.eye(num_classes)[torch.randint(0, num_classes, (batch,))]

  def noised(images, first, last):
    sigma = table[torch.randint(first, last, (batch, 1, 1, 1))]
    return images + sigma * torch.randn_like(images), sigma

  def realism(images, labels):
    images, sigma = noised(images, 0, dmd2.gan_num_levels)
    return critic(fake_score(images, sigma, labels, return_bottleneck=True))

  def update(network, optimizer, options, loss):
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), options.clip_norm)
    optimizer.step()
    for each in optimizers:
      each.zero_grad()

  def iterate():
    labels = torch.eye(num_classes)[torch.randint(0, num_classes, (batch,))]
    sigma = torch.full((batch,), dmd2.student_sigmas[0])
    images = generator(torch.randn(batch, 3, side, side) * sigma[0], sigma, labels)
    with torch.no_grad():
      low, high = (round(num_levels * level) for level in (dmd2.min_level, dmd2.max_level))
      noisy, level = noised(images, low, high + 1)
      from_teacher = images - teacher(noisy, level, labels)
      from_fake = images - fake_score(noisy, level, labels)
      scale = from_teacher.abs().mean((1, 2, 3), keepdim=True)
      gradient = torch.nan_to_num((from_teacher - from_fake) / scale)
    loss = 0.5 * nn.functional.mse_loss(images, (images - gradient).detach())
    guidance.requires_grad_(False)
    loss = loss + dmd2.gan_generator_weight * softplus(-realism(images, labels)).mean()
    guidance.requires_grad_(True)
    update(generator, optimizers[0], optim.generator, loss)

    images = images.detach()
    noisy, level = noised(images, 0, num_levels)
    errors = (fake_score(noisy, level, labels) - images).square()
    loss = ((level**-2 + 0.5**-2) * errors).mean()
    on_real, on_fake = realism(real, real_labels), realism(images, labels)
    gan = (softplus(on_fake) + softplus(-on_real)).mean()
    update(guidance, optimizers[1], optim.fake_score, loss + dmd2.gan_critic_weight * gan)

  networks = {"generator": generator, "fake_score": fake_score, "critic": critic}
  return iterate, networks | {"teacher": teacher}


def serve(side: str, method: str, clone: Path, num_threads: int, turns: Connection) -> None:
  """A process of one side: its number of parameters, then an iteration's seconds whenever asked."""
  keep_freed_memory()
  if side == "ours":
    iterate, num_parameters = ours(method)
  else:
    import torch

    torch.set_num_threads(num_threads)
    iterate, networks = {"dimo": released_dimo, "dmd2": released_dmd2}[method](clone)
    num_parameters = sum(p.numel() for p in networks["generator"].parameters())
  turns.send(num_parameters)
  while turns.recv():
    began = time.perf_counter()
    iterate()
    turns.send(time.perf_counter() - began)


def take_turns(method: str, clone: Path, repeats: int) -> dict[str, list[float]]:
  """Seconds of each side's iterations, the i-th of one right before the i-th of the other.

  Raises:
    EOFError: a side ended; its process has said why.
    ValueError: generators of different sizes.
  """
  num_threads = len(os.sched_getaffinity(0))
  context = multiprocessing.get_context("spawn")
  seconds: dict[str, list[float]] = {"released": [], "ours": []}
  ends, sizes = {}, {}
  try:
    for side in seconds:
      ends[side], theirs = context.Pipe()
      arguments = (side, method, clone, num_threads, theirs)
      context.Process(target=serve, args=arguments, daemon=True).start()
      theirs.close()  # so that a process that ends is noticed
      sizes[side] = ends[side].recv()
    if len(set(sizes.values())) > 1:
      raise ValueError(f"the sides' generators differ in their numbers of parameters: {sizes}")
    for i in range(_NUM_WARMUP + repeats):
      for side, end in ends.items():
        end.send(True)
        taken = end.recv()
        if i >= _NUM_WARMUP:
          seconds[side].append(taken)
  finally:
    for end in ends.values():
      with contextlib.suppress(BrokenPipeError):
        end.send(False)
  return seconds


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("method", choices=sorted(_NEEDED))
  parser.add_argument("clone", type=Path, help="a clone of the released code")
  parser.add_argument("--repeats", type=int, default=15, help="iterations of each side")
  given = parser.parse_args()
  if given.repeats < 2:
    parser.error(f"--repeats={given.repeats} must be at least 2")
  needed = given.clone / _NEEDED[given.method]
  if not needed.exists():
    parser.error(f"{needed} does not exist; give a clone of the released code of {given.method}")
  if importlib.util.find_spec("torch") is None:
    parser.error("PyTorch is not installed: pip install -r requirements-torch.txt")
  try:
    seconds = take_turns(given.method, given.clone.resolve(), given.repeats)
  except EOFError:
    sys.exit("error: one of the two processes ended, for the reason above")
  ratios = [a / b for a, b in zip(seconds["ours"], seconds["released"], strict=True)]
  rows = {f"{side}, seconds": times for side, times in seconds.items()}
  for name, values in (rows | {"ratio of each pair": ratios}).items():
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    print(f"{name:18s}  median {middle:.3f}, half of them within {low:.3f} to {high:.3f}")


if __name__ == "__main__":
  main()
