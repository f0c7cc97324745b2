"""README.md and docs/: each block of code runs, each link leads somewhere, quotations of the code are true.

Fences `python` and `bash` are run, in the order of the page; what is not to be run (an installation, say) is
`console`. The site shows what those marked `exec` print (`make docs`).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mlpext
from mlpext.training import _losses

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
BLOCK = re.compile(r"^```(python|bash)\b[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^( *)```.*?^\1```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
MARKS = {
    "docs/several-processes.md": pytest.mark.launch,
    "docs/reference/command-line.md": pytest.mark.slow,  # --help of each command
}


def run_bash(code, folder):
    """With this Python and this mlpext, installed or not."""
    env = os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env["PYTHONPATH"] = str(Path(mlpext.__file__).parents[1])
    code = 'mlpext() { python -m mlpext "$@"; }\n' + code
    done = subprocess.run(["bash", "-ec", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=MARKS.get(page, ())) for page in PAGES if BLOCK.search(PAGES[page])]
)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for number, (language, code) in enumerate(BLOCK.findall(PAGES[page])):
        if language == "bash":
            run_bash(code, tmp_path)
        else:  # from a file, as fuse reads the source of models
            file = tmp_path / f"block{number}.py"
            file.write_text(code)
            exec(compile(code, file, "exec"), namespace)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    pictures = re.findall(r'<img [^>]*src="([^"]+)"', PAGES[page])
    assert not [name for name in pictures if not (tmp_path / name).is_file()]


def anchors(markdown):
    """Of its headings, as Markdown's toc and GitHub make them."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub(lambda match: match[0].strip("`"), markdown), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", PAGES[page])):
        path, _, anchor = link.partition("#")
        if ":" in path:
            continue  # of another site
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            dead.append(link)
    assert not dead


def test_the_example_of_an_activation_applies():
    """Each hunk's old lines stand in the file that it names, once."""
    (diff,) = re.findall(r"```diff\n(.*?)```", PAGES["docs/adding-an-activation.md"], re.DOTALL)
    hunks = 0
    for part in re.split(r"^--- a/", diff, flags=re.MULTILINE)[1:]:
        name, _, rest = part.partition("\n")
        for hunk in re.split(r"^@@.*\n", rest, flags=re.MULTILINE)[1:]:
            old = "".join(line[1:] + "\n" for line in hunk.splitlines() if line[:1] in (" ", "-"))
            assert (ROOT / name).read_text().count(old) == 1, f"{name}:\n{old}"
            hunks += 1
    assert hunks >= 7


def test_the_example_of_a_loss_computes():
    """In the module that it is added to; its gradient is autograd's."""
    (code,) = re.findall(r"    ```python\n(.*?)    ```", PAGES["docs/adding-a-loss.md"], re.DOTALL)
    namespace = dict(vars(_losses))
    exec(re.sub(r"^    ", "", code, flags=re.MULTILINE), namespace)
    output = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, 3, dtype=torch.float64)
    each, whole = (namespace["pseudo_huber"](output, target, reduction) for reduction in ("none", "sum"))
    torch.testing.assert_close(each.sum(), whole)
    (gradient,) = torch.autograd.grad(whole, output)
    torch.testing.assert_close(namespace["_pseudo_huber_gradient"](output, target), gradient)
