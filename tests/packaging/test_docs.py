"""docs/: what they quote of the code is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_example_of_an_activation_applies():
    """Each hunk's old lines stand in the file that it names, once."""
    page = (ROOT / "docs" / "adding-an-activation.md").read_text()
    (diff,) = re.findall(r"```diff\n(.*?)```", page, re.DOTALL)
    hunks = 0
    for part in re.split(r"^--- a/", diff, flags=re.MULTILINE)[1:]:
        name, _, rest = part.partition("\n")
        for hunk in re.split(r"^@@.*\n", rest, flags=re.MULTILINE)[1:]:
            old = "".join(line[1:] + "\n" for line in hunk.splitlines() if line[:1] in (" ", "-"))
            assert (ROOT / name).read_text().count(old) == 1, f"{name}:\n{old}"
            hunks += 1
    assert hunks >= 7
