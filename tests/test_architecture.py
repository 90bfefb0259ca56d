"""pytest tests/test_architecture.py

Which room of desc/ may import which. This table is the map of the house: README and
desc/__init__.py show the same."""

import ast
import re

import pytest
from scripts import ROOT

METHOD = (  # in reading order: each may import those before it
    "domain esconv prompts templates encoding tree attention forward exactness modeling lora"
    " losses sampling pairs mining metrics calibration"
).split()
MAY_IMPORT = {
    "storage": set(),
    "method": {"storage"},
    "training.ranks": set(),
    "flags": {"method"},
    "cli": {"storage", "method", "flags", "training.ranks"},
    "training": {"storage", "method", "flags", "cli", "training.ranks"},
    "judging": {"storage", "method", "flags", "cli", "training.ranks"},
    "evaluation": {"storage", "method", "flags", "cli", "judging"},
    "chat": {"storage", "method", "flags", "cli", "training.ranks"},
}
FILES = sorted(path for path in (ROOT / "desc").rglob("*.py") if path != ROOT / "desc/__init__.py")


def room_of(module: str) -> str:
    """The room of "esconv", "training.ranks" or "judging.judge"."""
    room = module.partition(".")[0]
    if module in MAY_IMPORT:
        return module
    return "method" if room in METHOD else room


def imported(path) -> set[str]:
    """The modules of desc that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports relatively, which this test does not read"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {module_of(name) for name in names if name.startswith("desc.")} - {None}


def module_of(name: str) -> str | None:
    """The longest beginning of "desc.lora.add_adapter" that is a module: "lora"; None for the names
    of desc itself."""
    parts = name.split(".")[1:]
    for length in range(len(parts), 0, -1):
        place = ROOT / "desc" / "/".join(parts[:length])
        if place.with_suffix(".py").exists() or (place / "__init__.py").exists():
            return ".".join(parts[:length])
    return None


@pytest.mark.parametrize(
    "line",
    [
        "import desc.judging.judge",
        "from desc import judging",
        "from desc.judging import judge",
        "def f():\n    from desc.judging.judge import rate",
    ],
)
def test_no_import_is_overlooked(line, tmp_path):
    (tmp_path / "x.py").write_text(line)
    assert {room_of(module) for module in imported(tmp_path / "x.py")} == {"judging"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "desc")))
def test_imports_go_where_the_map_says(path):
    module = ".".join(path.relative_to(ROOT / "desc").with_suffix("").parts)
    here = room_of(module)
    for other in imported(path):
        there = room_of(other)
        assert there == here or there in MAY_IMPORT[here], f"{module} imports {other}"
        if here == there == "method":
            assert METHOD.index(other) < METHOD.index(module), f"{module} imports {other}"


def default_values(node) -> list:
    """The default values in the definition of a function or of a class."""
    if isinstance(node, ast.FunctionDef):
        return [*node.args.defaults, *filter(None, node.args.kw_defaults)]
    if isinstance(node, ast.ClassDef):
        return [field.value for field in node.body if getattr(field, "value", None)]
    return []


def test_esconv_is_the_default_of_scores_and_of_first_calls_alone():
    """Everywhere else a caller who forgets to pass another domain would get ESConv's words."""
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            values = [ast.unparse(value) for value in default_values(node)]
            if any(value.startswith("ESCONV") for value in values):
                found.add(f"{path.stem}.{node.name}")
    first = {"esconv.load_dialogues", "esconv.load_splits"}
    first |= {"prompts.build_messages", "prompts.build_examples"}
    assert {name for name in found if not name.startswith("metrics.")} == first


def test_prompts_are_laid_out_as_the_flags_say():
    """A call that passes no layout would make the default prompts, whatever the flags are."""
    calls = [
        ast.unparse(node)
        for path in [*FILES, *ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("build_messages", "build_examples")
    ]
    assert len(calls) > 8
    assert [call for call in calls if "layout" not in call] == []


def test_the_map_is_whole():
    assert {
        room_of(str(path.relative_to(ROOT / "desc").parts[0]).removesuffix(".py")) for path in FILES
    } == {room for room in MAY_IMPORT if "." not in room}


def test_readme_lists_the_method_in_order():
    """With each file's number of lines, give or take a tenth."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    entries = re.findall(r"\]\(([\w/]+\.py)\)(?:\*\*)? \|.*\| (\d+) \|", text)
    loops = ["desc/training/batches.py", "desc/training/run.py", "desc/training/objectives.py"]
    loops += ["train_sft.py", "mine_preferences.py", "train_dpo.py", "evaluate.py"]
    assert [name for name, _ in entries] == [f"desc/{name}.py" for name in METHOD] + loops
    for name, claimed in entries:
        lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert lines == pytest.approx(int(claimed), rel=0.1), f"{name} has {lines} lines"


def test_readme_and_the_package_name_every_room():
    package = (ROOT / "desc" / "__init__.py").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for room in set(MAY_IMPORT) - {"method", "training.ranks"}:
        name = room if room in ("flags", "cli") else f"{room}/"
        assert name in package and name in readme, room
    places = [package.index(f"\n    {name} ") for name in METHOD]
    assert places == sorted(places)


def test_every_file_that_the_prose_names_exists():
    for page in (
        "README.md",
        *map("docs/{}.md".format, ("tour", "results", "speed", "scaling", "models", "studies")),
    ):
        text = (ROOT / page).read_text(encoding="utf-8")
        for name in re.findall(r"\b((?:desc|tests|benchmarks|runs|docs)/[\w/]+\.\w+)", text):
            assert (ROOT / name).exists(), f"{page}: {name}"
        for name, function in re.findall(r"`(desc/[\w/]+\.py): (\w+)`", text):
            assert re.search(
                rf"\b(?:def|class) {function}\b", (ROOT / name).read_text(encoding="utf-8")
            ), function
