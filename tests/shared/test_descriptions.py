"""Below which heading a setting stands, and how its default is told."""

from typing import Annotated

from pydantic import Field

from shared.config import Settings, SettingsGroup
from shared.descriptions import arranged, as_text, default, description
from shared.kinds import R2D2, Heading


class Size(SettingsGroup):
    """A group with a heading."""

    heading = Heading.NETWORK

    width: int = 3
    """Width; default: as wide
    as it gets."""
    depth: Annotated[int, Heading.TRAINING] = 4
    """Depth."""
    layers: Annotated[int, R2D2] = 5
    """Layers."""


class Service(Settings, Size):
    """A service with a heading of its own."""

    heading = Heading.INFERENCE

    port: int
    """Port."""


class Everything(Service):
    """A command without a heading, which says something else of what it inherits."""

    sizes: tuple[float, ...] = (1.0, 0.5)
    """Sizes."""
    width: int = 1
    """Another width."""
    words: dict[str, bool] = Field(default_factory=lambda: {"a": True})
    """Words."""


def test_a_setting_stands_below_its_mark_or_else_the_heading_of_the_class_that_declares_it() -> None:
    assert arranged(Everything) == {
        None: ["sizes", "words", "preset"],
        Heading.NETWORK: ["width"],
        Heading.TRAINING: ["depth"],
        Heading.R2D2: ["layers"],
        Heading.INFERENCE: ["port"],
    }
    assert list(arranged(Everything)) == [
        None,
        *sorted({*Heading} & {*arranged(Everything)}, key=list(Heading).index),
    ]


def test_what_is_for_one_agent_alone_says_so() -> None:
    assert description(Service, "layers") == "[r2d2] Layers."
    assert description(Service, "width") == "Width; default: as wide as it gets."


def test_a_default_is_told_as_it_may_be_given_unless_the_documentation_does() -> None:
    told = {name: default(field) for name, field in Everything.model_fields.items()}
    assert told.pop("preset") is None
    assert told == {
        "width": "1",
        "depth": "4",
        "layers": "5",
        "port": None,
        "sizes": "1,0.5",
        "words": '{"a": true}',
    }
    assert default(Service.model_fields["width"]) is None
    assert as_text(1e-5) == "1e-05"
