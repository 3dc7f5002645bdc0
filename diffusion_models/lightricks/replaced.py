"""Another attribute on an object of ComfyUI's or diffusers', for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replaced(instance: object, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of an instance, and put back exactly what was there: another's attribute, or the class's."""
    own = instance.__dict__
    before = own.get(name, _ABSENT)
    own[name] = value
    try:
        yield
    finally:
        if before is _ABSENT:
            del own[name]
        else:
            own[name] = before


_ABSENT = object()
