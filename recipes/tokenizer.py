"""Train a small discrete VAE, whose codes are tokens for `recipes/cae.py`.

    python recipes/tokenizer.py                                  # two minutes on a CPU
    python recipes/tokenizer.py --data /path/to/images --preset base
    python recipes/cae.py --tokenizer runs/<folder>/tokenizer.safetensors

The encoder and decoder are DALL-E's (arXiv:2102.12092), trained with one-hot codes and the gradient
of a Gumbel softmax whose temperature falls (straight-through), Adam without weight decay, and a
small weight on the divergence from equally likely codes, which keeps codes in use. The log says how
many are: a code book of which few codes are used makes tokens that say little.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

if __name__ == "__main__":
    __import__("recipes.script" if __package__ else "script")  # import path, threads

import torch
import yaml
from jaxtyping import Float, Int64
from torch import Tensor

from mimkit import viz
from mimkit.nn import DiscreteVAE
from recipes.engine.data.load import load_data
from recipes.engine.data.sets import DataSet
from recipes.engine.dry_run import count_parameters
from recipes.engine.errors import UserError
from recipes.engine.optim import warmup_cosine
from recipes.engine.pretrained.tokenizers import to_inputs, to_pixels
from recipes.engine.report import print_unreadable, tiled_pictures
from recipes.engine.run.checkpoint import Checkpoints, start_from
from recipes.engine.run.cli import (
    CommonOptions,
    check_options,
    check_positive,
    choose_preset,
    run_command,
)
from recipes.engine.run.config import RunConfig, Training, override, scaled_lr
from recipes.engine.run.folder import RunFolder, default_path
from recipes.engine.run.loader import SINGLE, make_loader
from recipes.engine.run.world import World, world_size_from_environment
from recipes.engine.train import autocast, count_steps

_LOGS_PER_RUN = 50


@dataclass(frozen=True)
class VAEConfig:
    """Shape of the tokenizer, in the words of `nn.DiscreteVAE`, and how its codes are drawn.

    Attributes:
        image_size: Pixels per axis; an integer means a square image.
        in_channels: Channels of the images.
        dim: Width at full resolution.
        groups: Groups of blocks: a code stands for `2 ** (groups - 1)` pixels an axis.
        depth: Blocks of a group.
        vocabulary_size: Number of codes.
        stem_dim: Width of a code's embedding in the decoder.
        first_temperature: Of the Gumbel softmax at the start.
        last_temperature: At the end; in between it falls exponentially.
        divergence_weight: Weight of the codes' divergence from equally likely ones.
    """

    image_size: int | tuple[int, ...]
    in_channels: int = 3
    dim: int = 256
    groups: int = 4
    depth: int = 2
    vocabulary_size: int = 8192
    stem_dim: int = 128
    first_temperature: float = 1.0
    last_temperature: float = 1 / 16
    divergence_weight: float = 0.01

    def build(self) -> DiscreteVAE:
        """Make the tokenizer."""
        return DiscreteVAE(
            in_channels=self.in_channels,
            dim=self.dim,
            groups=self.groups,
            depth=self.depth,
            vocabulary_size=self.vocabulary_size,
            stem_dim=self.stem_dim,
        )

    def temperature(self, progress: float) -> float:
        """Return the temperature at a share of the run."""
        ratio = self.last_temperature / self.first_temperature
        return self.first_temperature * math.pow(ratio, progress)


@dataclass(frozen=True)
class TokenizerPreset:
    """A tokenizer's shape and how it is trained."""

    model: VAEConfig
    training: Training


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions(CommonOptions):
    """Training of a tokenizer.

    Attributes:
        vocabulary_size: Number of codes.
        groups: Groups of blocks: a code stands for `2 ** (groups - 1)` pixels an axis.
        divergence_weight: Weight of the codes' divergence from equally likely ones.
        image_size: Pixels per axis.
    """

    vocabulary_size: int | None = None
    groups: int | None = None
    divergence_weight: float | None = None
    image_size: int | None = None


