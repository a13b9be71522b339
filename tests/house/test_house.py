"""The house itself: what an import brings in, what a room exports, what a wheel holds."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
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


# Private functions that a benchmark measures: (benchmark, private module).
MEASURED = {
    ("benchmarks.bench_attention", "mimkit.nn._layers"),
    ("benchmarks.bench_simmim_step", "mimkit.nn._layers"),
}


def private_imports(root: Path) -> set[tuple[str, str]]:
    """Find imports of a room's `_private` modules from outside of it: (importer, private module).

    A room's own tests may import them (`tests/nn` those of `mimkit.nn`, `tests/peers` too those of
    `mimkit.interop`). Private modules directly in `mimkit` (`mimkit._grids`) are shared by all
    rooms.
    """
    found = set()
    for folder in ("mimkit", "kernels/mimkit_kernels", "recipes", "tests", "benchmarks"):
        for path in (root / folder).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            importer = parts[1:] if parts[0] == "kernels" else parts
            for module in imported_modules(path, importer[:-1], root):
                depth = next((i for i, part in enumerate(module) if part.startswith("_")), None)
                if depth is None or module[0] not in ("mimkit", "mimkit_kernels", "recipes"):
                    continue
                room = module[:depth]
                own = {("tests", room[-1].removeprefix("mimkit_")), room}
                own |= {("tests", "peers")} if room == ("mimkit", "interop") else set()
                if room != ("mimkit",) and not own & {importer[:2], importer[:depth]}:
                    found.add((".".join(importer), ".".join(module[: depth + 1])))
    return found


def imported_modules(path: Path, package: tuple[str, ...], root: Path) -> list[tuple[str, ...]]:
    """List the modules that a file imports, anywhere in it."""
    modules: list[tuple[str, ...]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            modules.append(base)
            modules += [
                (*base, alias.name)
                for alias in node.names
                for source in (root, root / "kernels")
                if source.joinpath(*base, f"{alias.name}.py").is_file()
            ]
    return modules


def test_no_module_imports_a_private_module_of_another_room() -> None:
    assert private_imports(ROOT) == MEASURED


def test_private_imports_are_found_however_they_are_written(tmp_path: Path) -> None:
    files = {
        "mimkit/patches/_cells.py": "from mimkit._grids import divide",
        "mimkit/patches/_tokens.py": "from mimkit.patches._cells import pack_cells",
        "mimkit/patches/__init__.py": "from mimkit.patches._cells import pack_cells as _pack",
        "mimkit/conv/_one.py": "from mimkit.patches._cells import pack_cells",
        "mimkit/conv/_two.py": "def later():\n    import mimkit.patches._cells as cells",
        "mimkit/conv/_three.py": "from ..patches import _cells",
        "mimkit/conv/_four.py": "from ..patches._cells import pack_cells",
        "mimkit/viz.py": "from mimkit.patches import __doc__, _cells",
        "recipes/mae.py": "from mimkit.patches._cells import pack_cells",
        "recipes/simmim.py": "from mimkit._grids import divide",
        "tests/patches/test_cells.py": "from mimkit.patches._cells import pack_cells",
        "tests/conv/test_depthwise.py": "from mimkit.patches._cells import pack_cells",
        "tests/kernels/test_launch.py": "from mimkit_kernels._launch import on_device",
        "benchmarks/bench_cells.py": "from mimkit_kernels import _launch",
        "kernels/mimkit_kernels/__init__.py": "from mimkit_kernels._launch import on_device",
        "kernels/mimkit_kernels/_launch.py": "import torch._dynamo",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    importers = [f"mimkit.conv._{name}" for name in ("one", "two", "three", "four")]
    importers += ["mimkit.viz", "recipes.mae", "tests.conv.test_depthwise"]
    expected = {(importer, "mimkit.patches._cells") for importer in importers}
    expected |= {("benchmarks.bench_cells", "mimkit_kernels._launch")}
    assert private_imports(tmp_path) == expected


def test_a_wheel_built_from_the_sdist_holds_both_packages_the_recipes_and_nothing_else(
    tmp_path: Path,
) -> None:
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
        prefix + str(path.relative_to(base))
        for base, package, prefix in (
            (ROOT, "mimkit", ""),
            (ROOT / "kernels", "mimkit_kernels", ""),
            (ROOT, "recipes", "mimkit/_shipped/"),
        )
        for path in (base / package).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert shipped == sources
    with tarfile.open(sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert {"mimkit", "kernels", "recipes", "tests", "benchmarks", "LICENSE"} <= tops
    assert not tops & {"runs", ".git", "dist"}
    assert sdist.stat().st_size < 1_000_000


def run_typed(*paths: str) -> None:
    """Run tests in a process that checks shapes and types of what passes through the library."""
    options = ["-m", "not full and not untyped", "-q", "-p", "no:cacheprovider"]
    # beartype draws from `random`, which `assert_sampler_conforms` takes for the sampler's doing.
    options += ["--ignore=mimkit/testing/_samplers.py"]
    options += ["--jaxtyping-packages=mimkit,beartype.beartype"]
    run_python(f"import sys, pytest\nsys.exit(pytest.main({[*paths, *options]}))")


@pytest.mark.full
def test_doctests_and_golden_files_run_with_shapes_and_types_checked() -> None:
    golden = (f"tests/recipes/test_{name}_golden.py" for name in ("mae", "convmae"))
    run_typed("mimkit", "recipes/mae.py", "recipes/convmae.py", *golden)


@pytest.mark.full
@pytest.mark.parametrize(
    "room", ["conv", "masking", "patches", "targets", "losses", "nn", "interop"]
)
def test_a_rooms_tests_run_with_shapes_and_types_checked(room: str) -> None:
    run_typed(f"tests/{room}")


def test_the_floors_of_the_engine_are_those_that_import_linter_checks() -> None:
    """The table in CONTRIBUTING.md, from top to bottom."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (contract,) = (
        one
        for one in project["tool"]["importlinter"]["contracts"]
        if one.get("containers") == ["recipes.engine"]
    )
    checked = [set(layer.split(" | ")) for layer in contract["layers"]]
    _, _, table = (ROOT / "CONTRIBUTING.md").read_text().partition("| floor | contents |\n")
    rows = table.partition("\n\n")[0].splitlines()[1:]
    assert [set(re.findall(r"`(\w+)/?`", row.split(" | ")[0])) for row in rows] == checked
