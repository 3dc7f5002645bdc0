"""The importable name of this repository: `rayltx.<folder>` is `<repository root>/<folder>`.

ComfyUI loads a custom-node folder under a name made of its path, which no other process can import. Ray workers, the
command line and the tests all need one name that works everywhere, so this package's search path is the repository
root. The folder that holds this package is put at the end of `sys.path` (by the root `__init__.py` in ComfyUI, by
`PYTHONPATH` in the workers, by pip in an editable install), and holds nothing else, so it can hide no other module.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2])]
