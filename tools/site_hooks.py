"""For `mkdocs`: files beside docs/ as pages of the site, and pictures that a page's own code has drawn."""

import base64
import mimetypes
import re
from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
BESIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "examples/*.ipynb", "benchmarks/results/*/*.md")
BESIDE += ("benchmarks/results/*/*.png",)


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files, config):
    """They have the same paths on the site as in the repository."""
    for path in (path for pattern in BESIDE for path in sorted(ROOT.glob(pattern))):
        uri = path.relative_to(ROOT).as_posix()
        files.append(File(uri, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, page, config, files):
    """On the site docs/ and what lies beside it are one folder."""
    if page.file.src_uri.startswith("reference/"):
        return markdown
    return re.sub(r"\]\((?:\.\./|docs/)", "](", markdown)


def on_page_content(html, page, config, files):
    """`<img src="loss.png">` of a file in the folder where the blocks have run becomes a part of the page."""

    def embedded(match):
        path = Path(match[2])
        if not path.is_file():
            return match[0]
        content = base64.b64encode(path.read_bytes()).decode()
        return f"{match[1]}data:{mimetypes.guess_type(path)[0]};base64,{content}{match[3]}"

    html = re.sub(r'href="\.\./docs/([\w-]+)\.md', r'href="../../\1/', html)  # of a notebook
    return re.sub(r'(<img [^>]*src=")([^":]+)(")', embedded, html)
