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
        """(strategy, reply) of "[strategy] reply". If the tag is missing or no strategy: (None, the
        whole text)."""
        tag = re.match(r"\s*\[([^\]]*)\]\s*", text)
        strategy = self.parse(tag.group(1)) if tag else None
        if strategy is None:
            return None, text.strip()
        return strategy, text[tag.end() :].strip()

    def suggestion(self, name: str) -> str:
        """How an error message about `name` ends: " (did you mean 'Question'?)" if it is close to a
        strategy's, else ""."""
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
    """A taxonomy from a text file with one name per line; ESConv's eight if `path` is None.

    Raises DescError if the file cannot be read, names fewer than two strategies, repeats one, or
    uses a square bracket."""
    if path is None:
        return ESCONV
    lines = [" ".join(line.split()) for line in read_text(path).splitlines()]
    names = [line for line in lines if line]
    repeated = len({name.casefold() for name in names}) < len(names)
    bracketed = any("[" in name or "]" in name for name in names)
    if len(names) < 2 or repeated or bracketed:
        raise DescError(
            f"{path}: a taxonomy needs two or more different names, one per line, without square"
            " brackets"
        )
    return Strategies(names)
