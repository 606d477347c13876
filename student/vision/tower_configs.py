"""What rebuilds a vision tower of timm or open_clip; their libraries are imported with the towers, not here."""

from transformers import AutoConfig, PreTrainedConfig


class TimmTowerConfig(PreTrainedConfig):
    """A network of timm.

    Args:
        architecture: timm's name, without a tag.
        pretrained_cfg: what of timm's configuration of the weights shapes the network.
        model_args: further arguments of its constructor.
    """

    model_type = "olavlm_timm"

    architecture: str = ""
    pretrained_cfg: dict | None = None
    model_args: dict | None = None


class OpenClipTowerConfig(PreTrainedConfig):
    """An image tower of open_clip.

    Args:
        architecture: open_clip's name, for messages.
        embed_dim, vision_cfg, quick_gelu: of open_clip's model configuration.
    """

    model_type = "olavlm_open_clip"

    architecture: str = ""
    embed_dim: int = 0
    vision_cfg: dict | None = None
    quick_gelu: bool = False


for _config in (TimmTowerConfig, OpenClipTowerConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
