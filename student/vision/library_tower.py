"""Vision towers of libraries other than transformers, kept in a config and a state dict as transformers keeps its own.

What timm and open_clip towers share: any network that offers timm's `forward_intermediates` is one.
"""

from collections.abc import Mapping
from functools import cached_property
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from olavlm.student.errors import RecipeError

from .select_layer import FeatureShape, block_of, check_patches


class Blocks(NamedTuple):
    """The blocks of a ViT."""

    number: int
    patch_size: int


class LibraryTower(PreTrainedModel):
    """A network built from its config alone; a subclass says how. Weights come from the network's own initialisation,
    until a checkpoint fills them."""

    main_input_name = "pixels"
    input_modalities = ("image",)
    # The network picks its attention itself: whatever is asked of the LLM must not be refused here.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: Any, network: nn.Module | None = None) -> None:
        super().__init__(config)
        self.network = self.build(config) if network is None else network
        self._constructed = False
        self.post_init()
        self._constructed = True

    @staticmethod
    def build(config: Any) -> nn.Module:
        """The network of a config, without weights of a checkpoint."""
        raise NotImplementedError

    @property
    def blocks(self) -> Blocks | None:
        """Blocks of a network that all give features of one grid; None if its grid shrinks by stages."""
        raise NotImplementedError

    def feature_map(self, pixels: torch.Tensor, block: int) -> torch.Tensor:
        """[B, D, rows, columns] behind a block, without a norm; -1 for the last stage."""
        raise NotImplementedError

    def forward(self, pixels: torch.Tensor, select_layer: int) -> torch.Tensor:
        """Feature map [B, D, rows, columns]. A network of stages gives its last one, whatever the layer."""
        blocks = self.blocks
        return self.feature_map(pixels, -1 if blocks is None else block_of(select_layer, blocks.number))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """What the network's constructor gave stays. Buffers outside the state dict, which transformers leaves empty
        when it fills a model that was built without memory, are made anew."""
        buffers = {name: getattr(module, name) for name in module._non_persistent_buffers_set}
        if self._constructed and any(buffer is not None for buffer in buffers.values()):
            prefix = next(name for name, candidate in self.network.named_modules() if candidate is module)
            for name, buffer in buffers.items():
                if buffer is not None:
                    buffer.copy_(self._fresh_buffers[f"{prefix}.{name}".lstrip(".")])

    @cached_property
    def _fresh_buffers(self) -> dict[str, torch.Tensor]:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return dict(self.build(self.config).named_buffers())


class LibraryFamily:
    """How features are read from a `LibraryTower`; see `encoders.EncoderFamily`."""

    options: Mapping[str, Any] = MappingProxyType({})

    def feature_shape(self, tower: LibraryTower, select_layer: int, side: int) -> FeatureShape:
        """Measured on the meta device, where a forward costs nothing.

        Raises:
            RecipeError: a layer that the tower has not, or pictures that it cannot take.
        """
        if tower.blocks is not None:
            check_patches(side, tower.blocks.patch_size)
        tensors = chain(tower.named_parameters(), tower.named_buffers())
        on_meta = {name: tensor.detach().to("meta") for name, tensor in tensors}
        pixels = torch.empty(1, 3, side, side, dtype=tower.dtype, device="meta")
        try:
            with torch.no_grad():
                features = functional_call(tower, on_meta, (pixels, select_layer))
        except RecipeError:
            raise
        except Exception as error:  # whatever a network raises that was not built for these pictures, or for features
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise RecipeError(
                f"{tower.config.architecture} gives no features of pictures of {side} pixels ({reason}); "
                "use its own size, or another encoder"
            ) from error
        _, width, rows, columns = features.shape
        return FeatureShape(rows, columns, width)

    def features(self, tower: LibraryTower, pixels: torch.Tensor, select_layer: int) -> torch.Tensor:
        """Tokens [B, rows * columns, D], row-major."""
        return tower(pixels, select_layer).flatten(2).transpose(1, 2)
