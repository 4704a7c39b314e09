"""Prepares images for training: `python -m dimo_jax.data.prepare --source=... --size=256 --out=...`

The source is a folder {train,val}/<class>/*.{png,jpg,jpeg,webp}, or one with ImageNet's tar files
ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or with --val_fraction=0.1 a folder of classes
that are not divided yet. What comes out is read by data.name="prepared",
by grain's ArrayRecordDataSource and by tfds.builder_from_directory.
"""

from absl import flags

from dimo_jax import cli


def main() -> None:
  """Runs the command line."""
  # Not at import: main.py has a flag --out too, and workers import this file.
  source = flags.DEFINE_string("source", "", "Folder with train and val, or ImageNet's tar files.")
  out = flags.DEFINE_string("out", "", "Folder to write; the same command goes on in it.")
  size = flags.DEFINE_integer("size", 0, "Pixels a side.")
  workers = flags.DEFINE_integer("workers", 0, "Processes; 0 is one for each core.")
  labels = flags.DEFINE_string(
    "val_labels", "", "Class names of validation images that lie flat, a line for each."
  )
  fraction = flags.DEFINE_float(
    "val_fraction", 0.0, "Part of each class to validate on, of a source without train and val."
  )

  def dispatch() -> None:
    from dimo_jax.data.preparation import prepare  # a mistyped flag is answered before

    prepare(
      source.value,
      out.value,
      size.value,
      num_workers=workers.value,
      labels_path=labels.value,
      val_fraction=fraction.value,
    )

  cli.run(dispatch, needs_config=False)


if __name__ == "__main__":
  main()
