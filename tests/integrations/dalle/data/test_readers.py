"""What each kind of data gives, and that all that cannot be used is counted and named."""

import json
import tarfile

import pytest
from distopt.integrations.dalle.data import coco, folders, shards, table
from distopt.integrations.dalle.data.collecting import Collector, read_bytes
from distopt.integrations.dalle.data.filters import Filters
from distopt.integrations.dalle.settings import InputError

from .conftest import draw, spoil, write_coco, write_folder, write_shards, write_tsv


@pytest.fixture
def collector():
    return Collector(Filters())


def _named(examples):
    return {example.name: list(example.captions) for example in examples}


def test_a_folder_gives_pictures_beside_texts(tmp_path, collector):
    write_folder(tmp_path, 3)
    (tmp_path / "000.txt").unlink()
    (tmp_path / "alone.txt").write_text("no picture")
    draw(tmp_path / "deep", 7).with_suffix(".txt").write_text("a\n b ")
    found = list(folders.examples(tmp_path, collector))
    assert _named(found) == {"001.png": ["picture number 1"], "002.png": ["picture number 2"], "deep/007.png": ["a b"]}
    assert [collector.files[e.file] for e in found] == [str(tmp_path / e.name) for e in found]
    assert collector.left_out.names == {"captions without a picture": ["alone.txt"], "without a caption": ["000.png"]}


def test_coco_gives_all_captions_of_a_picture(tmp_path, collector):
    path = write_coco(tmp_path, 3)
    table = json.loads(path.read_text())
    table["annotations"] += [
        {"image_id": 99, "caption": "of nothing"},
        {"image_id": 0},
        7,
        {"image_id": [], "caption": "x"},
    ]
    table["images"] += [{"id": 50, "file_name": "gone.png"}, {"id": 51, "file_name": "silent.png"}]
    table["annotations"].append({"image_id": 50, "caption": "gone"})
    path.write_text(json.dumps(table))
    found = list(coco.examples(path, None, collector))
    assert _named(found) == {f"{i:03}.png": [f"picture number {i} {k}" for k in range(2)] for i in range(3)}
    assert collector.left_out.counts == {
        "captions without a picture": 2,
        "malformed annotations": 2,
        "whose file is missing": 1,
        "without a caption": 1,
    }
    assert collector.left_out.names["whose file is missing"] == ["gone.png"]


@pytest.mark.parametrize("place", ["train", "../train", "images", "."])
def test_cocos_pictures_are_found_beside_the_file(tmp_path, collector, place):
    path = tmp_path / "annotations" / "captions_train.json"
    name = draw((path.parent / place), 0).name
    images = [{"id": "x", "file_name": name}]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": [{"image_id": "x", "caption": "a dog"}]}))
    assert _named(coco.examples(path, None, collector)) == {name: ["a dog"]}
    assert _named(coco.examples(path, path.parent / place, Collector(Filters()))) == {name: ["a dog"]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "UTF-8"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "'images' and 'annotations'"),
        (b'{"images": 3, "annotations": []}', "'images' and 'annotations'"),
        (b'{"images": [{"id": 1}], "annotations": []}', "entry 0 of 'images'"),
        (b'{"images": [4], "annotations": []}', "entry 0 of 'images'"),
        (b'{"images": [{"id": 1, "file_name": "a.png"}], "annotations": []}', "data.images"),
    ],
)
def test_malformed_annotations_are_refused_in_one_line(tmp_path, collector, content, words):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as refused:
        list(coco.examples(path, None, collector))
    assert "\n" not in str(refused.value)


def test_a_table_gives_captions_and_paths(tmp_path, collector):
    path = write_tsv(tmp_path, 3)
    rows = [
        'a "quoted caption\tfiles/000.png\textra',
        "no tab",
        "",
        "far away\thttps://example.org/a.jpg",
        "gone\tfiles/gone.png",
        "no path\t",
        "  \tfiles/001.png",
    ]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join(rows) + "\r\n")
    with path.open("ab") as file:
        file.write(b"caf\xe9\tfiles/002.png\n")
    found = _named(table.examples(path, None, 1, 2, collector))
    assert found["files/000.png"] == ["picture number 0", 'a "quoted caption']
    assert found["files/001.png"] == ["picture number 1"]
    assert collector.left_out.names == {
        "malformed rows": ["line 5", "line 11"],
        "that are addresses and must be downloaded first": ["https://example.org/a.jpg"],
        "whose file is missing": ["files/gone.png", ""],
    }


def test_the_columns_of_a_table_and_its_pictures_may_be_elsewhere(tmp_path, collector):
    name = draw(tmp_path / "far", 0).name
    path = tmp_path / "rows.tsv"
    path.write_text(f"{name}\tx\ta dog\n")
    assert _named(table.examples(path, tmp_path / "far", 3, 1, collector)) == {name: ["a dog"]}


@pytest.mark.parametrize("content", [b"a caption without a picture\n", b"\xff\xfe\xfa\tb\n", b"\x00\x01\x02"])
def test_what_is_no_table_is_refused(tmp_path, collector, content):
    path = tmp_path / "a.tsv"
    path.write_bytes(content)
    with pytest.raises(InputError, match="no row is text of 2 columns"):
        list(table.examples(path, None, 1, 2, collector))


def _indexed(pattern, collector):
    return list(shards.examples(shards.expand(str(pattern)), "caption", collector))


