"""Settings: precedence, near misses, keys that stay secret."""

import tomllib
from pathlib import Path

import pytest

from server.config import Settings, SettingsError, load_settings
from server.keys import hash_key

DEFAULT = '[steering.default]\nprofile = "p"\ndirection = "use_context"\n'


def test_flag_before_environment_before_file_before_default(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('[server]\nport = 1\nhost = "h"\n[engine]\ndtype = "float32"\n[admission]\nmax_concurrent = 3\n')
    environ = {"DELTAWORKS__SERVER__PORT": "2", "DELTAWORKS__ENGINE__DTYPE": "bfloat16", "OTHER": "x"}
    settings = load_settings(file, environ, {"server": {"port": 3}})
    assert (settings.server.port, settings.server.host) == (3, "h")
    assert settings.engine.dtype == "bfloat16"
    assert settings.admission.max_concurrent == 3
    assert settings.engine.deltas_per_batch == 8


@pytest.mark.parametrize(
    ("text", "environ", "message"),
    [
        ("[server]\nprot = 1", {}, r"unknown setting 'server.prot' \(did you mean 'port'\?\)"),
        ("[sever]\nport = 1", {}, r"unknown setting 'sever' \(did you mean 'server'\?\)"),
        ("[server]\nadmin_port = 8000", {}, "admin_port is port"),
        ('[engine.vllm]\nhf_token = "secret"', {}, "set HF_TOKEN in the environment"),
        ("[engine]\nzzz = 1", {}, r"unknown setting 'engine.zzz' \(known: dtype"),
        ("port = 1", {}, "must be a section"),
        ("[server]\nport = 99999", {}, "setting 'server.port'"),
        ("[steering]\nmax_strength = inf", {}, "setting 'steering.max_strength'"),
        ('[steering.default]\nprofile = "p"', {}, "setting 'steering.default.direction': Field required"),
        ('[steering.default]\nprofile = "p"\ndirection = "up"', {}, "setting 'steering.default.direction'"),
        (
            '[steering.default]\nprofil = "p"',
            {},
            r"unknown setting 'steering.default.profil' \(did you mean 'profile'\?\)",
        ),
        ("[steering]\ndefault = 3", {}, "setting 'steering.default'"),
        (DEFAULT + "strength = 5", {}, "default's strength is over max_strength 4"),
        ("", {"DELTAWORKS__STEERING__DEFAULT__": "p"}, "expected DELTAWORKS__SECTION__KEY"),
        ("", {"DELTAWORKS__STEERING__DEFAULT__PROFIL": "p"}, "did you mean 'profile'"),
        ("[server", {}, "cannot read the settings file"),
        ("", {"DELTAWORKS__SERVER__PROT": "1"}, "did you mean 'port'"),
        ("", {"DELTAWORKS__PORT": "1"}, "expected DELTAWORKS__SECTION__KEY"),
        ("", {"DELTAWORKS__SERVER__PORT": "many"}, "setting 'server.port'"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, environ: dict[str, str], message: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=message):
        load_settings(file, environ, {})


def test_section_of_a_section_is_overridden_key_by_key_and_printed(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(DEFAULT + "strength = 1.5\n[steering]\nallow_opt_out = true\n")
    environ = {"DELTAWORKS__STEERING__DEFAULT__PROFILE": "q", "DELTAWORKS__STEERING__ALLOW_OPT_OUT": "false"}
    steering = load_settings(file, environ, {}).steering
    assert steering.default is not None
    found = (steering.default.profile, steering.default.direction, steering.default.strength, steering.allow_opt_out)
    assert found == ("q", "use_context", 1.5, False)
    settings = load_settings(file, environ, {"steering": {"default": {"strength": 2}}})
    assert settings.steering.default is not None
    assert (settings.steering.default.profile, settings.steering.default.strength) == ("q", 2)
    file.write_text(settings.to_toml())
    assert load_settings(file, {}, {}) == settings


def test_vllm_arguments_come_from_file_and_environment_and_are_printed(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("[engine.vllm]\ntensor_parallel_size = 2\nhf_overrides = {rope_theta = 1.5}\n")
    settings = load_settings(file, {"DELTAWORKS__ENGINE__VLLM__KV_CACHE_DTYPE": "fp8"}, {})
    passed = {"tensor_parallel_size": 2, "hf_overrides": {"rope_theta": 1.5}, "kv_cache_dtype": "fp8"}
    assert settings.engine.vllm == passed
    file.write_text(settings.to_toml())
    assert load_settings(file, {}, {}) == settings


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot read the settings file"):
        load_settings(tmp_path / "none.toml", {}, {})


def test_keys_come_from_environment_and_file_and_are_masked(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# users\ncanary-file\n\n")
    environ = {"DELTAWORKS__AUTH__API_KEYS": "canary-a, canary-b", "DELTAWORKS__AUTH__API_KEY_FILE": str(file)}
    settings = load_settings(None, environ, {})
    held = [key.get_secret_value() for key in settings.auth.api_keys]
    assert held == [hash_key(f"canary-{name}") for name in ("a", "b", "file")]
    assert "canary" not in settings.to_toml()
    assert "canary" not in repr(settings)


@pytest.mark.parametrize("content", ["", "# only a comment\n"])
def test_key_file_without_keys_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(SettingsError, match="holds no key"):
        load_settings(None, {}, {"auth": {"admin_key_file": file}})


def test_printed_settings_load_again(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(Settings().to_toml())
    assert load_settings(file, {}, {}) == Settings()
    sections = {"server", "store", "engine", "auth", "admission", "steering", "tools", "gate", "telemetry"}
    assert set(tomllib.loads(file.read_text())) == sections
