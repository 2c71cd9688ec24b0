"""A YAML file of settings, read strictly: text in UTF-8, every key once, and nothing that YAML 1.1 turns into another
thing than was written.

A value keeps its line, so that a complaint about it can say where it stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from prism_megatron.errors import ConfigError

_MAX_BYTES = 2**18
_MAX_VALUES = 10_000
_MAX_INTEGER = 2**63
_WIDE_BOMS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_SCALARS = tuple(f"{_TAG}{kind}" for kind in ("null", "bool", "int", "float", "str"))


class Section(dict[str, Any]):
    """The keys and values of one mapping of a file, and where they stand."""

    def __init__(self, path: Path, line: int) -> None:
        super().__init__()
        self._path, self._line = path, line
        self._lines: dict[str, int] = {}

    def put(self, key: str, value: Any, *, line: int) -> None:
        self[key], self._lines[key] = value, line

    def place(self, key: str) -> str:
        """File and line of a key, or of the whole mapping where it has none of that name."""
        return f"{self._path}, line {self._lines.get(key, self._line)}"

    def without(self, *keys: str) -> Section:
        """The same mapping, in the same place, less these keys."""
        rest = Section(self._path, self._line)
        for key, value in self.items():
            if key not in keys:
                rest.put(key, value, line=self._lines[key])
        return rest


def read_yaml(path: Path) -> Mapping[str, Any]:
    """The mapping in a YAML file; mappings in it are :class:`Section` s, lists are lists.

    Raises ConfigError, with the line where there is one, for a file that cannot be read, that is no UTF-8, that holds
    anything but keys with plain values, or that repeats a key.
    """
    text = _text(path)
    try:
        loader = _Loader(text, path)
        node = loader.get_single_node()
        if node is None:
            return Section(path, 1)
        if not isinstance(node, yaml.MappingNode):
            kind = node.tag.rpartition(":")[2]
            raise ConfigError(f"{path} must hold keys with values, not a {_KINDS.get(kind, kind)}; write `steps: 3`")
        _check_size(node, path)
        values: Mapping[str, Any] = _value(node, loader, path)
    except yaml.MarkedYAMLError as error:
        line = 1 if error.problem_mark is None else error.problem_mark.line + 1
        raise ConfigError(f"{path}, line {line}: this is not YAML: {_complaint(error)}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{path}, line {line}: this is not YAML: the character {_character(error)} stands in no text; remove it"
        ) from error
    except ValueError as error:  # PyYAML leaves the escape of a character that there is not to chr()
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}; correct it") from error
    except RecursionError as error:
        raise ConfigError(
            f"{path} is not YAML that can be read: it is nested too deeply; settings have two levels"
        ) from error
    return values


_KINDS = {"seq": "list", "str": "text", "int": "number", "float": "number", "bool": "truth value"}


def _text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is no regular file; settings are read more than once: write them to a file")
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path} is larger than {_MAX_BYTES // 1024} KiB: it is no file of settings")
    wide = next((name for bom, name in _WIDE_BOMS.items() if data.startswith(bom)), None)
    if wide is None and data[:2].count(0) == 1:
        wide = "UTF-16"
    if wide is not None:
        raise ConfigError(f"{path} is not YAML in UTF-8: it is {wide}; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}, line {line}: this is not YAML in UTF-8: byte {data[error.start]:#04x}; save it as UTF-8"
        ) from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe one without dates, numbers of base 60, and 0-led octals: they stay the text that was written.

    The parts that it composes know no key twice.
    """

    def __init__(self, text: str, path: Path) -> None:
        super().__init__(text)
        self._file = path

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Raises ConfigError for a key that stands twice, or that is no text."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{self._file}, line {line}: a key must be a word, not a list or a mapping")
            if key.value in seen:
                raise ConfigError(
                    f"{self._file}, line {line}: the key {_short(key.value)} stands in line {seen[key.value]} already; "
                    "remove one of them"
                )
            seen[key.value] = line
        return node


