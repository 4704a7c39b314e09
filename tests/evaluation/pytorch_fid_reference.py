"""pytorch-fid's distance at 192 features, with injected weights, on images made by a rule.

Its number is recorded in golden/11_pytorch_fid_192.npz, because PyTorch is large and need not be
installed. Where pytorch-fid 0.3.0 is (requirements-torch.txt), this records it anew:

    python -m tests.evaluation.pytorch_fid_reference
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.evaluation.inception_rule import rule_weights

GOLDEN = Path(__file__).parents[1] / "golden"
NUM_IMAGES, SIDE = 2000, 40


def weights(*, counters: bool = False) -> dict[str, np.ndarray]:
  """The rule's weights of the whole network, if wanted with PyTorch's counters of batches."""
  with np.load(GOLDEN / "11_inception_features.npz") as file:
    names, shapes = file["weight_table_names"], file["weight_shapes"]
  table = {str(n): tuple(json.loads(str(s))) for n, s in zip(names, shapes, strict=True)}
  zeros = {k: np.zeros((), np.int64) for k in table if k.endswith("num_batches_tracked")}
  drawn = rule_weights({k: v for k, v in table.items() if k not in zeros})
  return drawn | (zeros if counters else {})


def images(seed: int) -> np.ndarray:
  """uint8 [n, side, side, 3]: a colour for each image, stripes, and noise; seeds differ in all."""
  random = np.random.RandomState(seed)
  colours = random.uniform(40, 200 + 10 * seed, (NUM_IMAGES, 1, 1, 3))
  waves = np.sin(np.arange(SIDE) * random.uniform(0.1, 1 + seed, (NUM_IMAGES, 1)))
  stripes = 40 * waves[:, :, None, None]
  noise = random.standard_normal((NUM_IMAGES, SIDE, SIDE, 3)) * (10 + 10 * seed)
  return np.clip(colours + stripes + noise, 0, 255).astype(np.uint8)


def reference_distance() -> float:
  """By pytorch-fid itself, from PNG files, with its resize off."""
  import torch
  from pytorch_fid import fid_score, inception

  inception.load_state_dict_from_url = lambda *args, **kwargs: {
    name: torch.from_numpy(value) for name, value in weights(counters=True).items()
  }
  block = inception.InceptionV3.BLOCK_INDEX_BY_DIM[192]
  network = inception.InceptionV3([block], resize_input=False)
  statistics = []
  for seed in (0, 1):
    with tempfile.TemporaryDirectory() as folder:
      files = []
      for i, image in enumerate(images(seed)):
        files.append(Path(folder) / f"{i:04d}.png")
        Image.fromarray(image).save(files[-1])
      statistics.append(
        fid_score.calculate_activation_statistics(files, network, 50, 192, "cpu", num_workers=0)
      )
  return float(fid_score.calculate_frechet_distance(*statistics[0], *statistics[1]))


if __name__ == "__main__":
  distance = reference_distance()
  np.savez(GOLDEN / "11_pytorch_fid_192.npz", fid=np.array(distance))
  print(distance)
