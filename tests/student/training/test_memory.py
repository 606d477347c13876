"""The estimate of memory: against the bytes of real tiny models and of a real step, and how it is told."""

import pytest
import torch

from olavlm.pipelines import train
from olavlm.student.fused_teachers import FusedTeacher
from olavlm.student.model import OlaVLM
from olavlm.student.stages import apply_stage
from olavlm.student.task import BatchTotals, DistillTask
from olavlm.student.tokens import TaskSpec
from olavlm.student.training.live_bytes import LiveBytes
from olavlm.student.training.memory import BatchShape, estimate_memory

SPECS = (
    TaskSpec("gen", tokens=1, dim=48, layers=(4, 6)),
    TaskSpec("depth", tokens=64, dim=32, layers=(2, 6), predictor_width="llm"),
    TaskSpec("seg", tokens=64, dim=64, layers=(3, 5)),
)
TOKENS_ONLY = tuple(TaskSpec(s.name, s.tokens, s.dim) for s in SPECS)
SHAPE = BatchShape(samples=4, text_tokens=50, supervised_tokens=12, global_batch=8)


def estimate(recipe, stage="pt", tokenizer=None, **options):
    distil = stage == "pt"
    defaults = {"vocabulary": 1025 if tokenizer is None else len(tokenizer), "distil": distil}
    return estimate_memory(recipe, stage, SPECS if distil else TOKENS_ONLY, SHAPE, **defaults | options)


def real(tiny, tokenizer, recipe, stage, dtype=torch.float32, **options):
    model = OlaVLM.build(
        tiny["llm"],
        tiny["encoder"],
        tokenizer,
        SPECS if stage == "pt" else TOKENS_ONLY,
        dtype=dtype,
        with_predictors=stage == "pt",
        **options,
    )
    apply_stage(model, stage, distil=stage == "pt")
    return model


@pytest.mark.parametrize(("stage", "dtype"), [("pt", "float32"), ("pt", "bfloat16"), ("ift", "float32")])
def test_weights_gradients_and_optimizer_are_those_of_the_real_model(recipe, tiny, tokenizer, stage, dtype):
    model = real(tiny, tokenizer, recipe, stage, getattr(torch, dtype))
    found = estimate(recipe(stage, **{"model.dtype": dtype}), stage, tokenizer)
    assert found.weights == sum(p.numel() * p.element_size() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert found.gradients == sum(p.numel() * p.element_size() for p in trained) > 0
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [v for s in optimizer.state.values() for v in s.values() if v.dim()]
    scalars = sum(p.dim() == 0 for p in trained)  # the moments of the logit scales have no dimension either
    assert found.optimizer == sum(v.numel() * v.element_size() for v in state) + 2 * 4 * scalars


def test_lora_takes_the_place_of_the_llms_gradients(recipe):
    pytest.importorskip("peft")
    whole, lora = (estimate(recipe("ift", **{"lora.rank": rank}), "ift") for rank in ("null", 4))
    updates = 4 * 6 * 4 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 256))  # bytes, blocks, rank, shapes
    projector = 4 * (64 * 128 + 128 + 128 * 128 + 128)
    assert lora.weights == whole.weights + updates
    assert lora.gradients == updates + projector
    assert lora.optimizer == 2 * lora.gradients


@pytest.mark.parametrize("stage", ["pt", "ift"])
def test_activations_are_those_of_a_real_step(recipe, tiny, tokenizer, stage):
    model = real(tiny, tokenizer, recipe, stage)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    b, m = SHAPE.samples, SHAPE.global_batch
    with LiveBytes() as live:
        ids = torch.full((b, SHAPE.text_tokens), 7)
        ids[:, 5] = model.config.image_token_id
        labels = torch.full_like(ids, -100)
        labels[:, -SHAPE.supervised_tokens :] = 7
        distilled = model.tasks if stage == "pt" else ()
        targets = {t.name: torch.randn(m, t.tokens, t.dim).half() for t in distilled}
        batch = {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.zeros(b, 3, 56, 56),
            "targets": {name: target[:b] for name, target in targets.items()},
            "valid": {name: torch.ones(b, dtype=torch.bool) for name in targets},
        }
        totals = BatchTotals(
            supervised_tokens=int((labels != -100).sum()),
            valid_rows=dict.fromkeys(targets, b),
            targets=targets,
            targets_valid={name: torch.ones(m, dtype=torch.bool) for name in targets},
        )
        losses, _ = DistillTask(distilled).compute(model, batch, totals)
        losses["loss/total"].backward()
    found = estimate(recipe(stage), stage, tokenizer)
    assert found.activations == pytest.approx(live.peak, rel=0.1)
    assert found.targets == (m * 2 * (48 + 64 * 32 + 64 * 64) if stage == "pt" else 0)
    assert found.logits == b * SHAPE.supervised_tokens * len(tokenizer) * (4 + 4) * 2


