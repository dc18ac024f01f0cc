"""What a transformer with a plan is called with: arguments, prompts, masks, attention processors."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from tiny_attached import STEPS, apart, config, planned
from tolerances import of_pass, of_trajectory

import harmonica
from harmonica.samplers import make_sampler


def test_a_call_takes_and_gives_what_the_transformers_own_does(case):
    times = make_sampler(case.model, config()).timesteps
    plain, near = case.call(times[-1]), of_pass(torch.float64)
    harmonica.apply(case.transformer, case.artifact())
    given = {"cross_attention_kwargs": {"scale": 0.5}, "return_dict": True}
    output = case.transformer(case.noise, timestep=torch.tensor(times[-1]), **case.one_call, **given)
    assert type(output).__name__ == "Transformer2DModelOutput" and apart(output.sample, plain) < near
    (output,) = case.transformer(
        case.noise, timestep=torch.full((2,), times[-1]), **case.one_call, return_dict=False
    )
    assert apart(output, plain) < near
    assert apart(case.call(times[-1], cross_attention_kwargs={}), plain) < near
    with pytest.raises(ValueError, match=r"cross_attention_kwargs has ip_mask: under a plan attention proc"):
        case.call(times[-1], cross_attention_kwargs={"ip_mask": 1})


def test_prompts_may_change_within_a_trajectory(pixart):
    """Keys and values of the text are kept for the very tensors that they were made of."""
    times, artifact = make_sampler(pixart.model, config()).timesteps, pixart.artifact()
    text = pixart.one_call["encoder_hidden_states"] = pixart.one_call["encoder_hidden_states"].clone()
    outputs = []
    for change in (lambda: text, lambda: text.flip(0), lambda: text.mul_(2)):
        harmonica.apply(pixart.transformer, artifact)
        pixart.call(times[-1])
        outputs.append(pixart.call(times[-2], encoder_hidden_states=change()))
        harmonica.remove(pixart.transformer)
    assert len({output.sum().item() for output in outputs}) == 3
    with torch.inference_mode():
        harmonica.apply(pixart.transformer, artifact)
        assert apart(pixart.run(), pixart.ours(artifact)) < of_trajectory(STEPS)


def test_masks_of_a_pixart(pixart):
    arguments, mask = pixart.one_call, pixart.one_call["encoder_attention_mask"]
    unmasked = pixart.call(999, encoder_attention_mask=None)
    harmonica.apply(pixart.transformer, pixart.artifact())
    assert apart(pixart.call(999, encoder_attention_mask=None), unmasked) < of_pass(torch.float64)
    with pytest.raises(ValueError, match=r"encoder_attention_mask has shape \(2, 1, 7\): .* give the mask"):
        pixart.call(999, encoder_attention_mask=(1.0 - mask[:, None]) * -10000)
    with pytest.raises(ValueError, match=r"attention_mask is given: under a plan all image tokens see all"):
        pixart.call(999, attention_mask=torch.ones(2, 16))
    assert set(arguments) == {"encoder_hidden_states", "encoder_attention_mask", "added_cond_kwargs"}


def test_attention_processors_of_a_pixart(pixart):
    class Custom(AttnProcessor2_0):
        pass

    artifact, (_, wanted) = pixart.artifact(), planned(pixart)
    near = of_pass(torch.float64, 2 * STEPS)
    for processor in (AttnProcessor(), SlicedAttnProcessor(1)):
        pixart.transformer.set_attn_processor(processor)
        harmonica.apply(pixart.transformer, artifact)
        assert apart(pixart.run(), wanted) < near
        harmonica.remove(pixart.transformer)
    harmonica.apply(pixart.transformer, artifact)
    pixart.transformer.transformer_blocks[1].attn1.set_processor(Custom())  # that one is called
    assert apart(pixart.run(), wanted) < near
    pixart.transformer.transformer_blocks[1].attn2.set_processor(Custom())
    with pytest.raises(ValueError, match=r"transformer_blocks.1.attn2 has the attention processor Custom"):
        pixart.run()


def test_attention_slicing(pixart):
    _, wanted = planned(pixart)
    harmonica.apply(pixart.transformer, pixart.artifact())
    pixart.pipe.enable_attention_slicing()
    assert apart(pixart.run(), wanted) < 1e-12
