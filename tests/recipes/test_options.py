"""Options are derived from configuration fields: their types, help texts and ranges."""

import dataclasses
import errno
import functools
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import numpy as np
import pytest
import torch

from recipes import detect, finetune, pack, probe, segment, tokenizer
from recipes.cae import RECIPE as CAE
from recipes.convmae import RECIPE as CONVMAE
from recipes.engine import Recipe, Training, loop, page, pictures, run
from recipes.engine.errors import UserError
from recipes.engine.fields import (
    Depth,
    FieldError,
    Fraction,
    NonNegativeFloat,
    OpenFraction,
    Pixels,
    PositiveFloat,
    Within,
    admits,
    check_fields,
)
from recipes.engine.main import options_type
from recipes.engine.pretrained import export
from recipes.engine.pretrained.encoders import open_encoder
from recipes.engine.run.cli import (
    Options,
    _is_switch,
    options_of,
    override,
    parse_options,
    run_command,
)
from recipes.engine.run.config import RunConfig, resolve
from recipes.mae import RECIPE as MAE
from recipes.simmim import RECIPE as SIMMIM
from recipes.vit_mpp import RECIPE as MPP
from tests.recipes.command import config_for, options_for

RECIPES = [MAE, SIMMIM, CAE, CONVMAE, MPP]


@dataclass(frozen=True)
class Model:
    """A model.

    Attributes:
        depth: Blocks of the
            encoder.
        size: Pixels per axis.
        share: Share of something.
        ratio: Ratio of something.
        rate: A rate.
        weight: A weight.
        kind: What it is.
        normalize: Whether to normalize.
        no_decoder: Whether to leave the decoder out.
    """

    depth: Depth = 12
    size: Pixels | tuple[Pixels, ...] = 32
    share: Fraction = 0.5
    ratio: OpenFraction = 0.5
    rate: PositiveFloat = 1.0
    weight: NonNegativeFloat = 0.0
    kind: Literal["one", "other"] | None = None
    normalize: bool = True
    no_decoder: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


NAMES = [field.name for field in dataclasses.fields(Model)]


def parse(*arguments: str) -> Any:
    kind = options_of([Model()], NAMES, Options)
    return parse_options(kind, arguments, program="", description="")


def test_an_option_that_is_not_given_keeps_the_presets_value() -> None:
    preset = Model(depth=3, normalize=False, no_decoder=True, kind="other")
    assert override(preset, parse()) == preset


def test_an_option_that_is_given_replaces_the_presets_value() -> None:
    arguments = "--depth 0 --size 64 48 --kind one --normalize False --no-decoder --weight 0"
    expected = Model(
        depth=0, size=(64, 48), kind="one", normalize=False, no_decoder=True, weight=0.0
    )
    assert override(Model(weight=2.0), parse(*arguments.split())) == expected


def test_the_help_of_an_option_is_its_fields_description(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse("--help")
    printed = capsys.readouterr().out
    assert "Blocks of the encoder." in printed
    assert "Share of something." in printed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("depth", -3),
        ("depth", 10**6),
        ("depth", "12"),
        ("depth", 2.5),
        ("depth", True),
        ("depth", None),
        ("size", 0),
        ("size", (32, -1)),
        ("size", [32, 32]),
        ("share", 1.01),
        ("share", math.nan),
        ("ratio", 0.0),
        ("ratio", 1.0),
        ("rate", math.inf),
        ("rate", 0.0),
        ("weight", -1e-9),
        ("kind", "two"),
        ("normalize", "yes"),
    ],
)
def test_the_message_for_a_value_that_does_not_fit_names_field_and_value(
    field: str, value: Any
) -> None:
    with pytest.raises(FieldError, match=rf"^{field} must be .+; got ") as caught:
        Model(**{field: value})
    assert repr(value)[:40] in str(caught.value)


def test_a_range_includes_its_ends_unless_it_is_open() -> None:
    assert 1 in Within(1, 2)
    assert 2 in Within(1, 2)
    assert 1 not in Within(1, 2, is_open=True)
    assert math.nan not in Within(-math.inf, math.inf)


