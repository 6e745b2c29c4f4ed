"""Complete, tiny text-to-image pipelines of every supported family, built from configs, without a download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

WORDS = ("a", "photo", "of", "the", "red", "blue", "cat", "dog", "house", "boat", "image", "user", "size", "color")
SIDE = 16
"""Pixels along each side of the pictures."""
WIDER = {"sana": 32, "sana-sprint": 32, "lumina2": 32, "qwen-image-2.1": 64}
"""Of families that draw larger multiples only."""
VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CHAT = "{% for m in messages %}user {{ m['content'] }} {% endfor %}"


def tokenizer(length: int = 8, start: bool = True) -> Any:
    """Words to numbers; any other word is unknown. Wrapped in start (if wanted) and end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", *WORDS))}
    fast = Tokenizer(models.WordLevel(vocab, "<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", 1), ("</s>", 2)]
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if start else "$A </s>", special_tokens=ends
    )
    special: dict[str, Any] = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    special |= {"model_input_names": ["input_ids", "attention_mask"]}
    made = PreTrainedTokenizerFast(tokenizer_object=fast, model_max_length=length, padding_side="right", **special)
    made.chat_template = CHAT
    return made


VOCAB = 4 + len(WORDS)


def clip(projection: bool = False, width: int = 8) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=width, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5(kind: str = "T5") -> Any:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=2
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def kl(channels: int = 4, shift: float | None = None) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 8), latent_channels=channels, norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=SIDE,
        scaling_factor=0.7, shift_factor=shift, use_quant_conv=shift is None, use_post_quant_conv=shift is None,
    )  # fmt: skip


def unet(**more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIDE // 2, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        in_channels=4, out_channels=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **more,
    )  # fmt: skip


def sd() -> dict[str, Any]:
    from diffusers import PNDMScheduler

    return {
        "vae": kl(), "text_encoder": clip(), "tokenizer": tokenizer(), "unet": unet(cross_attention_dim=8),
        "scheduler": PNDMScheduler(**VP, steps_offset=1, skip_prk_steps=True),
        "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip


def sdxl() -> dict[str, Any]:
    from diffusers import EulerDiscreteScheduler

    return {
        "vae": kl(), "text_encoder": clip(), "text_encoder_2": clip(True), "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(), "scheduler": EulerDiscreteScheduler(**VP, timestep_spacing="leading"),
        "unet": unet(cross_attention_dim=16, addition_embed_type="text_time", addition_time_embed_dim=4,
                     projection_class_embeddings_input_dim=6 * 4 + 8),
    }  # fmt: skip


def sd3() -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    return {
        "vae": kl(shift=0.1), "text_encoder": clip(True), "text_encoder_2": clip(True), "text_encoder_3": t5(),
        "tokenizer": tokenizer(), "tokenizer_2": tokenizer(), "tokenizer_3": tokenizer(start=False),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "transformer": SD3Transformer2DModel(
            sample_size=SIDE // 2, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
            pos_embed_max_size=8),
    }  # fmt: skip


def pixart() -> dict[str, Any]:
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    return {
        "vae": kl(), "text_encoder": t5(), "tokenizer": tokenizer(start=False),
        "scheduler": DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
        "transformer": PixArtTransformer2DModel(
            sample_size=SIDE // 2, patch_size=2, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, cross_attention_dim=16, caption_channels=16),
    }  # fmt: skip


def sana() -> dict[str, Any]:
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    return {
        "vae": AutoencoderDC(
            latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1], downsample_block_type="conv",
            upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
            scaling_factor=0.41407),
        "text_encoder": Gemma2Model(Gemma2Config(
            vocab_size=VOCAB, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
        "tokenizer": tokenizer(length=512),
        "scheduler": DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
        "transformer": SanaTransformer2DModel(
            sample_size=16, patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
            attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
            caption_channels=8),
    }  # fmt: skip


def flux() -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    return {
        "vae": kl(shift=0.1), "text_encoder": clip(), "text_encoder_2": t5(), "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(start=False),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "transformer": FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=8, guidance_embeds=True,
            axes_dims_rope=(4, 4, 8)),
    }  # fmt: skip


def qwen_image(layers: int = 1) -> dict[str, Any]:
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    words = {
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    }  # fmt: skip
    sight = {
        "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16, "patch_size": 2,
        "window_size": 4, "fullatt_block_indexes": [0],
    }  # fmt: skip
    return {
        "vae": AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.1, -0.1, 0.2, 0.0], latents_std=[0.9, 1.1, 1.0, 1.2]),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
            text_config=words, vision_config=sight, image_token_id=3, video_token_id=3, vision_start_token_id=3,
            vision_end_token_id=3)),
        "tokenizer": tokenizer(length=512),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
        "transformer": QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(4, 4, 8)),
    }  # fmt: skip


