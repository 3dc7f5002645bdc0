"""The hooks whose patches the workers were sent: LoRAs that come and go within a sampling run."""

from __future__ import annotations

import uuid

from rayltx.comfy_dist.comfy_host import ComfyHost
from rayltx.comfy_dist.comfy_types import HookGroup, KeyPatches, Model
from rayltx.comfy_dist.main_process.forwarding import check_sendable
from rayltx.comfy_dist.wire import HookPatches
from rayltx.distributed_worker.remote_model import RemoteModel
from rayltx.distributed_worker.worker_calls import ask

_SETUP = "hooks "  # a setup's key begins so; see `RemoteModel.set_up`


class SentHooks:
    """The names that the workers have for hooks, of one model."""

    def __init__(self, remote: RemoteModel) -> None:
        self._remote = remote
        # By the hooks, their strengths, and the patches below them.
        self._keys: dict[tuple[tuple[tuple[object, float], ...], object], str] = {}

    def key_of(self, patcher: Model) -> str | None:
        """The workers' name for the hooks of this step, whose patches they are sent when they are first used."""
        hooks: HookGroup = patcher.current_hooks
        if hooks is None:
            return None
        # The references are part of the key, so that they live, and their ids stay their own.
        identity = tuple((hook.hook_ref, float(hook.strength)) for hook in hooks.hooks), patcher.patches_uuid
        if identity not in self._keys:
            key = uuid.uuid4().hex
            self._forget_other_strengths(identity[0])
            combined: KeyPatches = patcher.get_combined_hook_patches(hooks)
            check_sendable(combined, "the hook's patch of", self._remote.source.refer)
            call = ask(ComfyHost.keep_hooks, HookPatches(key, combined))
            self._remote.set_up(_SETUP + key, call, "forwarding hooks", as_views=True)
            self._keys[identity] = key
        return self._keys[identity]

    def _forget_other_strengths(self, hooks: tuple[tuple[object, float], ...]) -> None:
        """Of the same hooks: a strength that changes with every step would be kept for every step."""
        references = [reference for reference, _ in hooks]
        for known in [known for known in self._keys if [reference for reference, _ in known[0]] == references]:
            key = self._keys.pop(known)
            self._remote.forget_setups(_SETUP + key)
            self._remote.tell(ask(ComfyHost.forget_hooks, key))

    def forget(self) -> None:
        """The workers have none any more."""
        self._keys.clear()
        self._remote.forget_setups(_SETUP)

    def drop(self) -> None:
        """Let the workers undo all hooks. Not waited for: this is how a cancelled run ends, too."""
        if self._keys:
            self.forget()
            self._remote.tell(ask(ComfyHost.drop_hooks))
