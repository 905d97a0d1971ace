"""Read an experiment file: every problem is found here, before anything runs."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from entkd.config.errors import ConfigError, problems_of
from entkd.config.experiment import Experiment
from entkd.config.local import local_problems


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars (`off` is a word, `5e-4` a number), and no key twice."""

    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor`: what follows may replace what it brings
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):  # refused below
                continue
            if key in seen:
                first, line = seen[key] + 1, key_node.start_mark.line + 1
                raise ConfigError([f"line {line}: `{key}` is already given on line {first}; one of them would be lost"])
            seen[key] = key_node.start_mark.line
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf)$|^\.nan$"),
    list("-+.0123456789"),
)


def load_experiment(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """The validated experiment in a YAML file.

    Parameters
    ----------
    path
        The file. Paths inside it are relative to the working directory.
    overrides
        Settings that replace the file's, merged key by key, as ``snakemake --config`` gives them: strings are
        read as YAML.

    Raises
    ------
    ConfigError
        With one line per problem: file, dotted path, value, what is allowed, nearest match.
    """
    source = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError([f"no such experiment file (working directory {Path.cwd()})"], source) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"not in UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8"], source) from None
    try:
        settings = yaml.load(text, Loader=_Loader)
    except ConfigError as error:
        raise ConfigError(error.problems, source) from None
    except yaml.YAMLError as error:
        says = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise ConfigError([f"not valid YAML: {says}"], source) from None
    except RecursionError:
        raise ConfigError(["nested too deeply to be an experiment"], source) from None
    if not isinstance(settings, dict):
        raise ConfigError(["an experiment is a mapping of settings; this file holds none"], source)
    if overrides:
        settings = _merge(settings, _read_strings(overrides))
    try:
        experiment = Experiment.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(problems_of(error, Experiment), source) from None
    problems = list(local_problems(experiment))
    if problems:
        raise ConfigError(problems, source)
    return experiment


def _read_strings(value: Any) -> Any:
    """Strings of a command line as the YAML they would be in the file."""
    if isinstance(value, Mapping):
        return {key: _read_strings(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_read_strings(item) for item in value]
    return yaml.load(value, Loader=_Loader) if isinstance(value, str) else value


def _merge(settings: Any, overrides: Any) -> Any:
    if not isinstance(settings, Mapping) or not isinstance(overrides, Mapping):
        return overrides
    return {**settings, **{key: _merge(settings.get(key), value) for key, value in overrides.items()}}
