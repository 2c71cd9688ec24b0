"""A model folder that brings a system prompt: which requests get it, and whose template readers find in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.stages.data import STRUCTURED_SYSTEM_PROMPT
from prism_megatron.config.tools.serve import ServeConfig, check_serve
from prism_megatron.data.reading.model_files import chat_template
from prism_megatron.data.render import Renderer
from prism_megatron.errors import ConfigError, DataError
from prism_megatron.jobs.served_prompt import with_system_prompt

POLICY = MINI_FOLDER / "policy"
AWKWARD = 'It\'s "quoted", a \\n that is none, {{ no }} {% template %},\n\ta line – with ünïcode 😀'


def asked(folder: Path, system: str | None) -> tuple[int, ...]:
    return tuple(Renderer.from_folder(folder, system_prompt=system).prompt("q", "How many?", []).token_ids)


@pytest.mark.parametrize("prompt", [STRUCTURED_SYSTEM_PROMPT, AWKWARD], ids=["training", "awkward"])
def test_a_request_without_a_system_message_gets_it(prompt: str, tmp_path: Path) -> None:
    """Claim: the prompt is the one of training, token for token, and a message that is sent stays the only one."""
    with_system_prompt(POLICY, tmp_path / "served", prompt)
    assert asked(tmp_path / "served", None) == asked(POLICY, prompt) != asked(POLICY, None)
    assert asked(tmp_path / "served", prompt) == asked(POLICY, prompt)
    assert asked(tmp_path / "served", "Another one.") == asked(POLICY, "Another one.")


@pytest.mark.parametrize("form", ["chat_template.json", "tokenizer_config.json", "processor_config.json", "all"])
def test_no_reader_finds_the_models_own_template(form: str, tmp_path: Path) -> None:
    """Claim: in whatever file the model has its template, the folder has the new one alone, and all else by links."""
    own, template = tmp_path / "own", chat_template(POLICY)
    shutil.copytree(POLICY, own)
    names = ("chat_template.json", "tokenizer_config.json", "processor_config.json") if form == "all" else (form,)
    if form != "all":
        (own / "chat_template.jinja").unlink()
    for name in names:
        before = json.loads((own / name).read_text()) if (own / name).exists() else {}
        (own / name).write_text(json.dumps({**before, "chat_template": template}))
    with_system_prompt(own, tmp_path / "served", "Answer.")
    assert chat_template(tmp_path / "served").endswith(template)
    assert asked(tmp_path / "served", None) == asked(own, "Answer.")
    found = AutoTokenizer.from_pretrained(tmp_path / "served").apply_chat_template(
        [{"role": "user", "content": "How many?"}], tokenize=False
    )
    assert found.startswith("<|im_start|>system\nAnswer.<|im_end|>")
    assert (tmp_path / "served" / "model.safetensors").resolve() == (own / "model.safetensors").resolve()
    assert json.loads((own / names[-1]).read_text())["chat_template"] == template, "the model's files are its own"


def test_what_has_no_template_is_told(tmp_path: Path) -> None:
    shutil.copytree(POLICY, tmp_path / "own")
    (tmp_path / "own" / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=r"chat_template.jinja does not exist"):
        with_system_prompt(tmp_path / "own", tmp_path / "served", "Answer.")
    assert not (tmp_path / "served").exists()


def test_the_word_training_stands_for_its_prompt() -> None:
    assert ServeConfig(system_prompt="training").default_message == STRUCTURED_SYSTEM_PROMPT
    assert ServeConfig(system_prompt="Answer.").default_message == "Answer."
    assert ServeConfig().default_message is None
    with pytest.raises(ConfigError, match="--system-prompt is empty"):
        check_serve(ServeConfig(load="x", system_prompt=" \n"))
