"""Keys: what a key file may say, what is kept of it, and the command that makes one."""

import hashlib
import io
import tomllib
from pathlib import Path

import pytest

from server.cli import main
from server.config import Settings, SettingsError, load_settings
from server.keys import Caller, Key, Keys, as_stored, hash_key

KEY = "canary-key"
HASH = f"sha256:{hashlib.sha256(KEY.encode()).hexdigest()}"
ENTRY = f'[[keys]]\nid = "team-a"\nhash = "{HASH}"\n'


def load(tmp_path: Path, text: str) -> Settings:
    (tmp_path / "keys.toml").write_text(text)
    return load_settings(None, {"DELTAWORKS__AUTH__KEY_FILE": str(tmp_path / "keys.toml")}, {})


def test_an_entry_says_all_that_a_key_may_do(tmp_path: Path) -> None:
    more = 'scopes = ["inference", "admin"]\ndeltas = ["red", "team-*"]\nmax_concurrent = 2\nrequests_per_minute = 9\n'
    (entry,) = load(tmp_path, ENTRY + more).auth.keys
    key = entry.key()
    assert (key.hash, key.caller.key_id, key.caller.scopes) == (HASH, "team-a", {"inference", "admin"})
    limits = key.caller.limits
    assert (limits.max_concurrent, limits.max_queued_tokens, limits.requests_per_minute) == (2, None, 9)
    assert [key.caller.may_use(name) for name in ("red", "team-x", "reda", "blue")] == [True, True, False, False]


def test_without_deltas_and_scopes_a_key_may_infer_with_all(tmp_path: Path) -> None:
    (entry,) = load(tmp_path, ENTRY).auth.keys
    assert entry.key().caller == Caller("team-a", frozenset({"inference"}))
    assert not Caller(deltas=()).may_use("red")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold \\[\\[keys\\]\\]"),
        ("keys = []", "must hold"),
        (ENTRY + "[other]\n", "nothing else"),
        (ENTRY + "[[keys]]\n", "setting 'auth.keys.1.id': Field required"),
        (ENTRY + 'delta = ["red"]\n', r"unknown setting 'auth.keys.0.delta' \(did you mean 'deltas'\?\)"),
        (ENTRY + ENTRY, "'team-a' is given twice"),
        (ENTRY + ENTRY.replace("team-a", "team-b"), "is given twice"),
        (ENTRY + "scopes = []\n", "auth.keys.0.scopes"),
        (ENTRY + 'scopes = ["root"]\n', "auth.keys.0.scopes"),
        (ENTRY + "max_concurrent = 0\n", "auth.keys.0.max_concurrent"),
        (ENTRY.replace(HASH, KEY), "auth.keys.0.hash"),
        ("[[keys]", "cannot read the key file"),
    ],
)
def test_mistakes_in_a_key_file_are_named_and_no_key_is_shown(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as raised:
        load(tmp_path, text)
    assert KEY not in str(raised.value)


def test_a_key_of_two_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text(f"{KEY}\n")
    (tmp_path / "keys.toml").write_text(ENTRY)
    with pytest.raises(SettingsError, match="given twice"):
        load_settings(None, {}, {"auth": {"key_file": tmp_path / "keys.toml", "api_key_file": tmp_path / "plain"}})


def test_only_hashes_are_kept_however_a_key_was_given(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text(f"# users\n{KEY}-1\n{hash_key(KEY)}\n")
    environ = {"DELTAWORKS__AUTH__API_KEYS": f"{KEY}-2", "DELTAWORKS__AUTH__API_KEY_FILE": str(tmp_path / "plain")}
    settings = load_settings(None, environ, {"auth": {"admin_keys": [f"{KEY}-3"]}})
    held = [key.get_secret_value() for key in settings.auth.api_keys + settings.auth.admin_keys]
    assert held == [hash_key(f"{KEY}-2"), hash_key(f"{KEY}-1"), HASH, hash_key(f"{KEY}-3")]
    for shown in (settings.to_toml(), repr(settings), repr(load(tmp_path, ENTRY))):
        assert KEY not in shown
        assert HASH not in shown


def test_knowing_the_hash_is_not_knowing_the_key() -> None:
    keys = Keys([Key(as_stored(KEY), Caller("a"))], inference_open=False)
    assert keys.find(KEY) == Caller("a")
    for wrong in (HASH, HASH.removeprefix("sha256:"), KEY.upper(), KEY + " ", "", "\udc80"):
        assert keys.find(wrong) is None


def test_s3_every_known_key_is_compared_whatever_matched(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def compare(given: str, known: str) -> bool:
        compared.append(known)
        return given == known

    monkeypatch.setattr("server.keys.hmac.compare_digest", compare)
    known = [as_stored(f"k{number}") for number in range(5)]
    keys = Keys([Key(hashed, Caller(hashed)) for hashed in known], inference_open=False)
    for asked in ("k0", "k4", "nobody"):
        compared.clear()
        keys.find(asked)
        assert compared == known


def test_keys_new_writes_an_entry_and_shows_the_key_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--scope", "admin", "--scope", "inference", "--delta", "team-*", "--max-concurrent", "3"]
    assert main(["keys", "new", "team-b", *arguments]) == 0
    made = capsys.readouterr()
    key = made.err.strip().removeprefix("key: ")
    assert len(key) > 40
    assert key not in made.out
    (entry,) = load(tmp_path, made.out).auth.keys
    assert entry.hash == hash_key(key)
    assert (entry.id, entry.deltas, entry.max_concurrent) == ("team-b", ("team-*",), 3)
    assert tomllib.loads(made.out)["keys"][0]["scopes"] == ["admin", "inference"]
    assert main(["keys", "new", "team b"]) == 1
    assert "error: id:" in capsys.readouterr().err


def test_keys_hash_reads_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{KEY}\n"))
    assert main(["keys", "hash"]) == 0
    assert capsys.readouterr().out == f"{HASH}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(["keys", "hash"]) == 1
