"""The training loop of every recipe: logs, checkpoints, non-finite steps, synchronizations."""

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mimkit import masking
from recipes import finetune, signals, tokenizer, vit_mpp
from recipes.cae import RECIPE as CAE
from recipes.convmae import RECIPE as CONVMAE
from recipes.engine import Recipe, Training, run
from recipes.engine.data.load import load_data
from recipes.engine.data.sets import Batch, TrainSet, first_inputs
from recipes.engine.dry_run import measure
from recipes.engine.errors import UserError
from recipes.engine.flops import counting_flops
from recipes.engine.loop import Moment, Plan, Task, make_plan, run_steps
from recipes.engine.pretrain import Pretraining
from recipes.engine.run.cli import Options, parse_options
from recipes.engine.run.config import RunConfig
from recipes.engine.run.folder import RunFolder
from recipes.engine.run.loader import on_device
from recipes.engine.run.world import World
from recipes.mae import RECIPE as MAE
from recipes.simmim import RECIPE as SIMMIM
from tests.recipes.command import config_for

# The smallest task: linear regression.


class Numbers(TrainSet):
    """Sixteen samples x; the model must predict 3 x."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: tuple[int, int]) -> tuple[Tensor, int]:
        return torch.tensor([float(index[1])]), index[1]


class Line(Task):
    """Fits 3 x. `spoil` maps the number of a call of `forward` to a factor of its loss."""

    def __init__(self, config: RunConfig, spoil: Callable[[int], float] = lambda call: 1.0) -> None:
        torch.manual_seed(0)
        self.calls = itertools.count()
        self.spoil = spoil
        super().__init__(nn.Linear(1, 1), config, World())

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.0)

    def prepare(self, batch: Batch, at: Moment) -> Tensor:
        return batch.images / 16

    def forward(self, model: nn.Module, inputs: Tensor) -> Mapping[str, Tensor]:
        factor = self.spoil(next(self.calls))
        return {
            "loss": (model(inputs) - 3 * inputs).square().mean() * factor,
            "seen": inputs.mean(),
        }

    def extras(self) -> dict[str, Any]:
        return {"baselines": {"zero": 1.0}}


def make_config(**changes: Any) -> RunConfig:
    training = Training(epochs=3, batch_size=4, base_lr=6.4, warmup_epochs=0.0, min_lr=0.1)
    values: dict[str, Any] = {
        "recipe": "line", "preset": "only", "data": "numbers", "model": None, "training": training,
        "lr": 0.1, "max_steps": None, "seed": 0, "device": "cpu", "compile": False, "accumulate": 1,
    }  # fmt: skip
    return RunConfig(**(values | changes))


def train(out: Path, task: Task, **options: Any) -> list[dict[str, Any]]:
    chosen = Options(**({"log_every": 1} | options))
    plan = make_plan(task.config, chosen, Numbers())
    with RunFolder(out, task.config) as folder:
        run_steps(task, plan, Numbers(), folder, chosen)
    return [json.loads(line) for line in (out / "metrics.jsonl").open()]


def test_the_smallest_task_learns_and_logs_its_numbers(tmp_path: Path) -> None:
    rows = train(tmp_path / "run", Line(make_config()))
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"] / 4
    assert rows[0].keys() >= {"epoch", "loss", "lr", "grad_norm", "seen", "images_per_s"}
    assert all(row["baselines"] == {"zero": 1.0} for row in rows)


def test_recomputing_is_refused_for_a_model_without_such_an_encoder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--recompute: this model has no encoder that can"):
        train(tmp_path / "run", Line(make_config()), recompute=True)


def test_rows_come_at_the_first_step_every_few_and_the_last(tmp_path: Path) -> None:
    rows = train(tmp_path / "run", Line(make_config()), log_every=5)
    assert [row["step"] for row in rows] == [1, 5, 10, 12]


def test_a_run_says_what_it_is_and_once_how_long_it_should_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    longer = dataclasses.replace(config.training, epochs=10)
    train(tmp_path / "run", Line(dataclasses.replace(config, training=longer)), log_every=40)
    printed = capsys.readouterr().err.splitlines()
    assert (
        printed[0]
        == "step 0/40  line only on numbers: 2 parameters, 16 images, 4 of them in a step"
    )
    expected = [line for line in printed if "about" in line]
    assert len(expected) == 1
    assert re.fullmatch(
        r"step 21/40  about [\d:]+ \(min:s\) of training to go, an estimate from 20 steps",
        expected[0],
    )
    train(tmp_path / "short", Line(config))
    assert "about" not in capsys.readouterr().err  # too few steps to measure and to wait for
    train(tmp_path / "short", Line(config))
    assert capsys.readouterr().err == ""  # a run that has ended


def said_flops(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"(\S+) GFLOP an image", printed)]


def test_a_run_says_once_how_many_operations_an_image_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", Line(make_config()))
    assert said_flops(capsys.readouterr().err) == [4e-9]  # forward, and gradient of the weight
    train(tmp_path / "run", Line(make_config()))
    assert said_flops(capsys.readouterr().err) == []  # a run that has ended


def test_operations_are_counted_in_the_first_step_with_images_that_is_not_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoiled = Line(make_config(), lambda call: math.inf if call == 0 else 1.0)
    train(tmp_path / "run", spoiled, non_finite="rewind")
    assert said_flops(capsys.readouterr().err) == [4e-9]  # of step 2


@pytest.mark.parametrize(
    "recipe", [MAE, SIMMIM, CAE, CONVMAE, vit_mpp.RECIPE], ids=lambda r: r.name
)
def test_counting_operations_changes_no_weight_and_agrees_with_the_dry_run(recipe: Recipe) -> None:
    config = config_for(recipe, "--data", "digits", "--device", "cpu")
    data = load_data("digits", image_size=(32, 32), seed=0)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, in_channels=1))
    images = torch.stack([data.train[0, i][0] for i in range(4)])
    batch = on_device(Batch(images, torch.arange(4), []), data.train, "cpu")
    weights = []
    for counter in (contextlib.nullcontext(), counting_flops()):
        task = Pretraining(recipe, config, data, World())
        with counter:
            task.step(batch, Moment(1, 0.1))
        weights.append([weight.clone() for weight in task.model.parameters()])
    assert all(map(torch.equal, *weights))
    with torch.device("meta"):
        model = recipe.build(config.model).train()
    estimate, _ = measure(config, data, model)
    assert counter.get_total_flops() / 4 == pytest.approx(estimate, rel=0.1)  # masks differ


def test_a_progress_bar_shows_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train(tmp_path / "run", Line(make_config()))
    shown = re.findall(r"data \d+%  ([\d.]+) GiB", capsys.readouterr().err)
    assert shown
    assert all(0.05 < float(memory) < 100 for memory in shown)


def test_by_default_every_twentieth_step_has_a_row() -> None:
    assert Options().log_every == 20


def test_gradient_accumulation_gives_the_same_steps(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", Line(make_config()))
    parts = train(tmp_path / "parts", Line(make_config(accumulate=3)))  # parts of 1, 1 and 2
    np.testing.assert_allclose([r["loss"] for r in parts], [r["loss"] for r in whole], rtol=1e-5)
    np.testing.assert_allclose([r["seen"] for r in parts], [r["seen"] for r in whole], rtol=1e-5)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_no_weight(factor: float) -> None:
    task = Line(make_config(), lambda call: factor)
    before = task.model.weight.detach().clone()
    batch = Batch(torch.ones(4, 1), torch.arange(4), [])
    with pytest.raises(Exception, match="the loss of step 8 is"):
        task.step(batch, Moment(7, 1.75))
    assert torch.equal(task.model.weight, before)


def test_a_gradient_that_is_not_finite_is_noticed_when_the_loss_is_finite() -> None:
    class Root(Line):
        def forward(self, model: nn.Module, inputs: Tensor) -> Mapping[str, Tensor]:
            return {"loss": (model(inputs) - model(inputs)).square().sum().sqrt()}  # 0 / 0

    with pytest.raises(Exception, match="the loss of step 1 is 0.0, the norm of its gradient nan"):
        Root(make_config()).step(Batch(torch.ones(4, 1), torch.arange(4), []), Moment(0, 0.0))


class Deferring(Line):
    """Reads the numbers of a step during the next one, as on a GPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert not self.defers  # on a CPU
        self.defers = True
        self.events: list[str] = []

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), fused=True)

    def forward(self, model: nn.Module, inputs: Tensor) -> Mapping[str, Tensor]:
        self.events.append("forward")
        return super().forward(model, inputs)

    def finish(self, started: Any) -> Any:
        self.events.append("finish")
        return super().finish(started)


