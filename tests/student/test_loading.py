"""Why a checkpoint cannot be loaded, in one line that says what to do."""

import json
import shutil
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from transformers import AutoModelForCausalLM

from olavlm.student.errors import ModelError, RecipeError
from olavlm.student.loading import load_complete, load_errors, read_config_fields, why_not_loaded

RESPONSE = SimpleNamespace(headers={}, request=None)


def raised(message: str, cause: Exception | None) -> OSError:
    """As transformers raises what the hub's client has raised."""
    error = OSError(message)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "cause",
    [
        LocalEntryNotFoundError("Cannot find the requested files in the disk cache"),
        HFValidationError("Repo id must be in the form 'repo_name' or 'namespace/repo_name'"),
        RepositoryNotFoundError("404 Client Error.", response=RESPONSE),
    ],
)
def test_neither_a_folder_nor_on_the_hub(cause, tmp_path):
    error = raised("We couldn't connect to 'https://huggingface.co' to load the files.\nCheck", cause)
    message = "it is neither a local folder nor reachable as a hub id; check the name and the network"
    assert why_not_loaded("nobody/nothing", error) == message
    assert why_not_loaded(tmp_path, error).startswith("We couldn't connect"), "a folder is not looked for on the hub"


def test_the_library_says_what_to_do_about_a_gated_model():
    error = raised("You are trying to access a gated repo.\nMake sure", GatedRepoError("403", response=RESPONSE))
    assert why_not_loaded("meta-llama/Meta-Llama-3-8B-Instruct", error) == "You are trying to access a gated repo."


def test_a_message_that_goes_on_in_the_next_line_is_not_cut_off():
    assert why_not_loaded("x", ValueError("one of: \n(1) a file, \n(2) a class")) == "one of: (1) a file, (2) a class"
    assert why_not_loaded("x", ValueError("a rule\nwith a long list")) == "a rule"
    assert why_not_loaded("x", ValueError()) == "ValueError"


def test_a_missing_package_is_the_recipes_affair_only_where_attention_needs_one():
    for attention, kind in ((None, ModelError), ("sdpa", ModelError), ("flash_attention_2", RecipeError)):
        with pytest.raises(kind, match="package"), load_errors("x", attention):
            raise ImportError("the package is not installed.")


def test_weights_of_other_shapes_than_the_config_says(tiny, tmp_path):
    shutil.copytree(tiny["llm"], tmp_path / "llm")
    file = tmp_path / "llm" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "intermediate_size": 2 * config["intermediate_size"]}))
    with pytest.raises(ModelError, match=r"its weights have other shapes than its config\.json gives them") as error:
        load_complete(AutoModelForCausalLM, tmp_path / "llm")
    assert "ignore_mismatched_sizes" not in str(error.value)


@pytest.mark.parametrize(
    "error", [StrictDataclassError("Validation error\nfor field x"), TypeError("x"), KeyError("x")]
)
def test_what_the_library_raises_of_fields_of_a_wrong_kind(error):
    with pytest.raises(ModelError, match=rf"its config cannot be used \({type(error).__name__}: "), load_errors("x"):
        raise error


@pytest.mark.parametrize("content", ["[]", '"a"', '{"model_type": 3}', "{"])
def test_a_config_that_is_none(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config.json|JSON"):
        read_config_fields(tmp_path)
