"""Train a small discrete VAE, whose codes are the tokens that CAE predicts.

    python recipes/tokenizer.py                                  # two minutes on a CPU
    python recipes/tokenizer.py --data /path/to/images --preset base
    python recipes/cae.py --tokenizer runs/<folder>/tokenizer.safetensors

The encoder and decoder are DALL-E's (arXiv:2102.12092). Training uses a straight-through Gumbel
softmax with falling temperature, and Adam without weight decay. A small KL divergence from the
uniform distribution keeps codes in use. The log shows how many codes are used: if there are few,
the tokens carry little information.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

if __name__ == "__main__":
    __import__("recipes.script" if __package__ else "script")  # import path, threads

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from mimkit.nn import DiscreteVAE
from recipes.engine import fields
from recipes.engine.data.load import load_data
from recipes.engine.data.on_gpu import decoded_on
from recipes.engine.data.sets import Batch, DataSet, first_inputs
from recipes.engine.dry_run import count_parameters
from recipes.engine.errors import UserError, say
from recipes.engine.loop import Moment, Task, make_plan, run_steps
from recipes.engine.pictures import TiledPicture, draw_columns
from recipes.engine.pretrained.tokenizers import to_inputs, to_pixels
from recipes.engine.report import print_unreadable
from recipes.engine.run.cli import FLAGS, Options, options_of, run_command
from recipes.engine.run.closing import print_closing
from recipes.engine.run.config import Preset, RunConfig, Training, resolve
from recipes.engine.run.folder import RunFolder, open_folder, output_folder
from recipes.engine.run.world import check_shard, check_shares, join, whole_weights


@dataclass(frozen=True)
class VAEConfig:
    """Configuration of the tokenizer: the arguments of `nn.DiscreteVAE`, and its Gumbel softmax.

    Attributes:
        image_size: Pixels per axis; an integer means a square image.
        in_channels: Channels of the images.
        dim: Width at full resolution.
        groups: Groups of blocks. A code covers `2 ** (groups - 1)` pixels per axis.
        depth: Blocks per group.
        vocabulary_size: Number of codes.
        stem_dim: Width of a code's embedding in the decoder.
        first_temperature: Temperature of the Gumbel softmax at the start.
        last_temperature: Temperature at the end; it falls exponentially.
        divergence_weight: Weight of the codes' KL divergence from the uniform distribution.
    """

    image_size: fields.Pixels | tuple[fields.Pixels, ...]
    in_channels: fields.PositiveInt = 3
    dim: fields.Width = 256
    groups: Annotated[int, fields.Within(1, 16)] = 4
    depth: fields.Depth = 2
    vocabulary_size: Annotated[int, fields.Within(1, 2**24)] = 8192
    stem_dim: fields.Width = 128
    first_temperature: fields.PositiveFloat = 1.0
    last_temperature: fields.PositiveFloat = 1 / 16
    divergence_weight: fields.NonNegativeFloat = 0.01

    def __post_init__(self) -> None:
        fields.check_fields(self)

    def build(self) -> DiscreteVAE:
        """Build the tokenizer."""
        return DiscreteVAE(
            in_channels=self.in_channels,
            dim=self.dim,
            groups=self.groups,
            depth=self.depth,
            vocabulary_size=self.vocabulary_size,
            stem_dim=self.stem_dim,
        )

    def temperature(self, progress: float) -> float:
        """Return the temperature at a fraction of the run."""
        ratio = self.last_temperature / self.first_temperature
        return self.first_temperature * math.pow(ratio, progress)


PRESETS = {
    "tiny": Preset(
        VAEConfig(
            image_size=32,
            dim=16,
            groups=3,
            depth=1,
            vocabulary_size=128,
            stem_dim=32,
        ),
        Training(
            epochs=1,
            batch_size=32,
            base_lr=2.4e-2,
            warmup_epochs=0.1,
            weight_decay=0.0,
            betas=(0.9, 0.999),
        ),
    ),
    # OpenAI's shape, at the resolution that CAE uses.
    "base": Preset(
        VAEConfig(image_size=112),
        Training(
            epochs=20,
            batch_size=512,
            base_lr=5e-5,
            warmup_epochs=1,
            weight_decay=0.0,
            betas=(0.9, 0.999),
        ),
    ),
}


def usage(ids: Int64[Tensor, "..."], vocabulary_size: int) -> tuple[float, float]:
    """Measure the use of codes.

    Returns:
        The fraction of codes that occur, and the perplexity: the exponential of the entropy.

    Example:
        >>> share, perplexity = usage(torch.tensor([0, 0, 3, 3]), 8)
        >>> share, round(perplexity, 6)
        (0.25, 2.0)
    """
    counts = torch.bincount(ids.flatten(), minlength=vocabulary_size).double()
    shares = counts[counts > 0] / counts.sum()
    return float((counts > 0).double().mean()), float((-(shares * shares.log()).sum()).exp())


class TokenizerTask(Task):
    """Training of a discrete VAE."""

    temperature: float

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Make Adam without weight decay."""
        return torch.optim.Adam(self.model.parameters(), betas=self.config.training.betas)

    def prepare(self, batch: Batch, at: Moment) -> Tensor:
        """Turn model inputs into pixels, and set the temperature of this step."""
        shape, epochs = self.config.model, self.config.training.epochs
        self.temperature = shape.temperature(min(at.epoch / epochs, 1.0))
        images = batch.images.to(self.config.device, non_blocking=True)
        if len(images) == 0:  # this process must still take part in the step
            images = images.new_empty(0, shape.in_channels, *self.config.image_size)
        return to_pixels(images)

    def forward(self, model: nn.Module, inputs: Tensor) -> Mapping[str, Tensor]:
        """Return the loss and its two parts."""
        weight = self.config.model.divergence_weight
        output = model(inputs, temperature=self.temperature, divergence_weight=weight)
        return {
            "loss": output.loss,
            "reconstruction_loss": output.reconstruction_loss,
            "divergence": output.divergence,
        }

    @torch.no_grad()
    def extras(self) -> dict[str, Any]:
        """Return the use of codes in the last batch, and the temperature."""
        model: Any = self.model
        used, perplexity = usage(model.encode(self.inputs), self.config.model.vocabulary_size)
        return {"codes_used": used, "perplexity": perplexity, "temperature": self.temperature}