class Waiting(Deferring):
    """The same task and optimizer, but the host waits for each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.defers = False


def test_the_host_reads_a_step_during_the_next_one_unless_a_row_or_checkpoint_is_due(
    tmp_path: Path,
) -> None:
    task = Deferring(make_config(max_steps=6))
    train(tmp_path / "run", task, log_every=5, checkpoint_every=3)
    ahead, at_once = ["forward"], ["forward", "finish"]
    # Rows after steps 1, 5 and 6, checkpoints after 3 and 6.
    assert task.events == [
        *at_once, *ahead, *["forward", "finish", "finish"], *ahead,
        *["forward", "finish", "finish"], *at_once,
    ]  # fmt: skip


def spoilt(task: Task, steps: set[int]) -> Task:
    """Make some steps not finite, whenever they are drawn."""
    prepare = task.prepare

    def prepare_spoilt(batch: Batch, at: Moment) -> Tensor:
        return prepare(batch, at) * (float("inf") if at.step in steps else 1.0)

    task.prepare = prepare_spoilt  # type: ignore[method-assign]
    return task


@pytest.mark.parametrize("bad", [{0}, {3, 4}, {11}])
def test_reading_a_step_late_changes_no_row_and_no_weight(bad: set[int], tmp_path: Path) -> None:
    options = {"log_every": 5, "checkpoint_every": 4, "non_finite": "rewind"}
    timing = {"images_per_s", "data_share", "seconds"}
    ended = []
    for kind in (Waiting, Deferring):
        out = tmp_path / kind.__name__
        task = spoilt(kind(make_config()), bad)
        rows = [
            {name: value for name, value in row.items() if name not in timing}
            for row in train(out, task, **options)
        ]
        skipped = (out / "skipped_steps.json").read_text() if bad else ""
        ended.append((rows, skipped, task.model.weight.tolist(), task.model.bias.tolist()))
    assert ended[0] == ended[1]


def test_a_step_that_is_not_finite_leaves_weights_and_optimizer_before_it_is_noticed() -> None:
    task = spoilt(Deferring(make_config()), {1})
    batch = Batch(torch.ones(4, 1), torch.arange(4), [])
    task.step(batch, Moment(0, 0.0))
    before = copy.deepcopy((task.model.state_dict(), task.optimizer.state_dict()))
    started = task.start(batch, Moment(1, 0.25))
    torch.testing.assert_close(
        (task.model.state_dict(), task.optimizer.state_dict()), before, rtol=0, atol=0
    )
    with pytest.raises(Exception, match="the loss of step 2 is inf"):
        task.finish(started)


def test_a_step_that_is_not_finite_stops_a_run_that_reads_late(tmp_path: Path) -> None:
    task = spoilt(Deferring(make_config()), {5})
    with pytest.raises(UserError, match=r"the loss of step 6 is nan.*step 4.*--non-finite rewind"):
        train(tmp_path / "run", task, log_every=100, checkpoint_every=4)


def test_a_signal_ends_a_run_that_reads_late_after_the_step_and_loses_nothing(
    tmp_path: Path,
) -> None:
    class Signalled(Deferring):
        def prepare(self, batch: Batch, at: Moment) -> Tensor:
            if at.step == 6:
                signal.raise_signal(signal.SIGTERM)
            return super().prepare(batch, at)

    whole = Deferring(make_config())
    train(tmp_path / "whole", whole, log_every=100, checkpoint_every=100)
    with pytest.raises(signals.Stopped, match="after step 7 of 12, which is saved"):
        train(tmp_path / "run", Signalled(make_config()), log_every=100, checkpoint_every=100)
    signals.forget()
    resumed = Deferring(make_config())
    train(tmp_path / "run", resumed, log_every=100, checkpoint_every=100)
    assert torch.equal(resumed.model.weight, whole.model.weight)
    assert resumed.events.count("forward") == 5


def test_a_batch_without_readable_images_is_skipped() -> None:
    task = Line(make_config())
    nothing = Batch(torch.empty(0, 0, 0, 0), torch.empty(0, dtype=torch.int64), [3])
    assert task.step(nothing, Moment(0, 0.0)) is None


@pytest.mark.parametrize("every", [1, 100])
def test_a_last_step_that_is_skipped_has_a_row_with_the_numbers_before_it(
    every: int, tmp_path: Path
) -> None:
    task = Line(make_config(), lambda call: float("nan") if call == 11 else 1.0)
    rows = train(
        tmp_path / "run", task, non_finite="rewind", checkpoint_every=every, log_every=every
    )
    assert rows[-1]["step"] == 12
    assert rows[-1]["skipped"]
    assert np.isfinite(rows[-1]["loss"])
    assert rows[-1]["baselines"] == {"zero": 1.0}
    assert not any("skipped" in row for row in rows[:-1])


class Damaged(Numbers):
    """No sample can be read."""

    def __getitem__(self, index: tuple[int, int]) -> Any:
        return None, index[1]

    def describe(self, sample_id: int) -> str:
        return f"folder/{sample_id}.png"


def test_a_run_in_which_no_image_can_be_read_says_so(tmp_path: Path) -> None:
    task = Line(make_config())
    plan = make_plan(task.config, Options(), Damaged())
    says = pytest.raises(UserError, match=r"1. of 16 images cannot be read, among them folder/")
    with RunFolder(tmp_path / "run", task.config) as folder, says:
        run_steps(task, plan, Damaged(), folder, Options())


def test_a_run_of_which_every_step_is_skipped_says_so(tmp_path: Path) -> None:
    config = make_config(max_steps=2)
    with pytest.raises(UserError, match="every step was not finite"):
        train(tmp_path / "run", Line(config, lambda call: float("nan")), non_finite="rewind")


def test_a_set_of_which_nothing_can_be_read_to_fit_a_target_is_one_line() -> None:
    with pytest.raises(UserError, match="11 of 16 images cannot be read"):
        first_inputs(Damaged(), 8)


@pytest.mark.parametrize("runs", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize(("choice", "mode"), [(True, None), ("graphs", "reduce-overhead")])
def test_compiled_steps_are_the_same_and_graphs_are_told_where_each_begins(
    choice: Any, mode: str | None, runs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(tmp_path / "plain", Line(make_config(accumulate=2)))
    modes, marks, real = [], [], torch.compile

    def compile_with(function: Any, *, mode: str | None) -> Any:
        modes.append(mode)
        return real(function, mode=mode) if runs else function

    monkeypatch.setattr(torch, "compile", compile_with)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    rows = train(tmp_path / "run", Line(make_config(accumulate=2, compile=choice)))
    assert modes == [mode]
    assert len(marks) == (len(rows) if choice == "graphs" else 0)  # once for both parts of a batch
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([r[name] for r in rows], [r[name] for r in plain], rtol=1e-5)


def test_graphs_that_pytorch_leaves_out_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, mode: function)
    # Other modules keep this dictionary: it must not be replaced.
    monkeypatch.setitem(torch._dynamo.utils.counters, "inductor", Counter(cudagraph_skips=2))
    train(tmp_path / "run", Line(make_config(compile="graphs")))
    said = capsys.readouterr().err
    assert said.count("warning: --compile graphs: PyTorch makes no CUDA graph of 2 ") == 1
    assert "TORCH_LOGS=perf_hints" in said


def test_a_plan_saves_and_logs_at_its_end() -> None:
    for num_steps in range(1, 12):
        plan = Plan(steps_per_epoch=4, num_steps=num_steps, checkpoint_every=5, log_every=3)
        assert plan.saves(num_steps)
        assert plan.logs(num_steps)
        assert plan.logs(1)


# Every recipe.

DIGITS = ["--data", "digits", "--batch-size", "8", "--max-steps", "4", "--workers", "0"]


class Syncs(TorchDispatchMode):
    """Counts synchronizations with the device: `item`, `bool`, `int` and `float` of a tensor."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", [MAE, SIMMIM, CONVMAE, CAE], ids=lambda recipe: recipe.name)
