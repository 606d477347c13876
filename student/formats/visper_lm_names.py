"""Names of tensors in the authors' published checkpoints, and whether a checkpoint holds the ones of a model of ours.

llm.NAME                    NAME                                                         the language model's own
vision.tower.NAME           model.vision_tower.vision_tower.vision_model.NAME            CLIP; newer libraries: .NAME
vision.tower.network.trunk.NAME   model.vision_tower.vision_tower.NAME                   a trunk of open_clip
projector.0.weight          model.mm_projector.0.weight
task_tokens.query.depth     model.special_depth_tokens
predictors.depth_8.q.weight image_depth_heads.0.projector.layers.0.0.to_q.weight         by the order of layers
logit_scales.depth          depth_logit_scale
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from olavlm.student.errors import ModelError
from olavlm.student.tokens import TaskSpec

TOWER = "model.vision_tower.vision_tower."
_CLIP, _TRUNK = "vision_model.", "network.trunk."
_PREDICTOR = {
    "in_proj": "proj_in",
    "key_norm": "layers.0.0.norm1",
    "query_norm": "layers.0.0.norm2",
    "q": "layers.0.0.to_q",
    "kv": "layers.0.0.to_kv",
    "attn_out": "layers.0.0.to_out",
    "ff_norm": "layers.0.1.0",
    "ff1": "layers.0.1.1",
    "ff2": "layers.0.1.3",
    "out": "proj_out",
    "out_norm": "norm_out",
    "latents": "latents",
}
TEACHERS = ("oneformer", "dav2_backbone", "da_v2_head", "pipe")
"""Parts of their model that no model of ours holds: teachers, and what decodes for looking."""
_COMPUTED = (".rotary_emb.inv_freq", ".embeddings.position_ids")
"""What older libraries saved though it follows from the config."""


def release_name(name: str, tasks: Sequence[TaskSpec], clip: str = _CLIP) -> str:
    """What they call a tensor of ours; `clip` is what the names of CLIP's begin with (`clip_prefix`)."""
    part, _, rest = name.partition(".")
    if part == "llm":
        return rest
    if part == "vision":
        tower = rest.removeprefix("tower.")
        if tower.startswith(_TRUNK):
            return f"{TOWER}{tower.removeprefix(_TRUNK)}"
        return f"{TOWER}{clip}{tower.removeprefix(_CLIP)}"
    if part == "projector":
        return f"model.mm_projector.{rest}"
    if part == "task_tokens":
        return f"model.special_{rest.removeprefix('query.')}_tokens"
    if part == "logit_scales":
        return f"{rest}_logit_scale"
    assert part == "predictors", name
    key, _, parameter = rest.partition(".")
    task, _, layer = key.rpartition("_")
    index = next(task_spec.layers.index(int(layer)) for task_spec in tasks if task_spec.name == task)
    module, dot, leaf = parameter.partition(".")
    return f"{heads_of(task)}{index}.projector.{_PREDICTOR[module]}{dot}{leaf}"


def clip_prefix(found: Iterable[str]) -> str:
    """What CLIP's names begin with in a checkpoint: transformers 5 saves them without `vision_model.`."""
    tower = [name.removeprefix(TOWER) for name in found if name.startswith(TOWER)]
    return "" if tower and not any(name.startswith(_CLIP) for name in tower) else _CLIP


def is_behind_features(name: str) -> bool:
    """Whether a tensor of ours belongs to a tower of open_clip, and features do not depend on it."""
    tower = name.removeprefix("vision.tower.")
    return (
        tower != name and tower.startswith("network.") and not tower.startswith((f"{_TRUNK}stem.", f"{_TRUNK}stages."))
    )


def heads_of(task: str) -> str:
    """What the names of a task's predictors begin with."""
    return f"image_{task}_heads."


def is_of_predictors(name: str, task: str) -> bool:
    """Whether a tensor of theirs belongs to a task's predictors."""
    return name.startswith(heads_of(task)) or name == f"{task}_logit_scale"


def teacher_of(name: str) -> str | None:
    """Which of `TEACHERS` a tensor of theirs belongs to."""
    part = name.partition(".")[0]
    return part if part in TEACHERS else None


def is_computed(name: str) -> bool:
    """Whether a tensor of theirs follows from the config."""
    return name.endswith(_COMPUTED)


def check_shapes(source: object, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """ModelError unless the two have the same names and shapes: nothing stays random, nothing is dropped unseen."""
    faults = []
    if lost := sorted(wanted.keys() - found.keys()):
        faults.append(f"it lacks {_some(lost)}")
    if more := sorted(found.keys() - wanted.keys()):
        faults.append(f"nothing here takes {_some(more)}")
    if other := sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name]):
        name = other[0]
        faults.append(f"{_some(other)}: {name} is {list(found[name])}, and {list(wanted[name])} by its config.json")
    if faults:
        raise ModelError(f"{source} does not hold the tensors of a VisPer-LM checkpoint: {'; '.join(faults)}")


def _some(names: Sequence[str]) -> str:
    """Their number and the first of them."""
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
