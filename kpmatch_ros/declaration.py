"""Declaration of a parameter: type, default, allowed values and description."""

from __future__ import annotations

import math
import numbers
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Declaration", "ParameterError", "parameter"]


class ParameterError(ValueError):
    """A parameter has a value that is not allowed. The text names the parameter, the value and what is allowed."""


@dataclass(frozen=True)
class Declaration:
    """Declares one parameter: type, default, allowed values and description.

    `special` is an allowed value outside of the range. `needs` is the name of another parameter, and the value that it
    must have so that this parameter has an effect.
    """

    name: str
    default: Any
    description: str
    unit: str
    minimum: float | None
    maximum: float | None
    special: float | None
    choices: tuple[str, ...]
    pattern: str
    dynamic: bool
    needs: tuple[str, Any] | None

    @property
    def type(self) -> type:
        """``bool``, ``int``, ``float`` or ``str``."""
        return type(self.default)

    @property
    def constraint(self) -> str:
        """The allowed values as text; empty if any value of the type is allowed."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.minimum is not None and self.maximum is not None:
            special = "" if self.special is None else f"{self.special:g}, or "
            return f"{special}{self.minimum:g} to {self.maximum:g}"
        return ""

    def check(self, value: Any) -> Any:
        """Return ``value`` as the parameter's type, or raise :class:`ParameterError`.

        NumPy numbers are accepted as numbers, and path objects as text.
        """
        if self.type in (int, float) and type(value) is not bool:  # True is an instance of Integral
            if isinstance(value, numbers.Integral):
                value = int(value)
            if self.type is float and isinstance(value, numbers.Real):
                with suppress(OverflowError):  # beyond 1.8e308
                    value = float(value)
        if value is False and "off" in self.choices:  # YAML reads `off` without quotes as False
            value = "off"
        if self.type is str and isinstance(value, os.PathLike):
            value = os.fspath(value)
        if type(value) is not self.type:
            article = "an" if self.type is int else "a"
            raise ParameterError(f"{self.name} is {value!r}; it must be {article} {self.type.__name__}")
        self._check_range(value)
        return value

    def _check_range(self, value: Any) -> None:
        if self.choices and value not in self.choices:
            raise ParameterError(f"{self.name} is {value!r}; it must be {self.constraint}")
        if self.pattern and not re.fullmatch(self.pattern, value):
            raise ParameterError(f"{self.name} is {value!r}; {self.description}")
        if self.type is float and not math.isfinite(value):
            raise ParameterError(f"{self.name} is {value!r}; it must be a finite number")
        too_low = self.minimum is not None and value < self.minimum
        too_high = self.maximum is not None and value > self.maximum
        if (too_low or too_high) and value != self.special:
            raise ParameterError(f"{self.name} is {value!r}; it must be {self.constraint}")


def parameter(
    default: Any,
    description: str,
    *,
    unit: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    special: float | None = None,
    choices: tuple[str, ...] = (),
    pattern: str = "",
    dynamic: bool = False,
    needs: tuple[str, Any] | None = None,
) -> Any:
    """Return a field of :class:`kpmatch_ros.parameters.Parameters`. The arguments are those of :class:`Declaration`."""
    return field(
        default=default,
        metadata=dict(
            description=description,
            unit=unit,
            minimum=minimum,
            maximum=maximum,
            special=special,
            choices=choices,
            pattern=pattern,
            dynamic=dynamic,
            needs=needs,
        ),
    )
