"""The table of supported versions in `docs/kernels.md` is true."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "tests" / "kernels" / "recorded"


def minor(release: str) -> str:
    return ".".join(release.split("+")[0].split(".")[:2])


def supported() -> dict[str, str]:
    """The table: version of PyTorch -> version of Triton."""
    text = (ROOT / "docs" / "kernels.md").read_text()
    return dict(re.findall(r"^\| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE))


def test_the_installed_pytorch_and_triton_are_a_supported_pair() -> None:
    assert supported().get(minor(version("torch"))) == minor(version("triton"))


def test_static_figures_are_recorded_for_every_supported_triton() -> None:
    recorded = {path.stem.removeprefix("triton-") for path in RECORDED.glob("triton-*.csv")}
    assert recorded == set(supported().values())


def test_the_oldest_supported_pytorch_is_the_one_that_the_package_requires() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = min(supported(), key=lambda release: [int(part) for part in release.split(".")])
    assert f"torch>={oldest}" in project["dependencies"]


def test_the_tests_run_with_supported_versions_of_pytorch() -> None:
    """Those that CI installs, and those that CONTRIBUTING names."""
    files = (".ci/run", "pyproject.toml", "CONTRIBUTING.md")
    used = {
        minor(release)
        for name in files
        for release in re.findall(r"torch==([\d.]+\d)", (ROOT / name).read_text())
    }
    assert used == set(supported())
