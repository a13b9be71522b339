"""Options come from the fields of configurations: their types, help and ranges."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import pytest

from recipes import finetune, probe, tokenizer
from recipes.cae import RECIPE as CAE
from recipes.convmae import RECIPE as CONVMAE
from recipes.engine import Recipe
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
    check_fields,
)
from recipes.engine.main import options_type
from recipes.engine.run.cli import Options, options_of, override, parse_options
from recipes.engine.run.config import RunConfig, resolve
from recipes.mae import RECIPE as MAE
from recipes.simmim import RECIPE as SIMMIM
from recipes.vit_mpp import RECIPE as MPP
from tests.recipes.command import config_for, options_for

RECIPES = [MAE, SIMMIM, CAE, CONVMAE, MPP]
BAD = ("nan", "inf", "-inf", "-1", "-0.5", "1e400", "9" * 5000, "two", "")


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


def test_what_is_not_given_stays_as_the_preset_has_it() -> None:
    preset = Model(depth=3, normalize=False, no_decoder=True, kind="other")
    assert override(preset, parse()) == preset


def test_what_is_given_replaces_the_preset() -> None:
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
def test_a_value_that_does_not_fit_names_its_field_and_what_would(field: str, value: Any) -> None:
    with pytest.raises(FieldError, match=rf"^{field} must be .+; got ") as caught:
        Model(**{field: value})
    assert repr(value)[:40] in str(caught.value)


def test_the_ends_of_a_range_belong_to_it_but_for_open_ones() -> None:
    assert 1 in Within(1, 2)
    assert 2 in Within(1, 2)
    assert 1 not in Within(1, 2, is_open=True)
    assert math.nan not in Within(-math.inf, math.inf)


def has_range(kind: Any) -> bool:
    return any(isinstance(part, Within) or has_range(part) for part in get_args(kind))


def numbers_of(options: type[Any]) -> list[str]:
    """Return the flags of an options class that take numbers."""
    hints = get_type_hints(options, include_extras=True)
    return [name for name, kind in hints.items() if has_range(kind)]


def flags_of_everything() -> list[tuple[str, str]]:
    found = [(recipe.name, name) for recipe in RECIPES for name in numbers_of(options_type(recipe))]
    found += [("tokenizer", name) for name in numbers_of(tokenizer.OPTIONS)]
    found += [("finetune", name) for name in numbers_of(finetune.OPTIONS)]
    return found + [("probe", name) for name in numbers_of(probe.OPTIONS)]


def resolve_line(name: str, *arguments: str) -> None:
    """Parse a command line and resolve it, as the recipe does before anything else."""
    scripts = {"tokenizer": tokenizer, "finetune": finetune, "probe": probe}
    if name in scripts:
        script: Any = scripts[name]
        more = () if name == "tokenizer" else ("--encoder", "none")
        options = parse_options(script.OPTIONS, (*more, *arguments), program=name, description="")
        resolve(options, name, script.PRESETS, config_type=RunConfig)
        return
    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    config_for(recipe, *arguments)


@pytest.mark.parametrize(("name", "flag"), flags_of_everything())
def test_no_number_that_makes_no_sense_is_taken(name: str, flag: str) -> None:
    option = f"--{flag.replace('_', '-')}"
    for value in BAD:
        with pytest.raises(UserError) as caught:
            resolve_line(name, option, value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1_000


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
    for number, line in enumerate(lines):
        if line.startswith("│ --"):
            described = line + lines[number + 1]
            assert len(described.replace("│", "").split("(default")[0].split()) > 4, line


def test_every_preset_of_every_recipe_is_in_range() -> None:
    for recipe in RECIPES:
        for preset in recipe.presets.values():
            for part in preset.parts:
                check_fields(part)


def test_an_empty_output_folder_is_refused() -> None:
    with pytest.raises(UserError, match='--out "" names no folder'):
        config_for(MAE, "--out", "")


def test_a_yaml_file_gives_options_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("epochs: 3\ndecoder-depth: 2\n")
    config = config_for(MAE, "--config", str(file), "--epochs", "5")
    assert (config.training.epochs, config.model.decoder_depth) == (5, 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epochs: -1", "--epochs"),
        ("epoch: 1", "unknown key 'epoch'"),
        ("compile: maybe", "must be true or false"),
        ("image_size: [32, a]", "--image-size"),
        ("- 1", "must hold `option: value` lines"),
        ("{" * 5_000, "is not YAML: nested"),
        ("seed: " + "9" * 5_000, "is not YAML"),
        ("epochs: 1\nepochs: 2", "the key .epochs. twice"),
    ],
)
def test_a_yaml_file_that_does_not_fit_is_one_line(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        config_for(MAE, "--config", str(file))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1_000


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
