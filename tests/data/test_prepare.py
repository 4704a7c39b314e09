import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import grain
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from dimo_jax.data import preparation
from dimo_jax.data.listing import is_imagenet, list_source
from dimo_jax.data.pipeline import image_batches
from dimo_jax.data.preparation import prepare
from dimo_jax.data.prepared import MANIFEST
from dimo_jax.data.shards import Shard
from dimo_jax.data.sources import load_source
from dimo_jax.health import RunStopped, disk_is_full
from dimo_jax.preemption import STOP, Preempted
from dimo_jax.types import UserError

ROOT = Path(__file__).resolve().parents[2]
SIZE = 6
CLASSES = ("b", "a", "c")
BROKEN = {  # within train/a
  "cut.jpg": "cannot be read as an image: image file is truncated",
  "deep.png": "cannot be read as an image: more than 8 bits a pixel and channel",
  "empty.jpg": "is empty",
  "flipped.png": "cannot be read as an image: ",
  "narrow.png": "cannot be read as an image: 3x400 pixels are too narrow for a square",
  "page.jpg": "cannot be read as an image: cannot identify image file",
}


def noise(seed, h, w, c=3):
  return np.random.default_rng(seed).integers(256, size=(h, w, c), dtype=np.uint8)


def write_tree(root, number=4):
  """Images of many sizes, half of them JPEGs: `number` of each class to train on, 2 to validate."""
  for split, count in [("train", number), ("val", 2)]:
    for c, name in enumerate(CLASSES):
      (root / split / name).mkdir(parents=True)
      for i in range(count):
        image = Image.fromarray(noise(100 * c + i + len(split), 5 + 3 * i, 9 + c))
        path = root / split / name / f"{i}_{name}_{split}"  # flat files lie in another order
        image.save(path.with_suffix(".JPEG" if i % 2 else ".png"))
  return root


def break_tree(root):
  """Adds what cannot be used to train/a, and one of each odd kind that can be to train/b."""
  a, b, image = root / "train/a", root / "train/b", Image.fromarray(noise(0, 40, 40))
  image.save(a / "cut.jpg")
  os.truncate(a / "cut.jpg", 900)
  Image.fromarray(np.full((8, 8), 9999, np.uint16)).save(a / "deep.png")
  (a / "empty.jpg").touch()
  image.save(a / "flipped.png")
  with open(a / "flipped.png", "r+b") as stream:
    stream.seek(60)
    stream.write(bytes(50))
  image.resize((3, 400)).save(a / "narrow.png")
  (a / "page.jpg").write_text("<html>")
  (a / "notes.txt").write_text("no image")
  (a / ".hidden.png").touch()
  (a / "deeper").mkdir()
  image.save(root / "train" / "outside.png")
  image.convert("CMYK").save(b / "cmyk.jpg")
  image.convert("L").save(b / "grey.jpg")
  image.convert("P").save(b / "palette.png")
  image.convert("RGBA").save(b / "alpha.png")
  image.resize((3, 2)).save(b / "tiny.png")
  image.save(b / "wrong.jpg", "PNG")
  exif = Image.Exif()
  exif[0x0112] = 6
  image.save(b / "turned.jpg", exif=exif)


def prepared(source, out, **options):
  arguments = {"size": SIZE, "num_workers": 1, "images_per_shard": 4} | options
  prepare(str(source), str(out), **arguments)
  return Path(out)


def contents(folder, but=()):
  """Hashes of all files of a folder by name."""
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob("*"))
    if path.is_file() and path.name not in but
  }


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
  return write_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def uninterrupted(tree, tmp_path_factory):
  return prepared(tree, tmp_path_factory.mktemp("prepared") / "out")


def test_images_of_another_size_than_the_config_are_refused(uninterrupted):
  assert load_source("prepared", "test", str(uninterrupted), image_size=SIZE).image_shape[0] == SIZE
  with pytest.raises(UserError, match=r"data\.image_size=7 must be 6, as the images of data\.path"):
    load_source("prepared", "test", str(uninterrupted), image_size=SIZE + 1)