def z_image() -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    return {
        "vae": kl(shift=0.1),
        "text_encoder": Qwen3Model(Qwen3Config(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
        "tokenizer": tokenizer(length=512),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "transformer": ZImageTransformer2DModel(
            all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1,
            n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 4, 8], axes_lens=[64, 16, 16]),
    }  # fmt: skip


def wan() -> dict[str, Any]:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel

    return {
        "vae": AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.1, -0.1, 0.2, 0.0], latents_std=[0.9, 1.1, 1.0, 1.2], scale_factor_spatial=2),
        "text_encoder": t5("UMT5"), "tokenizer": tokenizer(start=False),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        "transformer": WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=16, ffn_dim=16, num_layers=2, rope_max_seq_len=32),
    }  # fmt: skip


def wan_experts() -> dict[str, Any]:
    """Wan 2.2's layout: a network for much noise and one for less."""
    return wan() | {"transformer_2": wan()["transformer"], "boundary_ratio": 0.6}


def sana_sprint() -> dict[str, Any]:
    from diffusers import SanaTransformer2DModel, SCMScheduler

    config = dict(sana()["transformer"].config) | {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
    network = SanaTransformer2DModel.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    return sana() | {"scheduler": SCMScheduler(), "transformer": network}


def flux2(klein: bool = False) -> dict[str, Any]:
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

    words = {
        "vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 27 if klein else 30,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    sight = {
        "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 8), latent_channels=4, norm_num_groups=2, layers_per_block=1, sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    with torch.no_grad():
        vae.bn.running_mean.uniform_(-0.5, 0.5)
        vae.bn.running_var.uniform_(0.5, 2.0)
    return {
        "vae": vae,
        "text_encoder": Qwen3ForCausalLM(Qwen3Config(**words)) if klein else Mistral3ForConditionalGeneration(
            Mistral3Config(text_config={"model_type": "mistral", **words}, vision_config=sight, image_token_index=3)),
        "tokenizer": tokenizer(length=512),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
        "transformer": Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), mlp_ratio=1.0,
            guidance_embeds=not klein),
    }  # fmt: skip


def qwen_image_21() -> dict[str, Any]:
    from diffusers import AutoencoderKLQwenImage21, FlowMatchEulerDiscreteScheduler, QwenImage21Transformer2DModel
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    return {
        "vae": AutoencoderKLQwenImage21(
            base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, False, False, False], latents_mean=[0.1, -0.1, 0.2, 0.0],
            latents_std=[0.9, 1.1, 1.0, 1.2]),
        "text_encoder": Qwen3VLForConditionalGeneration(Qwen3VLConfig(**qwen3_vl())),
        "processor": Processor(tokenizer(length=512)),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
        "transformer": QwenImage21Transformer2DModel(
            in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            context_in_dim=16, axes_dims_rope=(4, 4, 8)),
    }  # fmt: skip


def qwen3_vl() -> dict[str, Any]:
    words = {
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0,
                            "mrope_interleaved": True},
    }  # fmt: skip
    sight = {
        "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16, "patch_size": 2,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return {
        "text_config": words, "vision_config": sight, "image_token_id": 3, "video_token_id": 3,
        "vision_start_token_id": 3, "vision_end_token_id": 3,
    }  # fmt: skip


