"""Check that a model came with all that generating images takes."""

from harmonica.data.conditions import check_conditions
from harmonica.models.loading import LoadedModel
from harmonica.models.vae import check_vae, draws_pixels


def check_is_whole(loaded: LoadedModel) -> None:
    """Check that a model came with all that generating images takes.

    Raises:
        ValueError: it generates latents and has no usable decoder, or takes prompts and has no text encoder.
    """
    if not draws_pixels(loaded.model):
        if loaded.vae_folder is None:
            raise ValueError(
                f"model.vae is '' and the model draws latents, of {loaded.model.in_channels} channels, and "
                "comes without a decoder: give one"
            )
        check_vae(loaded.vae_folder)
    check_conditions(loaded)
