"""The files beside a model's weights that say how texts and images become its inputs, in every form they are saved in.

| what | read from | where several are there |
|---|---|---|
| image settings | ``processor_config.json`` (its ``image_processor``, as transformers 5 saves it), ``preprocessor_config.json`` | they must agree |
| chat template | ``chat_template.jinja``, ``chat_template.json``, ``tokenizer_config.json``, ``processor_config.json`` | they must agree |
| tokens | ``tokenizer.json`` | |

Loaders of transformers and of servers each have their own order among these, so that of two which differ, tokenizer and
processor may take one each.
"""  # noqa: E501 - a table

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.json_file import read_object
from prism_megatron.errors import DataError

PROCESSOR = "processor_config.json"
PREPROCESSOR = "preprocessor_config.json"
VIDEO_PREPROCESSOR = "video_preprocessor_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
LEGACY_TEMPLATE = "chat_template.json"
SETTINGS = ("size", "patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
"""What has to be there: the class defaults (patch 14, CLIP's colours) are not Qwen3-VL's."""

_NUM_FILTERS = 6
"""PIL's ways to resize are 0 (nearest) to 5 (Hamming)."""
_COLOURS = ("image_mean", "image_std")
_COUNTS = ("patch_size", "temporal_patch_size", "merge_size")
_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
_EDGES = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
"""Names of the least and the largest area, and what they were called before."""
_CLASSES = ("Qwen2VLImageProcessor", "Qwen3VLImageProcessor")
_DEFAULTS: Mapping[str, Any] = {"resample": 3, "rescale_factor": 1 / 255}
"""What published models leave to the class: bicubic, and levels of 8 bits."""
_MODEL_TOKENS = {
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
    "<|vision_start|>": "vision_start_token_id",
    "<|vision_end|>": "vision_end_token_id",
}
_COPY = "copy it from the model's Hugging Face folder"


def image_settings(folder: Path) -> dict[str, Any]:
    """The settings of the image processor that decide what it makes of a picture, by their present names.

    Raises DataError where no form has them, two forms differ, one leaves a setting to the class, or asks for another
    image processor than Qwen3-VL's.
    """
    forms = _image_forms(folder)
    if not forms:
        raise DataError(f"{folder / PREPROCESSOR} does not exist, nor an image_processor in {PROCESSOR}; {_COPY}")
    (first, settings), *others = ((name, _settings(folder / name, form)) for name, form in forms.items())
    for name, form in others:
        for key in settings:
            if settings[key] != form[key]:
                raise DataError(
                    f"{folder}: {key} is {settings[key]} in {first} and {form[key]} in {name}; remove the wrong file"
                )
    return settings


def chat_template(folder: Path) -> str:
    """The template of a chat. Raises DataError where no form has one, or two forms differ."""
    forms = _template_forms(folder)
    if not forms:
        raise DataError(
            f"{folder / TEMPLATE} does not exist, and neither {LEGACY_TEMPLATE} nor {TOKENIZER_CONFIG} holds a chat "
            f"template; {_COPY}"
        )
    (first, template), *others = forms.items()
    for name, other in others:
        if other.rstrip("\n") != template.rstrip("\n"):
            raise DataError(f"{folder}: the chat templates in {first} and {name} differ; remove the wrong one")
    return template


def tokens(folder: Path) -> dict[int, str]:
    """Every token by its id. Raises DataError for a file that is missing or no tokenizer."""
    path = folder / TOKENIZER
    if not path.is_file():
        raise DataError(f"{path} does not exist; {_COPY}")
    document = read_object(path, error=DataError)
    try:
        found = {token_id: token for token, token_id in document["model"]["vocab"].items()}
        found |= {token["id"]: token["content"] for token in document["added_tokens"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no tokenizer of a Qwen3-VL ({error!r}); {_COPY}") from error
    if not found or not all(type(token_id) is int and isinstance(token, str) for token_id, token in found.items()):
        raise DataError(f"{path} is no tokenizer of a Qwen3-VL (not every token has a number); {_COPY}")
    return found


def check_model_files(folder: Path, shape: Qwen3VLShape) -> None:
    """Raise DataError unless the files are all there and make inputs that a model of ``shape`` reads."""
    settings = image_settings(folder)
    sizes = {"patch_size": "patch", "temporal_patch_size": "temporal_patch", "merge_size": "merge"}
    for name, field in sizes.items():
        if settings[name] != getattr(shape.vision, field):
            raise DataError(
                f"{folder}: images are cut with {name} {settings[name]}, but vision_config of config.json says "
                f"{getattr(shape.vision, field)}; correct one of them"
            )
    if shape.vision.channels != len(settings["image_mean"]):
        raise DataError(f"{folder}: images have 3 channels, but in_channels of config.json is {shape.vision.channels}")
    chat_template(folder)
    named = tokens(folder)
    if (largest := max(named)) >= shape.text.vocab:
        raise DataError(
            f"{folder}: {TOKENIZER} has the token {largest}, but vocab_size of config.json is {shape.text.vocab}; "
            "correct one of them"
        )
    for token_id, token in named.items():
        key = _MODEL_TOKENS.get(token)
        if key is not None and getattr(shape, key) != token_id:
            raise DataError(
                f"{folder}: {key} of config.json is {getattr(shape, key)}, but {token} is {token_id} in "
                f"{TOKENIZER}; correct one of them"
            )


def with_older_forms(files: Mapping[str, bytes], where: Path) -> dict[str, bytes]:
    """``files``, by name, with what readers before transformers 5 look for, made of the forms that are there.

    Raises DataError for JSON that cannot be read; ``where`` is the folder of the files.
    """
    made = dict(files)
    nested = _parsed(files, PROCESSOR, where)
    for part, name in (("image_processor", PREPROCESSOR), ("video_processor", VIDEO_PREPROCESSOR)):
        if name not in made and isinstance(nested.get(part), dict):
            made[name] = (json.dumps(nested[part], indent=2) + "\n").encode()
    if TEMPLATE not in made:
        parsed = {name: _parsed(files, name, where) for name in (LEGACY_TEMPLATE, TOKENIZER_CONFIG, PROCESSOR)}
        found = [template for document in parsed.values() if (template := _template_in(document)) is not None]
        if found:
            made[TEMPLATE] = found[0].encode()
    return made


def _image_forms(folder: Path) -> dict[str, Any]:
    forms: dict[str, Any] = {}
    if (folder / PROCESSOR).is_file():
        nested = read_object(folder / PROCESSOR, error=DataError).get("image_processor")
        if nested is not None:
            forms[PROCESSOR] = nested
    if (folder / PREPROCESSOR).is_file():
        forms[PREPROCESSOR] = read_object(folder / PREPROCESSOR, error=DataError)
    return forms


def _settings(path: Path, form: Any) -> dict[str, Any]:
    """One form's settings, checked, the areas in ``size``."""
    if not isinstance(form, dict):
        raise DataError(f"{path}: image_processor is {form!r}, expected a JSON object")
    settings = {key: form.get(key) for key in SETTINGS} | {
        key: form.get(key, value) for key, value in _DEFAULTS.items()
    }
    kind = form.get("image_processor_type", _CLASSES[0])
    if not isinstance(kind, str) or not kind.startswith(_CLASSES):
        raise DataError(f"{path}: image_processor_type is {kind!r}, which is not Qwen3-VL's")
    for name in _STEPS:
        if form.get(name, True) is not True:
            raise DataError(f"{path}: {name} is {form[name]!r}, and only true is supported")
    settings["size"] = _size(path, form) or None
    if missing := [name for name in SETTINGS if settings[name] is None]:
        raise DataError(f"{path}: {', '.join(missing)} missing; the class defaults are not Qwen3-VL's")
    _check_numbers(path, settings)
    return settings


def _check_numbers(path: Path, settings: Mapping[str, Any]) -> None:
    for name in _COUNTS:
        if type(settings[name]) is not int or settings[name] < 1:
            raise DataError(f"{path}: {name} is {settings[name]!r}, expected a whole number of at least 1")
    for name in _COLOURS:
        value = settings[name]
        if not (isinstance(value, list) and len(value) == 3 and all(type(one) in (int, float) for one in value)):
            raise DataError(f"{path}: {name} is {value!r}, expected a number for each of three colours")
    if settings["resample"] not in range(_NUM_FILTERS):
        raise DataError(f"{path}: resample is {settings['resample']!r}, expected the number of one of PIL's filters")
    if type(settings["rescale_factor"]) not in (int, float) or not settings["rescale_factor"] > 0:
        raise DataError(f"{path}: rescale_factor is {settings['rescale_factor']!r}, expected a positive number")
    if not all(settings["image_std"]):
        raise DataError(f"{path}: image_std is {settings['image_std']}; colours are divided by it, so it cannot be 0")


def _size(path: Path, form: Mapping[str, Any]) -> dict[str, int]:
    """The least and the largest area of an image in pixels, under whichever names; empty where none is there."""
    given = form.get("size")
    inside = {} if given is None else given
    if not isinstance(inside, dict) or not inside.keys() <= _EDGES.keys() | set(_EDGES.values()):
        raise DataError(f"{path}: size is {given!r}, expected shortest_edge and longest_edge")
    size: dict[str, int] = {}
    for name, older in _EDGES.items():
        found = [value for value in (inside.get(name), inside.get(older), form.get(older)) if value is not None]
        if any(value != found[0] for value in found):
            raise DataError(f"{path}: {name} of size and {older} are names of one setting, and are {found}")
        if any(type(value) is not int or value < 1 for value in found):
            raise DataError(f"{path}: {name} of size is {found[0]!r}, expected a number of pixels")
        if found:
            size[name] = found[0]
    if len(size) == 1:
        raise DataError(f"{path}: size is {given!r}, expected shortest_edge and longest_edge")
    return size


def _template_forms(folder: Path) -> dict[str, str]:
    """Every chat template by its file."""
    forms: dict[str, str] = {}
    if (folder / TEMPLATE).is_file():
        try:
            forms[TEMPLATE] = (folder / TEMPLATE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{folder / TEMPLATE} cannot be read: {error}") from error
    for name in (LEGACY_TEMPLATE, TOKENIZER_CONFIG, PROCESSOR):
        if (folder / name).is_file():
            template = _template_in(read_object(folder / name, error=DataError))
            if template is not None:
                forms[name] = template
    return forms


def _template_in(document: Mapping[str, Any]) -> str | None:
    """The ``default`` of several named ones; None where there is none, or it is no text."""
    found = document.get("chat_template")
    if isinstance(found, list):
        named = (one for one in found if isinstance(one, dict))
        found = {one.get("name"): one.get("template") for one in named}
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else None


def _parsed(files: Mapping[str, bytes], name: str, where: Path) -> dict[str, Any]:
    return read_object(where / name, error=DataError) if name in files else {}
