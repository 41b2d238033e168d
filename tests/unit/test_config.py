"""The gateway's settings: one schema, three sources, and one clear line for what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from bmoe.protocol.errors import ConfigError
from coordinator.config import GatewaySettings, load_settings


def test_a_flag_beats_the_environment_and_the_environment_beats_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three sources, in this order; what none of them sets has its documented default."""
    (tmp_path / "gateway.toml").write_text('policy = "full"\nbatch_rows = 8\nwindow_ms = 5\n')
    monkeypatch.setenv("BMOE_BATCH_ROWS", "16")
    settings = load_settings(state=tmp_path, window_ms=7.0)
    assert (settings.policy, settings.batch_rows, settings.window_ms) == ("full", 16, 7.0)
    assert settings.api_host == "127.0.0.1"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("batch_rows = 0", "batch_rows"),
        ('colour = "red"', "colour"),
        ("window_ms = 'soon'", "window_ms"),
        ("mqtt_port = 70000", "mqtt_port"),
        ("this is not toml", "gateway.toml"),
    ],
)
def test_what_cannot_be_is_named(tmp_path: Path, text: str, says: str) -> None:
    """A value out of range, an unknown key, a wrong type, a broken file: ConfigError with the name in it."""
    (tmp_path / "gateway.toml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_settings(state=tmp_path)


def test_every_setting_says_what_it_is_for() -> None:
    """`bmoe config` is worth reading only if nothing in it is bare."""
    assert all(field.description for field in GatewaySettings.model_fields.values())
