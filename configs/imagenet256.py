"""Di[M]O on ImageNet-256: a one-step generator from the published MaskGIT teacher.

    python -m dimo_jax.main --config=configs/imagenet256.py --workdir=runs/imagenet256 \\
      --config.teacher.path=MaskGIT_ImageNet_256.pth \\
      --config.tokenizer.name=vqgan --config.tokenizer.path=last.ckpt

Published (arXiv:2503.15457): FID 6.91, IS 214.0 in one step (FID-50k at sampling temperature 7)
after 30k to 50k generator updates at batch 128 on 2 GPUs; its teacher has FID 6.60 in 16 steps.
Not run to the end here. The settings are those of base.py; Jeffreys -0.2 is the paper's best, the
release ships 0.

With `--config.evaluation.inception=pt_inception-2015-12-05-6726825d.pth` and
`--config.evaluation.statistics=VIRTUAL_imagenet256_labeled.npz` the teacher is evaluated first, at
4, 8 and 16 steps (`--config.evaluation.teacher_first=False` skips it), then the student every 5000
updates; with images (`--config.data.name=prepared`) also the tokenizer's reconstructions.

The training needs classes only, no images. The tokenizer is taming-transformers' ImageNet VQGAN
(f = 16, 1024 codes), `last.ckpt` with its `model.yaml` in the same folder; it decodes the pictures,
40 of each network every 1000 updates. Without it training runs on tokens alone and writes none.

`--config.teacher.path=random` tries the wiring without any file; so does
`--config.tokenizer.path=random` with the VQGAN. The network is 768 wide with 24 layers, 174.2 M
parameters; three of them, two optimisers and an average take 5.6 GB in float32.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """The published settings are the defaults."""
  config = base.get_config()
  config.evaluation.update(protocol="adm-imagenet256", teacher_steps=(4, 8, 16))
  return config