def kolors() -> dict[str, Any]:
    from diffusers import EulerDiscreteScheduler
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    words = ChatGLMModel(ChatGLMConfig(
        num_layers=2, padded_vocab_size=VOCAB, hidden_size=16, ffn_hidden_size=16, kv_channels=8,
        num_attention_heads=2, seq_length=256, original_rope=True))  # fmt: skip
    for parameter in words.parameters():  # its class leaves them as memory was
        nn.init.normal_(parameter, std=0.3)
    return {
        "vae": kl(), "text_encoder": words,
        "tokenizer": Numbered(tokenizer(length=256)),
        "scheduler": EulerDiscreteScheduler(**VP, timestep_spacing="leading"),
        "unet": unet(cross_attention_dim=16, encoder_hid_dim_type="text_proj", encoder_hid_dim=16,
                     addition_embed_type="text_time", addition_time_embed_dim=4,
                     projection_class_embeddings_input_dim=6 * 4 + 16),
    }  # fmt: skip


class Numbered:
    """In the place of Kolors' tokenizer, which needs sentencepiece: left padding, and the places of the words."""

    def __init__(self, words: Any) -> None:
        self.words = words
        words.padding_side = "left"

    def __call__(self, text: Any, **how: Any) -> Any:
        found = self.words(text, **how)
        found["position_ids"] = (found["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return found


class Processor:
    """In the place of Qwen3-VL's processor, which needs torchvision: its tokenizer alone."""

    def __init__(self, words: Any) -> None:
        self.tokenizer = words

    def __call__(self, text: Any, **how: Any) -> Any:
        return self.tokenizer(text, **how)

    def apply_chat_template(self, messages: Any, **how: Any) -> list[list[int]]:
        return [self.tokenizer(message["content"][0]["text"])["input_ids"] for message in messages]


def chroma() -> dict[str, Any]:
    from diffusers import ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    return {
        "vae": kl(shift=0.1), "text_encoder": t5(), "tokenizer": tokenizer(start=False),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "transformer": ChromaTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(4, 4, 8), approximator_num_channels=16,
            approximator_hidden_dim=16, approximator_layers=1),
        "image_encoder": None, "feature_extractor": None,
    }  # fmt: skip


def lumina2() -> dict[str, Any]:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    return {
        "vae": AutoencoderKL(
            block_out_channels=(4,) * 4, latent_channels=4, norm_num_groups=2, layers_per_block=1, sample_size=SIDE,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            scaling_factor=0.7, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": Gemma2Model(Gemma2Config(
            vocab_size=VOCAB, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
        "tokenizer": tokenizer(length=256),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=6.0),
        "transformer": Lumina2Transformer2DModel(
            sample_size=4, patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1,
            num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(8, 4, 4), axes_lens=(300, 16, 16),
            cap_feat_dim=8),
    }  # fmt: skip


def hunyuan_image() -> dict[str, Any]:
    from diffusers import (
        AdaptiveProjectedMixGuidance,
        AutoencoderKLHunyuanImage,
        FlowMatchEulerDiscreteScheduler,
        HunyuanImageTransformer2DModel,
    )
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    letters = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return {
        "vae": AutoencoderKLHunyuanImage(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1,
            spatial_compression_ratio=2, sample_size=SIDE, scaling_factor=0.7),
        "text_encoder": qwen_image(layers=3)["text_encoder"], "tokenizer": tokenizer(length=1100),
        "text_encoder_2": T5EncoderModel(letters), "tokenizer_2": ByT5Tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "transformer": HunyuanImageTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, mlp_ratio=1.0, patch_size=(1, 1), text_embed_dim=16,
            text_embed_2_dim=16, rope_axes_dim=(8, 8)),
        "guider": AdaptiveProjectedMixGuidance(), "ocr_guider": AdaptiveProjectedMixGuidance(),
    }  # fmt: skip


def aura_flow() -> dict[str, Any]:
    from diffusers import AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    return {
        "vae": kl(), "text_encoder": t5("UMT5"), "tokenizer": tokenizer(start=False),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.73),
        "transformer": AuraFlowTransformer2DModel(
            sample_size=SIDE // 2, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1,
            num_single_dit_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
            caption_projection_dim=16, pos_embed_max_size=64),
    }  # fmt: skip


