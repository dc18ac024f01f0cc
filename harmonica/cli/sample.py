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
from typing import Any

import torch
from torch import Tensor

from harmonica.cli.common import fail, parse_settings, say
from harmonica.cli.sample_command import SampleCommand, load_router, requested_sampler, requested_subjects
from harmonica.cli.train import pick_device
from harmonica.core.accumulation import kept_bytes
from harmonica.core.artifact import RouterArtifact
from harmonica.core.sampling import sample
from harmonica.data.conditions import make_conditions
from harmonica.evaluation.differences import with_differences
from harmonica.execution.levels import warm_ups
from harmonica.io.paths import local
from harmonica.io.tensor_files import write_tensors
from harmonica.models.loading import LoadedModel, load_model
from harmonica.models.vae import decode_latents, draws_pixels
from harmonica.samplers import Sampler
from harmonica.samplers.noise import SampleKeys
from harmonica.validation.finite import NotFinite, check_finite

_SHEET_COLUMNS = 16


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
    model, router = loaded.model, load_router(command, loaded)
    sampler = requested_sampler(command, loaded, router)
    subjects, titles = requested_subjects(command, loaded)
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
