"""What was changed in place on the MODEL of this process, which the workers do not see.

ComfyUI's way to patch a module is an object patch, which is forwarded. Some nodes set attributes of modules, exchange their
classes, take blocks out or put other weights in instead: on a model without weights that would change nothing, without a word.
What is written into a weight is not seen: within ComfyUI's inference mode torch keeps no count of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from rayltx.errors import UnsupportedError

_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class _ModuleState:
    kind: type
    methods: dict[str, int]  # of the instance, by name: identities
    settings: dict[str, object]
    hooks: dict[str, tuple[int, ...]]
    parts: dict[str, int]  # modules and parameters, by name: identities

    @classmethod
    def of(cls, module: nn.Module) -> _ModuleState:
        attributes = vars(module)
        tables: dict[str, dict[Any, Any]] = {
            name: table for name, table in attributes.items() if name.endswith("hooks") and isinstance(table, dict)
        }
        parts = {name: id(child) for name, child in module.named_children()}
        parts |= {name: id(parameter) for name, parameter in module.named_parameters(recurse=False)}
        return cls(
            type(module),
            {name: id(value) for name, value in attributes.items() if callable(value) and not isinstance(value, type)},
            {name: value for name, value in attributes.items() if isinstance(value, _PLAIN)},
            {name: tuple(table) for name, table in tables.items() if table},
            parts,
        )

    def differences(self, now: _ModuleState) -> Iterator[str]:
        if now.kind is not self.kind:
            yield f"its class is {now.kind.__qualname__} in place of {self.kind.__qualname__}"
        for word, before, after in (
            ("the method", self.methods, now.methods),
            ("the setting", self.settings, now.settings),
            ("hooks in", self.hooks, now.hooks),
            ("the part", self.parts, now.parts),
        ):
            for name in [name for name in {**before, **after} if before.get(name, self) != after.get(name, self)]:
                yield f"{word} {name}"


class ModuleSnapshot:
    """A model's modules as they were loaded. It holds none of them."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = {name: _ModuleState.of(module) for name, module in model.named_modules()}

    def changes(self, model: nn.Module) -> list[str]:
        """What is another now, by module."""
        now = {name: _ModuleState.of(module) for name, module in model.named_modules()}
        found = [f"{name} is gone" for name in self._modules if name not in now]
        found += [f"{name} is new" for name in now if name not in self._modules]
        for name, before in self._modules.items():
            if name in now:
                found += [f"{name or 'the model'}: {what}" for what in before.differences(now[name])]
        return found

    def check(self, model: nn.Module) -> None:
        """Raises UnsupportedError that names what was changed."""
        found = self.changes(model)
        if found:
            more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
            raise UnsupportedError(
                f"a node has changed this MODEL in place, which the workers do not see: {'; '.join(found[:4])}{more}. Patches as "
                "ComfyUI has them (add_object_patch, LoRAs, hooks) are forwarded; remove the node that does otherwise and load "
                "the model again, or use ComfyUI's own loader for this graph"
            )