@torch.no_grad()
def draw_reconstructions(
    model: DiscreteVAE, config: RunConfig, data: DataSet, folder: RunFolder
) -> None:
    """Draw held-out pictures beside their reconstructions."""

    def columns(_: int, picture: TiledPicture) -> dict[str, Tensor]:
        pixels = to_pixels(picture.inputs.to(config.device))
        decoded = model.decode(model.encode(pixels))
        return {
            "input of the tokenizer": picture.from_inputs(to_inputs(pixels)),
            "reconstruction from codes": picture.from_inputs(to_inputs(decoded)),
        }

    height, width = config.image_size
    draw_columns(folder.path / "reconstructions.png", data, (height, width), columns)


@torch.no_grad()
def measure_usage(model: DiscreteVAE, config: RunConfig, data: DataSet) -> tuple[float, float]:
    """Measure the use of codes on the first thousand training images."""
    images = first_inputs(data.train, 1000)
    ids = [model.encode(to_pixels(part.to(config.device))) for part in images.split(100)]
    return usage(torch.cat(ids), config.model.vocabulary_size)


def run(options: Options) -> None:
    """Train a tokenizer.

    Raises:
        UserError: If an option does not fit.
    """
    config = resolve_tokenizer(options)
    with join(config.device, timeout=options.timeout) as world:
        data = load_data(
            config.data,
            image_size=config.model.image_size,
            seed=config.seed,
            decode=config.training.decoder,
            share=world.share,
        )
        data = decoded_on(options.decode, data)
        config = config.for_data(data)
        if len(config.image_size) != 2:
            raise UserError(f"--data {config.data}: a tokenizer is for images of two axes")
        plan = make_plan(config, options, data.train)
        if options.recompute:
            raise UserError("--recompute: a tokenizer has no blocks to compute again, omit it")
        check_shard(options.shard)
        check_shares(config.training.batch_size, world, accumulate=config.accumulate)
        if options.dry_run:
            with torch.device("meta"):
                num_parameters = count_parameters(config.model.build())
            if world.is_main:
                say(*config.as_lines(), "---", f"parameters    {num_parameters:,}")
            return
        path = output_folder(options.out, config)
        with open_folder(path, config, world, options) as folder:
            summary = folder.read_summary()
            if summary is None:
                torch.manual_seed(config.seed)
                model = config.model.build().to(config.device)
                task = TokenizerTask(model, config, world, shard=options.shard)
                run_steps(task, plan, data.train, folder, options)
                weights = whole_weights(task.model)
                summary = finish(weights, config, data, folder) if world.is_main else {}
            if world.is_main:
                print_summary(summary, config, folder)


def resolve_tokenizer(options: Options) -> RunConfig:
    """Build the configuration of a run from a preset and the given options.

    Raises:
        UserError: If a value does not fit, or the image size is not a multiple of the stride.
    """
    config = resolve(options, "tokenizer", PRESETS, config_type=RunConfig)
    model: VAEConfig = config.model
    stride = 1 << (model.groups - 1)
    if any(size % stride for size in config.image_size):
        raise UserError(
            f"--image-size {model.image_size} is not a multiple of the {stride} pixels that a code "
            f"stands for with --groups {model.groups}"
        )
    return config


def finish(
    weights: Mapping[str, Tensor], config: RunConfig, data: DataSet, folder: RunFolder
) -> dict[str, Any]:
    """Write weights, pictures and summary; return the summary."""
    model: DiscreteVAE = config.model.build().to(config.device).eval()
    model.load_state_dict(weights)
    folder.write_weights("tokenizer.safetensors", model)
    draw_reconstructions(model, config, data, folder)
    rows = folder.read_metrics()
    losses = [row.get("reconstruction_loss") for row in rows]
    known = [loss for loss in losses if isinstance(loss, float)]  # not in a damaged row
    if not known:
        raise UserError(f"no row of metrics.jsonl in {folder.path} has a reconstruction_loss")
    last = known[-max(len(known) // 10, 1) :]
    used, perplexity = measure_usage(model, config, data)
    summary = {
        "steps": rows[-1]["step"],
        "final_loss": sum(last) / len(last),
        "codes_used": used,
        "perplexity": perplexity,
        "unreadable_images": [data.train.describe(image) for image in folder.read_unreadable()],
    }
    folder.write_summary(summary)
    return summary


def print_summary(summary: dict[str, Any], config: RunConfig, folder: RunFolder) -> None:
    """Print the results of a run."""
    say(
        f"training loss     {summary['final_loss']:.3f} nats per pixel value",
        f"codes in use      {summary['codes_used']:.0%} of {config.model.vocabulary_size}, "
        f"perplexity {summary['perplexity']:.1f}",
    )
    print_unreadable(summary["unreadable_images"])
    print_closing(folder.path)
    say(f"mimkit cae --tokenizer {folder.path / 'tokenizer.safetensors'}")


# The command line.
OPTIONS = options_of(
    PRESETS["tiny"].parts,
    (*FLAGS, "vocabulary_size", "groups", "divergence_weight"),
    Options,
    presets=PRESETS,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script, and return its exit code."""
    return run_command(run, OPTIONS, name="tokenizer", description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