@pytest.mark.parametrize("split", ["train", "test"])
def test_training_sees_what_the_folders_hold(split, tree, uninterrupted):
  """Every pixel: cropped and scaled alike, and nothing is lost in the records."""
  source = load_source("prepared", split, str(uninterrupted))
  wanted = load_source("folder", split, str(tree), image_size=SIZE)
  assert (source.num_classes, source.image_shape, source.num_levels) == (3, (SIZE, SIZE, 3), 256)
  assert source.labels.tolist() == wanted.labels.tolist()
  assert len(source) == len(wanted) == (12 if split == "train" else 6)
  for i in reversed(range(len(source))):
    assert np.array_equal(source[i]["image"], wanted[i]["image"])
    assert source[i]["class_id"] == wanted.labels[i]
  options = {"batch_size": 5, "seed": 0, "start_step": 0, "num_steps": 4, "flip": True}
  for batch, other in zip(
    image_batches(source, **options), image_batches(wanted, **options), strict=True
  ):
    assert np.array_equal(batch["image"], other["image"])
    assert np.array_equal(batch["class_id"], other["class_id"])


def test_grain_and_tfds_read_it(uninterrupted):
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(str(uninterrupted))
  assert builder.info.features["label"].names == sorted(CLASSES)
  source = load_source("prepared", "test", str(uninterrupted))
  records = builder.as_data_source("validation")
  assert [record["label"] for record in records] == source.labels.tolist()
  levels = np.round((source[3]["image"] + 1) * 127.5)
  assert np.array_equal(records[3]["image"], levels)
  assert records[3]["file_name"] == b"validation/b/1_b_val.JPEG"
  paths = sorted(str(path) for path in uninterrupted.glob("*-train.array_record-*"))
  assert len(paths) == 3  # of four images each
  raw = grain.sources.ArrayRecordDataSource(paths)
  assert len(raw) == 12
  assert builder.info.features.deserialize_example_np(raw[5])["label"] == 1
  # In order of name; protobuf's own differs from one process to the next.
  assert raw[5].index(b"file_name") < raw[5].index(b"image") < raw[5].index(b"label")


def test_a_folder_of_classes_is_divided(tree, tmp_path):
  """Each class by the names of its images: no image is lost, none is in both, none moves."""
  source = tmp_path / "classes"
  for name in CLASSES:
    for split in ("train", "val"):
      shutil.copytree(tree / split / name, source / name, dirs_exist_ok=True)
  (source / "notes.png").touch()
  listing = list_source(str(source), val_fraction=0.3)
  names = {
    split: {entry.name.removeprefix(f"{split}/") for entry in entries}
    for split, entries in listing.splits.items()
  }
  assert {split: len(found) for split, found in names.items()} == {"train": 12, "validation": 6}
  assert names["train"] | names["validation"] == {
    str(path.relative_to(source)) for path in source.glob("*/*")
  }
  assert listing.skipped == [("source/notes.png", "lies in no class")]
  assert [entry.label for entry in listing.splits["validation"]] == [0, 0, 1, 1, 2, 2]
  more = list_source(str(source), val_fraction=0.5)
  assert names["validation"] < {
    entry.name.removeprefix("validation/") for entry in more.splits["validation"]
  }
  for fraction, number in [(0.01, 1), (0.99, 5)]:  # of six images each
    splits = list_source(str(source), val_fraction=fraction).splits
    assert len(splits["validation"]) == number * len(CLASSES)
  damaged = min(names["validation"])
  (source / damaged).write_bytes(b"no image")
  out = prepared(source, tmp_path / "out", val_fraction=0.3)
  assert len(load_source("prepared", "test", str(out))) == 6 - 1
  report = json.loads((out / "report.json").read_text())
  assert [item["file"] for item in report["corrupt"]] == [damaged]
  assert [item["file"] for item in report["skipped"]] == ["notes.png"]
  with pytest.raises(UserError, match=r"with val_fraction 0\.3, not 0\.5; name"):
    prepared(source, out, val_fraction=0.5)


def test_shards_are_small_where_images_are_few(tree, tmp_path):
  sizes = {18: 32, 16 * 100: 100, 16 * 100 + 1: 101, 1_281_167: 1024}
  assert {num: preparation._shard_size(num) for num in sizes} == sizes
  out = prepared(tree, tmp_path / "out", images_per_shard=0)
  assert json.loads((out / MANIFEST).read_text())["images_per_shard"] == 32
  old = prepared(tree, tmp_path / "old", images_per_shard=4)
  before = contents(old)
  prepared(tree, old, images_per_shard=0)  # as it was begun
  assert contents(old) == before
  with pytest.raises(UserError, match="with images_per_shard 4, not 5; name a new folder"):
    prepared(tree, old, images_per_shard=5)
  (old / MANIFEST).write_text('{"format": 1, "size": 6}')
  with pytest.raises(UserError, match="with images_per_shard None, not 32"):
    prepared(tree, old, images_per_shard=0)


