"""Nemotron 3 Nano Omni in Hugging Face style: text, images, video and audio in, text out.

Importing the package registers the classes with transformers' Auto classes for the released `model_type`, so that
`AutoConfig`, `AutoModelForMultimodalLM` and `AutoProcessor` read the released folder without remote code.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

from . import quantized_loading  # noqa: F401  so that transformers knows FP8 and NVFP4 checkpoints
from .configuration_omni import MODEL_TYPE, OmniAudioConfig, OmniConfig, OmniTextConfig, OmniVisionConfig
from .feature_extraction_omni import OmniFeatureExtractor
from .image_processing_omni import OmniImageProcessor
from .media import MediaLimits, OmniInputError, VideoClip, load_audio, load_image, load_video
from .modeling_omni import OmniForConditionalGeneration, OmniModel
from .modeling_text import OmniForCausalLM
from .processing_omni import OmniProcessor, register_auto_processors
from .video_processing_omni import OmniVideoProcessor

__version__ = "0.1.0"

AutoConfig.register(MODEL_TYPE, OmniConfig, exist_ok=True)
AutoModel.register(OmniConfig, OmniModel, exist_ok=True)
AutoModelForCausalLM.register(OmniConfig, OmniForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(OmniConfig, OmniForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(OmniConfig, OmniForConditionalGeneration, exist_ok=True)
register_auto_processors()

__all__ = [
    "MediaLimits",
    "OmniAudioConfig",
    "OmniConfig",
    "OmniFeatureExtractor",
    "OmniForCausalLM",
    "OmniForConditionalGeneration",
    "OmniImageProcessor",
    "OmniInputError",
    "OmniModel",
    "OmniProcessor",
    "OmniTextConfig",
    "OmniVideoProcessor",
    "OmniVisionConfig",
    "VideoClip",
    "load_audio",
    "load_image",
    "load_video",
]