def test_a_step_synchronizes_with_the_device_once(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(recipe, "--data", "digits", "--device", "cpu")
    data = load_data("digits", image_size=(32, 32), seed=0)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, in_channels=1))
    task = Pretraining(recipe, config, data, World())
    images = torch.stack([data.train[0, i][0] for i in range(4)])
    fetched = []
    real = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: fetched.append(1) or real(self))
    batch = on_device(Batch(images, torch.arange(4), []), data.train, "cpu")
    with Syncs() as syncs:
        step = task.step(batch, Moment(1, 0.1))
    assert step is not None
    # CAE checks the range of codes, and its tokenizer that images are finite, but only on a CPU,
    # where this needs no synchronization.
    assert (len(fetched), syncs.count) == (1, 3 if recipe is CAE else 0)


@pytest.mark.full
@pytest.mark.parametrize(
    "recipe", [MAE, SIMMIM, CONVMAE, CAE, vit_mpp.RECIPE], ids=lambda recipe: recipe.name
)
def test_a_compiled_model_is_one_graph_with_all_tensors_on_its_device(recipe: Recipe) -> None:
    """Else `--compile graphs` launches its kernels one by one. The meta device stands for a GPU."""
    config = config_for(recipe, "--data", "digits", "--device", "cpu")
    model = recipe.build(config.model).to("meta")
    key = masking.key(torch.arange(4), seed=0)
    masks = config.masking.draw(key, model.encoder.grid)
    images = torch.empty(4, 3, *model.encoder.image_size)
    inputs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (images, masks))
    graphs: list[torch.fx.GraphModule] = []
    torch.compiler.reset()  # numbers that differ from those of an earlier model become inputs
    compiled = torch.compile(model, fullgraph=True, backend=lambda g, _: graphs.append(g) or g)
    compiled(*inputs)
    values = [node.meta.get("example_value") for graph in graphs for node in graph.graph.nodes]
    assert {value.device.type for value in values if isinstance(value, Tensor)} == {"meta"}
    assert len(graphs) == 1


