"""``distopt report``: what stands on the page, of whose files, and what is told where they are damaged or missing."""

import math
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from distopt.commands.main import main
from distopt.monitor.records import read_records
from distopt.monitor.sections import sort_curves

pytest.importorskip("tensorboard")
pytest.importorskip("matplotlib")
LAYERS = [f"blocks.{i}.weight" for i in range(9)]


def write(folder, points, start=1000.0, name=""):
    """Write scalars with torch's writer: of each tag, values by step; a second a step."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), filename_suffix=name) as writer:
        for tag, values in points.items():
            for step, value in values.items():
                writer.add_scalar(tag, value, step, walltime=start + step)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with everything that distopt writes, and a loss that was once not a number."""
    steps = range(0, 200, 10)
    falling = {step: 2.0 + math.exp(-step / 50) for step in range(200)} | {77: math.nan}
    points = {
        "train/loss": falling,
        "train/learning_rate": dict.fromkeys(steps, 0.1),
        "distopt/saving": dict.fromkeys(steps, 0.925),
        "distopt/skipped_steps": {step: step // 100 for step in steps},
        "distopt/reconstruction_error": dict.fromkeys(steps, 0.5),
        "distopt.scaler/scale_log2/mlp": {step: 13 - step // 100 for step in steps},
        **{f"distopt.reconstruction_error/{name}": dict.fromkeys(steps, 0.1 + i / 20) for i, name in enumerate(LAYERS)},
    }
    return write(tmp_path_factory.mktemp("report") / "run <b>&", points)


class Page(HTMLParser):
    """What a browser would see of a page: elements, that all are closed, text, and whatever would be loaded."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.text, self.loaded = [], {}, "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found[tag] = self.found.get(tag, 0) + 1
        self.loaded += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.loaded += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def page(run):
    assert main(["report", str(run)]) == 0
    return Page((run / "report.html").read_text()), (run / "report.html").read_text()


def test_every_section_is_there(page):
    titles = re.findall("<h2>(.*?)</h2>", page[1])
    assert titles == ["Saving", "Errors of the compression", "Gradient scales", "Losses", "Steps", "Everything else"]
    plots = ["not sent", "reconstruction error", "reconstruction error by layer", "log2 of the scale", "loss"]
    for plot in [*plots, "train · seconds a step", "skipped steps", "learning_rate"]:
        assert re.search(rf"<figcaption><b>[^<]*{plot}</b>", page[1]), plot
    assert page[0].found["svg"] == 8


def test_figures_on_the_page_are_those_of_the_run(page):
    text = " ".join(page[0].text.split())
    assert "92.5 %bytes not sent" in text
    assert "train/loss: 1 of 200 values are NaN or infinite" in text
    assert "blocks.8.weight 0.5" in text  # the worst layers are in the legend
    assert "From 1970-01-01 00:16 UTC" in text
    assert "1train · seconds a step" in text
    assert "run <b>&" in text  # as text, not as an element
    assert page[0].found["b"] == page[1].count("</b>")


def test_the_page_needs_nothing_else(page):
    """No script, nothing loaded but by reference to itself, colours of the page's own, and it is small."""
    assert "script" not in page[0].found
    assert all(value.startswith("#") for value in page[0].loaded)
    assert not re.findall(r"url\((?!#)", page[1])
    assert "@import" not in page[1]
    svg = "".join(re.findall("<svg.*?</svg>", page[1], re.DOTALL))
    assert not re.findall(r"(?:fill|stroke): #\w+", svg)
    assert "prefers-color-scheme: dark" in page[1]
    assert len(page[1]) < 120_000


def test_the_numbers_at_the_axes_are_exact(page):
    """Coordinates are rounded, text is not: the learning rate never changes, and its axis is narrow."""
    plot = page[1][page[1].index("learning_rate</b>") :]
    marks = re.findall(r"<text[^>]*>(0\.[\d.]+)</text>", plot)
    assert len(marks) > 3
    assert len(set(marks)) == len(marks)


def test_the_page_is_where_it_was_asked_for(run, tmp_path, capsys):
    assert main(["report", str(run), "--out", str(tmp_path / "it.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/it.html\n"
    assert (tmp_path / "it.html").read_text() == (run / "report.html").read_text()


def refused(arguments, capsys):
    assert main(["report", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


def test_what_it_refuses(run, tmp_path, capsys):
    assert "there/is/none', but must be the folder of a run\n" in refused([tmp_path / "there/is/none"], capsys)
    assert "must be a folder with scalars in event files of TensorBoard; none here\n" in refused([tmp_path], capsys)
    (tmp_path / "file").write_text("")
    assert "must be the folder of a run; this is a file\n" in refused([tmp_path / "file"], capsys)
    assert "--out is" in refused([run, "--out", tmp_path / "no/folder.html"], capsys)
    (tmp_path / "events.out.tfevents.1.x").write_bytes(b"no records, but some text\n")
    error = refused([tmp_path], capsys)
    assert "1 of them here without any (events.out.tfevents.1.x: is damaged after 0 events" in error


@pytest.mark.parametrize("package", ["tensorboard.compat.proto.event_pb2", "matplotlib"])
def test_a_package_that_is_missing_is_told(package, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    error = refused([run, "--out", tmp_path / "it.html"], capsys)
    assert error == f"distopt: error: {package.split('.')[0]} is missing: pip install 'distopt[report]'\n"


def test_bad_input_is_refused_before_torch_is_loaded():
    code = (
        "import sys; from distopt.commands.main import main;"
        "assert main(['report', '/there/is/none']) == 2; assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100, capture_output=True)


@pytest.fixture
def event_file(tmp_path):
    return next(write(tmp_path, {"loss": {step: 1.0 / (1 + step) for step in range(10)}}).iterdir())


def loss_of(folder):
    records = read_records(folder)
    (curve,) = records.curves
    return curve.steps, records.notes


def test_a_file_that_is_cut_off_shows_what_lies_before(event_file):
    event_file.write_bytes(event_file.read_bytes()[:-5])
    steps, notes = loss_of(event_file.parent)
    assert steps == tuple(range(9))
    assert notes == (f"{event_file.name}: is cut off after 10 events; what lies before is shown",)


@pytest.mark.parametrize("place", [0, 9, 20])  # in a length, in its check, in the message
def test_a_file_that_is_damaged_shows_what_lies_before(event_file, place):
    data = bytearray(event_file.read_bytes())
    position = 0
    for _ in range(5):
        position += 16 + struct.unpack_from("<Q", data, position)[0]
    data[position + place] ^= 0x40
    event_file.write_bytes(data)
    steps, notes = loss_of(event_file.parent)
    assert steps == tuple(range(4))
    assert notes == (f"{event_file.name}: is damaged after 5 events; what lies before is shown",)


def test_damage_is_told_on_the_page(event_file):
    event_file.write_bytes(event_file.read_bytes()[:-5])
    assert main(["report", str(event_file.parent)]) == 0
    assert (
        "is cut off after 10 events; what lies before is shown</p>" in (event_file.parent / "report.html").read_text()
    )


def test_pictures_are_passed_over(tmp_path):
    import torch
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss", 1.0, 0)
        writer.add_image("large", torch.rand(3, 700, 700), 0)
        writer.add_scalar("loss", 2.0, 1)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size > 1 << 20
    assert loss_of(tmp_path) == ((0, 1), ())
    file.write_bytes(file.read_bytes()[: 1 << 20])
    assert loss_of(tmp_path)[0] == (0,)


def test_scalars_of_the_second_format(tmp_path):
    """As TensorFlow 2 and others write them: tensors, whose kind is said once."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.summary.writer.record_writer import RecordWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    kind = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"))
    with (tmp_path / "events.out.tfevents.1.v2").open("wb") as stream:
        for step in range(3):
            values = [
                Summary.Value(tag="loss", tensor=make_tensor_proto(step / 2), metadata=kind if step == 0 else None),
                Summary.Value(tag="histogram", tensor=make_tensor_proto([1.0, 2.0])),
            ]
            event = Event(step=step, wall_time=step, summary=Summary(value=values))
            RecordWriter(stream).write(event.SerializeToString())
    (curve,) = read_records(tmp_path).curves
    assert (curve.tag, curve.values) == ("loss", (0.0, 0.5, 1.0))


def test_a_run_that_went_on_shows_each_step_once(tmp_path):
    write(tmp_path, {"loss": dict.fromkeys(range(10), 1.0)}, name=".a")
    write(tmp_path, {"loss": dict.fromkeys(range(5, 12), 2.0)}, start=2000.0, name=".b")
    (curve,) = read_records(tmp_path).curves
    assert curve.steps == tuple(range(12))
    assert curve.values == (1.0,) * 5 + (2.0,) * 7


def test_two_processes_at_once_are_both_shown(tmp_path):
    for name in (".a", ".b"):
        write(tmp_path, {"loss": {step: 1.0 for step in range(3)}}, name=name)
    assert loss_of(tmp_path)[0] == (0, 0, 1, 1, 2, 2)


def test_runs_below_a_folder_are_told_apart(tmp_path):
    for name in ("version_0", "version_1"):
        write(tmp_path / name, {"loss": {0: 1.0, 1: 0.5}})
    (losses, *_) = sort_curves(read_records(tmp_path).curves)
    assert [panel.title for panel in losses.panels] == ["version_0 · loss", "version_1 · loss"]


def test_seconds_a_step_without_pauses(tmp_path):
    """Of a run whose steps take two seconds, with an evaluation of ten minutes in the middle."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(20):
            writer.add_scalar("loss", 1.0, 5 * step, walltime=1000.0 + 10 * step + 600 * (step > 9))
    steps = next(section for section in sort_curves(read_records(tmp_path).curves) if section.title == "Steps")
    (panel,) = steps.panels
    assert set(panel.curves["seconds a step"].values) == {2.0}
    assert len(panel.curves["seconds a step"].values) == 18
