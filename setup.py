"""Compiles the C++ kernel when the package is installed; without a compiler the install goes on, and says what serves instead."""

import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

from compressors.kernels import build  # noqa: E402  # found by the path that was just added


class BuildWithKernel(build_py):
    """An editable install compiles into the cache folder, where it looks; any other into the package."""

    def run(self) -> None:
        super().run()
        try:
            if self.editable_mode:
                build.library()
            else:
                build.compile_to(Path(self.build_lib) / "compressors" / "kernels" / build.library_name())
        except build.KernelUnavailableError as error:
            print(f"kernel not built, deltas will be served with torch CSR: {error}", file=sys.stderr)


class PlatformDistribution(Distribution):
    """A wheel that holds a compiled kernel is not for every machine."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildWithKernel}, distclass=PlatformDistribution)
