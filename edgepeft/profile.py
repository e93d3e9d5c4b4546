"""The TOML of a hardware profile, read field by field: the first one that is wrong ends the reading."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgepeft.errors import UsageError, nearest

DTYPES = ("fp32", "bf16", "fp16", "int8")
COMPUTING = ("matmul", "thin", "attention")
MOVING = ("elementwise", "curved", "random", "dequantize", "optimizer", "requantize")
OPERATIONS = (*COMPUTING, *MOVING, "sending")
IN_A_DTYPE = tuple(f"{operation}.{dtype}" for operation in COMPUTING for dtype in DTYPES)
"""Operations that may reach another share of each dtype's peak."""

# Lowest and highest believable value. Their main use is to catch GB where bytes are meant, and TFLOPS where FLOP/s are.
_RANGES: dict[str, tuple[float, float]] = {
    "memory_bytes": (2**28, 2**44),
    "reserved_bytes": (0, 2**43),
    "bandwidth": (1e8, 1e14),
    "interconnect": (1e7, 1e14),
    "cores": (1, 2**12),
    "call_seconds": (1e-8, 1e-2),
    "watts": (0.1, 1e5),
    "price": (1e-4, 1e4),
}
_FLOPS_RANGE = (1e8, 1e17)
# A dtype that hardware multiplies itself is not far slower than fp32. The fastest here are AMX's int8, 64 times fp32.
_RATIO_RANGE = (0.1, 200)
# Nothing computes or sends faster than its peak; what moves bytes may where caches serve.
_SHARE_RANGES = dict.fromkeys(OPERATIONS, (1e-4, 1.0)) | dict.fromkeys(MOVING, (1e-4, 50.0))
_UNITS = {
    "bandwidth": "bytes per second",
    "interconnect": "bytes per second",
    "cores": "cores",
    "watts": "watts",
    "price": "US dollars an hour",
}
_UNITS |= {"memory_bytes": "bytes", "reserved_bytes": "bytes", "call_seconds": "seconds"}
_EXAMPLES = "The shipped profiles are examples to start from."
_WITH_SOURCE = {
    *(*_RANGES, "instructions"),
    *(f"flops.{dtype}" for dtype in DTYPES),
    *(f"reached.{operation}" for operation in (*OPERATIONS, *IN_A_DTYPE)),
}
_OF_PROCESSOR = ("reserved_bytes", "instructions", *(f"flops.{dtype}" for dtype in DTYPES))
_WITH_SOURCE |= {f"processor.{name}" for name in _OF_PROCESSOR}


class Table:
    """Takes the fields out of one profile.

    Attributes:
        within: the name of the table inside the profile, with a dot after it; "" for the profile itself.

    Raises:
        UsageError: the file is no TOML; and from every method: the field is missing or wrong.
    """

    def __init__(self, path: Path, fields: dict[str, Any] | None = None, within: str = "") -> None:
        self.path = path
        self.within = within
        self._fields = _load(path) if fields is None else fields

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def error(self, key: str, fact: str, remedy: str = _EXAMPLES) -> UsageError:
        return UsageError(f"The hardware profile {self.path} has a bad {self.within}{key}: {fact}.", "", remedy)

    def text(self, key: str) -> str:
        value = self._take(key)
        if not isinstance(value, str) or not value:
            raise self.error(key, "it is not a text")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._take(key)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise self.error(key, "it is not a list of texts")
        return tuple(value)

    def capability(self) -> tuple[int, int]:
        """The compute capability, written as in ``"9.0"``."""
        parts = re.fullmatch(r"(\d{1,2})\.(\d)", self.text("capability"))
        if parts is None:
            raise self.error("capability", "it is no compute capability", 'For example: capability = "8.0"')
        return int(parts[1]), int(parts[2])

    def number(self, key: str) -> float:
        return self._number(key, self._take(key), _RANGES[key])

    def whole(self, key: str) -> int:
        value = self.number(key)
        if not value.is_integer():
            raise self.error(key, f"{value} is not a whole number")
        return int(value)

    def flops(self) -> dict[str, float]:
        table = self._take("flops")
        if not isinstance(table, dict) or "fp32" not in table:
            raise self.error("flops", "it is not a table with fp32 in it", "For example: flops = { fp32 = 8.1e12 }")
        self._known("flops", table, DTYPES, "dtype")
        rates = {dtype: self._number(f"flops.{dtype}", rate, _FLOPS_RANGE) for dtype, rate in table.items()}
        low, high = _RATIO_RANGE
        for dtype, rate in rates.items():
            if not low <= rate / rates["fp32"] <= high:
                believed = (
                    f"It is between {low:g} and {high:g} times that of fp32; leave out a dtype that is not native."
                )
                raise self.error(
                    f"flops.{dtype}", f"{rate:g} is out of range beside flops.fp32 = {rates['fp32']:g}", believed
                )
        return rates

    def reached(self) -> dict[str, float]:
        """By operation, or by operation and dtype (``thin.bf16``) where a table of dtypes stands for a number."""
        if "reached" not in self:
            return {}
        table = self._take("reached")
        if not isinstance(table, dict):
            raise self.error("reached", "it is not a table", "For example: reached = { matmul = 0.8 }")
        self._known("reached", table, OPERATIONS, "operation")
        shares = dict(_flat(table))
        self._known("reached", shares, (*OPERATIONS, *IN_A_DTYPE), "operation of a dtype")
        limits = {name: _SHARE_RANGES[name.partition(".")[0]] for name in shares}
        return {name: self._number(f"reached.{name}", value, limits[name]) for name, value in shares.items()}

    def table(self, key: str) -> Table:
        value = self._take(key)
        if not isinstance(value, dict):
            raise self.error(key, "it is not a table")
        return Table(self.path, value, f"{self.within}{key}.")

    def sources(self) -> dict[str, str]:
        """Where each number is from, by its dotted name."""
        if "sources" not in self:
            return {}
        table = self._take("sources")
        if not isinstance(table, dict):
            raise self.error("sources", "it is not a table")
        found = dict(_flat(table))  # TOML reads the dotted key flops.fp32 as a table of its own
        for key, source in found.items():
            if key not in _WITH_SOURCE:
                raise self.error(f"sources.{key}", "there is no such number")
            if not isinstance(source, str) or not source:
                raise self.error(f"sources.{key}", "it is not a text")
        return found

    def end(self, known: Iterable[str]) -> None:
        """Refuse what is left."""
        for key in self._fields:
            raise self.error(key, "there is no such field", nearest(key, known))

    def _take(self, key: str) -> Any:
        if key not in self._fields:
            raise self.error(key, "it is missing")
        return self._fields.pop(key)

    def _number(self, key: str, value: Any, limits: tuple[float, float]) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, "it is not a number")
        low, high = limits
        if not low <= value <= high:  # also refuses nan
            unit = _UNITS.get(key, "of the peak" if key.startswith("reached") else "FLOP/s")
            raise self.error(key, f"{str(value)[:20]} is out of range", f"It is between {low:g} and {high:g} {unit}.")
        return float(value)

    def _known(self, key: str, table: Mapping[str, Any], names: Iterable[str], what: str) -> None:
        for name in table:
            if name not in names:
                raise self.error(f"{key}.{name}", f"there is no such {what}", nearest(name, names))


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"The hardware profile {path} cannot be read.", f"{error.strerror}.", "The shipped ones are loaded by name."
        ) from error
    except (ValueError, RecursionError) as error:  # no TOML, no text, or numbers and nesting beyond all reason
        raise UsageError(f"The hardware profile {path} is not valid TOML.", f"{error}.", _EXAMPLES) from error


def _flat(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, value
