"""What an index and a stranger see of the project: README's links, the sdist, versions and addresses."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text()
(REPOSITORY,) = re.findall(r'^Repository = "(.*?)"', PROJECT, re.MULTILINE)


def test_links_of_the_readme_lead_somewhere_from_an_index_too():
    """None is relative, and those into the repository name what it has."""
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^#)][^)]*)\)", text) + re.findall(r"^\[[^]]*\]: (.*)", text, re.MULTILINE)
    assert links and [link for link in links if not link.startswith("https://")] == []
    own = REPOSITORY.removeprefix("https://github.com/")
    into = re.compile(
        rf"https://(?:github\.com/{own}/blob/main|raw\.githubusercontent\.com/{own}/main)/([^#]*)"
    )
    named = [found[1] for link in links if (found := into.match(link))]
    assert named and [name for name in named if not (ROOT / name).exists()] == []


def test_the_citation_is_of_the_latest_release():
    version, date = re.findall(r"^## \[(\d.*?)\] - (.*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[
        0
    ]
    citation = (ROOT / "CITATION.cff").read_text().splitlines()
    for line in (f"version: {version}", f'date-released: "{date}"', f"repository-code: {REPOSITORY}"):
        assert line in citation


def test_each_python_has_a_classifier():
    (oldest, newest) = re.findall(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', PROJECT)[0]
    listed = re.findall(r"Programming Language :: Python :: 3\.(\d+)", PROJECT)
    assert [int(minor) for minor in listed] == list(range(int(oldest), int(newest)))


@pytest.mark.launch
def test_the_sdist_holds_whatever_the_repository_does(tmp_path):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("needs a checkout, and git")
    for folder in ("egg", "dist"):
        (tmp_path / folder).mkdir()
    command = [
        "egg_info",
        "--egg-base",
        tmp_path / "egg",
        "sdist",
        "--formats=tar",
        "--dist-dir",
        tmp_path / "dist",
    ]
    subprocess.run([sys.executable, "setup.py", "-q", *command], cwd=ROOT, check=True, capture_output=True)
    (archive,) = (tmp_path / "dist").iterdir()
    listed = subprocess.run(["tar", "tf", archive], check=True, capture_output=True, text=True).stdout
    packed = {name.partition("/")[2] for name in listed.splitlines()}
    there = {name for name in tracked.stdout.splitlines() if (ROOT / name).exists()}
    assert there <= packed, sorted(there - packed)
    assert [name for name in packed if name.endswith((".so", ".pyc"))] == []
