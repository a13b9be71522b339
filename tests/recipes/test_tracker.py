"""Experiment trackers get the metrics."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipes.engine import run
from recipes.mae import RECIPE

SHORT = ["--data", "digits", "--max-steps", "3", "--batch-size", "8", "--log-every", "1"]


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the report and its probes, which other tests cover."""
    monkeypatch.setattr("recipes.engine.main.write_report", lambda *a, **k: {"steps": 3})
    monkeypatch.setattr("recipes.engine.main.print_summary", lambda *a, **k: None)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_wandb_style_tracker_gets_every_row(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, dict[str, object]]] = []
    module = SimpleNamespace(
        init=lambda **kwargs: calls.append(("init", kwargs)),
        log=lambda values, step: calls.append(("log", {"step": step, **values})),
        finish=lambda: calls.append(("finish", {})),
    )
    monkeypatch.setitem(sys.modules, name, module)
    assert run(RECIPE, "", [*SHORT, "--tracker", name, "--out", str(tmp_path / "run")]) == 0
    assert [kind for kind, _ in calls] == ["init", "log", "log", "log", "finish"]
    assert calls[0][1]["name"] == "run"
    assert [values["step"] for kind, values in calls if kind == "log"] == [1, 2, 3]
    assert {"loss", "lr", "baselines/zero"} <= calls[1][1].keys()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_in_one_line(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None
    )
    assert run(RECIPE, "", [*SHORT, "--tracker", name, "--out", str(tmp_path / "run")]) == 2
    assert f"pip install {name}" in capfd.readouterr().err


def test_tensorboard_writes_an_event_file(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    out = tmp_path / "run"
    assert run(RECIPE, "", [*SHORT, "--tracker", "tensorboard", "--out", str(out)]) == 0
    assert list((out / "tensorboard").glob("events.*"))
