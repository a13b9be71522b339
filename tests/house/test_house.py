"""The house itself: what an import brings in, what a room exports, what a wheel holds."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, *options: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    result = subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


ROOMS = ["masking", "patches", "conv", "targets", "losses", "nn", "interop", "viz"]


def test_importing_the_library_brings_in_nothing_optional_and_touches_no_gpu() -> None:
    optional = ["triton", "hypothesis", "PIL", "matplotlib", "timm", "transformers", "torchvision"]
    optional += ["safetensors", "skimage", "sklearn", "tyro", "yaml", "tqdm", "recipes"]
    code = (
        "import importlib, sys, torch, numpy, einops, jaxtyping\n"
        "before = set(sys.modules)\n"
        f"[importlib.import_module(f'mimkit.{{room}}') for room in {ROOMS}]\n"
        "import mimkit\n"
        f"print([name for name in {optional} if name in set(sys.modules) - before])\n"
        "print(torch.cuda.is_initialized())"
    )
    assert run_python(code).split("\n")[:2] == ["[]", "False"]


def test_every_room_exports_exactly_the_names_it_lists() -> None:
    for room in [*ROOMS, "testing"]:
        if room == "viz":
            continue
        module = __import__(f"mimkit.{room}", fromlist=["*"])
        listed = set(module.__all__)
        public = {
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and (name in listed or not isinstance(value, type(sys)))
        }
        assert listed == public, room


def test_a_wheel_built_from_the_sdist_holds_both_packages_and_nothing_else(tmp_path: Path) -> None:
    # `--no-isolation`: the backend comes from the test environment, nothing is downloaded.
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (sdist,) = tmp_path.glob("*.tar.gz")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {
        str(path.relative_to(base))
        for base, package in ((ROOT, "mimkit"), (ROOT / "kernels", "mimkit_kernels"))
        for path in (base / package).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert shipped == sources
    with tarfile.open(sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert {"mimkit", "kernels", "recipes", "tests", "benchmarks", "LICENSE"} <= tops
    assert not tops & {"runs", ".git", "dist"}


def run_typed(*paths: str) -> None:
    """Run tests in a process that checks shapes and types of what passes through the library."""
    options = ["-m", "not full and not untyped", "-q", "-p", "no:cacheprovider"]
    # beartype draws from `random`, which `assert_sampler_conforms` takes for the sampler's doing.
    options += ["--ignore=mimkit/testing/_samplers.py"]
    options += ["--jaxtyping-packages=mimkit,beartype.beartype"]
    run_python(f"import sys, pytest\nsys.exit(pytest.main({[*paths, *options]}))")


def test_doctests_and_golden_files_run_with_shapes_and_types_checked() -> None:
    golden = (f"tests/recipes/test_{name}_golden.py" for name in ("mae", "convmae"))
    run_typed("mimkit", "recipes/mae.py", "recipes/convmae.py", *golden)


@pytest.mark.full
@pytest.mark.parametrize(
    "room", ["conv", "masking", "patches", "targets", "losses", "nn", "interop"]
)
def test_a_rooms_tests_run_with_shapes_and_types_checked(room: str) -> None:
    run_typed(f"tests/{room}")
