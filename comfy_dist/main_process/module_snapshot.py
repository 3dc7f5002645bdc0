"""What was changed in place on the MODEL of this process, which the workers do not see.

ComfyUI's way to patch a module is an object patch, which is forwarded. Some nodes set attributes of modules, exchange their
classes, take blocks out or put other weights in instead: on a model without weights that would change nothing, without a word.
A method that was set on a module is what an object patch is. What is written into a weight is refused where it is done (see
`absent_weights`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

_PLAIN = (bool, int, float, str, type(None))
_OF_TORCH = ("_is_torch_compile",)  # settings that torch.compile leaves on what it has been shown
_CALLS_THE_WORKERS = "_forward"  # of the model itself
RUNS_HERE = "forward"  # of the model itself: it calls the one above


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
            {name: id(value) for name, value in _methods_of(module).items()},
            {name: value for name, value in attributes.items() if isinstance(value, _PLAIN) and name not in _OF_TORCH},
            {name: tuple(table) for name, table in tables.items() if table},
            parts,
        )

    def differences(self, now: _ModuleState) -> Iterator[str]:
        if now.kind is not self.kind:
            yield f"its class is {now.kind.__qualname__} in place of {self.kind.__qualname__}"
        for word, before, after in (
            ("the setting", self.settings, now.settings),
            ("hooks in", self.hooks, now.hooks),
            ("the part", self.parts, now.parts),
        ):
            for name in [name for name in {**before, **after} if before.get(name, self) != after.get(name, self)]:
                yield f"{word} {name}"


def _methods_of(module: nn.Module) -> dict[str, object]:
    """What can be called among an instance's own attributes."""
    return {name: value for name, value in vars(module).items() if callable(value) and not isinstance(value, type)}


class QuickState:
    """Of a model's modules, what can be compared at every step: classes, forwards, numbers of hooks, and the list of blocks."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._state = self._now(model)

    def is_same(self, model: nn.Module) -> bool:
        return self._now(model) == self._state

    def _now(self, model: nn.Module) -> list[object]:
        state: list[object] = [id(part) for part in vars(model)["_modules"].values()]
        state += map(id, model.transformer_blocks)  # type: ignore[arg-type]
        for module in self._modules:
            own = vars(module)
            hooks = len(own["_forward_hooks"]), len(own["_forward_pre_hooks"])
            state.append((type(module), id(own.get("forward")), id(type(module).forward), hooks))
        return state


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
                gone = before.methods.keys() - now[name].methods.keys()
                found += [f"{name or 'the model'}: the method {method} is gone" for method in sorted(gone)]
        if _CALLS_THE_WORKERS in now[""].methods:
            found.append(f"the model: the method {_CALLS_THE_WORKERS}")
        return found

    def set_methods(self, model: nn.Module) -> dict[str, object]:
        """What was set in place of modules' methods, by module and method: `a.b.forward`."""
        found = {}
        for name, module in model.named_modules():
            before = self._modules[name].methods if name in self._modules else {}
            for method, value in _methods_of(module).items():
                if id(value) != before.get(method) and (name or method != RUNS_HERE):
                    found[f"{name}.{method}".removeprefix(".")] = value
        return found
