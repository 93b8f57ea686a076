"""Data of every kind with the same pictures: each has a colour of its own, by which it is known again."""

import json
from pathlib import Path

import pytest
from PIL import Image

SIDE = 8


def colour(i):
    return ((37 * i) % 251, (91 * i) % 241, i % 256)


def which(pixels):
    """The number of the picture that ``pixels``, uint8 (H, W, 3), come from."""
    return int(pixels[0, 0, 2])


def draw(folder, i, size=(SIDE, SIDE)):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{i:03}.png"
    Image.new("RGB", size, colour(i)).save(path)
    return path


def spoil(path):
    path.write_bytes(path.read_bytes()[:40])


def write_folder(root, n):
    for i in range(n):
        draw(root, i).with_suffix(".txt").write_text(f"picture number {i}")
    return root


def write_coco(root, n, several=2):
    names = [draw(root / "train", i).name for i in range(n)]
    annotations = [{"image_id": i, "caption": f"picture number {i} {k}"} for i in range(n) for k in range(several)]
    path = root / "captions_train.json"
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def write_tsv(root, n):
    rows = [f"picture number {i}\t{draw(root / 'files', i).relative_to(root)}\n" for i in range(n)]
    path = root / "rows.tsv"
    path.write_text("".join(rows), encoding="utf-8")
    return path


def write_shards(root, sizes, spoiled=()):
    """Shards of these sizes, by the library's own writer."""
    from webdataset import TarWriter

    root.mkdir(parents=True, exist_ok=True)
    i = 0
    for shard, size in enumerate(sizes):
        with TarWriter(str(root / f"{shard:03}.tar")) as writer:
            for _ in range(size):
                data = draw(root / "drawn", i).read_bytes()
                data = data[:40] if i in spoiled else data
                caption = {"txt": f"picture number {i}"} if i % 2 else {"json": {"caption": f"picture number {i}"}}
                writer.write({"__key__": f"{i:03}", "png": data, **caption})
                i += 1
    return root / f"{{000..{len(sizes) - 1:03}}}.tar"


WRITERS = {
    "folder": write_folder,
    "coco": write_coco,
    "tsv": write_tsv,
    "webdataset": lambda root, n: write_shards(root, [n // 4, 0, n - n // 4 - 1, 1]),
}


@pytest.fixture(params=list(WRITERS))
def each_kind(request, tmp_path):
    """The kind, and what ``--data`` would be, of 24 pictures."""
    return request.param, Path(WRITERS[request.param](tmp_path / "data", 24))