def test_what_cannot_be_used_is_named_and_left_out(tree, tmp_path, capsys):
  shutil.copytree(tree, tmp_path / "tree")
  break_tree(tmp_path / "tree")
  out = prepared(tmp_path / "tree", tmp_path / "out", images_per_shard=2)  # one shard is all broken
  report = json.loads((out / "report.json").read_text())
  corrupt = {item["file"].removeprefix("train/a/"): item["reason"] for item in report["corrupt"]}
  assert sorted(corrupt) == sorted(BROKEN)
  for name, reason in BROKEN.items():
    assert corrupt[name].startswith(reason)
    assert " at 0x" not in corrupt[name]
  assert {item["file"]: item["reason"] for item in report["skipped"]} == {
    "train/a/.hidden.png": "hidden",
    "train/a/deeper": "a folder within a class",
    "train/a/notes.txt": "does not end in .png, .jpg, .jpeg, .webp",
    "train/outside.png": "lies in no class",
  }
  kinds = report["kinds"]
  assert {kind: kinds.get(f"mode {kind}", 0) for kind in ("CMYK", "L", "P", "RGBA")} == {
    "CMYK": 1,
    "L": 1,
    "P": 1,
    "RGBA": 1,
  }
  assert kinds["EXIF rotation ignored"] == 1
  assert kinds["enlarged"] == 6 + 1  # those five pixels high, and the tiny one
  assert report["images"] == {"train": 12 + 7, "validation": 6}
  source = load_source("prepared", "train", str(out))
  assert np.bincount(source.labels).tolist() == [4, 4 + 7, 4]
  assert all(source[i]["class_id"] == label for i, label in enumerate(source.labels))
  printed = capsys.readouterr().out
  assert f"corrupt: 6, all named in {out}/report.json" in printed
  assert "EXIF rotation ignored: 1" in printed
  prepared(tmp_path / "tree", out, images_per_shard=2)
  left_out = f"is prepared already, without {len(BROKEN)} files that could not be read; a new --out"
  assert left_out in capsys.readouterr().out
  (out / "report.json").unlink()
  prepared(tmp_path / "tree", out, images_per_shard=2)
  assert f"{out} is prepared already\n" in capsys.readouterr().out


def write_tars(tree, root, nested=True):
  """The tree as ImageNet's tar files: a tar for each class within train's, validation flat."""
  root.mkdir()
  with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
    for name in CLASSES:
      if not nested:
        outer.add(tree / "train" / name, f"train/{name}")
        continue
      stream = io.BytesIO()
      with tarfile.open(fileobj=stream, mode="w") as inner:
        for path in sorted((tree / "train" / name).iterdir(), reverse=True):
          inner.add(path, path.name)
      member = tarfile.TarInfo(f"{name}.tar")
      member.size = stream.tell()
      stream.seek(0)
      outer.addfile(member, stream)
  labels = {path.name: path.parent.name for path in (tree / "val").glob("*/*")}
  with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as flat:
    for path in (tree / "val").glob("*/*"):
      flat.add(path, path.name)
  (root / "labels.txt").write_text("\n".join(labels[name] for name in sorted(labels)) + "\n")


@pytest.mark.parametrize("nested", [True, False])
def test_tar_files_give_the_bytes_of_the_folders(nested, tree, uninterrupted, tmp_path):
  write_tars(tree, tmp_path / "tars", nested)
  labels_path = str(tmp_path / "tars/labels.txt")
  out = prepared(tmp_path / "tars", tmp_path / "out", labels_path=labels_path)
  assert contents(out, but=["report.json"]) == contents(uninterrupted, but=["report.json"])


@pytest.mark.parametrize("layout", ["classes", "flat", "tars"])
def test_the_report_says_where_a_damaged_file_lies(layout, tree, tmp_path):
  source = tmp_path / "source"
  shutil.copytree(tree, source)
  damaged = min((source / "val" / "b").iterdir())
  damaged.write_bytes(b"no image")
  labels = {path.name: path.parent.name for path in (source / "val").glob("*/*")}
  options, wanted = {}, f"val/b/{damaged.name}"
  if layout == "flat":
    flat_validation(source)
    wanted = f"val/{damaged.name}"
  if layout == "tars":
    write_tars(source, tmp_path / "tars")
    source, wanted = tmp_path / "tars", f"ILSVRC2012_img_val.tar/b/{damaged.name}"
  if layout != "classes":
    (tmp_path / "labels.txt").write_text("".join(f"{labels[name]}\n" for name in sorted(labels)))
    options = {"labels_path": str(tmp_path / "labels.txt")}
  out = prepared(source, tmp_path / "out", **options)
  (found,) = json.loads((out / "report.json").read_text())["corrupt"]
  assert found["file"] == wanted