def spoiled(recipe: Recipe, bad: set[int]) -> Recipe:
    """Multiply the loss by nan at the given training passes."""
    calls = itertools.count()

    def build(config: Any) -> nn.Module:
        model = recipe.build(config)

        def spoil(module: nn.Module, inputs: Any, output: Any) -> Any:
            if module.training and next(calls) in bad:
                return dataclasses.replace(output, loss=output.loss * float("nan"))
            return None

        model.register_forward_hook(spoil)
        return model

    return dataclasses.replace(recipe, build=build)


def spoil_classifier(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
    calls = itertools.count()
    real = finetune.FineTuned.forward

    def forward(self: Any, images: Tensor) -> Tensor:
        logits = real(self, images)
        return logits * float("nan") if self.training and next(calls) in bad else logits

    monkeypatch.setattr(finetune.FineTuned, "forward", forward)


def spoil_tokenizer(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
    calls = itertools.count()
    real = tokenizer.TokenizerTask.forward

    def forward(self: Any, model: nn.Module, inputs: Tensor) -> Mapping[str, Tensor]:
        numbers = dict(real(self, model, inputs))
        factor = float("nan") if next(calls) in bad else 1.0
        return {name: value * factor for name, value in numbers.items()}

    monkeypatch.setattr(tokenizer.TokenizerTask, "forward", forward)


def fine_tune(out: Path, *more: str) -> int:
    return finetune.main([*DIGITS, "--encoder", "none", "--out", str(out), *more])


def train_tokenizer(out: Path, *more: str) -> int:
    return tokenizer.main([*DIGITS, "--out", str(out), *more])


OTHERS = [
    pytest.param(fine_tune, spoil_classifier, id="finetune", marks=pytest.mark.full),
    pytest.param(train_tokenizer, spoil_tokenizer, id="tokenizer"),
]


@pytest.mark.parametrize(("command", "spoil"), OTHERS)
def test_other_tasks_stop_at_a_loss_that_is_not_finite_and_keep_their_checkpoint(
    command: Callable[..., int],
    spoil: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    spoil(monkeypatch, {2})
    assert command(tmp_path / "run", "--checkpoint-every", "1") == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the loss of step 3 is nan")
    assert "the checkpoint of step 2 is safe" in error


@pytest.mark.parametrize(("command", "spoil"), OTHERS)
def test_other_tasks_rewind_after_a_loss_that_is_not_finite(
    command: Callable[..., int],
    spoil: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch, {2})
    out = tmp_path / "run"
    arguments = ["--checkpoint-every", "1", "--non-finite", "rewind", "--log-every", "1"]
    assert command(out, *arguments) == 0
    assert json.loads((out / "skipped_steps.json").read_text()) == [2]
    assert [json.loads(r)["step"] for r in (out / "metrics.jsonl").open()] == [1, 2, 4]


@pytest.mark.parametrize(
    "command", [pytest.param(fine_tune, marks=pytest.mark.full), train_tokenizer]
)
def test_other_tasks_have_a_tracker_accumulation_and_log_every(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, float]] = []
    module = SimpleNamespace(
        init=lambda **kwargs: None,
        log=lambda values, step: rows.append({"step": step}),
        finish=lambda: rows.append({"finished": 1}),
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    arguments = ["--tracker", "wandb", "--accumulate", "2", "--log-every", "2"]
    assert command(tmp_path / "run", *arguments) == 0
    assert rows == [{"step": 1}, {"step": 2}, {"step": 4}, {"finished": 1}]


def test_the_seed_of_a_tokenizer_changes_its_codes(tmp_path: Path) -> None:
    """The seed was once in bits that PyTorch's CPU generator ignores."""
    draws = []
    for seed in (0, 1):
        arguments = ["--data", "digits", "--device", "cpu"]
        options = parse_options(
            tokenizer.OPTIONS, [*arguments, "--seed", str(seed)], program="", description=""
        )
        config = tokenizer.resolve_tokenizer(options)
        torch.manual_seed(0)  # the same weights
        task = tokenizer.TokenizerTask(config.model.build(), config, World())
        images = torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32)
        step = task.step(Batch(images, torch.arange(4), []), Moment(5, 0.5))
        assert step is not None
        draws.append(step.numbers["loss"])
    assert draws[0] != draws[1]


def test_a_run_of_an_earlier_format_is_refused_in_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_text("recipe: mae\npreset: tiny\n")
    assert run(MAE, "", [*DIGITS, "--out", str(out)]) == 2
    error = capfd.readouterr().err
    assert "holds a run of another version of mimkit" in error
    assert error.count("\n") == 1
    assert [path.name for path in out.iterdir() if path.name != ".lock"] == ["config.yaml"]
