"""Rows of benchmarks: saved as they are measured, and not measured again when a run goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import estimate, harness
from benchmarks.bench_mae_step import IS_MATRIX_PRODUCT, IS_MOVE
from benchmarks.count_launches import PIECE, Launches, count_update
from benchmarks.harness import Bench, Pass, Report, Row, Variant, read_records
from benchmarks.sweep_launches import launch_table, measured

Run = Callable[..., list[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a benchmark of two variants; return which were called."""
    x = torch.ones(4, requires_grad=True)

    def compare(
        passes: tuple[Pass, ...] = ("forward",), resume: bool = True, fails: str = ""
    ) -> list[str]:
        calls: list[str] = []

        def function(name: str) -> Callable[[Tensor], Tensor]:
            def call(x: Tensor) -> Tensor:
                calls.append(name)
                return x * (3 if name == fails else 2)

            return call

        variants = [Variant(name, function(name), (x,), (x,)) for name in ("theirs", "ours")]
        report = Report(file=tmp_path / "rows.jsonl", resume=resume)
        bench = Bench("bench_double", torch.device("cpu"), 0, report)
        bench.compare("four", variants, dtype=torch.float32, tolerance=0, passes=passes)
        assert {row.variant for row in report.rows} == {"theirs", "ours"}
        return calls

    return compare


def keys(file: Path) -> list[tuple[str, str]]:
    return [(record["variant"], record["pass"]) for record in read_records(file)]


def test_what_the_file_has_is_neither_measured_nor_saved_again(run: Run, tmp_path: Path) -> None:
    assert set(run()) == {"theirs", "ours"}
    before = (tmp_path / "rows.jsonl").read_text()
    assert run() == []
    assert (tmp_path / "rows.jsonl").read_text() == before
    assert run(("forward", "backward"))
    assert sorted(keys(tmp_path / "rows.jsonl")) == [
        ("ours", "backward"), ("ours", "forward"), ("theirs", "backward"), ("theirs", "forward"),
    ]  # fmt: skip


def test_without_resume_rows_are_added(run: Run, tmp_path: Path) -> None:
    run()
    assert run(resume=False)
    assert len(keys(tmp_path / "rows.jsonl")) == 4


