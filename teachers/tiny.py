"""Tiny checkpoints with random weights in the true architectures, for tests and for the demo.

    olavlm-tiny DIR     # DIR/depth DIR/seg DIR/gen DIR/encoder DIR/llm, a few MB in all

Each is a normal Hugging Face checkpoint folder and loads through exactly the code that loads the real one.
"""

from __future__ import annotations

import filecmp
import tempfile
from pathlib import Path

from olavlm.teachers.checkpoint import WEIGHTS, quiet
from olavlm.teachers.errors import TeacherError
from olavlm.teachers.tiny_clip_tokenizer import clip_tokenizer
from olavlm.teachers.tiny_llm import write_llm

# Weights are drawn wider than the libraries' usual 0.02, about 1/sqrt(width). With 0.02 the blocks of so narrow a
# network add next to nothing to their residual stream: every layer gives the same features, so that a wrong layer would
# go unnoticed, and CLIP's pooled embedding hardly depends on the picture. Much wider, and rounding errors grow too.
# With 0.02 the depth decoder's maps are zero but for rounding, and every picture is of one class.
DINOV2_INIT, SWIN_INIT, CLIP_INIT_FACTOR, DPT_INIT, ONEFORMER_INIT = 0.18, 0.15, 3.0, 0.2, 0.1

SEG_CLASSES = ("person", "chair", "bird", "tree-merged", "sky-other-merged", "grass-merged")
"""Of the tiny OneFormer: some of COCO's, things before stuff."""


def make_tiny(root: str | Path, *, seed: int = 0) -> dict[str, Path]:
    """Write the five tiny checkpoints below `root`.

    The same seed and library versions give the same bytes. A folder that already holds those bytes is left alone;
    other content is never overwritten. Folders appear whole or not at all.

    Returns:
        Folder by name: `depth` (Depth-Anything-V2), `seg` (OneFormer with a tokenizer), `gen` (CLIP with
        projection), `encoder` (CLIP vision tower with its image processor), `llm` (Llama with a tokenizer and chat
        template).

    Raises:
        TeacherError: one of the folders exists and holds something else. Nothing is written.
    """
    import torch

    writers = {"depth": _write_depth, "seg": _write_seg, "gen": _write_gen, "encoder": _write_encoder, "llm": write_llm}
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    folders = {name: root / name for name in writers}
    with tempfile.TemporaryDirectory(prefix=".tiny-", dir=root) as staging, torch.random.fork_rng(devices=[]):
        with quiet():
            for name, write in writers.items():
                torch.manual_seed(seed)
                write(Path(staging, name))
        for name, folder in folders.items():
            if folder.exists() and not _same_files(folder, Path(staging, name)):
                raise TeacherError(
                    f"{folder}: exists and is not this tiny checkpoint; remove it or name another folder"
                )
        for name, folder in folders.items():
            if not folder.exists():
                Path(staging, name).rename(folder)
    return folders


def _same_files(left: Path, right: Path) -> bool:
    names = sorted(path.name for path in left.iterdir()) if left.is_dir() else None
    if names != sorted(path.name for path in right.iterdir()):
        return False
    return filecmp.cmpfiles(left, right, names, shallow=False)[0] == names


def _write_depth(folder: Path) -> None:
    from torch import nn
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        image_size=518,
        patch_size=14,
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        mlp_ratio=2,
        out_indices=[2, 3, 5, 6],
        reshape_hidden_states=False,
        initializer_range=DINOV2_INIT,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=4,
    )
    model = DepthAnythingForDepthEstimation(config)
    for part in (model.neck, model.head):  # by ourselves: not every version draws all of it as wide as it is told to
        for weight in part.parameters():
            nn.init.normal_(weight, std=DPT_INIT)
    nn.init.ones_(model.head.conv3.bias)  # or most of a map is below 0, and cut off
    model.save_pretrained(folder)


def _write_seg(folder: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import OneFormerConfig, OneFormerModel, SwinConfig

    backbone = SwinConfig(
        image_size=224,
        embed_dim=8,
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 4, 8],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        initializer_range=SWIN_INIT,
    )
    config = OneFormerConfig(
        backbone_config=backbone,
        init_std=ONEFORMER_INIT,
        conv_dim=32,  # the pixel decoder normalises 32 groups of channels
        hidden_dim=32,
        mask_dim=32,  # as wide as the pixel decoder, or the library cannot run it
        encoder_feedforward_dim=8,
        dim_feedforward=8,
        encoder_layers=1,
        decoder_layers=2,
        query_dec_layers=1,
        num_attention_heads=2,
        num_queries=4,
        task_seq_len=8,
        text_encoder_width=8,
        text_encoder_context_length=8,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=16,
        text_encoder_n_ctx=2,
        id2label=dict(enumerate(SEG_CLASSES)),
        label2id={name: i for i, name in enumerate(SEG_CLASSES)},
    )
    OneFormerModel(config).save_pretrained(folder)
    # The real checkpoint is a OneFormerForUniversalSegmentation, which calls this model `model` and adds no weights but
    # its training loss's. Building that class would need scipy for the loss.
    weights = load_file(folder / WEIGHTS)
    save_file({f"model.{name}": tensor for name, tensor in weights.items()}, folder / WEIGHTS, {"format": "pt"})
    config.architectures = ["OneFormerForUniversalSegmentation"]
    config.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)


def _write_gen(folder: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        image_size=224,
        patch_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=48,
        initializer_factor=CLIP_INIT_FACTOR,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)


def _write_encoder(folder: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    side = 56
    config = CLIPVisionConfig(
        image_size=side,
        patch_size=14,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_factor=CLIP_INIT_FACTOR,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(folder)
