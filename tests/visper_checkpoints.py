"""Tiny checkpoints as the authors of OLA-VLM / VisPer-LM publish theirs, and what a model of theirs computes.

Written from the description of the method (arXiv 2412.09585) with language models and CLIP of transformers, and with
predictors made here that have the published names; nothing is shared with `olavlm`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerBase,
)

LLM = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4}
ROPE = {"rope_theta": 5e5, "rope_scaling": None}
"""As configs of the time say it."""
ORDER = ("gen", "depth", "seg")
PREFIX = {"gen": "img", "depth": "depth", "seg": "seg"}
LAYERS = {"gen": (3, 6), "depth": (2, 5), "seg": (5, 1)}
SHAPE = {"gen": (1, 32), "depth": (16, 24), "seg": (16, 40)}
WEIGHT = {"gen": 0.5, "depth": 0.25, "seg": 0.75}
N, PATCHES = 4, 16
ABSENT = object()
"""Of a field that a config does not have."""
PHI_3 = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


class Attention(nn.Module):
    """From queries to keys and queries; 4 heads of 32, no biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_kv = nn.Linear(width, 128, bias=False), nn.Linear(width, 256, bias=False)
        self.to_out = nn.Linear(128, width, bias=False)

    def forward(self, keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        queries = self.norm2(queries)
        both = self.to_kv(torch.cat([self.norm1(keys), queries], dim=1))
        q, k, v = self.to_q(queries), both[..., :128], both[..., 128:]
        heads = []
        for head in range(4):
            part = slice(32 * head, 32 * head + 32)
            similarity = (q[..., part] * 32**-0.25) @ (k[..., part] * 32**-0.25).transpose(1, 2)
            heads.append(similarity.float().softmax(dim=-1) @ v[..., part])
        return self.to_out(torch.cat(heads, dim=-1))


class Projector(nn.Module):
    """One block: attention, feed-forward, projection with a norm."""

    def __init__(self, llm_width: int, width: int, num_queries: int, out: int) -> None:
        super().__init__()
        feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width, bias=False), nn.GELU(), nn.Linear(width, width, bias=False)
        )
        self.num_queries = num_queries
        self.proj_in, self.proj_out, self.norm_out = (
            nn.Linear(llm_width, width), nn.Linear(width, out), nn.LayerNorm(out)
        )  # fmt: skip
        self.layers = nn.ModuleList([nn.ModuleList([Attention(width), feed_forward])])

    def forward(self, keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        if queries.shape[1] != self.num_queries:
            queries = queries.mean(dim=1, keepdim=True)
        queries, keys = self.proj_in(queries), self.proj_in(keys)
        attention, feed_forward = self.layers[0]
        queries = queries + attention(keys, queries)
        queries = queries + feed_forward(queries)
        return self.norm_out(self.proj_out(queries))


class Head(nn.Module):
    def __init__(self, llm_width: int, task: str) -> None:
        super().__init__()
        tokens, dim = SHAPE[task]
        self.projector = Projector(llm_width, llm_width if task == "depth" else dim, tokens, dim)


@dataclass
class Published:
    """A checkpoint on the disk and the modules it was written from."""

    folder: Path
    llm: nn.Module
    tower: CLIPVisionModel
    projector: nn.Sequential
    special: dict[str, torch.Tensor]
    heads: dict[str, nn.ModuleList]

    @torch.no_grad()
    def forward(
        self, before: torch.Tensor, after: torch.Tensor, pixels: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Logits of one sample, and predictions by "task/layer".

        Args:
            before, after: ids ahead of the image and behind it.
            pixels: (3, S, S).
        """
        embed = self.llm.get_input_embeddings()
        features = self.tower(pixels[None], output_hidden_states=True).hidden_states[-2][0, 1:]
        pooled = [
            self.special[task] if task == "gen" else self.special[task].view(N, -1, embed.embedding_dim).mean(dim=1)
            for task in ORDER
        ]
        sequence = torch.cat([embed(before), self.projector(features), *pooled, embed(after)])[None]
        out = self.llm(inputs_embeds=sequence, output_hidden_states=True)
        predictions, image_end = {}, len(before) + PATCHES
        for index, task in enumerate(ORDER):
            own = slice(image_end + index * N, image_end + (index + 1) * N)
            for layer, head in zip(LAYERS[task], self.heads.get(task, ()), strict=False):
                states = out.hidden_states[layer]
                keys = torch.cat([states[:, :image_end], states[:, own], states[:, image_end + N * len(ORDER) :]], 1)
                queries = states[:, own] if task == "gen" else self.special[task][None]
                predictions[f"{task}/{layer}"] = head.projector(keys, queries)
        return out.logits[0], predictions


def tokenizer_of(llm: Path, model_type: str) -> PreTrainedTokenizerBase:
    """The tiny LLM's with Llama-3's added `<pad>`, or with Phi-3's tokens."""
    tokenizer = AutoTokenizer.from_pretrained(llm)
    if model_type.endswith("phi3"):
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in PHI_3])
    else:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def settings_of(task: str) -> dict:
    """A config's dictionary about a task's predictors."""
    (tokens, dim), prefix = SHAPE[task], PREFIX[task]
    return {
        "depth": 1, "dim_head": 32, "num_heads": 4, "num_tokens": tokens, "output_dim": dim, "ff_mult": 1,
        f"{prefix}_layer_indices": "-".join(map(str, LAYERS[task])), f"{prefix}_loss_weight": WEIGHT[task],
    } | ({"use_intermediate_depth": False} if task == "depth" else {})  # fmt: skip


