"""Every command and every link that a document shows is real."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cli import COMMANDS, _imported, known_settings
from tests.support.commands import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text()
BLOCKS = re.compile(r"^```(\w*).*?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands() -> Iterator[str]:
    """Every line of a shell block, and every whole command in the prose, without its remark."""
    for path in DOCUMENTS:
        text = path.read_text()
        lines = [
            line
            for block in BLOCKS.finditer(text)
            if block[1] in ("sh", "ini")
            for line in block[2].replace("\\\n", " ").splitlines()
        ]
        prose = BLOCKS.sub("", text)
        lines += re.findall(r"`((?:seedrl (?:bench )?\w+|python [-\w/.]+|make) [^`…]+)`", prose)
        for line in lines:
            yield re.sub(r"\s+#.*", "", line.strip()).removeprefix("ExecStart=/opt/seedrl/bin/")


def starting_with(*words: str) -> list[str]:
    return sorted({line for line in commands() if line.split()[:1] in [[word] for word in words]})


def is_a_synopsis(line: str) -> bool:
    """`seedrl eval RUN_DIR --episodes N` stands for many commands."""
    return bool(re.search(r"[\[|]|--preset$|\s(?!ALE/)[A-Z][A-Z_:]*(?=[\s/]|$)", line))


def split(line: str) -> tuple[str, list[str]]:
    """The name of a `seedrl` command, and its arguments."""
    _, name, *arguments = shlex.split(line)
    return (f"{name} {arguments[0]}", arguments[1:]) if name == "bench" else (name, arguments)


@pytest.mark.parametrize("line", [line for line in starting_with("seedrl") if not is_a_synopsis(line)])
def test_a_seedrl_command_has_settings_that_are_taken(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    name, arguments = split(line)
    # What belongs to a run, which is not here.
    arguments = [re.sub(r"^(?:runs/\S+/)?config\.yaml$", "atari_vtrace", word) for word in arguments]
    if name == "train":
        arguments = [word for word in arguments if word != "--resume"]
    if "--help" not in arguments:
        _imported(COMMANDS[name].config).loaded(arguments, prog=name, known=known_settings())


@pytest.mark.parametrize("line", [line for line in starting_with("seedrl") if is_a_synopsis(line)])
def test_what_a_synopsis_names_are_settings_of_its_commands(line: str) -> None:
    first, *others = re.split(r" \| ", line.removeprefix("seedrl "))
    name, _ = split(f"seedrl {first}")
    for each in (name, *others):
        fields = {field.replace("_", "-") for field in _imported(COMMANDS[each].config).model_fields}
        assert set(re.findall(r"--([a-z][a-z0-9-]*)", line)) <= fields | {"json"}


@pytest.mark.parametrize("line", starting_with("make"))
def test_make_has_the_target(line: str) -> None:
    for target in line.split()[1:]:
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target


@pytest.mark.parametrize("line", starting_with("python"))
def test_python_has_the_file_or_module(line: str) -> None:
    for module, file in re.findall(r"python (?:-m ((?:benchmarks|tools)[\w.]+)|(\w+/[\w/.]+\.py))", line):
        assert (ROOT / (file or f"{module.replace('.', '/')}.py")).exists()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    text = path.read_text()
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", text):
        linked = path.parent / target if target else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text()), (target, anchor)


def anchors(document: str) -> set[str]:
    """What links to a document's headings are called."""
    titles = re.findall(r"^#+ (.*)$", document, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
