"""docs/settings.md says what the configuration models and the presets say."""

import re

from services.cli import known_settings
from shared.presets import preset_names, read_preset
from tests.support.commands import ROOT
from tools.settings_reference import DOCUMENT, document

TEXT = DOCUMENT.read_text()


def test_the_reference_is_what_is_made_of_the_models() -> None:
    assert ROOT / "docs/settings.md" == DOCUMENT
    assert document() == TEXT, "python -m tools.settings_reference writes it anew"


def test_it_has_every_setting_that_can_be_given_in_the_environment() -> None:
    settings = {
        name
        for model in known_settings()
        for name, field in model.model_fields.items()
        if not field.validation_alias
    }
    assert {name.lower() for name in re.findall(r"`SEEDRL_([A-Z0-9_]+)` \|", TEXT)} == settings


def test_it_tells_values_bounds_defaults_presets_and_commands() -> None:
    (cells,) = (line.split(" | ") for line in TEXT.splitlines() if line.startswith("| `--rmsprop-decay`"))
    assert cells[0] == "| `--rmsprop-decay`<br>`SEEDRL_RMSPROP_DECAY`"
    assert cells[1:3] == ["float, ≥ 0, < 1", "`0.99`"]
    assert cells[4] == "train, learner, bench pipeline"
    (cells,) = (line.split(" | ") for line in TEXT.splitlines() if line.startswith("| `--n-steps`"))
    assert cells[3] == "`10`: cartpole_r2d2"
    assert cells[5].startswith("[r2d2] Rewards")
    others = {name for name in preset_names() if read_preset(name).values.get("n_steps", 5) != 5}
    assert others == {"cartpole_r2d2"}
