"""The report counts what tests tell, and changes nothing of a page but their lines between the marks."""

from types import SimpleNamespace

from tests.faults.report import BEGIN, END, PAGE, Counter, write


def told(passed, when="call"):
    properties = [("promise", "It holds"), ("trials", 1000), ("passed", passed)]
    return SimpleNamespace(when=when, user_properties=properties, duration=1.4)


def test_counts_are_written_between_the_marks_beside_those_that_are_there(tmp_path):
    counter = Counter()
    for report in (
        told(1000),
        told(999),
        told(1000, when="teardown"),
        SimpleNamespace(when="call", user_properties=[]),
    ):
        counter.pytest_runtest_logreport(report)
    page = tmp_path / "page.md"
    head = "| what was tried | trials | passed | seconds |\n|---|--:|--:|--:|"
    before, other = "| It holds | 20 | 20 | 1 |", "| Others do, too | 5 | 5 | 1 |"
    page.write_text(f"before\n{BEGIN}{head}\n{before}\n{other}\n{END}after\n")
    write(counter.lines(), page)
    row = "| It holds | 2,000 | 1,999 | 3 |"
    assert page.read_text() == f"before\n{BEGIN}{head}\n{row}\n{other}\n{END}after\n"


def test_the_page_has_the_marks():
    assert PAGE.read_text().count(BEGIN) == PAGE.read_text().count(END) == 1
