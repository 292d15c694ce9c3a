"""Carry the experiments' YAML files in the wheel, where `tdisent quickstart` finds them. All else is in setup.cfg."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithExperiments(build_py):
    """Copy experiments/**/*.yaml into the package."""

    def run(self) -> None:
        """See the class; an editable install reads them from the checkout."""
        super().run()
        if self.editable_mode:
            return
        source = Path(__file__).parent / "experiments"
        if not (files := sorted(source.rglob("*.yaml"))):
            raise SystemExit(f"{source} has no YAML files, which the wheel must carry")
        for file in files:
            target = Path(self.build_lib) / "lightning_tdisent" / "experiments" / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


setup(cmdclass={"build_py": BuildWithExperiments})