# What every flag is tried with.
ODD = ("nan", "inf", "-inf", "-1", "0", "1" + "0" * 400, "")
# A folder, a file or an array may have such a name. Whether it exists is checked where it is read.
# (`--teacher` alone is refused: it needs `--target features`.)
FREE_NAMES = {"data", "out", "resume", "tokenizer", "array_key"}
# Flags whose 0 means something.
ZERO_MEANS = {
    "seed": "a seed like any other",
    "workers": "images are loaded in the training process",
    "warmup_epochs": "no warm-up",
    "decoder_depth": "no block",
    "regressor_depth": "no block",
    "alignment_weight": "no alignment",
    "divergence_weight": "reconstruction alone",
    "drop_path": "nothing is dropped",
    "layer_decay": "the head alone is trained",
    "mixup": "no mixup",
    "cutmix": "no cutmix",
    "smoothing": "no smoothing",
    "aux_weight": "no auxiliary loss",
    "ignore_label": "class 0 does not count",
    "trained_blocks": "no block is trained",
    "blocks": "no block is trained",
    "patch_size": "that of the base model (SimMIM)",
}


def is_meaningful(options: type[Any], flag: str, value: str) -> bool:
    """Whether a flag may have one of the odd values."""
    kind = get_type_hints(options, include_extras=True)[flag]
    is_name = flag in FREE_NAMES and admits(kind, value)
    takes_zero = flag in ZERO_MEANS and (admits(kind, 0) or admits(kind, (0,)))
    return is_name or (takes_zero and value == "0")


@functools.cache  # made from docstrings: this takes a while
def kinds_of_options() -> dict[str, type[Any]]:
    kinds: dict[str, type[Any]] = {recipe.name: options_type(recipe) for recipe in RECIPES}
    return kinds | {
        "tokenizer": tokenizer.OPTIONS, "finetune": finetune.OPTIONS, "probe": probe.OPTIONS,
        "segment": segment.OPTIONS, "detect": detect.OPTIONS,
    }  # fmt: skip


def flags_with_a_value(options: type[Any]) -> list[str]:
    """Return the flags that take a value."""
    hints = get_type_hints(options, include_extras=True)
    return [name for name, kind in hints.items() if not _is_switch(kind)]


def flags_of_all_scripts() -> list[Any]:
    """Return every flag of every script; the long tier tries all, the quick one a flag a type."""
    found, seen = [], set[str]()
    for name, options in kinds_of_options().items():
        hints = get_type_hints(options)
        for flag in flags_with_a_value(options):
            alike = f"{flag in FREE_NAMES} {flag in ZERO_MEANS} {hints[flag]}"
            marks = [pytest.mark.full] if alike in seen else []
            found.append(pytest.param(name, flag, marks=marks))
            seen.add(alike)
    return found


def resolve_line(name: str, *arguments: str) -> None:
    """Parse a command line and resolve its configuration, as a recipe does first."""
    scripts = {
        "tokenizer": tokenizer,
        "finetune": finetune,
        "probe": probe,
        "segment": segment,
        "detect": detect,
    }
    if name in scripts:
        script: Any = scripts[name]
        more = () if name == "tokenizer" else ("--encoder", "none")
        options = parse_options(script.OPTIONS, (*more, *arguments), program=name, description="")
        if getattr(options, "encoder", "none") != "none":
            open_encoder(options, script.PRESETS["tiny"].model)
        resolve(options, name, script.PRESETS, config_type=RunConfig)
        return
    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    config_for(recipe, *arguments)


def accepted_values(try_value: Callable[[str], None], values: Iterable[str]) -> list[str]:
    """Return the values that are accepted; each other one must be refused in one line."""
    accepted, refusals = [], list[str]()
    for value in values:
        try:
            try_value(value)
        except UserError as error:
            refusals.append(str(error))
        else:
            accepted.append(value)
    assert all("\n" not in text and len(text) < 1_000 for text in refusals)
    return accepted


@pytest.mark.parametrize(("name", "flag"), flags_of_all_scripts())
def test_every_flag_refuses_odd_values_but_those_that_mean_something(name: str, flag: str) -> None:
    option = f"--{flag.replace('_', '-')}"
    accepted = accepted_values(lambda value: resolve_line(name, option, value), ODD)
    options = kinds_of_options()[name]
    assert accepted == [value for value in ODD if is_meaningful(options, flag, value)]