def test_imagenet_is_recognised_and_its_validation_labels_are_known(tmp_path):
  import tensorflow_datasets as tfds

  listed = tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()
  with tarfile.open(tmp_path / "train.tar", "w") as tar:
    for name in reversed(listed):
      tar.addfile(tarfile.TarInfo(f"{name}/{name}_1.JPEG"))
  with tarfile.open(tmp_path / "val.tar", "w") as tar:
    for i in range(50_000, 0, -1):
      tar.addfile(tarfile.TarInfo(f"ILSVRC2012_val_{i:08d}.JPEG"))
  listing = list_source(str(tmp_path))
  assert is_imagenet(listing.classes)
  assert not is_imagenet(listed[1:])
  names = {entry.name: entry.label for entry in listing.splits["validation"]}
  # The first image is a sea snake, class 65 of published classifiers.
  assert names["validation/n01751748/ILSVRC2012_val_00000001.JPEG"] == 65
  assert np.bincount(list(names.values())).tolist() == [50] * 1000


KILLED = """
import os, signal, sys
from dimo_jax.data import preparation, shards
count, decode = 0, shards.decode_image
def decode_image(*args, **options):
  global count
  count += 1
  if count == 7:
    os.kill(os.getpid(), signal.SIGKILL)
  return decode(*args, **options)
shards.decode_image = decode_image
preparation.prepare(sys.argv[1], sys.argv[2], 6, num_workers=1, images_per_shard=4)
"""


def test_killed_in_the_middle_of_a_shard_it_goes_on(tree, uninterrupted, tmp_path):
  out = tmp_path / "out"
  command = [sys.executable, "-c", KILLED, str(tree), str(out)]
  killed = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert len(list(out.glob("*.tmp"))) == 1
  (finished,) = out.glob("*-train.array_record-?????-of-00003")
  before = finished.stat()
  with pytest.raises(UserError, match="is not finished: run the command that prepares it again"):
    load_source("prepared", "train", str(out))
  prepared(tree, out)
  assert finished.stat().st_ino == before.st_ino  # kept, not written again
  assert finished.stat().st_mtime_ns == before.st_mtime_ns
  assert contents(out) == contents(uninterrupted)


def test_several_workers_write_the_same_bytes(tree, uninterrupted, tmp_path):
  assert contents(prepared(tree, tmp_path / "out", num_workers=2)) == contents(uninterrupted)


TWO_SHARDS = dict.fromkeys("ab", Shard("", [], SIZE, 1))


def interrupts_are_held(shard=None):
  del shard
  return {"held": signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])}


def test_interrupts_are_for_the_main_process(monkeypatch):
  monkeypatch.setattr(preparation, "write_shard", interrupts_are_held)
  seen = {}
  preparation._run(TWO_SHARDS, 2, seen.__setitem__)
  assert seen == {"a": {"held": True}, "b": {"held": True}}
  assert interrupts_are_held() == {"held": False}


def die(shard):
  del shard
  os._exit(1)


@pytest.mark.parametrize(
  ("signalled", "error", "message"),
  [
    (None, RunStopped, "a worker was killed, perhaps for want of memory"),
    (signal.SIGTERM, Preempted, "SIGTERM: the same command goes on from here"),
  ],
  ids=["alone", "with the main process"],
)
def test_workers_that_are_killed(signalled, error, message, monkeypatch):
  wait = preparation.wait

  def waiting(*arguments, **options):
    monkeypatch.setattr(STOP, "signal", signalled)
    return wait(*arguments, **options)

  monkeypatch.setattr(preparation, "write_shard", die)
  monkeypatch.setattr(preparation, "wait", waiting)
  monkeypatch.setattr(STOP, "signal", None)
  with pytest.raises(error, match=message):
    preparation._run(TWO_SHARDS, 2, lambda *_: None)


def die_later(shard):
  """Writes nothing; where there is a file to wait for it dies instead."""
  while shard.path and not os.path.exists(shard.path):
    time.sleep(0.01)
  return os._exit(1) if shard.path else {}


