"""How the pages of this folder become a site: ``make docs``. Nothing is fetched."""

import re
from pathlib import Path

import distopt

project = "distopt"
author = "The distopt authors"
version = release = distopt.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"distopt {version}"
html_show_copyright = html_copy_source = html_show_sphinx = False
highlight_language = "text"
smartquotes = False

myst_heading_anchors = 4  # as GitHub makes them

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
default_role = "py:obj"  # what docstrings put between single backquotes: names, and arguments

autodoc_mock_imports = ["lightning", "accelerate", "transformers"]  # whose classes ours extend

nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", r".*"),  # an argument is no link
    (
        "py:.*",
        r"(torch|accelerate|lightning|transformers|collections|contextlib|typing|datetime|os|pathlib|types)\..*",
    ),  # their pages are elsewhere
    # Any type; parts of a sum; and what the classes that users do not make themselves are made of.
    ("py:class", r"distopt\.(.*\._T|accumulation\.Batch)"),
    ("py:class", r"distopt\.planning\.(costs\.(Scheme|Share)|machine\.Wire)"),
    ("py:class", r"distopt\.attach\.(engine\.Engine|registration\.Attachment)"),
    ("py:class", r"distopt\.comm\.meeting\.Meeting"),
    ("py:class", r"distopt\.pipelining\.(running\.(Plan|Ranks)|stages\.Chain|schedules\.Action)"),
    ("py:class", r"distopt\.pipelining\.attachment\.PipelineAttachment"),
    ("py:exc", "InputError"),  # the integrations' own
]

OUTSIDE = re.compile(r"\]\((\.\./(?:\.\./)*[^)#]*)\)")


def offer_sources(app, document, content):
    """Let links to files outside of this folder be downloads: on GitHub they lead to the file itself."""
    folder = Path(app.srcdir, document).parent

    def offered(link):
        file = (folder / link[1]).resolve()
        return link[0] if file.is_relative_to(app.srcdir) else f"](<path:{link[1]}>)"

    content[0] = OUTSIDE.sub(offered, content[0])


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", offer_sources)
