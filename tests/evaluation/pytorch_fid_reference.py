"""pytorch-fid's distance with injected weights, on images made by a rule.

At 192 features its number is recorded in golden/11_pytorch_fid_192.npz: PyTorch is large and need
not be installed. Where pytorch-fid 0.3.0 is (requirements-torch.txt), this records it anew:

    python -m tests.evaluation.pytorch_fid_reference
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.evaluation.inception_rule import rule_weights

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclasses.dataclass(frozen=True)
class Case:
  """How many features, of how many images of which side; Inception's last ones need 75 pixels."""

  num_features: int = 192
  num_images: int = 2000
  side: int = 40


def weights(*, counters: bool = False) -> dict[str, np.ndarray]:
  """The rule's weights of the whole network, if wanted with PyTorch's counters of batches."""
  with np.load(GOLDEN / "11_inception_features.npz") as file:
    names, shapes = file["weight_table_names"], file["weight_shapes"]
  table = {str(n): tuple(json.loads(str(s))) for n, s in zip(names, shapes, strict=True)}
  zeros = {k: np.zeros((), np.int64) for k in table if k.endswith("num_batches_tracked")}
  drawn = rule_weights({k: v for k, v in table.items() if k not in zeros})
  return drawn | (zeros if counters else {})


def images(seed: int, case: Case) -> np.ndarray:
  """uint8 [n, side, side, 3]: a colour for each image, stripes, and noise; seeds differ in all."""
  random, num, side = np.random.RandomState(seed), case.num_images, case.side
  colours = random.uniform(40, 200 + 10 * seed, (num, 1, 1, 3))
  waves = np.sin(np.arange(side) * random.uniform(0.1, 1 + seed, (num, 1)))
  stripes = 40 * waves[:, :, None, None]
  noise = random.standard_normal((num, side, side, 3)) * (10 + 10 * seed)
  return np.clip(colours + stripes + noise, 0, 255).astype(np.uint8)


def reference_distance(case: Case) -> float:
  """By pytorch-fid itself, from PNG files, with its resize off."""
  import torch
  from pytorch_fid import fid_score, inception

  inception.load_state_dict_from_url = lambda *args, **kwargs: {
    name: torch.from_numpy(value) for name, value in weights(counters=True).items()
  }
  block = inception.InceptionV3.BLOCK_INDEX_BY_DIM[case.num_features]
  network = inception.InceptionV3([block], resize_input=False)
  statistics = []
  for seed in (0, 1):
    with tempfile.TemporaryDirectory() as folder:
      files = []
      for i, image in enumerate(images(seed, case)):
        files.append(Path(folder) / f"{i:05d}.png")
        Image.fromarray(image).save(files[-1])
      statistics.append(
        fid_score.calculate_activation_statistics(
          files, network, 50, case.num_features, "cpu", num_workers=0
        )
      )
  return float(fid_score.calculate_frechet_distance(*statistics[0], *statistics[1]))


if __name__ == "__main__":
  distance = reference_distance(Case())
  np.savez(GOLDEN / "11_pytorch_fid_192.npz", fid=np.array(distance))
  print(distance)
