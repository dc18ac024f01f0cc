"""Settings of a model that is run in the loop of its own diffusers pipeline."""

from typing import Annotated, Any

from harmonica.integrations.recorded.kinds import BLOCKS, RecordedKind, check_kinds
from harmonica.validation.settings import Field, Natural, settings


@settings("pipeline")
class PipelineConfig:
    """Any text-to-image pipeline of diffusers, with the arguments of its calls."""

    enabled: bool = False
    """Train, evaluate and register in the loop of the diffusers pipeline in `model.path`, whose branches are
    found by recording its forward; on in the preset `pipeline`. Off: the model has a branch file of its own
    (DiT, PixArt, Sana)."""
    height: Natural = 0
    """Height of the images in pixels. 0: the pipeline's own."""
    width: Natural = 0
    """Width of the images in pixels. 0: the pipeline's own."""
    guidance_scale: Annotated[float, Field(ge=0, le=50)] | None = None
    """The call's guidance_scale. Empty: the pipeline's own."""
    true_cfg_scale: Annotated[float, Field(ge=0, le=50)] | None = None
    """The call's true_cfg_scale, where the pipeline has it beside embedded guidance (FLUX, Qwen-Image).
    Empty: the pipeline's own."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    max_sequence_length: Natural = 0
    """Tokens of a prompt at most, as encode_prompt takes them. 0: the pipeline's own."""
    cacheable: Annotated[tuple[RecordedKind, ...], Field(min_length=1)] = (BLOCKS,)
    """What a router may reuse. blocks: all blocks together, of which one value is kept. Or kinds of
    sub-modules, each of which keeps its own: attn, cross, mlp, and single, the blocks whose attention and
    feed-forward end in one projection."""

    def __post_init__(self) -> None:
        check_kinds(self.cacheable, "pipeline.cacheable")

    def call(self, num_inference_steps: int) -> dict[str, Any]:
        """Return the arguments that are given to each of the pipeline's calls."""
        sizes = {"height": self.height or None, "width": self.width or None}
        scales = {"guidance_scale": self.guidance_scale, "true_cfg_scale": self.true_cfg_scale}
        given = {name: value for name, value in (sizes | scales).items() if value is not None}
        return {"num_inference_steps": num_inference_steps, **given}
