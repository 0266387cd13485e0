"""What docs/operations.md names is real: commands, settings, exit statuses, files, words of the program."""

import re
from functools import cache

import pytest

from services.cli import known_settings
from shared import errors
from tests.support.commands import ROOT

DOCUMENT = (ROOT / "docs/operations.md").read_text()
PROSE = re.sub(r"^```.*?^```$", "", DOCUMENT, flags=re.MULTILINE | re.DOTALL)


def spans(section: str = "") -> list[str]:
    """The code spans of the prose, or of the tables' first columns below a heading."""
    if not section:
        return re.findall(r"`([^`]+)`", PROSE)
    below = PROSE.partition(f"\n## {section}\n")[2]
    rows = re.findall(r"^\| ([^|]*`[^|]*) \|", below, re.MULTILINE)
    return [span for row in rows for span in re.findall(r"`([^`]+)`", row)]


@cache
def sources() -> str:
    """All code of the program, with literals that go on in the next line put together."""
    code = "\n".join(
        path.read_text() for top in ("services", "shared") for path in (ROOT / top).rglob("*.py")
    )
    return re.sub(r'"\s*\n\s*f?"', "", code)


def test_every_flag_and_variable_is_a_setting() -> None:
    settings = {name for model in known_settings() for name in model.model_fields}
    flags = set(re.findall(r"--([a-z][a-z-]+)", DOCUMENT)) - {"build", "build-arg", "scale"}  # docker's
    assert flags <= {name.replace("_", "-") for name in settings}
    compose = {"tag"}  # which no service reads
    assert {name.lower() for name in re.findall(r"SEEDRL_([A-Z_]+)", DOCUMENT)} - compose <= settings


def test_every_test_and_preset_that_is_named_is_there() -> None:
    for path in re.findall(r"`(tests/[\w/.]+)`", PROSE):
        assert (ROOT / path).exists(), path
    for preset in re.findall(r"`?(?:--preset )?\b((?:atari|cartpole)_\w+)`?", DOCUMENT):
        assert (ROOT / "presets" / f"{preset}.yaml").exists(), preset


@pytest.mark.parametrize("said", spans("Troubleshooting"))
def test_what_it_says_in_trouble_is_what_the_program_says(said: str) -> None:
    for part in said.split("…"):
        fixed = part.strip(" .;:'`,()")
        if not fixed.startswith(("--", "/")):  # settings and paths are checked elsewhere
            assert fixed in sources(), fixed


def test_the_exit_statuses_are_those_of_the_errors() -> None:
    kinds = [each for each in vars(errors).values() if isinstance(each, type)]
    known = {each.exit_status for each in kinds if issubclass(each, errors.SeedrlError)}
    shown = {int(status) for status in re.findall(r"^\| (\d+) \|", DOCUMENT, re.MULTILINE)}
    assert known <= shown == {0, 1, 2, 3, 4, 5, 130}
    (prevented,) = re.findall(r"^RestartPreventExitStatus=(.*)$", DOCUMENT, re.MULTILINE)
    assert set(map(int, prevented.split())) == known - {1, 3}


def test_the_figures_of_settings_are_their_defaults() -> None:
    defaults = {
        name: field.default for model in known_settings() for name, field in model.model_fields.items()
    }
    for flag, value in re.findall(r"`--([a-z-]+)` \((\d+)\)", DOCUMENT):
        assert defaults[flag.replace("-", "_")] == int(value), flag