@pytest.mark.parametrize("fusion", ["feature_concat", "token_concat"])
def test_a_fusion_baseline(recipe, tiny, tokenizer, fusion):
    """Weights and activations of the real model, whose features of teachers are on the device for all micro-batches."""
    shapes = {"gen": (1, 48, [1, 1]), "depth": (64, 32, [8, 8])}
    fused = [
        FusedTeacher(name, {"tokens": n, "dim": d, "grid": grid, "fingerprint": name})
        for name, (n, d, grid) in shapes.items()
    ]
    made = recipe("ift", **{"model.fusion": fusion, "model.num_task_tokens": 0, "losses.stages": "[]"})
    found = estimate_memory(made, "ift", [], SHAPE, vocabulary=len(tokenizer), distil=False, fused=fused)
    model = OlaVLM.build(
        tiny["llm"], tiny["encoder"], tokenizer, num_task_tokens=0, fusion=fusion, fused_teachers=fused
    )
    apply_stage(model, "ift")
    assert found.weights == sum(p.numel() * p.element_size() for p in model.parameters())
    trained = [*model.projector.parameters(), *model.llm.parameters()]
    assert found.gradients == sum(p.numel() * p.element_size() for p in trained)
    b = SHAPE.samples
    assert found.targets == b * 2 * (48 + 64 * 32)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as live:
        ids = torch.full((b, SHAPE.text_tokens), 7)
        ids[:, 5] = model.config.image_token_id
        labels = torch.full_like(ids, -100)
        labels[:, -SHAPE.supervised_tokens :] = 7
        features = {t.name: torch.randn(b, t.tokens, t.dim).half() for t in fused}
        pixels = torch.zeros(b, 3, 56, 56)
        output = model(ids, labels=labels, pixel_values=pixels, teacher_features=features)
        output.text_loss_sum.backward()
    assert found.activations == pytest.approx(live.peak, rel=0.1)


def test_live_bytes_by_hand():
    with LiveBytes() as live:
        a = torch.zeros(1000)  # 4000 bytes
        view = a[10:]  # of the same storage
        assert (live.now, live.peak) == (4000, 4000)
        b = a + 1
        del a
        assert live.now == 8000, "a view keeps what it is a view of"
        del view
        assert live.now == 4000
        del b
    assert (live.now, live.peak) == (0, 8000)


def test_what_makes_it_smaller(recipe):
    pt = estimate(recipe())
    assert estimate(recipe(), gradient_checkpointing=True).activations < 0.9 * pt.activations
    half = estimate(recipe(**{"train.mixed_precision": "bf16"}))
    assert half.activations < pt.activations
    assert half.weights == pt.weights
    several, sharded = (estimate(recipe(), processes=4, sharded=on) for on in (False, True))
    assert (several.weights, several.gradients) == (pt.weights, 2 * pt.gradients)
    assert (sharded.weights, sharded.gradients) == (pt.weights // 4, pt.gradients // 4)
    assert pt.total == pt.weights + pt.gradients + pt.optimizer + pt.activations


def test_a_dry_run_tells_it(recipe, capsys, tmp_path):
    import yaml

    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(recipe().to_dict()))
    assert train.main(["all", "--config", str(file), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count("memory of a device, estimated for 4 samples of ") == 2
    assert out.count("needed: ") == 1  # pt alone reads targets
    for stage in ("pt", "ift"):
        assert f"{stage} with one process: global batch 4" in out
    assert " without gradient checkpointing)" not in out
    assert out.count("with gradient checkpointing)") == 4
    assert "    of which logits " in out
    assert not (tmp_path / "pt").exists()
    assert train.main(["pt", "--config", str(file), "--dry-run", "--model.llm=no/such/llm"]) == 0
    assert "memory: no estimate: no tokenizer in 'no/such/llm'" in capsys.readouterr().out
    for stage, told in {"pt": "memory: no estimate: the shapes of the targets", "ift": "memory of a device"}.items():
        words = ["--targets.source=online", "--targets.store=null", "--dry-run"]
        assert train.main([stage, "--config", str(file), *words]) == 0
        assert told in capsys.readouterr().out
