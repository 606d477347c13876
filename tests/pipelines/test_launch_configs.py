"""The shipped configurations of `accelerate launch`."""

import os
import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from torch.distributed.run import get_args_parser

from olavlm.pipelines.launch_configs import config_file, launch_configs
from olavlm.pipelines.train import main
from olavlm.student.recipes import load_chain, load_recipe

KINDS = {"ddp": DistributedType.MULTI_GPU, "fsdp": DistributedType.FSDP, "zero2": DistributedType.DEEPSPEED}


def test_each_is_one_that_accelerate_reads():
    assert launch_configs().keys() == KINDS.keys()
    for name, file in launch_configs().items():
        config = load_config_from_file(str(file))
        assert config.distributed_type == KINDS[name]
        assert config.num_processes == -1  # the user says how many, or accelerate asks
        assert config.mixed_precision is None  # the recipe says


def test_the_command_lists_them_and_prints_where_one_lies(capsys):
    assert main(["accelerate"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(launch_configs())
    assert main(["accelerate", "fsdp"]) == 0
    assert capsys.readouterr().out == f"{launch_configs()['fsdp']}\n"


def test_a_name_that_is_not_shipped_is_wrong_usage(capsys):
    assert main(["accelerate", "fsd"]) == 2
    assert "'fsd' is unknown; choose one of: ddp, fsdp, zero2" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        main(["accelerate", "ddp", "fsdp"])
    assert error.value.code == 2


def documented():
    text = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    for block in re.findall(r"```\n(.*?)```", text, flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line:
                yield line.partition("  #")[0]


@pytest.mark.parametrize("line", documented())
def test_documented_commands_parse(line):
    line = re.sub(r"\$\(olavlm-train accelerate (\w+)\)", lambda m: str(config_file(m[1])), line)
    words = shlex.split(line)
    if words[0] == "accelerate":
        parsed = launch_command_parser().parse_args(words[2:])
        assert parsed.module
        assert parsed.training_script == "olavlm.pipelines.train"
        stage, *rest = parsed.training_script_args
    else:
        parsed = get_args_parser().parse_args(words[1:])
        stage, *rest = parsed.training_script_args
    name = rest.index("--config") + 1
    if stage == "all":
        load_chain(rest[name], rest[name + 1 :])
    else:
        load_recipe(rest[name], rest[name + 1 :], stage)


def test_deepspeed_takes_the_settings(monkeypatch):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    from accelerate.utils import DeepSpeedPlugin

    settings = load_config_from_file(str(launch_configs()["zero2"])).deepspeed_config
    monkeypatch.setitem(os.environ, "ACCELERATE_USE_DEEPSPEED", "true")
    plugin = DeepSpeedPlugin(
        zero_stage=settings["zero_stage"],
        gradient_accumulation_steps=settings["gradient_accumulation_steps"],
        offload_optimizer_device=settings["offload_optimizer_device"],
        offload_param_device=settings["offload_param_device"],
        zero3_init_flag=settings["zero3_init_flag"],
    )
    assert plugin.zero_stage == 2
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == 2
