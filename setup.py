"""What goes into a wheel. All else is in `pyproject.toml`, which cannot say that the root is the package and find the rest.

An editable install needs only `importable/rayltx`, whose search path is this folder. A wheel has no folder to point to: it
holds the root as `rayltx`, and the root's packages under it.
"""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    def finalize_options(self) -> None:
        super().finalize_options()
        if not self.editable_mode:
            # Found, not listed: a list would go stale. The tests and the scripts are no packages.
            self.packages = ["rayltx", *(f"rayltx.{name}" for name in find_packages())]
            self.package_dir = {"rayltx": "."}
            self.package_data = {"rayltx.demo": ["shapes.safetensors"]}


# Named, for setuptools leaves the script itself out of the root's modules, and cannot tell its name under pip.
setup(script_name="setup.py", cmdclass={"build_py": BuildPy})
