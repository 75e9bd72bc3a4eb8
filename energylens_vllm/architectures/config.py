"""Fields of a Hugging Face config, checked as they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from energylens_vllm.architectures.errors import ArchitectureError
from energylens_vllm.errors import is_positive_whole, unknown


@dataclass(frozen=True, slots=True)
class Config:
    """The config of a text model. A field given as null counts as absent, as it does for transformers.

    Every accessor raises ArchitectureError, naming the field and the model type, if the field is absent and has no
    default, or its value makes no sense.
    """

    fields: Mapping[str, object]
    model_type: str

    @property
    def name(self) -> str:
        """What to call the model: the last part of the path or hub id it came from."""
        source = str(self.fields.get("_name_or_path") or "").rstrip("/")
        return source.rpartition("/")[2] or self.model_type

    def with_defaults(self, defaults: Mapping[str, object]) -> Config:
        """The config with what it leaves out filled in."""
        given = {field: value for field, value in self.fields.items() if value is not None}
        return Config({**defaults, **given}, self.model_type)

    def __contains__(self, field: str) -> bool:
        return self.fields.get(field) is not None

    def size(self, field: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self._get(field, default)
        if not is_positive_whole(value):
            raise self.error(f"field {field!r}: {value!r} is not a positive whole number")
        return value

    def count(self, field: str, default: int | None = None) -> int:
        """A whole number that may be zero."""
        return 0 if self._get(field, default) == 0 else self.size(field, default)

    def flag(self, field: str, default: bool) -> bool:
        value = self._get(field, default)
        if not isinstance(value, bool):
            raise self.error(f"field {field!r}: {value!r} is neither true nor false")
        return value

    def choice(self, field: str, accepted: Sequence[str], default: str) -> str:
        value = self._get(field, default)
        if value not in accepted:
            raise self.error(str(unknown(f"field {field!r}", value, accepted)))
        return str(value)

    def whole_numbers(self, field: str, default: Sequence[int] = ()) -> list[int]:
        """A list of whole numbers."""
        value = self._get(field, default)
        if not isinstance(value, list | tuple) or not all(isinstance(each, int) for each in value):
            raise self.error(f"field {field!r}: {value!r} is not a list of whole numbers")
        return list(value)

    def layer_types(self, kinds: Mapping[str, str], default: Sequence[str]) -> list[str]:
        """For each layer, its kind: `kinds` translates the words of the field `layer_types`; `default` is what the
        other fields say where that one is absent."""
        layers = self.size("num_hidden_layers")
        given = self.fields.get("layer_types")
        if given is None:
            return list(default)
        if not isinstance(given, list | tuple) or len(given) != layers:
            raise self.error(f"field 'layer_types' does not list one kind for each of the {layers} layers")
        for word in given:
            if not isinstance(word, str) or word not in kinds:
                raise self.error(str(unknown("field 'layer_types'", word, kinds)))
        return [kinds[word] for word in given]

    def error(self, problem: str) -> ArchitectureError:
        """The error to raise for a problem with the config's fields."""
        return ArchitectureError(f"config of model_type {self.model_type!r}: {problem}")

    def _get(self, field: str, default: object) -> object:
        value = self.fields.get(field)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"field {field!r} is missing")
        return value
