"""Every command of an installed mimkit, to a useful end: from the wheel, without a checkout."""

import dataclasses
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SHORT = "--data images --max-steps 2 --batch-size 4"

pytestmark = pytest.mark.full


@dataclasses.dataclass(frozen=True)
class Installed:
    """A virtual environment with the wheel, and a folder that was empty."""

    bin: Path
    folder: Path

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        unset = ("PYTHONPATH", "PYTHONSAFEPATH")
        environment = {name: value for name, value in os.environ.items() if name not in unset}
        return subprocess.run(
            [self.bin / program, *arguments],
            cwd=self.folder,
            env={**environment, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=1200,
        )

    def mimkit(self, line: str) -> str:
        """Run a command that must succeed, and return what it prints."""
        done = self.run("mimkit", *line.split())
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    home = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    subprocess.run([*build, str(home), str(ROOT)], check=True, capture_output=True)
    (wheel,) = home.glob("*.whl")
    venv.create(home / "venv")
    (packages,) = home.glob("venv/lib/python*/site-packages")
    # The dependencies lie in this environment. Its own `.pth` files, which name the checkout, are
    # not read there.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", str(home / "venv")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", str(wheel)], check=True)
    (home / "work").mkdir()
    found = Installed(home / "venv" / "bin", home / "work")
    where = found.run("python", "-c", "import mimkit, sys; print(mimkit.__file__, *sys.path)")
    file, *path = where.stdout.split()
    assert file.startswith(str(packages)), where.stderr
    assert str(ROOT) not in path
    return found


@pytest.fixture(scope="module")
def trained(installed: Installed) -> Installed:
    """The same with two finished runs and a folder of images."""
    (installed.folder / "images").mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(installed.folder / "images" / f"{number}.png")
    assert "attentive" in installed.mimkit("mae --max-steps 50 --out mae")
    installed.mimkit(f"convmae {SHORT} --workers 1 --out convmae")
    return installed


@pytest.mark.parametrize(
    ("line", "written"),
    [
        ("--help", None),
        ("--print-completion bash", None),
        ("doctor", None),
        ("masks describe uniform --grid 14 14 --ratio 0.75 --samples 64", "uniform.png"),
        (f"simmim {SHORT} --out simmim", "simmim/encoder.safetensors"),
        (f"vit-mpp {SHORT} --out vit-mpp", "vit-mpp/encoder.safetensors"),
        (f"cae {SHORT} --out cae", "cae/encoder.safetensors"),
        (f"tokenizer {SHORT} --out tokenizer", "tokenizer/tokenizer.safetensors"),
        ("probe --encoder mae --out probe", "probe/summary.json"),
        ("finetune --encoder mae --max-steps 2 --scratch never --out fine", "fine/summary.json"),
        ("segment --encoder convmae --max-steps 2 --runs 1 --out segment", "segment/summary.json"),
        ("pack images shards --workers 2", "shards/index.npz"),
        ("convert mae timm.safetensors --from mimkit --to timm", "timm.safetensors"),
        ("export mae hf", "hf/model.safetensors"),
        ("report mae convmae --out report.html", "report.html"),
        ("pictures mae convmae --out pictures", "pictures/curves-side-by-side.png"),
        ("figures mae", "mae/tsne.png"),
    ],
)  # fmt: skip
def test_a_command_writes_what_it_is_for(trained: Installed, line: str, written: str) -> None:
    printed = trained.mimkit(line)
    assert printed
    assert "recipes/" not in printed  # files of a checkout
    if written:
        assert (trained.folder / written).stat().st_size > 0


def commands(installed: Installed) -> list[str]:
    listed = installed.mimkit("--help").splitlines()
    return [line.split()[0] for line in listed if line.startswith("  ")]


def test_no_command_is_without_such_a_run(installed: Installed) -> None:
    lines = test_a_command_writes_what_it_is_for.pytestmark[0].args[1]
    others = set(commands(installed)) - {line.split()[0] for line, _ in lines}
    assert others == {"mae", "convmae", "detect"}  # run by `trained`, and below


def test_no_help_names_files_that_an_installation_has_not(installed: Installed) -> None:
    for command in commands(installed):
        if command != "doctor":  # which takes no options
            assert "recipes/" not in installed.mimkit(f"{command} --help"), command


def test_detect_without_torchvision_says_what_to_install(installed: Installed) -> None:
    if installed.run("python", "-c", "import torchvision").returncode == 0:
        pytest.skip("torchvision is installed; tests/peers runs detection")
    done = installed.run("mimkit", "detect")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "mimkit[detect]" in done.stderr
    assert "recipes/" not in done.stderr
