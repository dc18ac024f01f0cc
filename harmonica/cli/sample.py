r"""Sample with and without a router, on the same noise, timed; no Ray.

    python -m harmonica.cli.sample                                    # the built-in model and its champion
    python -m harmonica.cli.sample --model.path DiT-XL-2-256x256.pt --model.vae VAE --router ROUTER \
        --classes 207 360 --guidance-scale 4 --allow-other-sampler
    python -m harmonica.cli.sample --model.path builtin:fashion-pixart --prompts "a coat" "a dark sneaker"
    python -m harmonica.cli.sample --help

VAE is an AutoencoderKL's folder, or a Hugging Face id with its commit, as in org/name@commit.
ROUTER is an artifact folder, or a `.pt` of the released training code (then with `--threshold`).
"""

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from harmonica.builtin import CHAMPION
from harmonica.cli.common import fail, parse_settings, say
from harmonica.cli.train import pick_device
from harmonica.core.accumulation import kept_bytes
from harmonica.core.artifact import RouterArtifact
from harmonica.core.sampling import check_plan, sample
from harmonica.data.class_names import UnknownClass, find_class
from harmonica.data.conditions import make_conditions
from harmonica.evaluation.differences import with_differences
from harmonica.execution.levels import warm_ups
from harmonica.io.paths import local
from harmonica.io.safe_load import read_released_router
from harmonica.io.tensor_files import write_tensors
from harmonica.models.loading import BUILTIN, LoadedModel, ModelConfig, load_model
from harmonica.models.vae import decode_latents, draws_pixels
from harmonica.samplers import Sampler, SamplerConfig, SamplerName, make_sampler, with_scheduler
from harmonica.samplers.config import GuidanceChannels
from harmonica.samplers.noise import MAX_SEED, SampleKeys, sample_label
from harmonica.validation.finite import NotFinite, check_finite
from harmonica.validation.settings import Count, Cure, Field, SettingError, settings

_SHEET_COLUMNS = 16


@settings()
class SampleCommand:
    """Settings of one sampling."""

    router: str = ""
    """Artifact folder, or .pt of the released training code. Empty: the built-in model's champion, and
    no router for other models."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """tau of a released .pt, which does not say it."""
    classes: tuple[str, ...] = ()
    """Class names or numbers, one an image. Empty: eight drawn by seed."""
    prompts: tuple[str, ...] = ()
    """For a model that takes prompts: one an image."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED), Cure("a whole number from 0, below 2^63")] = 0
    """Fixes the noise; image i is the same whatever else is asked for."""
    sampler: SamplerName | None = None
    """Default: the router's; without one the model's own."""
    num_inference_steps: int | None = None
    """Default: the router's; without one 20."""
    guidance_scale: float | None = None
    """Default: the router's; without one 4 (built-in model: 2)."""
    guidance_channels: GuidanceChannels | None = None
    """Default: the router's; without one the convention of the model's layout."""
    allow_other_sampler: bool = False
    """Use the router under a sampler or guidance it was not trained for; its step count stays."""
    rounds: Count = 3
    """How often each way is timed, after warming up; the median counts."""
    output: Path = Path("samples.png")
    """Grid of pictures; without a VAE the latents go to a .safetensors file beside it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The denoiser."""


def own_sampler(loaded: LoadedModel, path: str) -> SamplerConfig:
    """Return the sampler of a model for which no router names one."""
    if path == BUILTIN:
        return SamplerConfig()
    if loaded.scheduler is not None:
        return SamplerConfig(
            name="diffusers", guidance_scale=4.0, clip_sample=False, scheduler=loaded.scheduler
        )
    return SamplerConfig(guidance_scale=4.0, guidance_channels="first_three", clip_sample=False)


def _load_router(command: SampleCommand, loaded: LoadedModel) -> RouterArtifact | None:
    path = command.router or (str(CHAMPION) if command.model.path == BUILTIN else "")
    if not path:
        return None
    if not path.endswith(".pt"):
        return RouterArtifact.load(path)
    logits_TB = read_released_router(path)
    # The released code trains under the public code's DDIM and records neither; guidance as in its README.
    config = SamplerConfig(
        num_inference_steps=len(logits_TB),
        guidance_scale=1.5,
        guidance_channels="first_three",
        clip_sample=False,
    )
    sampler = make_sampler(loaded.model, config)
    return RouterArtifact.build(
        logits_TB, sampler, threshold=command.threshold, reuse="hold", training={"released": Path(path).name}
    )


def _make_sampler(command: SampleCommand, loaded: LoadedModel, router: RouterArtifact | None) -> Sampler:
    """Return the sampler asked for, checked against the router."""
    base = router.sampler if router else own_sampler(loaded, command.model.path)
    asked: dict[str, Any] = {
        "name": command.sampler,
        "num_inference_steps": command.num_inference_steps,
        "guidance_scale": command.guidance_scale,
        "guidance_channels": command.guidance_channels,
    }
    if command.sampler not in (None, "diffusers"):
        base = replace(base, name="ddim", scheduler=None)  # the name follows
    config = with_scheduler(
        replace(base, **{name: value for name, value in asked.items() if value is not None}), loaded.scheduler
    )
    if router is not None:
        router.check(loaded.model, config, allow_other_sampler=command.allow_other_sampler)
    sampler = make_sampler(loaded.model, config)
    if router is not None:
        check_plan(router.plan, sampler)
    return sampler


