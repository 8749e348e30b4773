"""The language model without towers: the text checkpoints of the family (Nemotron 3 Nano, Super, Ultra).

They load by their released names (`backbone.`, `lm_head.`, `mtp.`) and are saved by them. Mixtures of experts that work
in a latent space (Super, Ultra: `moe_latent_size`) and draft heads (`num_nextn_predict_layers`) are those of the omni
model, and so are `forward` and `generate`.
"""

from .checkpoint import TEXT_RENAMES, register_released_layout
from .configuration_omni import OmniTextConfig
from .modeling_language import OmniLanguageModel
from .modeling_omni import OmniForConditionalGeneration, OmniModel, OmniPreTrainedModel


class OmniTextModel(OmniModel):
    """`OmniModel` of an `OmniTextConfig`: nothing but the language model."""

    config_class = OmniTextConfig
    input_modalities = ("text",)

    def __init__(self, config: OmniTextConfig):
        OmniPreTrainedModel.__init__(self, config)
        self.language_model = OmniLanguageModel(config)
        self.post_init()


class OmniForCausalLM(OmniForConditionalGeneration):
    """The language model with its head and, where the config has them, its draft heads."""

    config_class = OmniTextConfig
    input_modalities = ("text",)
    model_class = OmniTextModel
    released = False


# by the classes' names: the model type, "nemotron_h", is that of transformers' class
register_released_layout("OmniForCausalLM", TEXT_RENAMES)
register_released_layout("OmniTextModel", [])  # it stands in the other, whose rules are for all of it

__all__ = ["OmniForCausalLM", "OmniTextModel"]