def cogview4() -> dict[str, Any]:
    from diffusers import CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import GlmConfig, GlmModel

    return {
        "vae": kl(),
        "text_encoder": GlmModel(GlmConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
        "tokenizer": tokenizer(length=64),
        "scheduler": FlowMatchEulerDiscreteScheduler(
            base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"),
        "transformer": CogView4Transformer2DModel(
            sample_size=SIDE // 2, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, text_embed_dim=16, time_embed_dim=16, condition_dim=4, pos_embed_max_size=8,
            rope_axes_dim=(8, 8)),
    }  # fmt: skip


def krea2() -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Transformer2DModel
    from transformers import Qwen3VLConfig, Qwen3VLModel

    return {
        "vae": qwen_image()["vae"],
        "text_encoder": Qwen3VLModel(Qwen3VLConfig(**qwen3_vl())), "tokenizer": tokenizer(length=1024),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True, max_image_seq_len=6400),
        "transformer": Krea2Transformer2DModel(
            in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=16, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=2,
            text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=16,
            num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 4, 8)),
        "text_encoder_select_layers": (1, 2),
    }  # fmt: skip


PIPELINES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "sd": ("StableDiffusionPipeline", sd),
    "lcm": ("LatentConsistencyModelPipeline", lambda: told("sd")),
    "sdxl": ("StableDiffusionXLPipeline", sdxl),
    "sd3": ("StableDiffusion3Pipeline", sd3),
    "kolors": ("KolorsPipeline", kolors),
    "pixart": ("PixArtSigmaPipeline", pixart),
    "sana": ("SanaPipeline", sana),
    "sana-sprint": ("SanaSprintPipeline", sana_sprint),
    "flux": ("FluxPipeline", flux),
    "qwen-image": ("QwenImagePipeline", qwen_image),
    "flux2": ("Flux2Pipeline", flux2),
    "flux2-klein": ("Flux2KleinPipeline", lambda: flux2(klein=True)),
    "qwen-image-2.1": ("QwenImage21Pipeline", qwen_image_21),
    "chroma": ("ChromaPipeline", chroma),
    "lumina2": ("Lumina2Pipeline", lumina2),
    "hunyuan-image": ("HunyuanImagePipeline", hunyuan_image),
    "aura-flow": ("AuraFlowPipeline", aura_flow),
    "cogview4": ("CogView4Pipeline", cogview4),
    "krea2": ("Krea2Pipeline", krea2),
    "z-image": ("ZImagePipeline", z_image),
    "wan": ("WanPipeline", wan),
}


def zero_snr(prediction: str) -> dict[str, Any]:
    """Stable Diffusion whose schedule ends in noise alone."""
    from diffusers import DDIMScheduler

    ending = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": prediction}
    return sd() | {"scheduler": DDIMScheduler(**VP, **ending, steps_offset=1, clip_sample=False)}


def told(name: str) -> dict[str, Any]:
    """With a UNet that has the guidance scale as an input."""
    from diffusers import LCMScheduler

    made = PIPELINES[name][1]()
    config = {key: value for key, value in made["unet"].config.items() if not key.startswith("_")}
    network = type(made["unet"]).from_config(config | {"time_cond_proj_dim": 8})
    return made | {"unet": network, "scheduler": LCMScheduler(**VP)}


VARIANTS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "sd zero-snr v": ("StableDiffusionPipeline", lambda: zero_snr("v_prediction")),
    "sd zero-snr x0": ("StableDiffusionPipeline", lambda: zero_snr("sample")),
    "sd guidance input": ("StableDiffusionPipeline", lambda: told("sd")),
    "sdxl guidance input": ("StableDiffusionXLPipeline", lambda: told("sdxl")),
    "wan experts": ("WanPipeline", wan_experts),
}
"""Pipelines of the families above with other schedules and inputs."""
IN_MEMORY = ("kolors", "qwen-image-2.1")
"""With stand-ins for parts that need more libraries, which no folder has."""


def make_pipeline(name: str) -> Any:
    """An untrained pipeline; gates and output layers are no longer zero, which would hide the conditions."""
    import diffusers

    class_name, parts = (PIPELINES | VARIANTS)[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = parts()
        for network in filter(None, (made.get("unet") or made["transformer"], made.get("transformer_2"))):
            for parameter in network.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=0.1)
    pipeline = getattr(diffusers, class_name)(**made)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(name: str, folder: Path) -> Path:
    make_pipeline(name).save_pretrained(folder, safe_serialization=True)
    return folder