def test_a_worker_that_dies_while_another_shard_is_kept(tmp_path, monkeypatch):
  monkeypatch.setattr(preparation, "write_shard", die_later)
  marker, seen = tmp_path / "marker", []

  def keep(name, record):
    del record
    seen.append(name)
    marker.touch()
    time.sleep(1.0)  # the pool is broken when the third is handed to it

  shards = {
    name: Shard(path, [], SIZE, 1) for name, path in [("a", ""), ("b", str(marker)), ("c", "")]
  }
  with pytest.raises(RunStopped, match="a worker was killed"):
    preparation._run(shards, 2, keep)
  assert seen == ["a"]


def test_a_signal_stops_between_shards(tree, uninterrupted, tmp_path, monkeypatch):
  out = tmp_path / "out"
  monkeypatch.setattr(STOP, "signal", signal.SIGTERM)
  with pytest.raises(Preempted):
    prepared(tree, out)
  assert [path.name for path in out.iterdir()] == ["unfinished"]
  monkeypatch.setattr(STOP, "signal", None)
  assert contents(prepared(tree, out)) == contents(uninterrupted)


def test_a_shard_of_another_length_than_recorded_is_written_again(tree, uninterrupted, tmp_path):
  out = tmp_path / "out"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("dimo_jax.data.preparation._finish", lambda *_: None)
    prepared(tree, out)
  os.truncate(next(out.glob("*-train.array_record-00001-*")), 1000)
  assert contents(prepared(tree, out)) == contents(uninterrupted)


def test_a_finished_one_is_left_alone(tree, uninterrupted, capsys):
  before = contents(uninterrupted)
  prepared(tree, uninterrupted)
  assert f"{uninterrupted} is prepared already\n" in capsys.readouterr().out
  assert contents(uninterrupted) == before


def test_a_full_disk_is_recognised():
  with pytest.raises(RuntimeError) as error:
    writer = ArrayRecordWriter("/dev/full", "group_size:1,uncompressed")
    writer.write(bytes(2**21))
    writer.close()
  assert disk_is_full(error.value)


def remove(name):
  return lambda root: shutil.rmtree(root / name)


def only(name):
  """The source becomes what was one of its folders."""

  def change(root):
    (root / name).rename(root.with_name("part"))
    shutil.rmtree(root)
    root.with_name("part").rename(root)

  return change


def flat_validation(root):
  for path in (root / "val").glob("*/*"):
    path.rename(root / "val" / path.name)
  for name in CLASSES:
    (root / "val" / name).rmdir()


def no_tar(root):
  remove("train")(root)
  (root / "train.tar").write_bytes(b"no tar file" * 100)


@pytest.mark.parametrize(
  ("change", "options", "message"),
  [
    (None, {"size": 0}, "--size=0 must be positive"),
    (None, {"size": -4}, "--size=-4 must be positive"),
    (None, {"num_workers": -1}, "--workers=-1 must not be negative"),
    (shutil.rmtree, {}, "--source='{}' must be a folder that holds train and val, or tar files"),
    (remove("train"), {}, "--source='{}' must hold one of train, ILSVRC2012_img_train.tar"),
    (remove("val"), {}, "--source='{}' must hold one of val, ILSVRC2012_img_val.tar"),
    (
      lambda root: (root / "train").rename(root / "all"),
      {},
      "--source='{}' must hold one of train,",
    ),
    (None, {"val_fraction": 1.0}, "--val_fraction=1 must be between 0 and 1, such as 0.1"),
    (
      None,
      {"val_fraction": 0.1},
      "--val_fraction=0.1 is for a folder of classes, and --source='{}'",
    ),
    (only("train/b"), {"val_fraction": 0.1}, "--source='{}' has no images in folders of classes"),
    (
      only("train"),
      {},
      "--source='{}' must hold one of train, ILSVRC2012_img_train.tar, train.tar; it holds folders"
      " of images: --val_fraction=0.1 divides each",
    ),
    (
      lambda root: (only("val")(root), (root / "c/1_c_val.JPEG").unlink()),
      {"val_fraction": 0.1},
      "--val_fraction=0.1: {}/c has one image, must have at least two",
    ),
    (
      lambda root: [remove(f"train/{name}")(root) for name in CLASSES],
      {},
      "{}/train has no images in folders of classes; images end in .png",
    ),
    (
      lambda root: [
        (remove(f"train/{name}")(root), (root / f"train/{name}.tar").touch()) for name in CLASSES
      ],
      {},
      "{}/train has no images in folders of classes; images end in .png, .jpg, .jpeg, .webp; it"
      " holds .tar files: unpack each",
    ),
    (
      lambda root: [path.unlink() for path in (root / "train/b").iterdir()],
      {},
      "{}/train/b has no images; they end in .png",
    ),
    (
      lambda root: (root / "val/b").rename(root / "val/d"),
      {},
      "{}/val has classes that train lacks: d",
    ),
    (no_tar, {}, "{}/train.tar is no whole uncompressed tar file: "),
    (None, {"labels_path": "x.txt"}, "--val_labels='x.txt' has no use"),
    (flat_validation, {}, "{}/val has its images in no folders of classes: name a file"),
    (flat_validation, {"labels_path": "/no/such"}, "--val_labels='/no/such' cannot be read: No"),
    (
      flat_validation,
      {"labels_path": str(ROOT / "Makefile")},
      f"--val_labels='{ROOT}/Makefile' has ",
    ),
  ],
)
def test_bad_input_is_one_line_before_work(change, options, message, tmp_path):
  source = write_tree(tmp_path / "tree")
  if change:
    change(source)
  with pytest.raises(UserError) as error:
    prepared(source, tmp_path / "out", **options)
  assert str(error.value).startswith(message.replace("{}", str(source)))
  assert "\n" not in str(error.value)
  assert not (tmp_path / "out").exists()


