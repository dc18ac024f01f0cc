"""Settings of trainings: of learned steps, and the paper's.

Learned steps fit any model. The paper's settings have their source each; those that the sources do not state
are said to be unknown.

Sources: [R] README of the released code, its training command (DiT-XL/2 256, T = 10); [P] the paper's
tables (sampler, T, guidance and CUR of every row; [S] its slides for PixArt-Sigma at 2048, where CUR is not
given and 55% is what "over 2.2x theoretical" means); [C] the released code's defaults.
Not published: beta, learning rate, C and budget of every other row. There, beta follows from the CUR that
the paper reached (`target_cur`), and the budget is that of [R]: 20,000 updates, lambda every 500. No PixArt
code was released; which sub-layers the paper caches there is not said: self-attention and MLP here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from harmonica.models.loading import BUILTIN_COLOUR, BUILTIN_TEXT, ModelConfig
from harmonica.models.text_blocks import KINDS
from harmonica.samplers import SamplerConfig, SamplerName
from harmonica.training.config import TrainingConfig
from harmonica.training.forecast_config import ForecastConfig
from harmonica.training.sdt_config import SdtConfig

_UPDATES, _UPDATES_PER_LAMBDA = 20_000, 500  # [R] --max-steps, --lambda-c; T updates a trajectory there


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model, a sampler, and how a router is trained for the two."""

    model: ModelConfig
    sampler: SamplerConfig
    train: TrainingConfig


def learned_steps(*, is_large: bool = True, **settings: Any) -> TrainingConfig:
    """Return settings that learn which steps to reuse, with fitted forecasts.

    A correction of the model's output is fitted with them. Whole steps are reused. In the mean of the images
    it was nearest to the full sampler wherever it was measured (`tests/benchmarks/RESULTS.md`). It takes
    about as long as 170 full samplings of a batch at T = 20, or 230 where branches are computed again.

    It differs from the paper, which trains a row of the router 2,000 times where this trains it 12 times:
    it has a speed to reach instead of beta, a start from the steps whose reuse changes the image least,
    lambda per unit of step error, and reuse by forecasts that are fitted to the image. What SDT has trained
    is kept only where it is nearer than its start.

    Args:
        is_large: the activations of a trajectory fill a GPU, as those of diffusers' pipelines do. A
            trajectory has four images, one at a time, its branches are computed again in backward passes, and
            those of a branch file are forecast together (`harmonica.core.segments`).
        settings: replace those of this recipe, as in `learned_steps(target_speedup=2.5)`.
    """
    forecast = ForecastConfig(trajectories=12)
    if is_large:
        forecast = replace(forecast, rows_at_once=1, activation_checkpointing=True, segments=True)
        settings = {"batch_size": 4} | settings
    recipe = TrainingConfig(
        target_speedup=1.8,
        initial="measured",
        initial_logit=2.0,
        start_trajectories=6,
        trajectories=12,
        sdt=SdtConfig(learning_rate=0.1, threshold=0.5, reuse="forecast", penalty="macs"),
        iepo="sensitivity",
        iepo_every=12,
        choice_trajectories=3,
        forecast=forecast,
    )
    return replace(recipe, **settings)


def _dit(num_inference_steps: int, train: TrainingConfig, image_size: int = 256) -> Recipe:
    return Recipe(
        model=ModelConfig(path=f"DiT-XL-2-{image_size}x{image_size}.pt"),
        sampler=SamplerConfig(
            num_inference_steps=num_inference_steps,
            guidance_scale=1.5,  # [R] --cfg-scale, [P]
            guidance_channels="first_three",  # the public DiT code's
            clip_sample=False,
        ),
        train=train,
    )


def _training(num_steps: int, sdt: SdtConfig, *, target_cur: float = 0.0) -> TrainingConfig:
    return TrainingConfig(
        trajectories=_UPDATES // num_steps,
        batch_size=32,  # [R] a global batch of 64 rows, half of them guidance's
        iepo_every=_UPDATES_PER_LAMBDA // num_steps,
        initial="normal",  # [C]
        iepo="leave_one_out" if target_cur else "cumulative",  # [P]; [C] for the beta that goes with it
        sdt=sdt,
        target_cur=target_cur,
        checkpoint_interval_s=300,
    )


def dit_xl_2_256_t10() -> Recipe:
    """Return DiT-XL/2 256, DDIM-10, as the released training command sets it.

    The paper has CUR 22.86%, 1.23x.
    """
    return _dit(10, _training(10, SdtConfig(beta=7e-8, learning_rate=0.01, threshold=0.1)))


def dit_xl_2_256_t20() -> Recipe:
    """DiT-XL/2 256, DDIM-20: CUR 37.50%, 1.44x [P]; beta not published."""
    return _dit(20, _training(20, SdtConfig(), target_cur=0.3750))


def dit_xl_2_256_t50() -> Recipe:
    """DiT-XL/2 256, DDIM-50: CUR 23.68%, 1.30x [P]; beta not published."""
    return _dit(50, _training(50, SdtConfig(), target_cur=0.2368))


def dit_xl_2_512_t20() -> Recipe:
    """DiT-XL/2 512, DDIM-20: CUR 25.98%, 1.30x [P]; beta not published."""
    return _dit(20, _training(20, SdtConfig(), target_cur=0.2598), image_size=512)


