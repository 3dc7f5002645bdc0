"""A real ComfyUI server in a process of its own, with the pack installed in it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

from bound_processes import bound_to_this_process

ROOT = Path(__file__).resolve().parents[1]
PACK_FOLDER = "Ray LTX (odd name)"


class PromptFailed(Exception):
    """The prompt was refused or failed. `report` is what ComfyUI's error dialog shows."""

    def __init__(self, report):
        super().__init__(json.dumps(report)[:4000])
        self.report = report

    @property
    def message(self):
        return json.dumps(self.report)


def install_pack(custom_nodes: Path) -> Path:
    """Copy what git knows of this repository, as a user would have it."""
    target = custom_nodes / PACK_FOLDER
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in names:
        if not name.startswith(("tests/", "demo/shapes")) and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


class Server:
    """ComfyUI computes with one thread, as the workers do: on some processors, torch's convolutions of one thread and of two
    sum in other orders, and then the same bits cannot be asked for."""

    def __init__(self, comfyui: Path, base: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.base, self.output = base, base / "output"
        custom_nodes = base / "custom_nodes"
        for folder in (custom_nodes, self.output, base / "input", base / "temp", base / "user"):
            folder.mkdir(parents=True, exist_ok=True)
        for folder in ("diffusion_models", "checkpoints", "loras", "unet"):
            (base / "models" / folder).mkdir(parents=True, exist_ok=True)
        if not (custom_nodes / PACK_FOLDER).exists():
            install_pack(custom_nodes)
            pack = custom_nodes / "rayltx_test_pack"
            shutil.copytree(
                ROOT / "tests" / "comfyui" / "test_pack", pack, ignore=shutil.ignore_patterns("__pycache__")
            )
            entry = pack / "__init__.py"
            tests = base / "tests"
            tests.mkdir()
            for name in ("comfy_scenarios.py",):
                shutil.copy(ROOT / "tests" / name, tests / name)
            entry.write_text(entry.read_text().replace("@TESTS@", str(tests)))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log_path = base / "server.log"
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment = {**inherited, "OMP_NUM_THREADS": "1", **(environment or {})}
        with self.log_path.open("a") as log:
            self.process = subprocess.Popen(
                bound_to_this_process(
                    "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(base),
                    "--disable-auto-launch", "--disable-api-nodes", "--database-url", f"sqlite:///{base}/user/comfyui.db",
                    *arguments,
                ),
                cwd=comfyui, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 120
        while True:
            try:
                self.get("/system_stats")
                return
            except OSError as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise RuntimeError(f"the server did not start: {self.log()[-3000:]}") from error
                time.sleep(0.2)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str):
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.loads(answer.read())

    def post(self, path: str, body) -> dict:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
                return json.loads(text) if text else {}
        except urllib.error.HTTPError as error:
            raise PromptFailed(json.loads(error.read())) from error

    def queue(self, graph: dict, client_id: str = "tests") -> str:
        return self.post("/prompt", {"prompt": graph, "client_id": client_id})["prompt_id"]

    def wait(self, prompt_id: str, timeout_s: float = 300.0) -> dict:
        """The prompt's history. Raises PromptFailed."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = self.get(f"/history/{prompt_id}").get(prompt_id)
            if found is not None:
                if found["status"]["status_str"] != "success":
                    raise PromptFailed(
                        [m for m in found["status"]["messages"] if m[0] in ("execution_error", "execution_interrupted")]
                    )
                return found
            time.sleep(0.05)
        raise TimeoutError(f"{prompt_id}: {self.log()[-3000:]}")

    def run(self, graph: dict, timeout_s: float = 300.0) -> dict:
        return self.wait(self.queue(graph), timeout_s)

    def watch(self, graph: dict, on_message=None, timeout_s: float = 300.0) -> list:
        """Run a prompt and collect what the server tells its client: (type, data), and ("preview", bytes)."""
        import aiohttp

        async def listen():
            client = uuid.uuid4().hex
            seen = []
            async with (
                aiohttp.ClientSession() as session,
                session.ws_connect(f"{self.url}/ws?clientId={client}") as socket,
            ):
                loop = asyncio.get_running_loop()
                prompt_id = await loop.run_in_executor(None, self.queue, graph, client)
                async for message in socket:
                    if message.type == aiohttp.WSMsgType.BINARY:
                        seen.append(("preview", message.data))
                        continue
                    body = json.loads(message.data)
                    data = body.get("data", {})
                    seen.append((body["type"], data))
                    if on_message is not None:
                        await loop.run_in_executor(None, on_message, body["type"], data)
                    if data.get("prompt_id") == prompt_id and (
                        body["type"] in ("execution_success", "execution_error", "execution_interrupted")
                    ):
                        return seen

        return asyncio.run(asyncio.wait_for(listen(), timeout_s))


class Graph:
    """A prompt in API form, built a node at a time: `graph.add("KSampler", model=loader[0])` returns its outputs."""

    def __init__(self):
        self.nodes = {}

    def add(self, class_type, **inputs):
        number = str(len(self.nodes) + 1)
        self.nodes[number] = {"class_type": class_type, "inputs": inputs}
        return _Outputs(number)


class _Outputs:
    def __init__(self, number):
        self.number = number

    def __getitem__(self, output):
        return [self.number, output]