def test_a_name_of_a_file_is_neither_empty_nor_longer_than_file_systems_take() -> None:
    assert admits(str, "a" * 255)
    assert admits(str, "a" * 200 + "/" + "b" * 200)
    for text in ("", "a" * 256, "\u00e9" * 128, "a\0", "a/" * 2_048):
        assert not admits(str, text)


def test_a_flag_without_a_range_is_noticed() -> None:
    @dataclass(frozen=True)
    class Loose:
        rate: float = 1.0

    kind = options_of([Loose()], ["rate"], Options)

    def try_value(value: str) -> None:
        override(Loose(), parse_options(kind, ["--rate", value], program="", description=""))

    assert "rate" in flags_with_a_value(kind)
    assert accepted_values(try_value, ODD) == [value for value in ODD if value]


def test_a_flag_that_raises_something_else_is_noticed() -> None:
    def try_value(value: str) -> None:
        raise OverflowError

    with pytest.raises(OverflowError):
        accepted_values(try_value, ODD)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
        ("crop_area", (1.0, 0.2)),
        ("crop_area", (0.0, 1.0)),
        ("base_lr", 10**400),
        ("base_lr", 1e300),
        ("weight_decay", 10**400),
        ("milestones", (math.nan,)),
        ("warmup_epochs", math.inf),
        ("epochs", 10**400),
        ("clip_grad", 0.0),
        ("precision", ""),
    ],
)
def test_training_refuses_what_no_optimizer_takes(name: str, value: Any) -> None:
    values = {"epochs": 1, "batch_size": 1, "base_lr": 1.0, "warmup_epochs": 0.0} | {name: value}
    with pytest.raises(FieldError, match=f"^{name} must be "):
        Training(**values)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--no-alignment", "--alignment-weight", "2"], "--no-alignment and --alignment-weight"),
        (["--no-decoder", "--decoder-depth", "2"], "--no-decoder and --decoder-depth"),
        (["--teacher", "file", "--target", "rgb"], "teacher"),
        (["--image-size"], "--image-size has no value"),
        (["--epochs"], "--epochs has no value: give 1 or more"),
        (["--target", "x"], "--target 'x': give one of ('tokens', 'rgb', 'features')"),
        (["--non-finite", ""], "--non-finite '': give one of ('stop', 'rewind')"),
        (["--epochs", "\x1b[2J"], r"--epochs '\x1b[2J': give 1 or more"),
        (["--out", ""], "--out '' is empty"),
        (["--data", "a\0b"], "--data"),
    ],
)
def test_a_command_line_that_does_not_fit_is_one_plain_sentence(
    arguments: list[str], says: str
) -> None:
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        config_for(CAE, *arguments)
    assert "invalid choice" not in str(caught.value).lower()
    assert "None" not in str(caught.value)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_flag_of_a_recipe_is_a_field_of_its_preset(recipe: Recipe) -> None:
    preset = next(iter(recipe.presets.values()))
    fields = {field.name for part in preset.parts for field in dataclasses.fields(part)}  # type: ignore[arg-type]
    assert set(recipe.flags) <= fields
    assert set(recipe.flags) <= {f.name for f in dataclasses.fields(options_type(recipe))}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_option_has_a_help_text(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        parse_options(options_type(recipe), ["--help"], program="", description="")
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("│ --") for line in lines) > 20
    for number, line in enumerate(lines):
        if line.startswith("│ --"):
            described = line + lines[number + 1]
            assert len(described.replace("│", "").split("(default")[0].split()) > 4, line


