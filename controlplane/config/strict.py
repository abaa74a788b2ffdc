"""The base of all configuration models: strict, frozen, and able to say more than one thing at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

PathPart = str | int


@dataclass(frozen=True, slots=True)
class ConfigFinding:
    """Something wrong that concerns more than one field's own type."""

    path: tuple[PathPart, ...]
    """Where, from the model that found it."""
    message: str
    remedy: str = ""
    uses: tuple[str, ...] = ()
    """Other fields it was concluded from: if one of them is wrong itself, the finding may be too."""


class FindingsError(ValueError):
    """Carries findings through pydantic."""

    def __init__(self, findings: Sequence[ConfigFinding]) -> None:
        self.findings = tuple(findings)
        super().__init__("; ".join(finding.message for finding in findings))


class Strict(BaseModel):
    """Unknown keys are errors, values are not coerced between kinds, instances don't change.

    A subclass overrides :meth:`findings` for what its fields must satisfy together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    def findings(self) -> list[ConfigFinding]:
        """What is wrong between fields that are each right by themselves."""
        return []

    @model_validator(mode="after")
    def _no_findings(self) -> Self:
        found = self.findings()
        if found:
            raise FindingsError(found)
        return self