def test_rows_of_another_commit_do_not_count(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    environment = harness.describe_environment() | {"commit": "another"}
    monkeypatch.setattr(harness, "describe_environment", lambda: environment)
    assert run()
    assert len(keys(tmp_path / "rows.jsonl")) == 4


@pytest.mark.parametrize("cut", [1, 20, 10_000])
def test_a_line_that_a_killed_run_left_unfinished_costs_only_itself(
    run: Run, tmp_path: Path, cut: int
) -> None:
    file = tmp_path / "rows.jsonl"
    run()
    first, second = file.read_text().splitlines()
    file.write_text(f"{first}\n{second[:-cut]}")
    assert run()
    assert sorted(keys(file)) == [("ours", "forward"), ("theirs", "forward")]
    run(resume=False)
    assert len(keys(file)) == 4


def test_a_graph_that_cannot_be_captured_fails_when_all_else_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(variant: Variant) -> Variant:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(harness, "STAND_IN", True)
    monkeypatch.setattr(harness, "graphed", refuse)
    report = Report(file=tmp_path / "rows.jsonl")
    bench = Bench("bench_double", torch.device("cpu"), 0, report)
    variants = [Variant(name, torch.neg, (torch.ones(4),)) for name in ("authors", "ours")]
    with pytest.raises(AssertionError, match="'ours, CUDA graph' cannot be captured: operation"):
        bench.compare("four", variants, dtype=torch.float32, tolerance=0, graphs=True)
    assert keys(tmp_path / "rows.jsonl") == [("authors", "forward"), ("ours", "forward")]


def test_a_row_is_read_as_it_was_saved() -> None:
    row = Row("bench", "case", "ours", "both", "float32", 3, 1.0, 2.0, None, peak_bytes=7)
    assert Row.of_record(json.loads(json.dumps(row.as_record()))) == row


def test_the_sweep_repeats_what_failed_and_what_was_not_saved_whole(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    records: list[dict[str, Any]] = [
        {"bench": "sweep", "case": "whole", "us": {"num_warps=None": 3.0, "num_warps=1": "no"}},
        {"bench": "sweep", "case": "failed", "us": {"num_warps=None": "RuntimeError"}},
        {"bench": "other", "case": "other"},
        {"bench": "sweep", "case": "half", "us": {"num_warps=None": 3.0}},
    ]
    file.write_text("\n".join(map(json.dumps, records))[:-4])
    assert set(measured(file)) == {"whole"}
    assert measured(tmp_path / "absent") == {}


def test_the_launch_table_has_what_is_best_over_all_cases_of_a_kernel(tmp_path: Path) -> None:
    times = [
        # Best of the first case, and far behind in the second; fails in one; best of both together.
        {"num_warps=None": 10.0, "num_warps=1": 5.0, "num_warps=2": 1.0, "num_warps=4": 8.0},
        {"num_warps=None": 100.0, "num_warps=1": 300.0, "num_warps=2": "no", "num_warps=4": 50.0},
    ]
    file = tmp_path / "rows.jsonl"
    records = [
        {"bench": "sweep", "kernel": "first", "case": f"case {n}", "us": us}
        for n, us in enumerate(times)
    ]
    records.append({"bench": "sweep", "kernel": "other", "case": "only", "us": times[0]})
    file.write_text("\n".join(map(json.dumps, records)))
    first, other = (" ".join(line.split()) for line in launch_table(file))
    assert first == "first num_warps=4: 0.63 of today's time, 2 cases"
    assert other == "other num_warps=2: 0.10 of today's time, 1 cases"


def test_rows_of_a_copy_without_history_do_not_say_that_it_is_clean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MIMKIT_COMMIT", "0123abc")
    monkeypatch.setattr(harness, "_git", lambda *_: None)
    environment = harness.describe_environment.__wrapped__()
    assert (environment["commit"], environment["dirty"]) == ("0123abc", None)


def test_operators_of_a_profile_are_products_or_moves_or_neither() -> None:
    kinds = {
        "aten::addmm": "product", "aten::_scaled_dot_product_flash_attention": "product",
        "aten::cudnn_convolution": "product", "mimkit::packed_depthwise_conv": "product",
        "aten::copy_": "move", "aten::cat": "move", "aten::gather": "move", "aten::index": "move",
        "aten::index_select": "move", "aten::_index_put_impl_": "move", "aten::fill_": "move",
        "mimkit::gather_patches": "move", "mimkit::restore_tokens": "move",
        "mimkit::scatter_tokens": "move", "aten::add": "", "aten::gelu": "", "aten::sum": "",
        "mimkit::sum_tokens": "", "aten::native_layer_norm": "", "mimkit::uniform_sample": "",
    }  # fmt: skip
    found = {
        name: "product" * bool(IS_MATRIX_PRODUCT.search(name)) + "move" * bool(IS_MOVE.search(name))
        for name in kinds
    }
    assert found == kinds


H200 = Path(harness.__file__).parent / "results" / "2026-11-29-nvidia-h200-torch2.11.0+cu130.jsonl"


def test_estimates_stand_beside_the_rows_that_they_predict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {(case.kernel, case.case, case.launch) for case in estimate.cases()}
    for wanted in estimate.measured():
        assert {(wanted.kernel, *launch) for launch in wanted.launches} <= known
        assert len(estimate.find_rows(H200, wanted)) == 1
    made = estimate.Estimate(1, 1, 1, 1, 1, 1, 1, 1, 1, us=20)
    monkeypatch.setattr(estimate, "estimate", lambda case: made)
    assert estimate.main(["--rows", str(H200), "packed_depthwise_conv", "regressor_inputs"]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    # Four times the batch; one convolution; two and the filter's gradient.
    assert [line[3] for line in lines] == ["80", "80", "20", "60", "20", "60"]
    assert lines[2][1:] == [
        "forward, bfloat16, stage 1: (256, 256, 56, 56), 49 of 196 cells visible",
        "206", "20", "93", "4.6", "56%", "ae46bba |",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rows", "absent.jsonl"], "absent.jsonl has no row of a kernel that is estimated"),
        (["conv"], "there is no estimate of 'conv'; choose from blockwise_sample, "),
    ],
)
def test_an_estimate_of_nothing_is_an_error(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        estimate.main(arguments)
    assert sentence in capsys.readouterr().err


def test_operators_that_only_make_or_view_a_tensor_launch_nothing() -> None:
    x = torch.ones(2, 3)
    with Launches() as launches:
        y = x.t().reshape(3, 2).detach()[0].unsqueeze(0)
        torch.empty_like(y)
        assert launches.count == 0
        (y + 1).sum()
        y.clone()
    assert launches.count == 3


@pytest.mark.parametrize(
    ("sizes", "launches"),
    [
        ([], 0),
        ([1], 1),
        ([1] * 36, 1),
        ([1] * 37, 2),
        ([320 * PIECE], 1),
        ([320 * PIECE + 1], 2),
        ([200 * PIECE] * 2, 2),
        ([1] * 35 + [321 * PIECE] + [1] * 35, 2),  # 320 pieces, the last 36 with 35 others
        ([1] * 35 + [321 * PIECE] + [1] * 36, 3),
        ([320 * PIECE, 1], 2),
    ],
)
def test_the_fused_optimizer_launches_what_fits_at_once(sizes: list[int], launches: int) -> None:
    assert count_update(sizes, 320, 36) == launches