@pytest.mark.parametrize("width", ["80", "120"])
@pytest.mark.parametrize(
    ("options", "presets"),
    [(options_type(recipe), recipe.presets) for recipe in RECIPES]
    + [
        (script.OPTIONS, script.PRESETS) for script in (detect, finetune, probe, segment, tokenizer)
    ],
)
def test_the_help_names_the_presets_and_offers_no_none(
    options: type[Options],
    presets: Iterable[str],
    width: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    with pytest.raises(SystemExit):
        parse_options(options, ["--help"], program="", description="")
    printed = capsys.readouterr().out
    unwrapped = re.sub(r"[│\s]", "", printed)
    assert f"--preset{{{','.join(presets)}}}" in unwrapped
    assert "{None" not in printed
    boxed = [line for line in printed.splitlines() if line.startswith("│")]
    assert len({len(line) for line in boxed}) == 1  # the border is straight
    assert all(line.endswith("│") for line in boxed)


def test_every_preset_of_every_recipe_is_in_range() -> None:
    for recipe in RECIPES:
        for preset in recipe.presets.values():
            for part in preset.parts:
                check_fields(part)


def test_the_command_line_takes_precedence_over_a_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("epochs: 3\ndecoder-depth: 2\n")
    config = config_for(MAE, "--config", str(file), "--epochs", "5")
    assert (config.training.epochs, config.model.decoder_depth) == (5, 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epochs: -1", "--epochs"),
        ("epoch: 1", "unknown key 'epoch'"),
        ("recompute: maybe", "must be true or false"),
        ("compile: maybe", "compile must be true or false or 'graphs'; got"),
        ("compile: [yes]", "compile must be true or false"),
        ("image_size: [32, a]", "--image-size"),
        ("image_size: [32, yes]", "image_size must be"),
        ("data: yes", "data must be a name or a path; got True"),
        ("data: {a: 1}", "data must be a name"),
        ("data: !!binary aGk=", "data must be a name"),
        ("epochs: no", "epochs must be 1 or more"),
        ("- 1", "must hold `option: value` lines"),
        ("{" * 5_000, "is not YAML: nested"),
        ("seed: " + "9" * 5_000, "is not YAML"),
        ("epochs: 1\nepochs: 2", "the key .epochs. twice"),
    ],
)
def test_a_mistake_in_a_yaml_file_gives_one_line(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        config_for(MAE, "--config", str(file))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", False), ("--compile", True), ("--compile graphs", "graphs"), ("--no-compile", False),
        ("--compile --lr 1", True), ("--compile=graphs", "graphs"), ("--out compile", False),
        ("--compile graphs --no-compile --lock", False), ("true", True), ("false", False),
        ("graphs", "graphs"), ("graphs --no-compile", False), ("false --compile", True),
    ],
)  # fmt: skip
def test_compiling_is_a_switch_and_takes_a_word(
    given: str, expected: bool | str, tmp_path: Path
) -> None:
    in_file, *arguments = given.split() or [""]
    if in_file in ("true", "false", "graphs"):
        file = tmp_path / "options.yaml"
        file.write_text(f"compile: {in_file}\n")
        arguments += ["--config", str(file)]
    else:
        arguments = given.split()
    chosen = parse(*arguments).compile
    assert (chosen, type(chosen)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("arguments", "has_gpu", "says"),
    [
        ("--compile graphs", False, "--compile graphs: CUDA graphs need a GPU, this is a cpu"),
        ("--compile graphs --device cpu", True, "--compile graphs: CUDA graphs need a GPU"),
        ("--compile graphs --shard", True, "--compile graphs needs weights that stay .* --shard"),
        ("--compile maybe", True, "--compile 'maybe': give true or false or 'graphs'"),
    ],
)
def test_graphs_that_cannot_be_are_one_line(
    arguments: str, has_gpu: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    with pytest.raises(UserError, match=says):
        config_for(MAE, *arguments.split())


def test_graphs_are_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert config_for(MAE, "--compile", "graphs").compile == "graphs"


def test_options_of_a_yaml_file_may_not_contradict_each_other(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("no_decoder: true\ndecoder_depth: 2")
    with pytest.raises(UserError, match="contradict each other"):
        config_for(CAE, "--config", str(file))


def test_a_list_and_a_derived_switch_can_stand_in_a_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("image_size: [32, 64]\nno_alignment: true\nno_decoder: false\n")
    model = config_for(CAE, "--config", str(file)).model
    assert (model.image_size, model.no_alignment, model.no_decoder) == ((32, 64), True, False)


def test_of_several_yaml_files_the_last_one_is_read(tmp_path: Path) -> None:
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for seed, file in enumerate(files):
        file.write_text(f"seed: {seed}")
    assert options_for(MAE, "--config", str(files[0]), f"--config={files[1]}").seed == 1


def test_what_cannot_be_read_is_told_without_the_words_of_pythons_types() -> None:
    with pytest.raises(UserError, match="--image-size") as caught:
        config_for(MAE, "--image-size", "a", "b")
    assert "Within" not in str(caught.value)
    assert "typing" not in str(caught.value)


def test_numbers_of_numpy_are_numbers() -> None:
    preset = MAE.presets["tiny"]
    size = np.int64(32)
    model = dataclasses.replace(preset.model, image_size=size, mlp_ratio=np.float32(4))
    presets = {"tiny": dataclasses.replace(preset, model=model)}
    config = resolve(options_for(MAE), "mae", presets, config_type=RunConfig)
    assert config.image_size == (32, 32)
    assert config.digest() == config_for(MAE).digest()


def test_a_model_that_no_memory_holds_is_refused_before_a_folder_is_made(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.sysconf", lambda name: 1_000)  # a megabyte
    arguments = ["--data", "digits", "--device", "cpu"]
    assert run(MAE, "", arguments) == 2
    error = capfd.readouterr().err
    assert "need" in error
    assert "GiB" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
    assert run(MAE, "", [*arguments, "--dry-run"]) == 0  # a plan for another machine


@pytest.mark.parametrize(
    "allocate", [lambda: torch.empty(2**60, dtype=torch.uint8), lambda: bytearray(2**60)]
)
def test_an_allocation_that_fails_is_one_line(
    allocate: Callable[[], Any], capfd: pytest.CaptureFixture[str]
) -> None:
    def command(options: Options) -> None:
        allocate()

    assert run_command(command, Options, name="mae", description="", arguments=[]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: there is not enough memory: give a smaller --batch-size")
    assert error.count("\n") == 1


@pytest.mark.parametrize("given", [None, ":16:8"])
def test_cublas_is_told_to_be_deterministic_before_anything_is_computed(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.setenv(name, "")  # restored at the end
    monkeypatch.delenv(name)
    options_for(MAE)
    assert name not in os.environ
    if given is not None:
        monkeypatch.setenv(name, given)
    options_for(MAE, "--deterministic")
    assert os.environ[name] == (given or ":4096:8")


def test_an_operation_that_is_not_deterministic_is_one_line(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def command(options: Options) -> None:
        with loop.deterministic_algorithms():
            torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))

    assert run_command(command, Options, name="mae", description="", arguments=[]) == 2
    assert capfd.readouterr().err == (
        "error: --deterministic: put_ is not deterministic on this device; omit the option\n"
    )
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("door", ["encoder", "report", "pictures", "export", "pack", "data"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_path_that_the_system_refuses_to_look_at_is_one_line(
    number: int,
    door: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    closed, stat = tmp_path / "closed", os.stat

    def refuse(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if isinstance(path, str | Path) and Path(path).is_relative_to(closed):
            raise OSError(number, os.strerror(number), str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refuse)  # as root, nothing is refused
    out = str(tmp_path / "out")
    doors: dict[str, Callable[[], int]] = {
        "encoder": lambda: finetune.main(["--encoder", str(closed), "--dry-run"]),
        "report": lambda: page.main([str(closed), "--out", out]),
        "pictures": lambda: pictures.main([str(closed), str(closed), "--out", out]),
        "export": lambda: export.main([str(closed), out]),
        "pack": lambda: pack.main([str(closed), out]),
        "data": lambda: run(MAE, "", ["--data", str(closed), "--dry-run"]),
    }
    assert doors[door]() == 2
    error = capfd.readouterr().err
    assert str(closed) in error
    assert os.strerror(number) in error
    assert error.count("\n") == 1
    assert not Path(out).exists()


def test_another_runtime_error_keeps_its_traceback() -> None:
    def command(options: Options) -> None:
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        run_command(command, Options, name="mae", description="", arguments=[])


@pytest.mark.parametrize("size", ["16777216", "8193"])
def test_an_image_of_too_many_pixels_is_refused(size: str) -> None:
    with pytest.raises(UserError, match=f"--image-size {size} is too large"):
        config_for(MAE, "--image-size", size)