def _resolvers() -> dict[str, list[tuple[str, Any]]]:
    """Those of YAML 1.1 without dates; numbers as programs write them."""
    integer = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)\Z")
    floating = re.compile(
        r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    )
    own = {f"{_TAG}int": integer, f"{_TAG}float": floating}
    return {
        first: [(tag, own.get(tag, pattern)) for tag, pattern in known if tag != f"{_TAG}timestamp"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.yaml_implicit_resolvers = _resolvers()


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe one, with quotes around what either of the two loaders would take for another thing than text."""


_Dumper.yaml_implicit_resolvers = {
    first: known + _Loader.yaml_implicit_resolvers[first]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def write_yaml(values: Mapping[str, Any]) -> str:
    """``values``, nested and plain, as text that ``read_yaml`` gives back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _check_size(root: yaml.Node, path: Path) -> None:
    """Raise ConfigError where aliases make more of a small file than settings are, or something without an end."""
    counts: dict[int, int | None] = {}

    def count(node: yaml.Node) -> int:
        known = counts.get(id(node), 0)
        if known is None:
            raise ConfigError(
                f"{path}, line {node.start_mark.line + 1}: what an anchor (&) names here holds itself; write it out"
            )
        if known:
            return known
        counts[id(node)] = None
        total = 1 + sum(map(count, _children(node)))
        if total > _MAX_VALUES:
            raise ConfigError(
                f"{path}, line {node.start_mark.line + 1}: this comes to more than {_MAX_VALUES} values; settings are "
                "far fewer"
            )
        counts[id(node)] = total
        return total

    count(root)


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _value(node: yaml.Node, loader: _Loader, path: Path) -> Any:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
        loader.flatten_mapping(node)
        section = Section(path, line)
        for key, value in node.value:
            section.put(_scalar_text(key, path), _value(value, loader, path), line=key.start_mark.line + 1)
        return section
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
        return [_value(item, loader, path) for item in node.value]
    if not isinstance(node, yaml.ScalarNode) or node.tag not in _SCALARS:
        raise ConfigError(
            f"{path}, line {line}: settings are text, numbers, truth values and lists of them, not {_short(node.tag)}; "
            "leave the tag out, or put the value in quotes"
        )
    return _scalar(node, loader, path)


def _scalar(node: yaml.ScalarNode, loader: _Loader, path: Path) -> Any:
    if node.tag == f"{_TAG}str":
        return _scalar_text(node, path)
    try:
        value = loader.construct_object(node)
        # A number that cannot be printed cannot be complained about.
        if isinstance(value, int) and abs(value) >= _MAX_INTEGER:
            raise ValueError(f"beyond {_MAX_INTEGER}")
    except (ValueError, KeyError, IndexError) as error:  # of a tag that the text beside it does not fit
        kind = node.tag.removeprefix(_TAG)
        line = node.start_mark.line + 1
        raise ConfigError(
            f"{path}, line {line}: {_short(node.value)} is no {kind}; write numbers in digits, and text in quotes"
        ) from error
    return value


def _scalar_text(node: yaml.ScalarNode, path: Path) -> str:
    """Raises ConfigError for characters that escapes can write and neither files nor terminals take."""
    text: str = node.value
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(
            f"{path}, line {node.start_mark.line + 1}: {_short(text)} holds a character that is no text (NUL, or half "
            "of a pair); remove the escape"
        )
    return text


def _complaint(error: yaml.MarkedYAMLError) -> str:
    problem = " ".join(f"{error.context or ''} {error.problem or ''}".split())
    advice = "indent with spaces, not with tabs" if r"'\t'" in problem else "correct it, or put text in quotes"
    return f"{problem}; {advice}"


def _character(error: yaml.reader.ReaderError) -> str:
    return f"U+{error.character:04X}" if isinstance(error.character, int) else ascii(error.character)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
