"""Captions in the format of COCO: one JSON file of images and of annotations, several captions a picture.

Source: Lin et al., "Microsoft COCO: Common Objects in Context", 2014; the format of its caption annotations.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..pictures import ALONE
from ..settings import InputError
from .collecting import MISSING, Collector
from .index import Example


def examples(annotations: Path, images: Path | None, collector: Collector) -> Iterator[Example]:
    """Read the annotations and look for their pictures.

    Args:
        annotations: the JSON file.
        images: where the pictures lie; ``None`` looks beside the file, and where COCO itself has them.
        collector: counts what cannot be used.

    Raises:
        InputError: the file is not of that format, or no folder has any of the pictures.
    """
    listed, captions = _tables(annotations)
    names = {key: image["file_name"] for key, image in listed.items()}
    folder = images or _folder(annotations, names.values())
    spoken: dict[Any, list[str]] = {}
    for number, entry in enumerate(captions):
        key, caption = (entry.get(field) for field in ("image_id", "caption")) if isinstance(entry, dict) else (0, 0)
        if not isinstance(caption, str):
            collector.left_out.add("malformed annotations", f"number {number}")
        elif not isinstance(key, int | str) or key not in names:
            collector.left_out.add(ALONE, f"annotation {number}")
        else:
            spoken.setdefault(key, []).append(caption)
    for key, name in names.items():
        if key not in spoken:
            collector.left_out.add("without a caption", name)
        elif not (folder / name).is_file():
            collector.left_out.add(MISSING, name)
        elif kept := collector.captions(name, spoken[key]):
            yield Example(name, kept, collector.add_file(folder / name))


def _tables(path: Path) -> tuple[dict[Any, Mapping[str, Any]], list[Any]]:
    """Images by their id, and annotations."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError):
        raise InputError(f"--data {path}: cannot be read as text in UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"--data {path}: is not valid JSON: {error}") from None
    listed, captions = (whole.get(name) if isinstance(whole, dict) else None for name in ("images", "annotations"))
    if not isinstance(listed, list) or not isinstance(captions, list):
        raise InputError(f"--data {path}: must have the lists 'images' and 'annotations', as COCO's captions have")
    images: dict[Any, Mapping[str, Any]] = {}
    for number, image in enumerate(listed):
        fitting = isinstance(image, dict) and isinstance(image.get("id"), int | str)
        if not fitting or not isinstance(image.get("file_name"), str):
            raise InputError(f"--data {path}: entry {number} of 'images' must have an 'id' and a 'file_name'")
        images[image["id"]] = image
    return images, captions


def _folder(annotations: Path, names: Any) -> Path:
    """The folder that has the pictures: beside ``captions_train2017.json``, or ``../train2017``."""
    beside = annotations.parent
    part = annotations.stem.rsplit("_", 1)[-1]
    candidates = [beside, beside / part, beside / "images", beside.parent / part, beside.parent / "images" / part]
    for folder in candidates:
        if any((folder / name).is_file() for name in names):
            return folder
    looked = ", ".join(str(folder) for folder in candidates)
    raise InputError(f"--data {annotations}: none of its pictures is in {looked}: say where they are (data.images)")