def publish(
    folder: Path, tiny: dict[str, Path], model_type: str, *, dtype=torch.float32, shards: int = 2, **changes
) -> Published:
    """Writes a checkpoint; `changes` are fields of its config."""
    torch.manual_seed(11)
    tokenizer = tokenizer_of(tiny["llm"], model_type)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if model_type.endswith("phi3"):
        spare = len(tokenizer) + 20
        config = Phi3Config(**LLM, num_key_value_heads=4, vocab_size=spare, pad_token_id=tokenizer.pad_token_id, **ids)
        llm = Phi3ForCausalLM(config)
    else:
        config = LlamaConfig(**LLM, num_key_value_heads=2, vocab_size=len(tokenizer), rope_theta=ROPE["rope_theta"])
        llm = LlamaForCausalLM(config)
    tower = CLIPVisionModel.from_pretrained(tiny["encoder"])
    width = LLM["hidden_size"]
    projector = nn.Sequential(nn.Linear(tower.config.hidden_size, width), nn.GELU(), nn.Linear(width, width))
    special = {task: torch.randn(N if task == "gen" else SHAPE[task][0], width) for task in ORDER}
    heads = {}
    if model_type.startswith("ola_"):
        heads = {task: nn.ModuleList(Head(width, task) for _ in LAYERS[task]) for task in ORDER}
    for module in (llm, tower, projector, *heads.values()):
        for name, parameter in module.named_parameters():  # so that no two parts that could be mistaken are alike
            if parameter.dim() > 1 and "embed" not in name:
                nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
            elif parameter.dim() == 1 and "class" not in name:
                nn.init.normal_(parameter, mean=float("norm" in name and "bias" not in name), std=0.2)
            parameter.data = parameter.data.to(dtype).float()  # what the checkpoint can hold
        module.eval()
    special = {task: tokens.to(dtype).float() for task, tokens in special.items()}
    made = Published(folder, llm, tower, projector, special, heads)
    said = {
        "model_type": model_type, "architectures": ["SomethingForCausalLM"], "_name_or_path": "/authors/run",
        **LLM, "num_key_value_heads": config.num_key_value_heads, "vocab_size": config.vocab_size, **ids,
        "max_position_embeddings": config.max_position_embeddings, "torch_dtype": str(dtype).removeprefix("torch."),
        "rms_norm_eps": config.rms_norm_eps, **ROPE, "use_cache": True, "tie_word_embeddings": False,
        "num_task_tokens": N, "aux_mode": "-".join(ORDER), "task_token_format": "expand_emb",
        **{f"image_{task}": settings_of(task) for task in ORDER},
        "image_generator": "somewhere", "image_segmentor": "somewhere", "depth_estimator": "depth_anything_v2.pth",
        "contrastive_loss_weight": 0.3, "use_contrastive": True, "pass_text_to_aux": True,
        "mm_vision_tower": str(tiny["encoder"]), "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": tower.config.hidden_size, "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "use_mm_proj": True, "tune_mm_mlp_adapter": False,
        "image_aspect_ratio": "square" if model_type.startswith("ola_") else "pad",
        "tokenizer_model_max_length": 2048, "tokenizer_padding_side": "right",
    }  # fmt: skip
    if model_type.endswith("phi3"):
        said |= {"rope_theta": 1e4, "original_max_position_embeddings": config.original_max_position_embeddings,
                 "pad_token_id": tokenizer.pad_token_id, "auto_map": {"AutoConfig": "evil.Config"}}  # fmt: skip
    folder.mkdir(parents=True)
    write_config(folder, said | changes)
    save(folder, {name: tensor.to(dtype) for name, tensor in tensors_of(made).items()}, shards)
    tokenizer.save_pretrained(folder)
    GenerationConfig(**ids, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    return made


def tensors_of(made: Published) -> dict[str, torch.Tensor]:
    """By the published names."""
    tensors = dict(made.llm.state_dict())
    tensors |= {f"model.mm_projector.{name}": t for name, t in made.projector.state_dict().items()}
    for name, tensor in made.tower.state_dict().items():
        tensors[f"model.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_model.')}"] = tensor
    tensors |= {f"model.special_{task}_tokens": tokens for task, tokens in made.special.items()}
    for task, heads in made.heads.items():
        tensors |= {f"image_{task}_heads.{name}": tensor for name, tensor in heads.state_dict().items()}
        tensors[f"{task}_logit_scale"] = torch.tensor(1.5 + len(task))
    if made.heads:
        for name in ("oneformer.encoder.a.weight", "dav2_backbone.b.weight", "da_v2_head.c.bias", "pipe.unet.d.weight"):
            tensors[name] = torch.ones(3)
    return tensors


def save(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """In one file, or in several with an index; files of before are removed."""
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    placed = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(placed.values()):
        part = {name: tensor for name, tensor in tensors.items() if placed[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def write_config(folder: Path, fields: dict) -> None:
    """Without those that are `ABSENT`."""
    said = {name: value for name, value in fields.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(said))