def _pixart(repo: str, sampler: SamplerName, num_inference_steps: int, cur: float) -> Recipe:
    """Return a row of [P]'s text-to-image table.

    Guidance is 4.5 on all channels, as in diffusers' pipelines.
    """
    return Recipe(
        model=ModelConfig(path=f"PixArt-alpha/{repo}", dtype="bfloat16"),
        sampler=SamplerConfig(
            name=sampler, num_inference_steps=num_inference_steps, guidance_scale=4.5, clip_sample=False
        ),
        train=_training(num_inference_steps, SdtConfig(), target_cur=cur),
    )


_ALPHA_256, _ALPHA_512, _ALPHA_1024 = "PixArt-XL-2-256x256", "PixArt-XL-2-512x512", "PixArt-XL-2-1024-MS"
_PIXART: dict[str, tuple[str, SamplerName, int, float]] = {
    "pixart-alpha-256-dpm20": (_ALPHA_256, "dpm-solver++", 20, 0.5601),  # 1.60x
    "pixart-alpha-256-iddpm100": (_ALPHA_256, "iddpm", 100, 0.5324),  # 1.69x
    "pixart-alpha-256-sa25": (_ALPHA_256, "sa-solver", 25, 0.5419),  # 1.59x
    "pixart-alpha-512-dpm20": (_ALPHA_512, "dpm-solver++", 20, 0.5464),  # 1.64x
    "pixart-alpha-512-sa25": (_ALPHA_512, "sa-solver", 25, 0.5424),  # 1.61x
    "pixart-alpha-1024-dpm20": (_ALPHA_1024, "dpm-solver++", 20, 0.5506),  # 1.63x
    "pixart-alpha-1024-sa25": (_ALPHA_1024, "sa-solver", 25, 0.5398),  # 1.58x
    "pixart-sigma-2k-dpm20": ("PixArt-Sigma-XL-2-2K-MS", "dpm-solver++", 20, 0.55),  # 1.73x [S]
}


def fashion() -> Recipe:
    """The built-in DiT on Fashion-MNIST, DDIM-20: minutes on two cores, no download."""
    return Recipe(model=ModelConfig(), sampler=SamplerConfig(), train=learned_steps(is_large=False))


def emoji() -> Recipe:
    """The built-in DiT on emoji in colour, DDIM-20: minutes, no download."""
    return replace(fashion(), model=ModelConfig(path=BUILTIN_COLOUR))


def fashion_text() -> Recipe:
    """The built-in PixArt on captions of Fashion-MNIST, DPM-Solver++ 20.

    All three kinds of sub-layer may be reused: reusing cross-attention costs no image quality here
    (`tests/benchmarks/RESULTS.md`).
    """
    return Recipe(
        model=ModelConfig(path=BUILTIN_TEXT, text_tokens=16, cacheable=KINDS),
        sampler=SamplerConfig(name="dpm-solver++", guidance_scale=4.5),
        train=learned_steps(is_large=False),
    )


def _learned(row: str) -> Recipe:
    """Return learned steps for the model and the sampler of a row of the paper.

    A trajectory has 32 samples, at 2K 8. All three kinds of a PixArt's sub-layers may be reused, so that
    whole steps are.
    """
    paper, is_2k = _PAPER[row](), "-2k-" in row
    at_once = 1 if is_2k or "-1024-" in row else 4  # one takes 6 GiB of a GPU at 1024, and 26 at 2K
    train = learned_steps(batch_size=32, checkpoint_interval_s=300)
    train = replace(train, forecast=replace(train.forecast, rows_at_once=at_once))
    if is_2k:
        sdt = replace(train.sdt, activation_checkpointing=True)
        train = replace(train, batch_size=8, micro_batch_size=1, sdt=sdt)
    model = replace(paper.model, cacheable=KINDS) if row.startswith("pixart") else paper.model
    return Recipe(model=model, sampler=paper.sampler, train=train)


_PAPER: dict[str, Callable[[], Recipe]] = {
    "dit-xl-2-256-t10": dit_xl_2_256_t10,
    "dit-xl-2-256-t20": dit_xl_2_256_t20,
    "dit-xl-2-256-t50": dit_xl_2_256_t50,
    "dit-xl-2-512-t20": dit_xl_2_512_t20,
} | {name: partial(_pixart, *row) for name, row in _PIXART.items()}
_LEARNED = {
    "dit-xl-2-256": "dit-xl-2-256-t20",
    "dit-xl-2-512": "dit-xl-2-512-t20",
    "pixart-alpha-256": "pixart-alpha-256-dpm20",
    "pixart-alpha-512": "pixart-alpha-512-dpm20",
    "pixart-alpha-1024": "pixart-alpha-1024-dpm20",
    "pixart-sigma-2k": "pixart-sigma-2k-dpm20",
}
"""Name -> the row of the paper that has the model and the sampler."""

RECIPES: dict[str, Callable[[], Recipe]] = {
    "fashion": fashion,
    "emoji": emoji,
    "fashion-text": fashion_text,
    **{name: partial(_learned, row) for name, row in _LEARNED.items()},
    **_PAPER,
}
