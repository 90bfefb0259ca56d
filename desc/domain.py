"""A domain, as a value: the strategies of a kind of dialogue, its two speakers, and what models are
told about it. ESConv's is data/esconv.json; --domain reads another.

Also reading strategies out of what a model wrote."""

import re
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from desc import DescError
from desc.storage.files import describe, parse, read_field, read_text
from desc.storage.journal import work_key

RUBRICS = ("fluency", "professionalism", "empathy", "helpfulness")
NO_ERROR = "none"
UNREADABLE = "unreadable"  # what an annotator behind an endpoint wrote could not be read
UNJUDGED = "unjudged"  # no annotator was asked
# Words that stand for something else where an error's name stands.
NO_NAMES = (NO_ERROR, UNREADABLE, UNJUDGED)
# What each module reads of a domain. All of it is in the digest that is saved with the module.
READ_BY = {
    "sp": ("strategies", "speakers", "planner"),
    "rg": ("strategies", "responder"),
    "vanilla": ("strategies", "responder"),
    "annotate": ("speakers", "annotator", "errors"),
    "judge": ("speakers", "judge"),
}
# What is filled in, in an instruction.
FILLED_IN = {"planner": "{names}", "responder": None, "annotator": "{errors}", "guide": None}
# Characters that join letters of Persian or Hindi, and parts of emoji, or keep them apart. They are
# invisible, so they may only follow another character, and may not end a text.
JOINER = re.compile(r"(?<=\S)[\u200c\u200d](?=.)")


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


@dataclass(frozen=True)
class ErrorType:
    """An error that an annotator looks for in a turn."""

    definition: str
    module: str | None  # whose fault it is: "sp" or "rg"; of None no pair is made


@dataclass(frozen=True)
class Domain:
    """A kind of dialogue, in which one speaker answers the other."""

    strategies: Strategies
    speakers: tuple[str, str]  # what models read for who is answered, and for who answers
    planner: str  # sp's instruction; {names} stands for the strategies
    responder: str  # how rg's and vanilla's instruction begins
    annotator: str  # the annotator's instruction; {errors} stands for the definitions
    errors: dict[str, ErrorType]  # by name, which is in lower case
    judge: dict  # {"guide": …, and for each of RUBRICS {"asks": …, "scale": …}}

    @property
    def labels(self) -> tuple[str, ...]:
        """What an annotator may say of a turn: the name of an error, or NO_ERROR."""
        return (*self.errors, NO_ERROR)

    def faults(self, task: str) -> tuple[str, ...]:
        """The names of the errors that are the fault of the module of `task`. Those of vanilla,
        which is one model for both, are sp's and rg's."""
        modules = ("sp", "rg") if task == "vanilla" else (task,)
        return tuple(name for name, error in self.errors.items() if error.module in modules)

    def digest(self, module: str) -> str:
        """A digest of what `module` reads of this domain (READ_BY)."""
        values = {name: getattr(self, name) for name in READ_BY[module]}
        if "errors" in values:  # of these it reads names and definitions
            values["errors"] = {name: error.definition for name, error in self.errors.items()}
        return work_key(*values.values())


def read_domain(path: str | Path | None) -> Domain:
    """The domain in a JSON file; ESConv's if `path` is None, whose file shows all fields. An
    instruction, such as the judge's guide, is a string, or a list of lines.

    Raises DescError if the file cannot be read, if a field is missing or unknown, or if one cannot
    be used, naming it."""
    path = files("desc") / "data" / "esconv.json" if path is None else path
    record = parse(read_text(path), f"{path}:")
    where = str(path)
    known = [field.name for field in fields(Domain)]
    refuse_unknown(record, known, where)
    return Domain(
        strategies=read_strategies(record, where),
        speakers=read_speakers(record, where),
        planner=read_instruction(record, "planner", where),
        responder=read_instruction(record, "responder", where),
        annotator=read_instruction(record, "annotator", where),
        errors=read_errors(record, where),
        judge=read_judge(record, where),
    )


def refuse_unknown(record, known: list[str], where: str) -> None:
    """Raises DescError if a JSON value is no object, or has a field that is not `known`."""
    if not isinstance(record, dict):
        raise DescError(f"{where}: should be an object, not {describe(record)}")
    for name in record:
        if name not in known:
            raise DescError(f"{where}: field {name!r} is unknown; there are {', '.join(known)}")