def _label(name: str, class_names: tuple[str, ...]) -> int:
    try:
        return find_class(name, class_names)
    except UnknownClass as error:
        raise ValueError(f"classes has {error}") from error


def _subjects(command: SampleCommand, loaded: LoadedModel) -> tuple[Sequence[int | str], list[str]]:
    """Return the labels or prompts asked for, and the images' titles."""
    if not loaded.model.num_classes:
        if command.classes or not command.prompts:
            field, given = ("classes", command.classes) if command.classes else ("prompts", command.prompts)
            raise SettingError(
                f"{field} is {given!r} and the model in {command.model.path} takes prompts: give some texts "
                "with --prompts, and no classes"
            )
        return command.prompts, list(command.prompts)
    if command.prompts:
        raise SettingError(
            f"prompts is {command.prompts!r} and the model in {command.model.path} takes classes: give "
            "--classes instead"
        )
    drawn = tuple(str(sample_label(command.seed, i, loaded.model.num_classes)) for i in range(8))
    labels = [_label(name, loaded.class_names) for name in command.classes or drawn]
    return labels, [loaded.class_names[label] for label in labels]


def _timed(
    sampler: Sampler, batch: tuple[Tensor, Any], keys: SampleKeys, router: RouterArtifact | None, rounds: int
) -> tuple[Tensor, list[float]]:
    """Return the samples, and the seconds of each round after the warm-ups.

    The samples are the same in every round.
    """
    plan, reuse = (router.plan, router.reuse) if router else (None, "hold")
    seconds, first = [], warm_ups(sampler.model)
    for _ in range(rounds + first):
        started = time.perf_counter()
        images = sample(sampler, *batch, plan, reuse=reuse, keys=keys)  # type: ignore[arg-type]
        if images.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return images, seconds[first:]


def run(command: SampleCommand) -> dict[str, Tensor]:
    """Sample as asked, say how long it took, and write the images.

    Returns:
        Images or latents by way: `full`, and `cached` if there is a router.
    """
    device = pick_device(command.device)
    loaded = load_model(command.model, device)
    model, router = loaded.model, _load_router(command, loaded)
    sampler = _make_sampler(command, loaded, router)
    subjects, titles = _subjects(command, loaded)
    keys = SampleKeys.of(command.seed, range(len(subjects)))
    side = model.sample_size
    noise = torch.from_numpy(keys.start_noise((model.in_channels, side, side))).to(device)
    batch = noise, make_conditions(loaded, device).of(subjects, [""] * len(subjects))
    config = sampler.config
    how = f"{device}, {model.execution}"
    say(f"{config.name}, {config.num_inference_steps} steps, guidance {config.guidance_scale:g}, {how}")
    sampled, medians = {}, {}
    for way, used in (("full", None), ("cached", router)):
        if way == "cached" and router is None:
            continue
        sampled[way], seconds = _timed(sampler, batch, keys, used, command.rounds)
        check_finite(sampled[way], f"the {way} samples are")
        medians[way] = statistics.median(seconds)
        spread = (max(seconds) - min(seconds)) / medians[way]
        rounds = f"{len(seconds)} rounds, spread {spread:.0%}"
        say(f"{way:7} {medians[way]:.3f} s for {len(subjects)} images ({rounds})")
    if router is not None:
        say(
            f"CUR {router.plan.cur:.1%}, ideal {router.ideal_speedup:.2f}x, "
            f"measured {medians['full'] / medians['cached']:.2f}x"
        )
        held = kept_bytes(model, router.plan, router.reuse, is_guided=sampler.is_guided) / 2**20
        say(f"cache: {held:.1f} MiB an image, {held * len(subjects):.1f} MiB for the batch")
    _write(command, loaded, sampled, router, titles)
    return sampled


def _write(
    command: SampleCommand,
    loaded: LoadedModel,
    sampled: dict[str, Tensor],
    router: RouterArtifact | None,
    names: list[str],
) -> None:
    from harmonica.evaluation.plots import cached_title, sample_sheet

    output = local(command.output, "output")
    if not draws_pixels(loaded.model):
        vae = loaded.load_vae(next(iter(sampled.values())).device)
        if vae is None:
            path = output.with_suffix(".safetensors")
            write_tensors({way: x.cpu() for way, x in sampled.items()}, path)
            say(f"latents in {path}: give --model.vae for pictures")
            return
        sampled = {way: decode_latents(vae, x) for way, x in sampled.items()}
    titles = {"full": "full"}
    if router is not None:
        titles["cached"] = cached_title("cached", router.plan.cur, router.method)
    shown = {titles[way]: images[:_SHEET_COLUMNS].cpu() for way, images in sampled.items()}
    columns = [name.split(",")[0] for name in names[:_SHEET_COLUMNS]]
    sample_sheet(with_differences(shown), columns, output)
    say(f"pictures in {output}")


def main(arguments: list[str]) -> int:
    """Run the command and return the exit code.

    It is 0 when sampled, 2 for unusable input, and 1 if samples are not finite.
    """
    try:
        run(parse_settings(SampleCommand, arguments, "python -m harmonica.cli.sample"))
    except ValueError as error:
        return fail(error, code=2)
    except NotFinite as error:
        return fail(str(error), code=1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