PRESETS = {
    "tiny": TokenizerPreset(
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
    # OpenAI's shape, at the resolution at which CAE reads it.
    "base": TokenizerPreset(
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
    """Measure how many codes are in use.

    Returns:
        The share of codes that occur, and the perplexity: how many equally likely codes would be as
        hard to guess.

    Example:
        >>> share, perplexity = usage(torch.tensor([0, 0, 3, 3]), 8)
        >>> share, round(perplexity, 6)
        (0.25, 2.0)
    """
    counts = torch.bincount(ids.flatten(), minlength=vocabulary_size).double()
    shares = counts[counts > 0] / counts.sum()
    return float((counts > 0).double().mean()), float((-(shares * shares.log()).sum()).exp())


def train(
    config: RunConfig, data: DataSet, folder: RunFolder, options: TokenizerOptions
) -> DiscreteVAE:
    """Train from the last checkpoint on."""
    torch.manual_seed(config.seed)
    model: DiscreteVAE = config.model.build().to(config.device).train()
    optimizer = torch.optim.Adam(model.parameters(), betas=config.training.betas)
    checkpoints = Checkpoints(folder.path / "checkpoints", World(), keep_every=options.keep_every)
    steps_per_epoch, num_steps = count_steps(config, data)
    first_step = start_from(options.resume, checkpoints, model, optimizer, num_steps)
    folder.start_metrics(first_step=first_step)
    loader = make_loader(
        data.train,
        world=SINGLE,
        batch_size=config.training.batch_size,
        seed=config.seed,
        first_step=first_step,
        num_steps=num_steps,
        workers=options.workers,
        pin_memory=config.device == "cuda",
    )
    every = max(num_steps // _LOGS_PER_RUN, 1)
    for done, batch in enumerate(loader, first_step + 1):
        # The codes are drawn at random: the same ones in a run that was interrupted.
        torch.manual_seed((config.seed << 32) + done)
        folder.note_unreadable(batch.unreadable_ids)
        row = None
        if len(batch.images):
            row = train_step(model, optimizer, config, batch.images, (done - 1) / steps_per_epoch)
        if row is not None and (done % every == 0 or done == num_steps):
            folder.append_metrics({"step": done, **row})
            numbers = "  ".join(f"{name} {value:.3f}" for name, value in row.items())
            print(f"step {done}/{num_steps}  {numbers}", file=sys.stderr)
        if done % (options.checkpoint_every or steps_per_epoch) == 0 or done == num_steps:
            checkpoints.save(done, model, optimizer)
    checkpoints.finish()
    return model.eval()


def train_step(
    model: DiscreteVAE,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    inputs: Float[Tensor, "batch channels height width"],
    epoch: float,
) -> dict[str, float]:
    """Make a step, and return its numbers.

    Raises:
        UserError: The loss is not finite.
    """
    training, shape = config.training, config.model
    for group in optimizer.param_groups:
        group["lr"] = warmup_cosine(
            epoch, lr=config.lr, epochs=training.epochs, warmup_epochs=training.warmup_epochs
        )
    temperature = shape.temperature(min(epoch / training.epochs, 1.0))
    with autocast(config):
        output = model(
            to_pixels(inputs.to(config.device)),
            temperature=temperature,
            divergence_weight=shape.divergence_weight,
        )
    if not bool(output.loss.isfinite()):
        raise UserError(f"the loss is {output.loss.item()}: lower --lr")
    optimizer.zero_grad(set_to_none=True)
    output.loss.backward()
    optimizer.step()
    used, perplexity = usage(output.ids, shape.vocabulary_size)
    return {
        "loss": output.loss.item(),
        "reconstruction_loss": output.reconstruction_loss.item(),
        "divergence": output.divergence.item(),
        "codes_used": used,
        "perplexity": perplexity,
        "temperature": temperature,
    }


@torch.no_grad()
def draw_reconstructions(
    model: DiscreteVAE, config: RunConfig, data: DataSet, folder: RunFolder
) -> None:
    """Draw held-out pictures as they are and as their codes have them."""
    size = _image_size(config.model)
    rows = []
    for picture in tiled_pictures(data, size):
        pixels = to_pixels(picture.inputs.to(config.device))
        decoded = to_inputs(model.decode(model.encode(pixels)))
        read = to_inputs(pixels)
        shown = (picture.tiles, picture.from_inputs(read), picture.from_inputs(decoded))
        rows.append([picture.join(tiles) for tiles in shown])
    captions = ["input (not trained on)", "as the tokenizer reads it", "from its codes"]
    viz.panel(rows, captions).save(folder.path / "reconstructions.png")


@torch.no_grad()
def measure_usage(model: DiscreteVAE, config: RunConfig, data: DataSet) -> tuple[float, float]:
    """Measure how many codes the first thousand training images use."""
    count = min(len(data.train), 1000)
    items = (data.train[0, sample_id][0] for sample_id in range(count))
    images = torch.stack([image for image in items if image is not None])
    ids = [model.encode(to_pixels(part.to(config.device))) for part in images.split(100)]
    return usage(torch.cat(ids), config.model.vocabulary_size)


def run(options: TokenizerOptions) -> None:
    """Train a tokenizer.

    Raises:
        UserError: Something that was asked for does not fit.
    """
    if world_size_from_environment() > 1:
        raise UserError("this recipe runs in one process: start it without torchrun")
    config = resolve(options)
    data = load_data(config.data, image_size=_image_size(config.model), seed=config.seed)
    shape = dataclasses.replace(config.model, in_channels=data.in_channels)
    config = dataclasses.replace(config, model=shape)
    count_steps(config, data)
    if options.dry_run:
        print(yaml.safe_dump(config.as_dict(), sort_keys=False).rstrip())
        with torch.device("meta"):
            print(f"---\nparameters    {count_parameters(config.model.build()):,}")
        return
    with RunFolder(options.out or default_path(config), config) as folder:
        summary = folder.read_summary()
        if summary is None:
            summary = finish(train(config, data, folder, options), config, data, folder)
        print(f"training loss     {summary['final_loss']:.3f} nats a pixel value")
        print(
            f"codes in use      {summary['codes_used']:.0%} of {config.model.vocabulary_size}, "
            f"perplexity {summary['perplexity']:.1f}"
        )
        print_unreadable(summary["unreadable_images"])
        print(f"python recipes/cae.py --tokenizer {folder.path / 'tokenizer.safetensors'}")


def finish(
    model: DiscreteVAE, config: RunConfig, data: DataSet, folder: RunFolder
) -> dict[str, Any]:
    """Write weights, pictures and summary."""
    from safetensors.torch import save_file

    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder.path / "tokenizer.safetensors")
    draw_reconstructions(model, config, data, folder)
    rows = folder.read_metrics()
    last = rows[-max(len(rows) // 10, 1) :]
    used, perplexity = measure_usage(model, config, data)
    summary = {
        "steps": rows[-1]["step"],
        "final_loss": sum(row["reconstruction_loss"] for row in last) / len(last),
        "codes_used": used,
        "perplexity": perplexity,
        "unreadable_images": [data.train.describe(image) for image in folder.read_unreadable()],
    }
    folder.write_summary(summary)
    return summary


def resolve(options: TokenizerOptions) -> RunConfig:
    """Fill in the preset's values.

    Raises:
        UserError: A number out of range, or a size that the stride does not divide.
    """
    name, preset = choose_preset(options, PRESETS)
    training = override(preset.training, options)
    model = override(preset.model, options)
    lr = options.lr if options.lr is not None else scaled_lr(training)
    device = check_options(options, epochs=training.epochs, batch_size=training.batch_size, lr=lr)
    check_positive("groups", model.groups)
    check_positive("vocabulary-size", model.vocabulary_size)
    if not 0 <= model.divergence_weight < math.inf:
        raise UserError(
            f"--divergence-weight {model.divergence_weight} is no weight: give 0 or more"
        )
    stride = 1 << (model.groups - 1)
    if any(size % stride for size in _image_size(model)):
        raise UserError(
            f"--image-size {model.image_size} is no multiple of the {stride} pixels that a code "
            f"stands for with --groups {model.groups}"
        )
    return RunConfig(
        recipe="tokenizer",
        preset=name,
        data=options.data,
        model=model,
        training=training,
        lr=lr,
        max_steps=options.max_steps,
        seed=options.seed,
        device=device,
    )


def _image_size(model: VAEConfig) -> tuple[int, int]:
    size: Any = model.image_size
    return (size, size) if isinstance(size, int) else size


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script, and return its exit code."""
    return run_command(
        run, TokenizerOptions, name="tokenizer", description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
