"""Without a compiler the install and the server go on, with the torch form."""

import shutil

import pytest

from compressors.kernels import build


def test_without_a_compiler_the_reason_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(build.KernelUnavailableError, match="no C\\+\\+ compiler found"):
        build.compile_to(tmp_path / "kernel.so")


def test_building_without_a_compiler_is_no_failure(monkeypatch, capsys):
    def unavailable():
        raise build.KernelUnavailableError("no C++ compiler found")

    monkeypatch.setattr(build, "library", unavailable)
    assert build.main() == 0
    assert "torch CSR" in capsys.readouterr().out


def test_what_the_compiler_says_is_passed_on(tmp_path):
    with pytest.raises(build.KernelUnavailableError, match=r"failed on level\.cpp"):
        build.compile_to(tmp_path / "kernel.so", {"level": ("level.cpp", "-Dnamespace=nonsense")})
    assert list(tmp_path.iterdir()) == []
