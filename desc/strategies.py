"""The taxonomy of support strategies, as a value, and reading strategies out of what a model
wrote."""

import re
from difflib import get_close_matches

from desc import DescError
from desc.storage.files import read_text


class Strategies(tuple[str, ...]):
    """Names of strategies, in the order of every table and every probability vector."""

    def parse(self, text: str) -> str | None:
        """The strategy a planner wrote, or None. Brackets, final stops, case and white space do not
        matter."""
        wanted = " ".join(text.split()).strip("[].:\"' ").casefold()
        return next((name for name in self if name.casefold() == wanted), None)

    def split_tag(self, text: str) -> tuple[str | None, str]:
        """(strategy, reply) of "[strategy] reply"; the strategy is None, and the text whole, where
        the tag is no strategy."""
        tag = re.match(r"\s*\[([^\]]*)\]\s*", text)
        strategy = self.parse(tag.group(1)) if tag else None
        return (strategy, text[tag.end() :].strip()) if strategy else (None, text.strip())

    def suggestion(self, name: str) -> str:
        """For a misspelt name " (did you mean 'Question'?)", else "": the end of an error message
        with."""
        close = get_close_matches(name, self, n=1)
        return f" (did you mean {close[0]!r}?)" if close else ""


# Liu et al. 2021 (ESConv), in the order that all published figures use.
ESCONV = Strategies(
    (
        "Question",
        "Restatement or Paraphrasing",
        "Reflection of feelings",
        "Self-disclosure",
        "Affirmation and Reassurance",
        "Providing Suggestions",
        "Information",
        "Others",
    )
)


def read_strategies(path: str | None) -> Strategies:
    """A taxonomy from a text file with one name a line; ESConv's eight where `path` is None.

    Raises DescError where the file cannot be read, names fewer than two strategies, repeats one, or
    uses a bracket."""
    if path is None:
        return ESCONV
    names = tuple(" ".join(line.split()) for line in read_text(path).splitlines() if line.strip())
    if (
        len(names) < 2
        or len({name.casefold() for name in names}) < len(names)
        or any(c in "[]" for name in names for c in name)
    ):
        raise DescError(
            f"--strategies {path}: wants two or more different names, one a line, without square"
            " brackets"
        )
    return Strategies(names)
