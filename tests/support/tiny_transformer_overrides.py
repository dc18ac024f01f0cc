"""What the rules of `tiny_transformers` do not find, by class: settings, and inputs of one forward."""

from typing import Any

import torch
from torch import Tensor

ROWS, TEXT, WIDTH, SIDE = 2, 5, 32, 4
IMAGE = SIDE * SIDE


def _text(width: int = WIDTH, tokens: int = TEXT) -> Tensor:
    return torch.randn(ROWS, tokens, width)


def _grid(axes: int = 3, text: int = 0) -> Tensor:
    """Positions of text, all zero, and of an image's tokens (text + 16, axes)."""
    ids = torch.zeros(text + IMAGE, axes)
    ids[text:, -2] = torch.arange(SIDE).repeat_interleave(SIDE)
    ids[text:, -1] = torch.arange(SIDE).repeat(SIDE)
    return ids


def _time(time: float) -> Tensor:
    return torch.full((ROWS,), time)


def _cosmos3(module: Any, time: float) -> dict[str, Any]:
    """One packed sequence of text and a video of two frames."""
    tokens = TEXT + 2 * IMAGE // 4
    video = torch.arange(TEXT, tokens)
    return {
        "input_ids": torch.arange(TEXT),
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.arange(tokens).repeat(3, 1),
        "und_len": TEXT,
        "sequence_length": tokens,
        "vision_tokens": [torch.randn(1, 4, 2, SIDE, SIDE)],
        "vision_token_shapes": [(2, SIDE // 2, SIDE // 2)],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video,
        "vision_timesteps": torch.full((len(video),), time),
        "vision_noisy_frame_indexes": [torch.arange(2)],
    }


def _protein(module: Any, time: float) -> dict[str, Any]:
    """Six residues, all of them to be drawn; time rises to 1."""
    residues = torch.ones(ROWS, 6, dtype=torch.bool)
    return {
        "bb_ca": torch.randn(ROWS, 6, 3),
        "local_latents": torch.randn(ROWS, 6, 4),
        "bb_ca_time": _time(1 - time),
        "local_latents_time": _time(1 - time),
        "padding_mask": residues,
        "conditioning": {"is_in_context_conditioning": ~residues, "supports_local_latent": residues},
    }


def _camera_video(module: Any, time: float) -> dict[str, Any]:
    """Three frames of an unmoved camera."""
    camera = torch.cat([torch.eye(4).flatten(), torch.tensor([4.0, 4.0, 2.0, 2.0])])
    return {
        "hidden_states": torch.randn(ROWS, 4, 3, SIDE, SIDE),
        "timestep": torch.full((ROWS, 1, 3), time),
        "encoder_hidden_states": torch.randn(ROWS, 1, TEXT, WIDTH),
        "mask": torch.ones(ROWS, TEXT),
        "chunk_plucker": torch.randn(ROWS, 6, 3, SIDE, SIDE),
        "camera_conditions": camera.expand(ROWS, 3, 20),
    }


_UNIT = {"time_scale": 1e-3}  # of classes whose timesteps end at 1
_OF_WAN = {"rope_max_seq_len": 32}
_3D_IN_LAST = lambda module, time: {"hidden_states": torch.randn(ROWS, 3, 8, 8, 4)}  # noqa: E731
_FRAMES_FIRST = lambda module, time: {"hidden_states": torch.randn(ROWS, 3, 4, 8, 8)}  # noqa: E731

OVERRIDES: dict[str, dict[str, Any]] = {
    "FluxTransformer2DModel": _UNIT,
    "Flux2Transformer2DModel": _UNIT,
    "Flux3Transformer2DModel": _UNIT,
    "ChromaTransformer2DModel": _UNIT,
    "LongCatImageTransformer2DModel": {"config": {"in_channels": 64}, **_UNIT},
    "OvisImageTransformer2DModel": _UNIT,
    "AuraFlowTransformer2DModel": _UNIT,
    "Lumina2Transformer2DModel": _UNIT,
    "AceStepTransformer1DModel": {
        "config": {"encoder_hidden_size": WIDTH, "audio_acoustic_hidden_dim": 4, "in_channels": 12},
        "inputs": lambda module, time: {
            "hidden_states": torch.randn(ROWS, 8, 4),
            "context_latents": torch.randn(ROWS, 8, 8),
            "timestep_r": _time(time),
        },
        "time_scale": 1e-3,
    },
    "AnyFlowTransformer3DModel": {
        "inputs": lambda module, time: {
            "hidden_states": torch.randn(ROWS, 3, 4, 8, 8),
            "timestep": torch.full((ROWS, 3), time),
            "r_timestep": torch.full((ROWS, 3), time / 2),
        },
    },
    "BriaFibo2Transformer2DModel": {
        "config": {
            "dim": WIDTH,
            "n_layers": 3,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 4,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "axes_lens": (64, 64, 64),
        },
        "inputs": lambda module, time: {
            "encoder_hidden_states": torch.randn(ROWS, 2, TEXT, WIDTH),
            "encoder_attention_mask": None,
        },
        "time_scale": 1e-3,
    },
    "BriaFiboTransformer2DModel": {
        "inputs": lambda module, time: {"text_encoder_layers": [_text(WIDTH) for _ in range(4)]},
        "time_scale": 1e-3,
    },
    "ChronoEditTransformer3DModel": {"config": _OF_WAN},
    "CogVideoXTransformer3DModel": {
        "config": {"max_text_seq_length": TEXT, "time_embed_dim": WIDTH},
        "inputs": _FRAMES_FIRST,
    },
    "ConsisIDTransformer3DModel": {
        "config": {"max_text_seq_length": TEXT, "time_embed_dim": WIDTH},
        "inputs": _FRAMES_FIRST,
    },
    "Cosmos3OmniTransformer": {
        "config": {
            "head_dim": 16,
            "latent_channel": 4,
            "patch_latent_dim": 16,
            "vocab_size": 16,
            "rope_axes_dim": (4, 2, 2),
        },
        "inputs": _cosmos3,
    },
    "CosmosTransformer3DModel": {
        "config": {"max_size": (4, 16, 16), "extra_pos_embed_type": None},
        "inputs": lambda module, time: {"padding_mask": torch.zeros(1, 1, 8, 8)},
        "time_scale": 1e-3,
    },
    "DiTTransformer2DModel": {
        "config": {"norm_num_groups": 4, "num_embeds_ada_norm": 1000},
        "inputs": lambda module, time: {
            "class_labels": torch.tensor([1, 2]),
            "timestep": torch.full((ROWS,), round(time)),
        },
    },
    "DreamLiteTransformer2DModel": {
        "config": {"in_channels": WIDTH, "norm_num_groups": 4, "cross_attention_dim": WIDTH},
    },
    "EasyAnimateTransformer3DModel": {
        "config": {"in_channels": 4, "out_channels": 4, "patch_size": 2, "add_noise_in_inpaint_model": False},
    },
    "ErnieImageTransformer2DModel": {
        "config": {"rope_axes_dim": (4, 6, 6)},
        "inputs": lambda module, time: {"text_bth": _text(), "text_lens": torch.tensor([TEXT, 3])},
    },
    "GlmImageTransformer2DModel": {
        "config": {"prior_vq_quantizer_codebook_size": 16},
        "inputs": lambda module, time: {
            "prior_token_id": torch.arange(IMAGE).repeat(ROWS, 1),
            "prior_token_drop": torch.zeros(ROWS, IMAGE, dtype=torch.bool),
        },
    },
    "HeliosTransformer3DModel": {
        "config": {"rope_dim": (4, 6, 6), "has_multi_term_memory_patch": False},
        "inputs": lambda module, time: {"indices_hidden_states": torch.arange(3).repeat(ROWS, 1)},
    },
    "HiDreamImageTransformer2DModel": {
        "config": {
            "patch_size": 2,
            "axes_dims_rope": (4, 6, 6),
            "caption_channels": [WIDTH, WIDTH],
            "llama_layers": [0, 1, 1, 1],
            "text_emb_dim": WIDTH,
            "force_inference_output": True,
        },
        "inputs": lambda module, time: {
            "encoder_hidden_states_t5": _text(),
            "encoder_hidden_states_llama3": torch.randn(2, ROWS, TEXT, WIDTH),
            "hidden_states": torch.randn(ROWS, 4, 8, 8),
            "pooled_embeds": torch.randn(ROWS, WIDTH),
            "img_ids": None,
        },
    },
    "HunyuanDiT2DModel": {
        "config": {
            "in_channels": 4,
            "patch_size": 2,
            "hidden_size": WIDTH,
            "cross_attention_dim_t5": WIDTH,
            "pooled_projection_dim": 16,
            "text_len": TEXT,
            "text_len_t5": TEXT,
        },
        "inputs": lambda module, time: {
            "text_embedding_mask": torch.ones(ROWS, TEXT, dtype=torch.bool),
            "encoder_hidden_states_t5": _text(),
            "text_embedding_mask_t5": torch.ones(ROWS, TEXT, dtype=torch.bool),
            "image_meta_size": torch.tensor([[64.0, 64, 64, 64, 0, 0]] * ROWS),
            "style": torch.zeros(ROWS, dtype=torch.long),
            "image_rotary_emb": (torch.randn(IMAGE, 16), torch.randn(IMAGE, 16)),
        },
    },
    "HunyuanVideo15Transformer3DModel": {
        "config": {"target_size": 8, "rope_axes_dim": (4, 6, 6)},
        "inputs": lambda module, time: {
            "encoder_hidden_states_2": _text(),
            "encoder_attention_mask_2": torch.ones(ROWS, TEXT, dtype=torch.bool),
            "image_embeds": torch.randn(ROWS, 3, WIDTH),
        },
    },
    "HunyuanVideoTransformer3DModel": {"config": {"rope_axes_dim": (4, 6, 6)}},
    "HunyuanVideoFramepackTransformer3DModel": {
        "config": {
            "rope_axes_dim": (4, 6, 6),
            "has_image_proj": True,
            "image_proj_dim": WIDTH,
            "has_clean_x_embedder": True,
        },
        "inputs": lambda module, time: {
            "image_embeds": torch.randn(ROWS, 3, WIDTH),
            "indices_latents": torch.arange(3),
            "latents_clean": torch.randn(ROWS, 4, 1, 8, 8),
            "indices_latents_clean": torch.arange(1),
            "latents_history_2x": torch.randn(ROWS, 4, 2, 8, 8),
            "indices_latents_history_2x": torch.arange(2),
            "latents_history_4x": torch.randn(ROWS, 4, 4, 8, 8),
            "indices_latents_history_4x": torch.arange(4),
        },
    },
    "Ideogram4Transformer2DModel": {
        "config": {"mrope_section": (4, 2, 2), "llm_features_dim": WIDTH},
        "inputs": lambda module, time: {
            "hidden_states": torch.randn(ROWS, TEXT + IMAGE, 4),
            "encoder_hidden_states": _text(tokens=TEXT + IMAGE),
            "position_ids": _grid(3, TEXT).repeat(ROWS, 1, 1).long(),
            "segment_ids": torch.zeros(ROWS, TEXT + IMAGE, dtype=torch.long),
            "indicator": torch.tensor([[3] * TEXT + [2] * IMAGE] * ROWS),
        },
        "time_scale": 1e-3,
    },
    "JoyImageEditTransformer3DModel": {"config": {"rope_dim_list": [4, 6, 6]}},
    "JoyImageEditPlusTransformer3DModel": {
        "config": {"rope_dim_list": [4, 6, 6]},
        "inputs": lambda module, time: {
            "hidden_states": torch.randn(ROWS, IMAGE, 4, 1, 2, 2),
            "encoder_hidden_states_mask": torch.ones(ROWS, TEXT, dtype=torch.bool),
            "shape_list": [[(1, SIDE, SIDE)]] * ROWS,
        },
    },
    "Kandinsky5Transformer3DModel": {
        "config": {"axes_dims": (4, 6, 6)},
        "inputs": lambda module, time: {
            "hidden_states": torch.randn(ROWS, 3, 8, 8, 4),
            "visual_rope_pos": [torch.arange(3), torch.arange(SIDE), torch.arange(SIDE)],
            "text_rope_pos": torch.arange(TEXT),
        },
    },
    "Kandinsky6Transformer3DModel": {
        "config": {"axes_dims": (4, 6, 6), "visual_cond": False, "in_audio_dim": 4, "out_audio_dim": 4},
        "inputs": _3D_IN_LAST,
    },
    "Kandinsky6SRTransformer3DModel": {
        "config": {"axes_dims": (4, 6, 6), "out_visual_dim": 4, "nabla_window": (3, 3, 3)},
        "inputs": lambda module, time: {"hidden_states": torch.randn(ROWS, 3, 8, 8, 9)},
    },
    "Krea2Transformer2DModel": {
        "config": {"num_text_layers": 2, "axes_dims_rope": (4, 6, 6)},
        "inputs": lambda module, time: {
            "hidden_states": torch.randn(ROWS, IMAGE, 4),
            "encoder_hidden_states": torch.randn(ROWS, TEXT, 2, WIDTH),
            "position_ids": _grid(3, TEXT),
        },
        "time_scale": 1e-3,
    },
    "LTXVideoTransformer3DModel": {
        "inputs": lambda module, time: {
            "hidden_states": torch.randn(ROWS, 3 * IMAGE, 4),
            "num_frames": 3,
            "height": SIDE,
            "width": SIDE,
        },
    },
    "LTX2VideoTransformer3DModel": {
        "config": {"audio_cross_attention_dim": WIDTH, "cross_attention_dim": WIDTH},
        "inputs": lambda module, time: {
            "hidden_states": torch.randn(ROWS, 3 * IMAGE, 4),
            "audio_hidden_states": torch.randn(ROWS, 6, 4),
            "audio_encoder_hidden_states": _text(),
            "audio_encoder_attention_mask": torch.ones(ROWS, TEXT),
            "encoder_attention_mask": torch.ones(ROWS, TEXT),
            "num_frames": 3,
            "height": SIDE,
            "width": SIDE,
            "audio_num_frames": 6,
        },
    },
    "LatteTransformer3DModel": {
        "config": {
            "in_channels": 4,
            "patch_size": 2,
            "cross_attention_dim": WIDTH,
            "caption_channels": WIDTH,
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "video_length": 3,
            "activation_fn": "gelu-approximate",
        },
        "inputs": lambda module, time: {"encoder_attention_mask": None},
    },
    "LongCatAudioDiTTransformer": {
        "config": {"latent_dim": 4, "dit_text_dim": WIDTH},
        "inputs": lambda module, time: {
            "hidden_states": torch.randn(ROWS, 8, 4),
            "latent_cond": torch.randn(ROWS, 8, 4),
        },
        "time_scale": 1e-3,
    },
    "LuminaNextDiT2DModel": {
        "config": {"num_kv_heads": 2, "multiple_of": 16},
        "inputs": lambda module, time: {
            "image_rotary_emb": torch.polar(torch.ones(SIDE, SIDE, 8), torch.randn(SIDE, SIDE, 8)),
            "cross_attention_kwargs": {},
        },
        "time_scale": 1e-3,
    },
    "MiniMaxH3Transformer3DModel": {
        "config": {"patch_size": (1, 2, 2), "time_embed_hidden_dim": WIDTH, "rope_freq_dim": 2},
        "inputs": lambda module, time: {
            "hidden_states": torch.randn(1, IMAGE, 16),
            "audio_hidden_states": torch.randn(1, 6, 4),
            "encoder_hidden_states": torch.randn(1, TEXT, WIDTH),
            "timestep": torch.tensor([time, time]),
            "timestep_indices": torch.tensor([0] * (IMAGE + 6) + [1] * TEXT),
            "token_tags": torch.tensor([0] * IMAGE + [2] * 6 + [1] * TEXT),
            "position_ids": torch.arange(IMAGE + 6 + TEXT)[:, None].repeat(1, 3),
            "video_indices": torch.arange(IMAGE),
            "audio_indices": torch.arange(IMAGE, IMAGE + 6),
            "text_indices": torch.arange(IMAGE + 6, IMAGE + 6 + TEXT),
        },
        "time_scale": 1e-3,
    },
    "MiniMaxMusic3Transformer1DModel": {
        "config": {"rotary_dim": 8, "fourier_embedding_dim": WIDTH},
        "inputs": lambda module, time: {
            "hidden_states": torch.randn(ROWS, 4, 8),
            "encoder_hidden_states": torch.randn(ROWS, 8, WIDTH),
        },
        "time_scale": 1e-3,
    },
    "NucleusMoEImageTransformer2DModel": {
        "config": {
            "out_channels": 1,
            "num_experts": 4,
            "moe_intermediate_dim": WIDTH,
            "capacity_factors": 2.0,
        },
        "inputs": lambda module, time: {"img_shapes": [(1, SIDE, SIDE)] * ROWS},
        "time_scale": 1e-3,
    },
    "OmniGenTransformer2DModel": {
        "config": {
            "pad_token_id": 0,
            "vocab_size": 16,
            "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
            "pos_embed_max_size": 16,
            "intermediate_size": 64,
        },
        "inputs": lambda module, time: {
            "input_ids": torch.ones(ROWS, TEXT, dtype=torch.long),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(ROWS, TEXT + 1 + IMAGE, TEXT + 1 + IMAGE),
            "position_ids": torch.arange(TEXT + 1 + IMAGE).repeat(ROWS, 1),
        },
        "time_scale": 1e-3,
    },
    "PRXTransformer2DModel": {"config": {"axes_dim": [8, 8]}, "time_scale": 1e-3},
    "PriorTransformer": {
        "config": {"num_embeddings": TEXT, "embedding_dim": WIDTH},
        "inputs": lambda module, time: {"hidden_states": torch.randn(ROWS, WIDTH)},
    },
    "QwenImage21Transformer2DModel": {
        "inputs": lambda module, time: {
            "timestep": torch.tensor([time]),
            "img_shapes": [[(1, SIDE, SIDE)]] * ROWS,
            "img_mask": torch.tensor([[False] * TEXT + [True] * SIDE] * ROWS),
        },
        "time_scale": 1e-3,
    },
    "QwenImageTransformer2DModel": {"config": {"out_channels": 1}, "time_scale": 1e-3},
    "RFD4ProteinaTransformer": {
        "config": {
            "nlayers": 2,
            "nheads": 2,
            "latent_dim": 4,
            "tri_mult_c": 8,
            "feats_seq": ("xt_bb_ca", "xt_local_latents"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
            "num_sequence_classes": 8,
        },
        "inputs": _protein,
        "time_scale": 1e-3,
    },
    "SanaWMTransformer3DModel": {
        "config": {
            "softmax_every_n": 2,
            "linear_head_dim": 16,
            "chunk_plucker_channels": 6,
            "caption_channels": WIDTH,
        },
        "inputs": _camera_video,
    },
    "SkyReelsV2Transformer3DModel": {"config": _OF_WAN},
    "StableAudioDiTModel": {
        "config": {
            "global_states_input_dim": WIDTH,
            "num_key_value_attention_heads": 1,
            "cross_attention_input_dim": WIDTH,
        },
        "inputs": lambda module, time: {
            "hidden_states": torch.randn(ROWS, 4, 8),
            "global_hidden_states": torch.randn(ROWS, 1, WIDTH),
            "rotary_embedding": (torch.randn(9, 8), torch.randn(9, 8)),
        },
        "time_scale": 1e-3,
    },
    "StableAudio3DiTModel": {
        "config": {"io_channels": 4, "local_add_cond_dim": 5, "num_memory_tokens": 2, "embed_dim": WIDTH},
        "inputs": lambda module, time: {
            "hidden_states": torch.randn(ROWS, 4, 8),
            "global_hidden_states": torch.randn(ROWS, WIDTH),
        },
        "time_scale": 1e-3,
    },
    "T5FilmDecoder": {
        "config": {"input_dims": 8, "targets_length": 8, "d_model": WIDTH, "d_kv": 16, "d_ff": 2 * WIDTH},
        "inputs": lambda module, time: {
            "encodings_and_masks": [(_text(), torch.ones(ROWS, TEXT))],
            "decoder_input_tokens": torch.randn(ROWS, 8, 8),
            "decoder_noise_time": _time(time),
        },
        "time_scale": 1e-3,
    },
    "Transformer2DModel": {
        "config": {"in_channels": WIDTH, "norm_num_groups": 4, "cross_attention_dim": WIDTH},
    },
    "TransformerTemporalModel": {
        "config": {"in_channels": WIDTH, "norm_num_groups": 4},
        "inputs": lambda module, time: {
            "hidden_states": torch.randn(6, WIDTH, 8, 8),
            "num_frames": 3,
            "encoder_hidden_states": None,
        },
    },
    "WanAnimateTransformer3DModel": {
        "config": {
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": WIDTH,
            "motion_encoder_channel_sizes": {"4": 4, "8": 4, "16": 4},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        }
        | _OF_WAN,
        "inputs": lambda module, time: {
            "hidden_states": torch.randn(ROWS, 12, 3, 8, 8),
            "pose_hidden_states": torch.randn(ROWS, 4, 2, 8, 8),
            "encoder_hidden_states_image": torch.randn(ROWS, 3, WIDTH),
            "face_pixel_values": torch.randn(ROWS, 3, 8, 16, 16),
        },
    },
    "WanTransformer3DModel": {"config": _OF_WAN},
    "WanVACETransformer3DModel": {
        "config": {"vace_layers": [0], "vace_in_channels": 6} | _OF_WAN,
        "inputs": lambda module, time: {"control_hidden_states": torch.randn(ROWS, 6, 3, 8, 8)},
    },
    "ZImageTransformer2DModel": {
        "config": {"axes_dims": [4, 6, 6], "axes_lens": [64, 64, 64]},
        "inputs": lambda module, time: {
            "x": [torch.randn(4, 1, 8, 8) for _ in range(ROWS)],
            "cap_feats": [torch.randn(TEXT, WIDTH) for _ in range(ROWS)],
            "t": _time(time),
        },
        "time_scale": 1e-3,
    },
}
