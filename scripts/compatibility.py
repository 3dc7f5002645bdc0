"""Tries RayLTX on several ComfyUIs, and writes the table of `docs/compatibility.md`.

    PYTHON scripts/compatibility.py COMFYUI[=PYTHON_OF_IT] ... [--write docs/compatibility.md]

Each is the folder of a checkout, with an interpreter that can import it where that is not the one that runs this. For every
ComfyUI the names that RayLTX uses are looked up, and every kind of input goes through the seam, on every model that it has, on
two processes without Ray, and is compared with one process. On the oldest and the newest, four graphs go through its server
and the patches of the tests through its samplers, too. Half a minute for a ComfyUI, and some five minutes for those two.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from page_tables import write_table

ROOT = Path(__file__).resolve().parents[1]
DEGREES = [(2, 1), (1, 2)]
GRAPHS = (
    "tests/comfyui/test_server.py", "-k",
    "(two_workers and (KSampler-LTX-2.3 or uni_pc-LTX-2.3 or guide-LTX-2.3)) or (in_one_file and LTX-2.3)",
)  # fmt: skip
PATCHES = ("tests/comfyui/test_patch_proof.py",)


@dataclass(frozen=True)
class ComfyUI:
    path: Path
    python: str

    @classmethod
    def of(cls, text: str) -> ComfyUI:
        path, _, python = text.partition("=")
        return cls(Path(path).resolve(), python or sys.executable)

    def seam(self) -> dict:
        """{"version", "missing": names, "errors": {model: {case: error}}}, or {"failed": why}."""
        done = subprocess.run(
            [self.python, __file__, "--try", str(self.path)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=self.environment,
        )
        if done.returncode != 0:
            return {"version": self.version, "failed": done.stderr.strip().splitlines()[-1]}
        return json.loads(done.stdout.splitlines()[-1])

    def tests(self, *chosen: str) -> str:
        """What pytest says of some tests: `4 passed`."""
        done = subprocess.run(
            [self.python, "-m", "pytest", "-q", *chosen], capture_output=True, text=True, cwd=ROOT, env=self.environment
        )
        summary = re.search(r"(\d+ (?:passed|failed|error).*?) in ", done.stdout)
        return "not run" if summary is None else re.sub(r", \d+ (deselected|warnings?)", "", summary[1])

    @property
    def version(self) -> str:
        found = re.search(r'__version__ = "(.*)"', (self.path / "comfyui_version.py").read_text())
        return found[1] if found else "unknown"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "COMFYUI_PATH": str(self.path)}


def try_here(path: str) -> dict:
    """Within the ComfyUI's own interpreter: its names, and the seam on all of its models."""
    sys.path[:0] = [str(ROOT / "importable"), str(ROOT / "tests")]
    import torch
    from comfy_models import set_up_comfyui
    from comfy_ranks import seam_errors

    from rank_pool import RankPool

    set_up_comfyui(path)
    from rayltx.comfy_dist.comfy_environment import comfyui_version
    from rayltx.comfy_dist.comfy_names import missing_names
    from rayltx.comfy_dist.self_test import cases_for, tiny_model
    from rayltx.comfy_dist.tiny_checkpoints import known_versions, model_class
    from rayltx.diffusion_models.lightricks.tiny_configs import COMFYUI_CONFIGS

    pool = RankPool(2)
    try:
        errors: dict[str, dict[str, float | str]] = {}
        left_out: set[str] = set()  # what this ComfyUI's own model does not run
        for model in known_versions():
            tiny = tiny_model(model_class(model), COMFYUI_CONFIGS[model], torch.device("cpu"))
            left_out |= {case.name for case in cases_for(tiny)}
            for degrees in DEGREES:
                for case, error in pool.run(2, seam_errors, path, model, degrees)[0].items():
                    worst = errors.setdefault(model, {})
                    if isinstance(error, str) or isinstance(worst.get(case), str):
                        worst[case] = error if isinstance(error, str) else worst[case]
                    else:
                        worst[case] = max(error, worst.get(case, 0.0))
            left_out -= set(errors[model])
        return {
            "version": comfyui_version(), "missing": missing_names(), "errors": errors, "left out": sorted(left_out)
        }  # fmt: skip
    finally:
        pool.close()


def row(found: dict, graphs: str, patches: str) -> str:
    if "failed" in found:
        return f"| {found['version']} | {found['failed']} | | | | {graphs} | {patches} |"
    errors = [error for cases in found["errors"].values() for error in cases.values()]
    texts = [error for error in errors if isinstance(error, str)]
    worst = texts[0] if texts else f"{max(errors):.1e}"
    names = ", ".join(f"`{name}`" for name in found["missing"]) or "all"
    tried = f"{len(errors)}" + (f", without: {', '.join(found['left out'])}" if found["left out"] else "")
    return f"| {found['version']} | {', '.join(found['errors'])} | {names} | {tried} | {worst} | {graphs} | {patches} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", nargs="*", type=ComfyUI.of, metavar="COMFYUI[=PYTHON]")
    parser.add_argument("--write", type=Path, help="the page whose table is replaced")
    parser.add_argument("--seam-only", action="store_true", help="leave out the graphs and the patches")
    parser.add_argument("--try", dest="one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(try_here(arguments.one)))
        return
    known = sorted(arguments.comfyui, key=lambda c: [int(part) for part in c.version.split(".") if part.isdigit()])
    lines = [
        "| ComfyUI | models | names | kinds of input | largest error | graphs | patches |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, comfyui in enumerate(known):
        whole = number in (0, len(known) - 1) and not arguments.seam_only
        graphs, patches = (comfyui.tests(*GRAPHS), comfyui.tests(*PATCHES)) if whole else ("", "")
        lines.append(row(comfyui.seam(), graphs, patches))
        print(lines[-1], flush=True)
    if arguments.write:
        write_table(arguments.write, Path(__file__).name, lines)


if __name__ == "__main__":
    main()