def test_shards_are_indexed_to_the_byte(tmp_path, collector):
    pattern = write_shards(tmp_path, [2, 0, 3])
    found = _indexed(pattern, collector)
    assert [example.name for example in found] == [f"{s:03}.tar/{i:03}" for i, s in enumerate([0, 0, 2, 2, 2])]
    assert collector.left_out.counts == {}
    for i, example in enumerate(found):
        assert example.captions == [f"picture number {i}"]
        data = read_bytes(collector.files[example.file], example.offset, example.length)
        assert data == (tmp_path / "drawn" / f"{i:03}.png").read_bytes()


def test_shards_are_read_as_the_library_reads_them(tmp_path, collector):
    import webdataset

    pattern = write_shards(tmp_path, [3, 2])
    ours = _indexed(pattern, collector)
    theirs = list(webdataset.WebDataset(str(pattern), shardshuffle=False))
    assert [e.name.split("/")[1] for e in ours] == [sample["__key__"] for sample in theirs]
    data = [read_bytes(collector.files[e.file], e.offset, e.length) for e in ours]
    assert data == [sample["png"] for sample in theirs]


def _tar(path, files):
    import io

    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_samples_that_cannot_be_used_are_named(tmp_path, collector):
    picture = draw(tmp_path, 1).read_bytes()
    files = [
        ("__meta__", b"x"),
        ("dir/a.b/1.png", picture),
        ("dir/a.b/1.seg.png", b"not the picture"),
        ("dir/a.b/1.txt", b"one"),
        ("2.png", picture),
        ("3.txt", b"no picture"),
        ("4.png", picture),
        ("4.json", b"{"),
        ("5.png", picture),
        ("5.json", b'{"caption": ["a", "b"]}'),
        ("6.PNG", picture),
        ("6.txt", b" \n"),
        ("7.png", picture),
        ("7.png", picture),
        ("7.txt", b"seven"),
        ("8.json", b"[]"),
        ("8.png", picture),
    ]
    _tar(tmp_path / "s.tar", files)
    found = _named(_indexed(tmp_path / "s.tar", collector))
    assert found == {"s.tar/dir/a.b/1": ["one"], "s.tar/5": ["a", "b"], "s.tar/7": ["seven"]}
    assert collector.left_out.names == {
        "without a caption": ["s.tar/2"],
        "captions without a picture": ["s.tar/3"],
        "with an unreadable caption": ["s.tar/4", "s.tar/8"],
        "with an empty caption": ["s.tar/6"],
        "files of the same name as another in their shard": ["7.png"],
    }


def test_damaged_shards_give_what_lies_before_the_damage(tmp_path, collector):
    write_shards(tmp_path, [2, 2, 2, 2, 2])
    shard = [tmp_path / f"{i:03}.tar" for i in range(5)]
    with tarfile.open(shard[0]) as archive:
        last = archive.getmembers()[-1].offset_data
    shard[0].write_bytes(shard[0].read_bytes()[: last + 5])  # in the middle of a file
    with tarfile.open(shard[1]) as archive:
        second = next(member for member in archive if member.name.startswith("003")).offset
    shard[1].write_bytes(shard[1].read_bytes()[:second])  # between two files
    damaged = bytearray(shard[2].read_bytes())
    with tarfile.open(shard[2]) as archive:
        second = next(member for member in archive if member.name.startswith("005")).offset
    damaged[second : second + 512] = b"x" * 512
    shard[2].write_bytes(damaged)
    shard[3].write_bytes(b"\x1f\x8b" + bytes(600))
    shard[4].unlink()
    found = _indexed(tmp_path / "{000..004}.tar", collector)
    assert [e.name for e in found] == ["000.tar/000", "001.tar/002", "002.tar/004"]
    assert collector.left_out.names["shards that are missing"] == ["004.tar"]
    assert collector.left_out.names["shards that are no tar files, or compressed ones"] == ["003.tar"]
    cut = "shards that are damaged or cut short, whose beginning is used"
    assert collector.left_out.names[cut] == ["000.tar", "001.tar", "002.tar"]


@pytest.mark.parametrize("pattern", ["{000..001}.tar", "*.tar", "00?.tar", "000.tar::{root}/001.tar", "{000,001}.tar"])
def test_patterns_name_shards(tmp_path, pattern):
    write_shards(tmp_path, [1, 1])
    found = shards.expand(f"{tmp_path}/{pattern.replace('{root}', str(tmp_path))}")
    assert found == [str(tmp_path / "000.tar"), str(tmp_path / "001.tar")]


@pytest.mark.parametrize(
    ("pattern", "words"), [("{0..3}.tar", "no such shard"), ("*.tar", "no such"), ("{0..3.tar", "braces")]
)
def test_a_pattern_without_a_shard_is_refused(tmp_path, pattern, words):
    with pytest.raises(InputError, match=words):
        shards.expand(str(tmp_path / pattern))


def test_pictures_of_another_shape_are_left_out(tmp_path):
    for i, size in enumerate([(20, 10), (10, 21), (10, 10), (31, 10)]):
        draw(tmp_path, i, size).with_suffix(".txt").write_text("a b c")
    draw(tmp_path, 9).with_suffix(".txt").write_text("a b c")
    spoil(tmp_path / "009.png")
    (tmp_path / "009.png").write_bytes(b"no picture")
    collector = Collector(Filters(aspect=2.0))
    found = collector.of_fitting_shape(folders.examples(tmp_path, collector))
    assert [example.name for example in found] == ["000.png", "002.png"]
    assert collector.left_out.names == {
        "broken": ["009.png"],
        "more than 2 times as long as wide": ["001.png", "003.png"],
    }
