"""The names that a recipe chooses by. Imports nothing, so that a command line can be read before PyTorch is there."""

from typing import Literal

Stage = Literal["pt", "vpt", "ift"]
Geometry = Literal["square", "pad", "squash"]
"""What the base encoder sees of an image: its centre, the whole on a square, or the whole distorted."""
Fusion = Literal["none", "feature_concat", "token_concat"]
QueryKind = Literal["contextual", "raw"]
PredictorWidth = Literal["target", "llm"]
KeyBlocks = Literal["img+t", "sys+img+t", "sys+img+t+txt"]
Kernels = Literal["eager", "triton"]
TrackerName = Literal["tensorboard", "wandb"]
