"""A griffe extension for the API pages: our `Example:` is what Google's style calls `Examples:`."""

from typing import Any

import griffe


class Sections(griffe.Extension):
    """Rename the section, so that the site shows its prompts as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one object's docstring."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