def read_name(value, where: str) -> str:
    """A name or a sentence, with single blanks between its words. Raises DescError that begins with
    `where` if a value is no such text."""
    if not isinstance(value, str):
        raise DescError(f"{where}: should be a string, not {describe(value)}")
    name = " ".join(value.split())
    if not name or not JOINER.sub("", name).isprintable():
        problem = "holds characters that cannot be shown" if name else "is empty"
        raise DescError(f"{where}: a text {problem}")
    return name


def read_strategies(record, where: str) -> Strategies:
    """The field "strategies": two or more different names, each of which is found again where a
    planner writes it (Strategies.parse)."""
    values = read_field(record, "strategies", list, where)
    names = [read_name(value, f"{where}: strategies") for value in values]
    strategies = Strategies(names)
    bracketed = any("[" in name or "]" in name for name in names)
    found = [strategies.parse(name) for name in names]  # case and a final stop do not count
    if len(names) < 2 or bracketed or found != names:
        raise DescError(
            f"{where}: field 'strategies' needs two or more different names, without square"
            " brackets, and without quotation marks, colons or stops at their ends"
        )
    return strategies


def read_speakers(record, where: str) -> tuple[str, str]:
    """The field "speakers": two different names without colons, because a colon ends the name of
    who speaks."""
    values = read_field(record, "speakers", list, where)
    names = [read_name(value, f"{where}: speakers") for value in values]
    different = {name.casefold() for name in names}
    is_named = names == values and not any(":" in name for name in names)
    if len(names) != 2 or len(different) != 2 or not is_named:
        raise DescError(
            f"{where}: field 'speakers' needs two different names, who is answered and who"
            " answers, without colons, line breaks, or blanks around"
        )
    return tuple(names)


def read_instruction(record, name: str, where: str) -> str:
    """An instruction: a string, or a list of lines. What stands in braces is filled in, so it must
    be what FILLED_IN says."""
    lines = record.get(name)
    if isinstance(lines, list) and all(isinstance(line, str) for line in lines):
        record = record | {name: "\n".join(lines)}
    text = read_field(record, name, str, where)
    needed = FILLED_IN[name]
    if not text.strip():
        raise DescError(f"{where}: field {name!r} is empty")
    if needed and needed not in text:
        raise DescError(f"{where}: field {name!r} lacks {needed}, which is filled in")
    for braced in re.findall(r"\{[a-z_]*\}", text):
        if braced != needed:
            only = f"only {needed} is" if needed else "nothing is"
            raise DescError(f"{where}: field {name!r} has {braced}, but {only} filled in there")
    return text.strip()


def read_errors(record, where: str) -> dict[str, ErrorType]:
    """The field "errors": {name: {"definition": …, "module": "sp", "rg" or null}}."""
    errors = {}
    for name, value in read_field(record, "errors", dict, where).items():
        place = f"{where}: errors: {name[:60]!r}"
        if name != read_name(name, f"{where}: errors").casefold() or name in NO_NAMES:
            raise DescError(
                f"{place} should be another name: in lower case, with single blanks, and none of"
                f" {', '.join(NO_NAMES)}"
            )
        refuse_unknown(value, ["definition", "module"], place)
        definition = read_name(value.get("definition", ""), f"{place}: definition")
        if "module" not in value or value["module"] not in ("sp", "rg", None):
            raise DescError(f'{place}: field \'module\' should be "sp", "rg" or null')
        errors[name] = ErrorType(definition, value["module"])
    if not errors:
        raise DescError(f"{where}: field 'errors' is empty; an annotator looks for at least one")
    return errors


def read_judge(record, where: str) -> dict:
    """The field "judge": the judge's guide, and what it is asked about each of RUBRICS."""
    texts, place = read_field(record, "judge", dict, where), f"{where}: judge"
    refuse_unknown(texts, ["guide", *RUBRICS], place)
    judge = {"guide": read_instruction(texts, "guide", place)}
    for rubric in RUBRICS:
        asked = read_field(texts, rubric, dict, place)
        refuse_unknown(asked, ["asks", "scale"], f"{place}: {rubric}")
        judge[rubric] = {
            part: read_name(asked.get(part, ""), f"{place}: {rubric}: {part}")
            for part in ("asks", "scale")
        }
    return judge


ESCONV = read_domain(None)