def test_out_must_be_its_own(tree, uninterrupted, tmp_path):
  def message(source, out, **options):
    before = contents(Path(out))
    with pytest.raises(UserError) as error:
      prepared(source, out, **options)
    assert contents(Path(out)) == before
    return str(error.value)

  assert message(tree, tree / "out").startswith(f"--out='{tree}/out' must not lie in --source=")
  assert message(tree, tree).startswith(f"--out='{tree}' must not lie in --source=")
  holds = f"--out='{uninterrupted}' holds another preparation, "
  assert message(tree, uninterrupted, size=4) == f"{holds}with size 6, not 4; name a new folder"
  other = write_tree(tmp_path / "other", number=3)
  assert message(other, uninterrupted) == f"{holds}of other files; name a new folder"
  (other / "train/c").rename(other / "train/d")
  (other / "val/c").rename(other / "val/d")
  assert message(other, uninterrupted).startswith(f"{holds}of other classes, of other files;")
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine/letter.txt").touch()
  assert message(tree, tmp_path / "mine") == (
    f"--out='{tmp_path}/mine' holds other files; name a new or empty folder"
  )
  (tmp_path / "file").touch()
  assert message(tree, tmp_path / "file").startswith(f"--out='{tmp_path}/file' cannot be ")


def rewrite(name, old, new):
  return lambda out: (out / name).write_text((out / name).read_text().replace(old, new))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda out: (out / "prepared.json").unlink(),
      "data.path='{}' must be a folder that python -m dimo_jax.data.prepare made, with data.name=",
    ),
    (
      lambda out: (out / "train.labels.npy").unlink(),
      "data.path='{}' is not whole, [Errno 2] No such file or directory: '{}/train.labels",
    ),
    (rewrite("prepared.json", "}", ""), "data.path='{}' is not whole, Expecting"),
    (rewrite("features.json", "{", ""), "data.path='{}' is not whole, "),
    (lambda out: (out / "dataset_info.json").unlink(), "data.path='{}' is not whole, "),
    (
      lambda out: (out / "images-train.array_record-00001-of-00003").unlink(),
      "data.path='{}' is not whole, {}/images-train.array_record-00001-of-00003 is missing",
    ),
    (
      lambda out: shutil.copy(out / "validation.labels.npy", out / "train.labels.npy"),
      "data.path='{}' is not whole: 12 records and 6 labels of 'train', must be 12 each",
    ),
  ],
)
def test_a_damaged_preparation_is_one_line(change, message, uninterrupted, tmp_path):
  out = tmp_path / "out"
  shutil.copytree(uninterrupted, out)
  change(out)
  with pytest.raises(UserError) as error:
    load_source("prepared", "train", str(out))
  assert str(error.value).startswith(message.replace("{}", str(out)))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--size=64"], "--source is missing; name the folder"),
    (["--source=/tmp", "--size=64"], "--out is missing; name a folder"),
    (["--source=/tmp", "--out=/tmp/x", "--size=big"], "--size=big must be a whole number"),
  ],
)
def test_the_command_answers_in_one_line(arguments, message):
  command = [sys.executable, "-m", "dimo_jax.data.prepare", *arguments]
  result = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
  assert result.returncode == 2
  assert result.stderr.startswith(f"error: {message}")
  assert result.stderr.count("\n") == 1
