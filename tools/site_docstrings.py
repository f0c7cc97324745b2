"""For `mkdocs`: docstrings, which are written to be read in a terminal, as Markdown with links."""

import re

import griffe


class Links(griffe.Extension):
    """Examples get their heading, names and pages that they mention become links."""

    def on_object(self, *, obj, **_):
        if obj.docstring is None:
            return
        text = obj.docstring.value
        text, start, example = text.partition("\n>>> ")
        text = re.sub(r"`(mlpext(?:\.\w+)+)`", r"[`\1`][\1]", text)
        text = text.replace("(*", r"(\*")  # any shape, not emphasis
        text = re.sub(r"docs/([\w-]+)\.md", r"[\1](../\1.md)", text)
        if start:
            text += "\nExamples:\n    " + (start + example).strip().replace("\n", "\n    ")
        obj.docstring.value = text
